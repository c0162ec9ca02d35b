"""etcd is away, loses its data, is full or refuses a service: deliveries are held."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import methodcaller
from urllib.error import HTTPError

import pytest

from chaos.checks import becomes, holds, losses, not_ready, passes, says, throughout
from chaos.durations import lasting, often, quick, rate
from chaos.load import ids, orders
from chaos.outages import Outage, frozen, killed, stopped
from chaos.trial import StartTrial, Trial
from servers.broker import Event
from servers.etcd import Store
from servers.servers import Etcd, Servers, start_etcd
from servers.services import Service
from servers.wait import eventually

BATCH = 32
# The prefetch: twice what the four commits in flight hold.
IN_FLIGHT_AT_MOST = 2 * 4 * BATCH
# Revisions of a wiped etcd begin again, so it may look like a restored one.
ANOTHER = "wiped|restored from an older state"
SEEN_PAST_THE_SNAPSHOT = 50

LOGIN = {"ETCD_USER": "order", "ETCD_PASSWORD": "order's own"}
# The key may be any file that both a container and this machine have.
JWT = "--auth-token=jwt,sign-method=HS256,priv-key=/etc/hostname,ttl={ttl}"
RATE_PER_S = 100
QUOTA_BYTES = 16_777_216
FILLER = "/filler/"


@pytest.fixture
def clean(clean: Servers, request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Give the test an etcd of its own if its parameter has flags for one."""
    flags = getattr(request, "param", None)
    if flags is None:
        yield clean
        return
    with start_etcd(clean.kind, *flags) as etcd:
        yield replace(clean, etcd=etcd)


def own_etcd(*flags: str) -> pytest.MarkDecorator:
    """Start an etcd for this test, with more flags."""
    return pytest.mark.parametrize("clean", [flags], indirect=True, ids=["own"])


@pytest.mark.short
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("down", "seconds"),
    [
        (stopped, 1),
        (killed, 1),
        (frozen, 3),
        quick(frozen, 10),
        *((frozen, seconds) for seconds in lasting(10, 120, 600)[1:]),
        *((killed, seconds) for seconds in lasting(30, 600)),
    ],
)
def test_etcd_is_away_for_a_while(trial: StartTrial, down: Outage, seconds: float) -> None:
    """What is in flight stays bounded, and every event is delivered once."""
    attempt = trial(f"etcd {down.name} for {seconds:g} s")
    broker, service = attempt.broker, attempt.start(BATCH_SIZE=str(BATCH))
    # A call fails after 5 s.
    noticed = down is not frozen or seconds > 5

    def held() -> None:
        unacked = broker.unacked("order")
        assert unacked <= IN_FLIGHT_AT_MOST
        if seconds > 5:
            holds(service)
            assert unacked == IN_FLIGHT_AT_MOST

    with attempt.under_load(rate(seconds + 10)), down(attempt.servers.etcd):
        until_s = time.monotonic() + seconds
        passes(lambda: broker.unacked("order"), BATCH)
        if seconds > 5:
            eventually(held)
        with attempt.acks.none_pass() if seconds > 5 else nullcontext():
            throughout(until_s - time.monotonic(), held)
        if noticed:
            eventually(partial(not_ready, service, "etcd"))
        attempt.fired()
    service.wait_ready()
    if noticed:
        assert says(service, "etcd answers again")
    attempt.rig.each_delivered_once("orders", attempt.sent)
    assert (losses(service), attempt.statsd.count("orders_returned")) == (0, 0)


@pytest.mark.short
@pytest.mark.quick
@pytest.mark.timeout(200)
def test_etcd_is_wiped(trial: StartTrial) -> None:
    """Nothing is acked: what was in flight, what arrives, and what the service has cached."""
    attempt = trial("etcd wiped")
    broker, etcd = attempt.broker, attempt.servers.etcd
    service = attempt.start()
    # Their records go with the data, so the trial does not judge them.
    known = broker.publish(orders(20, "known"))
    becomes(lambda: attempt.store.done("order"), ids(known))
    # A record is there before its ack: what is unacked now would be held, too.
    becomes(lambda: broker.unacked("order"), 0)
    etcd.kill()
    attempt.publish(orders(30, "held"))
    becomes(lambda: broker.unacked("order"), 30)
    etcd.wipe()
    settles_nothing(attempt, service, ANOTHER, known + orders(30, "new"))
    assert attempt.store.client.get() == []
    assert service.terminate(10) == 0
    assert attempt.rig.times_returned("order") == [1] * 80
    assert says(attempt.start(), "no history of this service")
    attempt.recovers()
    attempt.judge(at_least=80, first_revision=1)


@pytest.mark.short
@pytest.mark.timeout(200)
def test_etcd_is_restored_from_an_older_snapshot(trial: StartTrial) -> None:
    """Nothing is acked until the service is restarted, not even what the snapshot still has."""
    attempt = trial("etcd restored from an older snapshot")
    store, etcd = attempt.store, attempt.servers.etcd
    service = attempt.start()
    saved = attempt.publish(orders(20, "saved"))
    becomes(lambda: store.done("order"), ids(saved))
    etcd.save()
    for number in range(SEEN_PAST_THE_SNAPSHOT):
        store.client.put("/elsewhere", str(number).encode())
    # Recorded and acked, and lost by the restore: the operator's decision.
    gone = attempt.broker.publish(orders(20, "gone"))
    becomes(lambda: store.done("order"), ids(saved + gone))
    before = store.client.revision()
    etcd.restore()
    assert store.client.revision() < before - SEEN_PAST_THE_SNAPSHOT
    settles_nothing(attempt, service, "restored from an older", saved + orders(30, "new"))
    assert store.done("order") == ids(saved)
    assert service.terminate(10) == 0
    attempt.start()
    attempt.recovers()
    attempt.judge(at_least=50)


@own_etcd(f"--quota-backend-bytes={QUOTA_BYTES}")
@pytest.mark.timeout(200)
def test_etcd_is_full(trial: StartTrial) -> None:
    """New events are held, duplicates acked; a replica that starts meanwhile consumes nothing."""
    attempt = trial("etcd NOSPACE")
    store, statsd, etcd = attempt.store, attempt.statsd, attempt.servers.etcd
    service = attempt.start()
    known = attempt.publish(orders(100, "known"))
    becomes(lambda: store.done("order"), ids(known))
    fill(etcd, store)
    attempt.publish(orders(50, "held"))
    eventually(partial(holds, service, "space exceeded"))
    late = attempt.start(wait=False)
    eventually(partial(holds, late, "space exceeded"), also=(OSError,))
    attempt.publish(known)
    becomes(lambda: statsd.count("orders_processed_skipped"), 100)
    becomes(lambda: attempt.broker.depth("order"), (0, 50))

    def held() -> None:
        holds(service, "space exceeded")
        holds(late, "space exceeded")
        assert attempt.broker.depth("order") == (0, 50)
        assert store.done("order") == ids(known)
        assert (attempt.acks.checked, attempt.acks.unknown) == (200, 0)

    throughout(5, held)
    attempt.fired()
    # As on etcd's page "Maintenance": make room, then disarm the alarm.
    store.client.delete(FILLER)
    assert not attempt.rig.verdict("order", [], []).double
    compacted = store.client.revision()
    etcd.ctl("compact", "--physical", str(compacted))
    etcd.ctl("defrag")
    etcd.ctl("alarm", "disarm")
    attempt.recovers()
    service.wait_ready()
    late.wait_ready()
    attempt.judge(at_least=150, first_revision=compacted + 1)
    becomes(lambda: statsd.count("orders_processed"), 151)
    assert statsd.count("orders_returned") == 0


# Authentication.


revoke = methodcaller("ctl", "user", "revoke-role", "order", "order")
grant = methodcaller("ctl", "user", "grant-role", "order", "order")


@own_etcd()
@pytest.mark.parametrize(
    ("fault", "refuse", "accept", "why"),
    [
        ("none", Etcd.require_login, Etcd.require_no_login, "user name is empty"),
        ("rights revoked", revoke, grant, "permission denied"),
    ],
)
def test_etcd_refuses_a_service_at_work(
    trial: StartTrial,
    fault: str,
    refuse: Callable[[Etcd], None],
    accept: Callable[[Etcd], None],
    why: str,
) -> None:
    """The service holds everything, with etcd's reason, and goes on when etcd accepts it again."""
    attempt = trial(f"etcd authentication: {fault}")
    service = attempt.start() if fault == "none" else logged_in(attempt)
    with attempt.under_load(RATE_PER_S, at_least=200):
        refuse(attempt.servers.etcd)
        eventually(partial(holds, service, why))
        recorded = attempt.store.done("order")
        throughout(5, partial(holds, service, why))
        assert attempt.store.done("order") == recorded
        attempt.fired()
        accept(attempt.servers.etcd)


@own_etcd()
def test_etcd_refuses_a_service_that_starts(trial: StartTrial) -> None:
    """It consumes nothing and says why, and is ready without a restart once its login is valid."""
    attempt = trial("etcd authentication: wrong password")
    etcd, broker = attempt.servers.etcd, attempt.broker
    assert attempt.start().terminate(10) == 0
    etcd.require_login()
    allow(etcd, "another's")
    attempt.publish(orders(50))
    service = attempt.start(wait=False, **LOGIN)

    def nothing_is_taken() -> None:
        holds(service, "authentication failed")
        assert (broker.depth("order"), broker.consumers("order")) == ((50, 0), 0)

    eventually(nothing_is_taken, also=(OSError,))
    throughout(3, nothing_is_taken)
    attempt.fired()
    etcd.ctl("user", "delete", LOGIN["ETCD_USER"])
    allow(etcd)
    attempt.recovers()
    service.wait_ready()
    attempt.judge(at_least=50)


# A restart of etcd loses simple tokens; a change of any user makes older tokens invalid.
@pytest.mark.parametrize(
    ("clean", "fault", "times"),
    [
        ((JWT.format(ttl="2s"),), "expired token", often(5, 50)),
        ((), "token forgotten", often(3, 10)),
        ((JWT.format(ttl="10m"),), "users changed", often(8, 20)),
    ],
    indirect=["clean"],
    ids=["expired token", "token forgotten", "users changed"],
)
def test_etcd_no_longer_accepts_the_token(trial: StartTrial, fault: str, times: int) -> None:
    """The service logs in again at once, and nothing is requeued."""
    attempt = trial(f"etcd authentication: {fault}")
    service, etcd = logged_in(attempt), attempt.servers.etcd
    with attempt.under_load(RATE_PER_S):
        for number in range(1, times + 1):
            attempt.works()
            if fault == "users changed":
                etcd.ctl("user", "add", f"other-{number}:and its own")
            elif fault == "token forgotten":
                etcd.restart()
            eventually(partial(says, service, "etcd does not answer", number))
            attempt.fired()
            attempt.recovers()
            # Otherwise the next one belongs to the same outage.
            eventually(partial(says, service, "etcd answers again", number))
    errors = [line["error"] for line in says(service, "etcd does not answer")]
    assert fault != "expired token" or all("invalid auth token" in error for error in errors)
    assert attempt.statsd.count("orders_returned") == 0


def logged_in(attempt: Trial) -> Service:
    """Enable authentication, and start a service with a login."""
    attempt.servers.etcd.require_login()
    allow(attempt.servers.etcd)
    return attempt.start(**LOGIN)


def allow(etcd: Etcd, password: str = LOGIN["ETCD_PASSWORD"]) -> None:
    """Add the user order, with rights to the service's own keys only."""
    if "order" not in etcd.ctl("role", "list").split():
        etcd.ctl("role", "add", "order")
        for prefix in ("/service/order/", "/incarnation/order", "/orders/"):
            etcd.ctl("role", "grant-permission", "order", "readwrite", "--prefix=true", prefix)
    etcd.ctl("user", "add", f"{LOGIN['ETCD_USER']}:{password}")
    grant(etcd)


def fill(etcd: Etcd, store: Store) -> None:
    """Write until etcd raises an alarm."""
    with pytest.raises(HTTPError) as refused:  # noqa: PT012 - one of them is.
        for number in range(2 * QUOTA_BYTES // 1_000_000):
            store.client.put(f"{FILLER}{number}", b"x" * 1_000_000)
    refused.value.close()
    assert "NOSPACE" in etcd.ctl("alarm", "list")


def settles_nothing(attempt: Trial, service: Service, why: str, more: list[Event]) -> None:
    """Wait until the service holds its deliveries for this reason, and see it hold `more`."""
    eventually(partial(holds, service, why))
    eventually(partial(says, service, "not the one seen before"))
    attempt.fired()
    held = attempt.broker.unacked(attempt.service)
    with attempt.acks.none_pass():
        attempt.publish(more)
        becomes(lambda: attempt.broker.unacked(attempt.service), held + len(more))
        throughout(5, partial(holds, service, why))

"""etcd is full, or asks for a login that a service has not, not yet, or no more: it holds all."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from urllib.error import HTTPError

import pytest

from chaos.checks import becomes, holds, lines, passes, says, throughout
from chaos.durations import often
from chaos.load import ids, orders
from chaos.trial import StartTrial, Trial
from servers.etcd import Store
from servers.servers import Etcd, Servers, start_etcd
from servers.services import Service
from servers.wait import eventually

pytestmark = pytest.mark.timeout(200)

LOGIN = {"ETCD_USER": "order", "ETCD_PASSWORD": "order's own"}
# A secret that both a container and this machine have, as long as nothing outside is to sign.
JWT = "--auth-token=jwt,sign-method=HS256,priv-key=/etc/hostname,ttl={ttl}"
RATE_PER_S = 100
QUOTA_BYTES = 16_777_216
FILLER = "/filler/"


@pytest.fixture
def clean(clean: Servers, request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Give an etcd of the test's own beside the broker, with the flags in the test's parameter."""
    with start_etcd(clean.kind, *getattr(request, "param", ())) as etcd:
        yield replace(clean, etcd=etcd)


def etcd_with(flag: str, id_: str) -> pytest.MarkDecorator:
    """Start the test's etcd with one more flag."""
    return pytest.mark.parametrize("clean", [(flag,)], indirect=True, ids=[id_])


@etcd_with(f"--quota-backend-bytes={QUOTA_BYTES}", "small")
def test_etcd_is_full(trial: StartTrial) -> None:
    """Held and not returned, duplicates acked; a replica that starts meanwhile consumes nothing."""
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

    def held() -> None:
        holds(service, "space exceeded")
        holds(late, "space exceeded")
        assert attempt.broker.depth("order") == (0, 50)
        assert store.done("order") == ids(known)
        assert (attempt.acks.checked, attempt.acks.unknown) == (200, 0)

    throughout(5, held)
    attempt.fired()
    # As etcd's page "Maintenance" says: make room, then disarm the alarm.
    store.client.delete(FILLER)
    etcd.ctl("compact", "--physical", str(store.keep_history()))
    etcd.ctl("defrag")
    etcd.ctl("alarm", "disarm")
    attempt.recovers()
    service.wait_ready()
    late.wait_ready()
    attempt.judge(at_least=150)
    becomes(lambda: statsd.count("orders_processed"), 151)
    assert statsd.count("orders_returned") == 0


def test_authentication_is_enabled_under_a_service_without_a_login(trial: StartTrial) -> None:
    """It goes on by itself when the login is wanted no more."""
    attempt = trial("etcd authentication: none")
    service = attempt.start()
    with attempt.load(RATE_PER_S) as load:
        attempt.works()
        attempt.servers.etcd.require_login()
        records_nothing(attempt, service, "user name is empty")
        assert load.running
        attempt.servers.etcd.require_no_login()
        attempt.recovers()
    attempt.judge(at_least=200)


def test_the_password_is_wrong_at_the_start(trial: StartTrial) -> None:
    """Alive, consuming nothing, saying why; ready without a restart once the password is right."""
    attempt = trial("etcd authentication: wrong password")
    etcd, broker = attempt.servers.etcd, attempt.broker
    assert attempt.start().terminate(10) == 0
    etcd.require_login()
    allow(etcd, "another's")
    attempt.publish(orders(50))
    service = attempt.start(wait=False, **LOGIN)
    eventually(partial(holds, service, "authentication failed"), also=(OSError,))

    def nothing_is_taken() -> None:
        holds(service, "authentication failed")
        assert broker.depth("order") == (50, 0)
        assert broker.consumers("order") == 0

    throughout(3, nothing_is_taken)
    attempt.fired()
    etcd.ctl("user", "delete", LOGIN["ETCD_USER"])
    allow(etcd)
    attempt.recovers()
    service.wait_ready()
    attempt.judge(at_least=50)


def test_the_login_is_given_before_it_is_wanted(trial: StartTrial) -> None:
    """A service that was told its login too early waits, and begins when etcd wants one."""
    attempt = trial("etcd authentication: login too early")
    assert attempt.start().terminate(10) == 0
    attempt.publish(orders(50))
    service = attempt.start(wait=False, **LOGIN)
    eventually(partial(holds, service, "authentication is not enabled"), also=(OSError,))
    throughout(3, partial(holds, service, "authentication is not enabled"))
    attempt.fired()
    allow(attempt.servers.etcd)
    attempt.servers.etcd.require_login()
    attempt.recovers()
    service.wait_ready()
    attempt.judge(at_least=50)


def test_rights_are_revoked_under_load(trial: StartTrial) -> None:
    """Held, with etcd's own words for it, until they are granted again."""
    attempt = trial("etcd authentication: rights revoked")
    service = logged_in(attempt)
    with attempt.load(RATE_PER_S) as load:
        attempt.works()
        attempt.servers.etcd.ctl("user", "revoke-role", "order", "order")
        records_nothing(attempt, service, "permission denied")
        assert load.running
        attempt.servers.etcd.ctl("user", "grant-role", "order", "order")
        attempt.recovers()
    attempt.judge(at_least=200)


@etcd_with(JWT.format(ttl="2s"), "tokens of 2 s")
def test_tokens_expire_under_load(trial: StartTrial) -> None:
    """Each time the service logs in again, and no delivery comes twice for it."""
    attempt = trial("etcd authentication: expired token")
    service, times = logged_in(attempt), often(5, 50)
    with attempt.load(RATE_PER_S):
        passes(partial(refused_tokens, service), times - 1, 20 * times)
        attempt.fired(times)
        attempt.recovers()
    attempt.judge(at_least=100)
    assert attempt.statsd.count("orders_returned") == 0


def test_etcd_forgets_the_tokens_under_load(trial: StartTrial) -> None:
    """Simple tokens are gone after a restart; the service logs in again."""
    attempt = trial("etcd authentication: token forgotten")
    service = logged_in(attempt)
    with attempt.load(RATE_PER_S):
        for _ in range(often(3, 10)):
            attempt.works()
            attempt.servers.etcd.restart()
            attempt.recovers()
            attempt.fired()
    attempt.judge(at_least=100)
    assert says(service, "etcd answers again")


@etcd_with(JWT.format(ttl="10m"), "with tokens")
def test_users_are_changed_under_load(trial: StartTrial) -> None:
    """Tokens from before a change of any user are refused: the service logs in again at once."""
    attempt = trial("etcd authentication: users changed")
    service = logged_in(attempt)
    with attempt.load(RATE_PER_S):
        for number in range(1, often(8, 20) + 1):
            attempt.works()
            attempt.servers.etcd.ctl("user", "add", f"other-{number}:and its own")
            eventually(partial(says, service, "etcd does not answer", number))
            attempt.fired()
            attempt.recovers()
    attempt.judge(at_least=100)


def logged_in(attempt: Trial) -> Service:
    """Let etcd ask for a login, and start a service that has one."""
    attempt.servers.etcd.require_login()
    allow(attempt.servers.etcd)
    return attempt.start(**LOGIN)


def records_nothing(attempt: Trial, service: Service, why: str) -> None:
    """Wait until the service holds all, and see it go on so, for a reason like `why`."""
    eventually(partial(holds, service, why))
    recorded = attempt.store.done("order")
    throughout(5, partial(holds, service, why))
    assert attempt.store.done("order") == recorded
    attempt.fired()


def allow(etcd: Etcd, password: str = LOGIN["ETCD_PASSWORD"]) -> None:
    """Make the user order, with rights to no more than the service's own keys."""
    if "order" not in etcd.ctl("role", "list").split():
        etcd.ctl("role", "add", "order")
        for prefix in ("/service/order/", "/incarnation/order", "/orders/"):
            etcd.ctl("role", "grant-permission", "order", "readwrite", "--prefix=true", prefix)
    etcd.ctl("user", "add", f"{LOGIN['ETCD_USER']}:{password}")
    etcd.ctl("user", "grant-role", LOGIN["ETCD_USER"], "order")


def refused_tokens(service: Service) -> int:
    """Return how often a service's token has been refused."""
    errors = [line["error"] for line in lines(service, "etcd does not answer")]
    return sum("invalid auth token" in error for error in errors)


def fill(etcd: Etcd, store: Store) -> None:
    """Write until etcd raises its alarm."""
    megabyte = b"x" * 1_000_000

    def fill_up() -> None:
        for number in range(2 * QUOTA_BYTES // len(megabyte)):
            store.client.put(f"{FILLER}{number}", megabyte)

    with pytest.raises(HTTPError) as refused:
        fill_up()
    refused.value.close()
    assert "NOSPACE" in etcd.ctl("alarm", "list")

"""etcd asks for a login that a service has not, not yet, or no more: deliveries are held."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest

from chaos.conftest import StartTrial
from chaos.durations import often
from chaos.holding import holds
from integration.judging import lines, says, throughout
from integration.load import orders
from servers.broker import Broker
from servers.server import Etcd
from servers.servers import Servers, start_etcd
from servers.services import Service
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually

StartAudited = Callable[..., Service]
LOGIN = {"ETCD_USER": "order", "ETCD_PASSWORD": "order's own"}
# A secret that both a container and this machine have, as long as nothing outside is to sign.
JWT = "--auth-token=jwt,sign-method=HS256,priv-key=/etc/hostname,ttl={ttl}"
RATE_PER_S = 100


@pytest.fixture
def clean(clean: Servers, request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Give an etcd that can ask for a login, with tokens as the test's parameter says."""
    with start_etcd(clean.kind, *getattr(request, "param", ())) as etcd:
        yield replace(clean, etcd=etcd)


@pytest.mark.timeout(200)
def test_authentication_is_enabled_under_a_service_without_a_login(
    trial: StartTrial, clean: Servers, start_audited: StartAudited, store: Store
) -> None:
    """It goes on by itself when the login is wanted no more."""
    attempt = trial("etcd authentication: none")
    service = start_audited("order")
    with attempt.load(RATE_PER_S) as load:
        attempt.works()
        clean.etcd.require_login()
        eventually(partial(holds, service, "user name is empty"))
        recorded = store.done("order")
        throughout(5, partial(holds, service, "user name is empty"))
        assert store.done("order") == recorded
        attempt.fired()
        assert load.running
        clean.etcd.require_no_login()
        attempt.recovers()
    attempt.judge(at_least=200)


@pytest.mark.timeout(200)
def test_the_password_is_wrong_at_the_start(
    trial: StartTrial, clean: Servers, start_audited: StartAudited, broker: Broker
) -> None:
    """Alive, consuming nothing, saying why; ready without a restart once the password is right."""
    attempt = trial("etcd authentication: wrong password")
    assert start_audited("order").terminate(10) == 0
    clean.etcd.require_login()
    allow(clean.etcd, "another's")
    attempt.publish(orders(50))
    service = start_audited("order", wait=False, **LOGIN)
    eventually(partial(holds, service, "authentication failed"), also=(OSError,))

    def nothing_is_taken() -> None:
        holds(service, "authentication failed")
        assert broker.depth("order") == (50, 0)
        assert broker.consumers("order") == 0

    throughout(3, nothing_is_taken)
    attempt.fired()
    clean.etcd.ctl("user", "delete", LOGIN["ETCD_USER"])
    allow(clean.etcd)
    attempt.recovers()
    service.wait_ready()
    attempt.judge(at_least=50)


@pytest.mark.timeout(200)
def test_the_login_is_given_before_it_is_wanted(
    trial: StartTrial, clean: Servers, start_audited: StartAudited
) -> None:
    """A service that was told its login too early waits, and begins when etcd wants one."""
    attempt = trial("etcd authentication: login too early")
    assert start_audited("order").terminate(10) == 0
    attempt.publish(orders(50))
    service = start_audited("order", wait=False, **LOGIN)
    eventually(partial(holds, service, "authentication is not enabled"), also=(OSError,))
    throughout(3, partial(holds, service, "authentication is not enabled"))
    attempt.fired()
    allow(clean.etcd)
    clean.etcd.require_login()
    attempt.recovers()
    service.wait_ready()
    attempt.judge(at_least=50)


@pytest.mark.timeout(200)
def test_rights_are_revoked_under_load(
    trial: StartTrial, clean: Servers, start_audited: StartAudited, store: Store
) -> None:
    """Held, with etcd's own words for it, until they are granted again."""
    attempt = trial("etcd authentication: rights revoked")
    clean.etcd.require_login()
    allow(clean.etcd)
    service = start_audited("order", **LOGIN)
    with attempt.load(RATE_PER_S) as load:
        attempt.works()
        clean.etcd.ctl("user", "revoke-role", "order", "order")
        eventually(partial(holds, service, "permission denied"))
        recorded = store.done("order")
        throughout(5, partial(holds, service, "permission denied"))
        assert store.done("order") == recorded
        attempt.fired()
        assert load.running
        clean.etcd.ctl("user", "grant-role", "order", "order")
        attempt.recovers()
    attempt.judge(at_least=200)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("clean", [(JWT.format(ttl="2s"),)], indirect=True, ids=["of 2 s"])
def test_tokens_expire_under_load(
    trial: StartTrial,
    clean: Servers,
    start_audited: StartAudited,
    statsd: StatsdListener,
) -> None:
    """Each time the service logs in anew, and no delivery comes twice for it."""
    attempt = trial("etcd authentication: expired token")
    clean.etcd.require_login()
    allow(clean.etcd)
    service = start_audited("order", **LOGIN)
    times = often(5, 50)
    with attempt.load(RATE_PER_S):
        eventually(lambda: expired(service, times), 20 * times)
        attempt.fired(times)
        attempt.recovers()
    attempt.judge(at_least=100)
    assert statsd.count("orders_returned") == 0


@pytest.mark.timeout(200)
def test_etcd_forgets_the_tokens_under_load(
    trial: StartTrial, clean: Servers, start_audited: StartAudited
) -> None:
    """Simple tokens are gone after a restart; the service logs in anew."""
    attempt = trial("etcd authentication: token forgotten")
    clean.etcd.require_login()
    allow(clean.etcd)
    service = start_audited("order", **LOGIN)
    with attempt.load(RATE_PER_S):
        for _ in range(often(3, 10)):
            attempt.works()
            clean.etcd.restart()
            attempt.recovers()
            attempt.fired()
    attempt.judge(at_least=100)
    assert says(service, "etcd answers again")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("clean", [(JWT.format(ttl="10m"),)], indirect=True, ids=["with tokens"])
def test_users_are_changed_under_load(
    trial: StartTrial, clean: Servers, start_audited: StartAudited
) -> None:
    """Tokens from before a change of any user are refused: the service logs in anew at once."""
    attempt = trial("etcd authentication: users changed")
    clean.etcd.require_login()
    allow(clean.etcd)
    service = start_audited("order", **LOGIN)
    with attempt.load(RATE_PER_S):
        for number in range(1, often(8, 20) + 1):
            attempt.works()
            clean.etcd.ctl("user", "add", f"other-{number}:and its own")
            eventually(partial(says, service, "etcd does not answer", number))
            attempt.fired()
            attempt.recovers()
    attempt.judge(at_least=100)


def allow(etcd: Etcd, password: str = LOGIN["ETCD_PASSWORD"]) -> None:
    """Make the user order, with rights to no more than the service's own keys."""
    if "order" not in etcd.ctl("role", "list").split():
        etcd.ctl("role", "add", "order")
        for prefix in ("/service/order/", "/incarnation/order", "/orders/"):
            etcd.ctl("role", "grant-permission", "order", "readwrite", "--prefix=true", prefix)
    etcd.ctl("user", "add", f"{LOGIN['ETCD_USER']}:{password}")
    etcd.ctl("user", "grant-role", LOGIN["ETCD_USER"], "order")


def expired(service: Service, times: int) -> None:
    """Raise AssertionError unless a service's token has been refused so often."""
    refused = [
        line
        for line in lines(service, "etcd does not answer")
        if "invalid auth token" in line["error"]
    ]
    assert len(refused) >= times, f"{len(refused)} times"

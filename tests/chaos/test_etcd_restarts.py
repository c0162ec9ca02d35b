"""etcd restarts, dies and pauses under load: the batches in hand are held, nothing goes back."""

from collections.abc import Callable

import pytest

from chaos.conftest import StartTrial
from chaos.durations import lasting, rate
from chaos.outages import Outage, frozen, killed, stopped
from chaos.signs import losses
from integration.judging import counters, not_ready, passes, says, throughout
from servers.broker import Broker
from servers.servers import Servers
from servers.services import Service
from servers.statsd import StatsdListener
from servers.wait import eventually

BATCH = 32
# The library asks the broker for as much again as its four commits in flight hold.
IN_HAND_AT_MOST = 2 * 4 * BATCH


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("fault", "down", "seconds"),
    [
        ("etcd restarted", stopped, 1),
        ("etcd killed -9", killed, 1),
        *(
            (f"etcd paused for {seconds:g} s", frozen, seconds)
            for seconds in (3, *lasting(10, 120))
        ),
    ],
)
def test_etcd_is_away_for_a_while(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    broker: Broker,
    statsd: StatsdListener,
    fault: str,
    down: Outage,
    seconds: float,
) -> None:
    """What is in hand stays bounded, and every delivery comes once: none is handed back."""
    attempt = trial(fault)
    service = start_audited("order", BATCH_SIZE=str(BATCH))

    def bounded() -> None:
        assert broker.unacked("order") <= IN_HAND_AT_MOST

    with attempt.load(rate(seconds + 10)):
        attempt.works()
        with down(clean.etcd):
            passes(lambda: broker.unacked("order"), BATCH)
            throughout(seconds, bounded)
            if seconds > 5:  # A call is given 5 s before it has failed.
                not_ready(service, "etcd")
            attempt.fired()
        attempt.recovers()
        attempt.works(100)
    attempt.judge(at_least=100)
    if seconds > 5 or down is not frozen:
        assert says(service, "etcd answers again")
    eventually(lambda: _each_came_once(statsd))
    assert losses(service) == 0


def _each_came_once(statsd: StatsdListener) -> None:
    counts = counters(statsd, "orders")
    settled = counts["processed"] + counts["processed_skipped"]
    assert counts == {
        "received": settled,
        "processed": counts["processed"],
        "processed_skipped": counts["processed_skipped"],
    }

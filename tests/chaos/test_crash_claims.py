"""The notify service is killed with claims in hand: every event is called for, and few twice.

A claim ends with its lease, 15 s after its process. So that the cells share one wait for that, a
test kills three processes one after the other, each at another step and with a backlog of its own.
The positions are the first, the eighth and the last event of a batch: when the first claim has been
taken, no call has begun, later those before it may have; when the first call returns, none is
recorded and the other slots are at theirs; when the first claim is completed, nothing is acked.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import chain, product

import pytest

from chaos.conftest import StartTrial
from chaos.crash_cells import (
    BATCH,
    POSITIONS,
    REDELIVERY_TIMEOUT_S,
    REPLICAS,
    SETTINGS,
    Where,
    assert_done,
    batches,
    frozen,
    killed_at,
    start_crashing,
)
from chaos.durations import often
from integration.load import ids
from integration.sink import Sink
from servers.services import Service
from servers.store import Store
from servers.wait import eventually

STEPS = ("claim taken", "call made", "claim completed")
AT_ONCE = 16
LEASE_S = 15.0
PASSAGES = dict(zip(POSITIONS, (1, BATCH // 2, BATCH), strict=True))

CELLS = [
    pytest.param(
        PASSAGES[position],
        replicas,
        id="-".join(
            (
                *(step.replace(" ", "_") for step in STEPS),
                position,
                REPLICAS[replicas],
                f"run_{run}",
            )
        ),
    )
    for position, replicas, run in product(POSITIONS, REPLICAS, range(1, 1 + often(1, 5)))
]


@pytest.mark.parametrize(("passage", "replicas"), CELLS)
def test_killed_with_claims(
    passage: int,
    replicas: int,
    trial: StartTrial,
    start_audited: Callable[..., Service],
    store: Store,
    sink: Sink,
) -> None:
    """What was not recorded is done by others when the lease is over; the rest is not touched."""
    attempt = trial(f"killed: {', '.join(STEPS)}", service="notify")

    def settings(caller: str) -> dict[str, str]:
        return {**SETTINGS, "CALLS_AT_ONCE": str(AT_ONCE), "NOTIFY_URL": f"{sink.url}/{caller}"}

    others = [start_audited("notify", **settings("survivor")) for _ in range(replicas - 1)]
    killed_with: dict[str, str] = {}
    sent: set[str] = set()
    for step in STEPS:
        at, caller = Where(step, passage), step.replace(" ", "-")
        killed = start_crashing(start_audited, "notify", at, **settings(caller))
        backlog = list(chain.from_iterable(batches(2 * replicas, prefix=caller)))
        sent |= ids(backlog)
        with frozen([killed, *others]):
            attempt.publish(backlog)
        killed_with[caller] = killed_at(killed, at)["id"]
        attempt.fired()
    if not others:
        start_audited("notify", wait=False, **settings("successor"))
    attempt.recovers()
    eventually(lambda: assert_done(store, "notify", sent), LEASE_S + REDELIVERY_TIMEOUT_S)
    attempt.judge(at_least=len(sent))
    assert_called(sink, store, killed_with, passage)


def assert_called(sink: Sink, store: Store, killed_with: dict[str, str], passage: int) -> None:
    """Check that each event was called for, and again only where a claim of it was lost.

    And what became of the events with which processes were killed, and how much they had begun.
    """
    callers, lost = callers_by_event(sink), losses(store)
    assert set(callers) == store.done("notify")
    for event_id, by in callers.items():
        assert len(set(by)) == len(by) <= 1 + lost[event_id], f"{event_id} was called by {by}"
    begun = Counter(chain.from_iterable(callers.values()))
    assert begun["claim-taken"] < passage
    # Those that had returned, and one in each of the other slots.
    assert begun["call-made"] < passage + AT_ONCE
    assert "claim-taken" not in callers[killed_with["claim-taken"]]
    assert "call-made" in callers[killed_with["call-made"]][:-1], "it was not made again"
    assert callers[killed_with["claim-completed"]][-1] == "claim-completed", "it was made again"


def callers_by_event(sink: Sink) -> dict[str, list[str]]:
    """Return who has called for each event, in order."""
    found = defaultdict(list)
    for call in sink.calls:
        found[call.key].append(call.path.rpartition("/")[2])
    return found


def losses(store: Store) -> dict[str, int]:
    """Return how often each event's claim has ended with its lease, and check its record's history.

    Each claim is gone before the next one is taken, and the last of them is done.
    """
    steps = store.steps("notify")
    lost = {event_id: states.count("gone") for event_id, states in steps.items()}
    for event_id, times in lost.items():
        assert steps[event_id] == ["claimed", "gone"] * times + ["claimed", "done"]
    return lost

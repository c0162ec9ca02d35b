"""The order service is killed at each step of an event: nothing is lost, nothing is done twice.

What is killed finds eight full batches at once, and may have four in flight. A step that each
event takes for itself is deadly for the first of the first batch, for one amid the fourth, or for
the last of the last; a step that a batch takes as a whole, for the first, the fourth or the eighth;
an ack, for the one that covers such a delivery.
"""

from collections import Counter
from collections.abc import Callable
from itertools import chain, product

import pytest

from chaos.acks import AckAudit
from chaos.conftest import StartTrial
from chaos.crash_cells import (
    BATCH,
    DUPLICATES,
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
from chaos.trial import Trial
from integration.judging import passes, wait_drained
from integration.load import ids
from servers.broker import Broker
from servers.publisher import Event
from servers.services import Service
from servers.store import Store
from servers.wait import eventually

BATCHES = 8
# Two share them as they come, and each must get eight of them.
BATCHES_FOR_TWO = 4 * BATCHES

DELIVERY = (1, 3 * (BATCH + DUPLICATES) + BATCH // 2, BATCHES * (BATCH + DUPLICATES))
EVENT = (1, 3 * BATCH + BATCH // 2, BATCHES * BATCH)
WHOLE_BATCH = (1, 4, BATCHES)
DEAD_LETTER = (1, 4, BATCHES)  # One before each batch.

STEPS = {
    "received": DELIVERY,
    "decoded": DELIVERY,
    "handler entered": EVENT,
    "handler left": EVENT,
    "batch sealed": WHOLE_BATCH,
    "txn sent": WHOLE_BATCH,
    "applied but reply unread": WHOLE_BATCH,
    "reply read": WHOLE_BATCH,
    "before ack": DELIVERY,
    "after ack": DELIVERY,
    "before park": DEAD_LETTER,
    "after park": DEAD_LETTER,
}

# What etcd must and must not hold where the first of all is killed there.
RECORDED = {"applied but reply unread", "reply read", "before ack", "after ack"}
UNRECORDED = {
    "received",
    "decoded",
    "handler entered",
    "handler left",
    "batch sealed",
    "before park",
}

CELLS = [
    pytest.param(
        Where(step, passages[POSITIONS.index(position)]),
        replicas,
        id="-".join((step.replace(" ", "_"), position, REPLICAS[replicas], f"run_{run}")),
    )
    for (step, passages), position, replicas, run in product(
        STEPS.items(), POSITIONS, REPLICAS, range(1, 1 + often(1, 5))
    )
]


@pytest.mark.parametrize(("at", "replicas"), CELLS)
def test_killed_at_a_step(
    at: Where,
    replicas: int,
    trial: StartTrial,
    start_audited: Callable[..., Service],
    broker: Broker,
    store: Store,
    acks: AckAudit,
) -> None:
    """Another process, or one started anew, has all of it done within seconds."""
    attempt = trial(f"killed: {at.point}")
    killed = start_crashing(start_audited, "order", at)
    others = [start_audited("order", **SETTINGS) for _ in range(replicas - 1)]
    backlog = batches(BATCHES_FOR_TWO if others else BATCHES)
    with frozen([killed, *others]):
        poison = publish(attempt, backlog, with_poison="park" in at.point)
    proof = killed_at(killed, at)
    attempt.fired()
    if not others:
        assert_was_there(at, proof, store, acks, broker)
        start_audited("order", wait=False, **SETTINGS)
    attempt.recovers()
    sent = ids(list(chain.from_iterable(backlog)))
    eventually(lambda: assert_done(store, "order", sent), REDELIVERY_TIMEOUT_S)
    if poison:
        wait_drained(broker, "order")
        assert_parked(at, proof, broker, poison)
    attempt.judge(at_least=len(sent))
    if at.point == "applied but reply unread":
        assert revisions(store, proof["key"]) == [proof["revision"]]


def publish(attempt: Trial, backlog: list[list[Event]], *, with_poison: bool) -> set[bytes]:
    """Publish the batches, with poison at the head of each if so told; return the poison."""
    if not with_poison:
        attempt.publish(list(chain.from_iterable(backlog)))
        return set()
    poison = [f"not json: {number}".encode() for number in range(len(backlog))]
    for body, batch in zip(poison, backlog, strict=True):
        attempt.broker.publish_raw(body)
        attempt.publish(batch)
    return set(poison)


def assert_was_there(
    at: Where, proof: dict[str, str], store: Store, acks: AckAudit, broker: Broker
) -> None:
    """Check that the step lies where its name says, by what the only replica has left behind."""
    dead_letters = broker.ready("order.dead-letter")
    if at.point == "after ack":
        passes(lambda: acks.checked, int(proof["acked"]) - 1)
    elif at.point == "after park":
        assert dead_letters > 0
    elif at.passage == 1:
        assert (acks.checked, dead_letters) == (0, 0)
    if at.point in RECORDED:
        assert store.done("order")
    elif at.point in UNRECORDED and at.passage == 1:
        assert not store.done("order")


def assert_parked(at: Where, proof: dict[str, str], broker: Broker, poison: set[bytes]) -> None:
    """Check the dead letters: all the poison, and twice what was parked and then not acked."""
    found = Counter(letter.body for letter in broker.drain("order.dead-letter"))
    assert set(found) == poison
    assert max(found.values()) <= 2
    assert found[proof["body"].encode()] == (2 if at.point == "after park" else 1)


def revisions(store: Store, key: str) -> list[int]:
    """Return each revision at which a key was changed."""
    return [change.revision for change in store.history() if change.key == key]

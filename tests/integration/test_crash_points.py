"""Services are killed at each step of an event: nothing is lost, nothing is done twice.

What is killed finds eight full batches at once, and may have four in flight. A step that each
event takes for itself is deadly for the first of the first batch, for one amid the fourth, or for
the last of the last; a step that a batch takes as a whole, for the first, the fourth or the eighth;
an ack, for the one that covers such a delivery. Shipment, the library's example, publishes an event
for each order.

A claim of notify's ends with its lease, 15 s after its process. So that the cells share one wait
for that, a test kills three processes one after the other, each at another step and with a backlog
of its own. The positions are the first, the eighth and the last event of a batch: when the first
claim has been taken, no call has begun, later those before it may have; when the first call
returns, none is recorded and the other slots are at theirs; when the first claim is completed,
nothing is acked.
"""

import json
import random
import signal
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from itertools import chain, product
from typing import Any, NamedTuple

import pika
import pytest

from chaos.acks import AckAudit
from chaos.checks import becomes, passes
from chaos.crash_points import PROOF, VARIABLE
from chaos.durations import often
from chaos.load import ids, order
from chaos.outages import frozen
from chaos.receiver import Receiver, ended_claims
from chaos.rig import Rig
from chaos.trial import StartTrial, Trial
from idempotent_consumer.flow import WAITS_FOR_ITS_EVENTS
from idempotent_consumer.system import claim_wait
from servers.broker import Event
from servers.etcd import Store
from servers.services import Service, ServiceEndedError

BATCH = 16
SETTINGS = {"BATCH_SIZE": str(BATCH)}
DUPLICATES = 4
"""So many to each batch of new events: half of its own events, half of all before."""

BATCHES = 8
MORE_BATCHES = 6 * BATCHES
"""At most so many more, one by one, where another replica takes more than its share."""

REDELIVERY_TIMEOUT_S = 5.0
LEFT_ALONE_S = WAITS_FOR_ITS_EVENTS * claim_wait(random.Random()).longest_s
"""For so long at the most a record is left to the process that was killed: it may yet publish."""

POSITIONS = ("first", "middle", "last")
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
"""The steps of order, and the passages that are first, in the middle and last."""

# Where the first of all is killed before "txn sent", etcd has no record; behind it there is one.
UNRECORDED = {*list(STEPS)[:5], "before park"}
RECORDED = set(list(STEPS)[6:10])

SHIPMENT_STEPS = dict.fromkeys(("events recorded", "event sent", "event confirmed"), EVENT)
SHIPPED = "order_shipped"
OBSERVED = "shipment.observed"

CLAIM_STEPS = ("claim taken", "call made", "claim completed")
AT_ONCE = 16
LEASE_S = 15.0


class Cell(NamedTuple):
    """A crash point of a service, the passage of it that kills, and how many are at work."""

    service: str
    point: str
    passage: int
    replicas: int


RUNS = range(1, 1 + often(1, 5))
CELLS = [
    pytest.param(
        Cell(service, step, passage, replicas),
        id=f"{service}, {step}, {position}, {replicas} at work, run {run}",
        marks=[pytest.mark.quick] if (position, replicas) == ("middle", 1) else [],
    )
    for service, steps in (("order", STEPS), ("shipment", SHIPMENT_STEPS))
    for step, passages in steps.items()
    for position, passage in zip(POSITIONS, passages, strict=True)
    for replicas, run in product((1, 2), RUNS)
]
CLAIM_CELLS = [
    pytest.param(passage, replicas, id=f"{position}, {replicas} at work, run {run}")
    for position, passage in zip(POSITIONS, (1, BATCH // 2, BATCH), strict=True)
    for replicas, run in product((1, 2), RUNS)
]


@pytest.mark.parametrize("at", CELLS)
def test_killed_at_a_step(at: Cell, trial: StartTrial) -> None:
    """Another process, or one started in its place, has all of it done within seconds."""
    attempt = trial(f"killed: {at.point}", service=at.service)
    store = attempt.store
    if at.service == "shipment":  # A queue of the test's own: to its events nobody listens.
        attempt.acks.unhandled.add(SHIPPED)
        attempt.broker.bind(OBSERVED, SHIPPED)
    killed = start_crashing(attempt, at)
    others = [attempt.start(**SETTINGS) for _ in range(at.replicas - 1)]
    backlog = batches(BATCHES * at.replicas)
    proof = killed_by(backlog, attempt, at, killed, others)
    unfinished = store.in_state(at.service, "publishing")
    if not others:
        assert_was_there(at, proof, attempt, unfinished)
        attempt.start(wait=False, **SETTINGS)
    attempt.recovers()
    sent = ids(chain.from_iterable(backlog))
    within_s = REDELIVERY_TIMEOUT_S + (LEFT_ALONE_S if at.service == "shipment" else 0)
    becomes(lambda: sent - store.done(at.service), set(), within_s)
    attempt.judge(at_least=len(sent))
    if "park" in at.point:
        # Twice what was parked and then not acked.
        assert max(attempt.parked.values()) <= 2
        assert attempt.parked[proof["body"].encode()] == (2 if at.point == "after park" else 1)
    if at.point == "applied but reply unread":
        changed = [change.revision for change in store.history() if change.key == proof["key"]]
        assert changed == [proof["revision"]]
    if at.service == "shipment":
        assert_shipped(attempt, may_repeat=unfinished if not others else None)


@pytest.mark.parametrize(("passage", "replicas"), CLAIM_CELLS)
def test_killed_with_claims(
    passage: int, replicas: int, trial: StartTrial, receiver: Receiver
) -> None:
    """What was not recorded is done by others when the lease is over; the rest is not touched."""
    attempt = trial(f"killed: {', '.join(CLAIM_STEPS)}", service="notify")

    def settings(caller: str) -> dict[str, str]:
        at_once = {"CALLS_AT_ONCE": str(AT_ONCE)}
        return {**SETTINGS, **at_once, "NOTIFY_URL": receiver.url_for(caller)}

    others = [attempt.start(**settings("survivor")) for _ in range(replicas - 1)]
    killed_with: dict[str, str] = {}
    sent: set[str] = set()
    for step in CLAIM_STEPS:
        at, caller = Cell("notify", step, passage, replicas), step.replace(" ", "-")
        killed = start_crashing(attempt, at, **settings(caller))
        backlog = batches(2 * replicas, prefix=caller)
        killed_with[caller] = killed_by(backlog, attempt, at, killed, others)["id"]
        sent |= ids(chain.from_iterable(backlog))
    if not others:
        attempt.start(wait=False, **settings("successor"))
    attempt.recovers()
    within_s = LEASE_S + REDELIVERY_TIMEOUT_S
    becomes(lambda: sent - attempt.store.done("notify"), set(), within_s)
    attempt.judge(at_least=len(sent))
    assert_called(receiver, attempt.store, killed_with, passage)


# The process that kills itself, and its backlog.


def start_crashing(attempt: Trial, at: Cell, **settings: str) -> Service:
    """Start a service that kills itself there, and wait until it is ready.

    Where events wait for it already, it may have come to that point before anybody saw it ready.
    """
    command = [sys.executable, "-m", "chaos.crash_points", at.service]
    settings = {**SETTINGS, VARIABLE: f"{at.point}:{at.passage}", **settings}
    crashing = attempt.start(wait=False, command=command, **settings)
    with suppress(ServiceEndedError):
        crashing.wait_ready()
    return crashing


def killed_by(
    backlog: list[list[Event]], attempt: Trial, at: Cell, killed: Service, others: list[Service]
) -> dict[str, Any]:
    """Let one die of a backlog, and return what it has left as proof of where it was.

    Both are frozen while that is published: it waits in their sockets, dealt out in turn. So each
    finds many batches there at once, and they are full. The one that is to die goes on first; where
    another takes more than its share, the backlog grows until it is dead. Raises AssertionError
    unless it was this point that has ended it.
    """

    def publish(batch: list[Event]) -> None:
        if "park" in at.point:
            attempt.poison()
        attempt.publish(batch)

    with ExitStack() as stack:
        for service in (*others, killed):
            if service.running:
                stack.enter_context(frozen(service))
        for batch in backlog:
            publish(batch)
    prefix = f"{at.point}-more".replace(" ", "-")  # As an Idempotency-Key has it, too.
    for batch in batches(MORE_BATCHES, prefix) if others else ():
        with suppress(AssertionError):
            killed.wait_end(timeout_s=0.5)
            break
        publish(batch)
        backlog.append(batch)
    assert killed.wait_end() == -signal.SIGKILL
    proofs = [line for line in killed.output().splitlines() if line.startswith(PROOF)]
    (proof,) = (json.loads(line.removeprefix(PROOF)) for line in proofs)
    assert (proof["point"], proof["passage"]) == (at.point, at.passage)
    attempt.fired()
    return dict(proof)


def batches(number: int, prefix: str = "order") -> list[list[Event]]:
    """Return so many batches of new events, with duplicates within each of them and across them."""
    chance = random.Random(number)
    sent: list[Event] = []
    made = []
    for batch in range(number):
        new = [order(f"{prefix}-{batch}-{index}", number=index) for index in range(BATCH)]
        again = chance.sample(new, DUPLICATES // 2) + chance.sample(sent or new, DUPLICATES // 2)
        mixed = new + again
        chance.shuffle(mixed)
        made.append(mixed)
        sent += new
    return made


# What it leaves behind, and what becomes of it.


def assert_was_there(at: Cell, proof: dict[str, str], attempt: Trial, unfinished: set[str]) -> None:
    """Check that the step lies where its name says, by what the only replica has left behind."""
    if at.service == "shipment":
        assert unfinished, "it was killed with an event that it owed"
        return
    acks, done = attempt.acks, attempt.store.done("order")
    dead_letters = attempt.broker.ready("order.dead-letter")
    if at.point == "after ack":
        passes(lambda: acks.checked, int(proof["acked"]) - 1)
    elif at.point == "after park":
        assert dead_letters > 0
    elif at.passage == 1:
        assert (acks.checked, dead_letters) == (0, 0)
    if at.point in RECORDED:
        assert done
    elif at.point in UNRECORDED and at.passage == 1:
        assert not done


def assert_shipped(attempt: Trial, *, may_repeat: set[str] | None) -> None:
    """Check that each record had two steps, and its parcel was written in the first of them.

    Others have seen an event for each order, and again only what was cut off.
    """
    store = attempt.store
    assert set(map(tuple, store.steps("shipment").values())) == {("publishing", "done")}
    placed = defaultdict(set)
    for change in store.history("/service/shipment/", "/parcels/"):
        _, *kind, name = change.key.split("/")
        if kind == ["parcels"] or json.loads(change.value)["state"] == "publishing":
            placed[kind[0]].add((name, change.revision))
    assert placed["parcels"] == placed["service"]
    published = (json.loads(message.body)["id"] for message in attempt.broker.drain(OBSERVED))
    seen = Counter(id_.removesuffix("/shipment/0") for id_ in published)
    assert set(seen) == store.done("shipment")
    if may_repeat is not None:
        assert {id_ for id_, times in seen.items() if times > 1} <= may_repeat
    assert max(seen.values()) <= 2


def assert_called(
    receiver: Receiver, store: Store, killed_with: dict[str, str], passage: int
) -> None:
    """Check that each event was called for, and again only where a claim of it was lost.

    And what became of the events with which processes were killed, and how much they had begun.
    """
    callers = defaultdict(list)
    for call in receiver.calls:
        callers[call.key].append(call.caller)
    lost = ended_claims(store)
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


# The audit of acks, which each trial has.


@pytest.mark.chaos
def test_an_ack_without_a_record_is_early_be_it_covered_by_a_later_one(
    rig: Rig, acks: AckAudit
) -> None:
    rig.broker.bind("order")
    with pika.BlockingConnection(pika.URLParameters(acks.url)) as connection:
        channel = connection.channel()
        rig.broker.publish([order("e-1"), order("e-2"), order("e-3")])
        rig.broker.publish_raw(b"not json")
        deliveries = channel.consume("order", inactivity_timeout=30)
        tags = [next(deliveries)[0].delivery_tag for _ in range(4)]
        rig.store.client.put("/service/order/e-1", b'{"state":"done"}')
        rig.store.client.put("/service/order/e-2", b'{"state":"claimed"}')
        channel.basic_ack(tags[0])
        channel.basic_ack(tags[3], multiple=True)
        becomes(lambda: acks.checked, 4)
    assert acks.early() == {"e-2", "e-3", "b'not json'"}

"""Services are killed at each step of an event: nothing is lost, nothing is done twice.

A killed service finds eight full batches and may have four of them in flight. A step that every
event takes is deadly for the first event, one in the fourth batch, or the last; a step of a whole
batch for the first, the fourth or the eighth batch; an ack for the one that covers such an event.
Shipment, the library's example, publishes an event for each order.

A claim of notify's ends with its lease, 15 s after its process. To wait for that only once, a test
kills three processes one after the other, each at another step of its own backlog: at the first,
the eighth or the last event of a batch. When its first claim is taken, no call has begun. When its
first call returns, nothing is recorded, and calls are under way in the other slots. When its first
claim is completed, nothing is acked.
"""

import json
import random
import signal
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from itertools import chain
from typing import Any, NamedTuple

import pika
import pytest

from chaos.acks import AckAudit
from chaos.checks import becomes, passes
from chaos.crash_points import PROOF, VARIABLE
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
"""In each batch, besides its new events: half of these are its own, half of all before."""

BATCHES = 8
MORE_BATCHES = 6 * BATCHES
"""How many more are published at most if another replica takes more than its share."""

REDELIVERY_TIMEOUT_S = 5.0
LEFT_ALONE_S = WAITS_FOR_ITS_EVENTS * claim_wait(random.Random()).longest_s
"""How long at most a record in state publishing is left to the process that may yet publish."""

POSITIONS = ("first", "middle", "last")
DELIVERY = (1, 3 * (BATCH + DUPLICATES) + BATCH // 2, BATCHES * (BATCH + DUPLICATES))
EVENT = (1, 3 * BATCH + BATCH // 2, BATCHES * BATCH)
WHOLE_BATCH = (1, 4, BATCHES)
DEAD_LETTER = (1, 4, BATCHES)  # One is published before each batch.

STEPS = {
    "received": (DELIVERY, False),
    "decoded": (DELIVERY, False),
    "handler entered": (EVENT, False),
    "handler left": (EVENT, False),
    "batch sealed": (WHOLE_BATCH, False),
    "txn sent": (WHOLE_BATCH, None),
    "applied but reply unread": (WHOLE_BATCH, True),
    "reply read": (WHOLE_BATCH, True),
    "before ack": (DELIVERY, True),
    "after ack": (DELIVERY, True),
    "before park": (DEAD_LETTER, False),
    "after park": (DEAD_LETTER, None),
}
"""The steps of order: their passages that are first, in the middle and last, and whether etcd has
a record at the first of them."""

SHIPMENT_STEPS = dict.fromkeys(("events recorded", "event sent", "event confirmed"), (EVENT, True))
SHIPPED = "order_shipped"
OBSERVED = "shipment.observed"

CLAIM_STEPS = ("claim taken", "call made", "claim completed")
AT_ONCE = 16
LEASE_S = 15.0


class Cell(NamedTuple):
    """A crash point of a service, the passage at which it kills, and the number of replicas."""

    service: str
    point: str
    passage: int
    replicas: int


CELLS = [
    pytest.param(
        Cell(service, step, passage, replicas),
        id=f"{service}, {step}, {position}, {replicas} at work",
        marks=[pytest.mark.quick] if (position, replicas) == ("middle", 1) else [],
    )
    for service, steps in (("order", STEPS), ("shipment", SHIPMENT_STEPS))
    for step, (passages, _) in steps.items()
    for position, passage in zip(POSITIONS, passages, strict=True)
    for replicas in (1, 2)
]
CLAIM_CELLS = [
    pytest.param(passage, replicas, id=f"{position}, {replicas} at work")
    for position, passage in zip(POSITIONS, (1, BATCH // 2, BATCH), strict=True)
    for replicas in (1, 2)
]


@pytest.mark.parametrize("at", CELLS)
def test_killed_at_a_step(at: Cell, trial: StartTrial) -> None:
    """Another replica, or the process that replaces it, does the rest within seconds."""
    attempt = trial(f"killed: {at.point}", service=at.service)
    store = attempt.store
    if at.service == "shipment":  # No service consumes its events, so the test has a queue.
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
        # A dead letter is there twice if its delivery was not acked.
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
    """Others handle what was not recorded when the lease has ended, and nothing else."""
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

    If events are waiting for it, it may get there before it is seen to be ready.
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
    """Publish a backlog that kills one service, and return its proof of where it was.

    All services are frozen meanwhile, and RabbitMQ deals the backlog out to their sockets in turn,
    so that each finds many full batches. The one to be killed is resumed first. If another takes
    more than its share, more batches are published. Raises AssertionError if something else has
    ended the service.
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
    prefix = f"{at.point}-more".replace(" ", "-")
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
    """Return batches of new events, each with duplicates of its own events and of earlier ones."""
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
    """Check, by what the only replica has left, that the step is where its name says."""
    if at.service == "shipment":
        assert unfinished, "no event was left to be published"
        return
    acks, done = attempt.acks, attempt.store.done("order")
    dead_letters = attempt.broker.ready("order.dead-letter")
    _, recorded = STEPS[at.point]
    if recorded or (recorded is False and at.passage == 1):
        assert bool(done) == recorded
    if at.point == "after ack":
        passes(lambda: acks.checked, int(proof["acked"]) - 1)
    elif at.point == "after park":
        assert dead_letters > 0
    elif at.passage == 1:
        assert (acks.checked, dead_letters) == (0, 0)


def assert_shipped(attempt: Trial, *, may_repeat: set[str] | None) -> None:
    """Check that each record had two steps, and that its parcel was written with the first.

    An event was published for each order, and a second time only if it was cut off.
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
    """Check that each event got a call, and a second one only if its claim was lost.

    Also how many calls the killed processes had begun, and what became of the events at which they
    were killed.
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
    # Those that have returned, and one in each of the other slots.
    assert begun["call-made"] < passage + AT_ONCE
    assert "claim-taken" not in callers[killed_with["claim-taken"]]
    assert "call-made" in callers[killed_with["call-made"]][:-1], "it was not made again"
    assert callers[killed_with["claim-completed"]][-1] == "claim-completed", "it was made again"


# The audit of acks, which each trial has.


@pytest.mark.chaos
def test_an_ack_without_a_record_is_early_also_if_a_later_ack_covers_it(
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

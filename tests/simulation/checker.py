"""The judgement of a run, by what was sent, recorded, parked and called."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from idempotent_consumer.names import ATTEMPTS_HEADER, REASON_HEADER
from idempotent_consumer.testing.store import Change
from simulation.etcd import Lineage
from simulation.handlers import SHARED_KEY, Call, announcements, effect_keys
from simulation.keys import INCARNATION, RECORDS, record_key
from simulation.plan import OF_DATA
from simulation.workload import CAN_FAIL, CLAIMED, NEVER_SUCCEEDS, Sent

if TYPE_CHECKING:
    from simulation.world import World

_MAY_PARK_TWICE = (
    "killed between two steps",
    "killed within a step",
    "stopped",
    "frozen",
    "confirm late",
    "confirm lost",
    "connection lost",
    "channel closed",
    "consumer cancelled",
    "broker restarted",
    "publish returned",
    "dead-lettered twice",
    "publish not confirmed",
    "alarm",
    "publish refused",
    *OF_DATA,
)
RECORDED = ("publishing", "done")
"""The states of a record that is there for good."""

_MAY_OVERLAP = ("frozen", "lease revoked", *OF_DATA)


def judge(world: World) -> None:
    """Find whatever must not be."""
    sent = list(world.auditor.sent.values())
    _judge_lost(world, sent)
    _judge_parked(world)
    for lineage in world.store.lineages:
        _judge_lineage(world, lineage, sent)
    _judge_calls(world)
    _judge_claims(world)
    _judge_published(world)
    _judge_counts(world)


def _judge_lost(world: World, sent: list[Sent]) -> None:
    """Lost = confirmed - (recorded or parked), body by body."""
    parked = {message.body for message in world.broker.dead}
    recorded = {item for lineage in world.store.lineages for item in lineage.done.items()}
    for one in sent:
        if (
            one.body in world.producer.confirmed
            and (one.handled or not one.digest)
            and not (one.body in parked or (record_key(one.event_id), one.digest) in recorded)
        ):
            world.trace.violation("lost", one.body)
        if not one.digest and one.body in world.producer.confirmed and one.body not in parked:
            world.trace.violation("an invalid body was not parked", one.body)


def _judge_parked(world: World) -> None:
    lineages = world.store.lineages
    retries = len(world.plan.settings.retry_delays)
    for message in world.broker.dead:
        one, headers = world.auditor.sent[message.body], message.headers
        reason = headers.get(REASON_HEADER)
        right = {
            "invalid": not one.digest,
            # A claim is no verdict: its holder may die or fail. Another body must be recorded.
            "conflict": one.handled
            and any(
                lineage.recorded.get(record_key(one.event_id), one.digest) != one.digest
                for lineage in lineages
            ),
            "failed": one.event_type in CAN_FAIL and headers.get(ATTEMPTS_HEADER) == retries + 1,
        }
        if not right.get(str(reason)):
            world.trace.violation("parked without cause", one.body, headers)
    if not world.trace.has_fired(*_MAY_PARK_TWICE):
        _judge_late_parking(world)
        copies = Counter(message.body for message in world.broker.dead)
        for body, number in copies.items():
            if number > 1 and body:
                world.trace.violation("parked twice without cause", body)


def _judge_late_parking(world: World) -> None:
    """Judge what was parked as failed: where it was recorded before, it was a duplicate."""
    recorded_s: dict[tuple[bytes, str], float] = {}
    for at_s, change in world.store.lineage.steps:
        if change.key.startswith(RECORDS) and change.value is not None:
            value = json.loads(change.value)
            if value["state"] in RECORDED:
                recorded_s.setdefault((change.key, value["digest"]), at_s)
    for message in world.broker.dead:
        one = world.auditor.sent[message.body]
        at_s = recorded_s.get((record_key(one.event_id), one.digest), math.inf)
        if at_s < world.broker.given_out_s[message.body]:
            world.trace.violation("parked though it was recorded before", one.body)


def _judge_lineage(world: World, lineage: Lineage, sent: list[Sent]) -> None:
    """Judge one life of etcd's data: unexpected and double records, and effects."""
    by_key: dict[bytes, list[tuple[float, Change]]] = defaultdict(list)
    for at_s, change in lineage.steps:
        by_key[change.key].append((at_s, change))
    by_content = {(record_key(one.event_id), one.digest): one for one in sent if one.handled}
    expected: set[bytes] = {INCARNATION, SHARED_KEY.encode()}
    shared = 0
    for key, steps in by_key.items():
        if not key.startswith(RECORDS):
            continue
        expected.add(key)
        done = _judge_record(world, by_content, key, [change for _, change in steps])
        if done is None:
            continue
        one, revision = done
        shared += one.event_type == "shared"
        for effect in effect_keys(one.event_type, one.event_id):
            expected.add(effect.encode())
            puts = [(c.revision, c.value) for _, c in by_key.get(effect.encode(), [])]
            if puts != [(revision, one.digest.encode())]:
                world.trace.violation(
                    "an effect is not there once, with its record", effect, revision, puts
                )
    for key in by_key.keys() - expected:
        world.trace.violation("unexpected key", key)
    if len(by_key.get(SHARED_KEY.encode(), [])) != shared:
        world.trace.violation("the shared effect was not written once for each event", shared)


def _judge_record(
    world: World, by_content: dict[tuple[bytes, str], Sent], key: bytes, steps: list[Change]
) -> tuple[Sent, int] | None:
    """Judge one record's history: recorded once, with the same content to the end.

    Returns the event that is recorded, and the revision at which its effects were written.
    """
    values = [json.loads(step.value) if step.value is not None else {} for step in steps]
    known = [by_content.get((key, value["digest"])) for value in values if value]
    if None in known:
        world.trace.violation("unexpected record", key, [step.value for step in steps])
        return None
    first = next((at for at, value in enumerate(values) if value.get("state") in RECORDED), None)
    if first is None:
        return None
    one = by_content[key, values[first]["digest"]]
    # With events to publish it is done in a second step, which the end of this etcd may prevent.
    states = [(value.get("state"), value.get("digest")) for value in values[first:]]
    due = [("publishing", one.digest)] * bool(announcements(one)) + [("done", one.digest)]
    if states != due[: len(states)]:
        world.trace.violation("double", key, steps)
        return None
    if one.event_type in NEVER_SUCCEEDS:
        world.trace.violation("recorded though its handler always raises", key)
    if one.event_type not in CLAIMED and not _was_claimed(values[:first], by_content, key):
        world.trace.violation("double", key, steps)
    return one, steps[first].revision


def _was_claimed(
    values: list[dict[str, str]], by_content: dict[tuple[bytes, str], Sent], key: bytes
) -> bool:
    """Return whether all that came before is another body's, with a claimed handler."""
    return all(by_content[key, value["digest"]].event_type in CLAIMED for value in values if value)


def _judge_claims(world: World) -> None:
    """Hold that no claim is left in the end: it would be kept alive, and nobody be at it."""
    living = {process.token for process in world.processes if process.life.alive}
    for key in world.store.keys(RECORDS.decode()):
        value = json.loads(world.store.get(key).value)
        if value["state"] == "claimed" and value["token"].partition("/")[0] in living:
            world.trace.violation("a claim is left, and nobody is at it", key, value["token"])


def _judge_published(world: World) -> None:
    """Hold that events are published after the record with them, and before it is done."""
    due_s: dict[bytes, float] = {}
    for at_s, state, body in _announced(world):
        if state == "publishing":
            due_s[body] = min(at_s, due_s.get(body, math.inf))
        elif state == "done" and world.broker.published_s.get(body, [math.inf])[0] > at_s:
            world.trace.violation("done before its event was published", body)
    for body, times_s in world.broker.published_s.items():
        if times_s[0] < due_s.get(body, math.inf):
            world.trace.violation("published without a record of it", body)
        if len(times_s) > 1:
            world.trace.fired["published again"] += 1
            if world.plan.replicas == 1 and not world.trace.has_fired(*_MAY_PARK_TWICE):
                world.trace.violation("published twice without cause", body)


def _announced(world: World) -> Iterator[tuple[float, str, bytes]]:
    """Yield, for each change of a record, its time, its state, and each event to be published."""
    by_content = {
        (record_key(one.event_id), one.digest): one
        for one in world.auditor.sent.values()
        if one.handled
    }
    for lineage in world.store.lineages:
        for at_s, change in lineage.steps:
            if change.key.startswith(RECORDS) and change.value is not None:
                value = json.loads(change.value)
                for body in announcements(by_content[change.key, value["digest"]]):
                    yield at_s, value["state"], body


def _judge_calls(world: World) -> None:
    for call in world.outside.calls:
        if call.life.alive and math.isinf(call.end_s):
            world.trace.violation("a call was not cancelled at its time-out", call.event.id)
    by_id: dict[str, list[Call]] = defaultdict(list)
    for call in world.outside.calls:
        by_id[call.event.id].append(call)
    for lineage in world.store.lineages:
        _judge_called(world, lineage, by_id)
    if world.trace.has_fired(*OF_DATA):
        return
    deleted: dict[bytes, list[float]] = defaultdict(list)
    for at_s, change in world.store.lineage.steps:
        if change.value is None:
            deleted[change.key].append(at_s)
    for event_id, calls in by_id.items():
        calls.sort(key=lambda call: call.start_s)
        for first, second in pairwise(calls):
            _judge_pair(world, first, second, deleted[record_key(event_id)])


def _judge_called(world: World, lineage: Lineage, by_id: dict[str, list[Call]]) -> None:
    """At least once: each claimed event that is done was called, with success, before."""
    by_key = {record_key(event_id): calls for event_id, calls in by_id.items()}
    types = {
        (record_key(one.event_id), one.digest): one.event_type
        for one in world.auditor.sent.values()
    }
    for at_s, change in lineage.steps:
        value = json.loads(change.value) if change.value and change.key.startswith(RECORDS) else {}
        if value.get("state") != "done":
            continue
        if types.get((change.key, value["digest"])) in CLAIMED and not any(
            call.returned
            and not call.raised
            and call.end_s <= at_s + 1e-6
            and call.event.digest == value["digest"]
            for call in by_key.get(change.key, [])
        ):
            world.trace.violation("done without a call", change.key)


def _judge_pair(world: World, first: Call, second: Call, deleted_s: list[float]) -> None:
    """Judge two calls of one id that follow each other."""
    who = (first.event.id, first.life.name, second.life.name, second.start_s)
    overlap = second.start_s < first.end_s and first.reached and second.reached
    if overlap:
        world.trace.fired["calls overlapped"] += 1
        if not world.trace.has_fired(*_MAY_OVERLAP):
            world.trace.violation("calls overlap", *who)
    if first.cut_s is not None:
        if first.cut_s < first.decided_s + world.plan.call_timeout_s - 1e-6:
            world.trace.violation("a call was cancelled before its time-out", *who)
        return
    if first.raised:
        return
    world.trace.fired["calls repeated"] += 1
    died = first.life.ended_s is not None and first.life.ended_s <= second.start_s
    # A claim whose lease an operator has ended may be gone before its call starts.
    revoked = world.trace.has_fired("lease revoked")
    since_s = 0.0 if revoked else min(first.decided_s, second.decided_s)
    lost = any(since_s <= at_s <= second.start_s for at_s in deleted_s)
    if not died and not lost:
        world.trace.violation("a call was repeated without cause", *who)


def _judge_counts(world: World) -> None:
    """Hold the contract's sum for each process that lives, and what it says it has processed."""
    done = Counter[str]()
    for _, change in world.store.lineage.steps:
        if change.key.startswith(RECORDS) and change.value is not None:
            value = json.loads(change.value)
            if value["state"] == "done":
                done[value["token"].partition("/")[0]] += 1
    for process in world.processes:
        name, processed = process.life.name, process.count("processed")
        if process.life.alive:
            process.judge_counts()
        if world.trace.has_fired(*OF_DATA):
            continue
        if process.count("claim_lost") and not world.trace.has_fired("claim ended by its lease"):
            world.trace.violation("a claim was counted as lost, and none was", name)
        recorded = done[process.token]
        exact = process.life.alive and process.count("returned") == 0
        if processed > recorded or (exact and processed != recorded):
            world.trace.violation(
                "processed is not what it has recorded", name, processed, recorded
            )

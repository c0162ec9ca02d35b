"""Judges a run by what was sent, recorded, parked, published and called."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from idempotent_consumer.names import ATTEMPTS_HEADER, REASON_HEADER
from idempotent_consumer.testing.etcd import Change, Data
from simulation.run import INCARNATION, OF_DATA, RECORDED, RECORDS, record_key, records
from simulation.workload import SHARED_KEY, Call, Sent, effect_keys

if TYPE_CHECKING:
    from simulation.world import World

_MAY_PARK_TWICE = (
    *("killed between two steps", "killed within a step", "stopped", "frozen"),
    *("connection lost", "channel closed", "consumer cancelled", "broker restarted", "alarm"),
    *("confirm late", "confirm lost", "dead-lettered twice"),
    *("publish returned", "publish refused", "publish not confirmed"),
    *OF_DATA,
)
_MAY_OVERLAP = ("frozen", "lease revoked", *OF_DATA)


class Checker:
    """Judges a world at its end.

    ``calls`` has the calls by event id, in the order of their starts; ``parked`` counts the parked
    copies of each body; ``done`` has each put of a record as done, in all lives of etcd's data.
    """

    def __init__(self, world: World) -> None:
        self._world, self._run, self._broker = world, world.run, world.broker
        self._violation, self._data = world.run.violation, world.store.lives
        self._handled = {
            (one.key, one.digest): one for one in world.broker.sent.values() if one.handled
        }
        """The bodies with a handler, by the key and the digest of their record."""
        self._puts = list(records(world.store.history))
        self._kept = list(records(self._data[-1].changes))
        self.done = [put for put in self._puts if put[1]["state"] == "done"]
        self.parked = Counter(message.body for message in world.broker.dead)
        self.calls: dict[str, list[Call]] = defaultdict(list)
        for call in sorted(world.outside.calls, key=lambda call: call.start_s):
            self.calls[call.event.id].append(call)

    def judge(self) -> None:
        self._judge_lost()
        self._judge_parked()
        for data in self._data:
            self._judge_data(data)
        self._judge_calls()
        self._judge_claims()
        self._judge_published()
        self._judge_counts()

    def _judge_lost(self) -> None:
        """Judge that each confirmed body is recorded or parked."""
        recorded = {(change.key, record["digest"]) for change, record in self.done}
        for one in self._broker.sent.values():
            if one.body not in self._world.producer.confirmed or one.body in self.parked:
                continue
            if not one.digest:
                self._violation("an invalid body was not parked", one.body)
            elif one.handled and (one.key, one.digest) not in recorded:
                self._violation("lost", one.body)

    def _judge_parked(self) -> None:
        retries = len(self._world.plan.settings.retry_delays)
        # Any call can fail by its time-out, if the process is frozen meanwhile.
        cut_off = Counter(
            call.event.digest for call in self._world.outside.calls if call.cut_s is not None
        )
        recorded_s: dict[tuple[bytes, str], float] = {}
        for change, record in self._kept:
            if record["state"] in RECORDED:
                recorded_s.setdefault((change.key, record["digest"]), change.at_s)
        may_park_twice = self._run.has_fired(*_MAY_PARK_TWICE)
        down = self._run.has_fired("receiver down", "receiver slow", "receiver flapping")
        rejecting = self._run.has_fired("receiver rejecting")
        for message in self._broker.dead:
            one, headers = self._broker.sent[message.body], message.headers
            claimed = one.handled and one.handler.claimed
            may_fail = one.handled and (one.handler.can_fail or (down and claimed))
            right = {
                "invalid": not one.digest,
                # A claim decides nothing: the other body must be recorded.
                "conflict": one.handled and self._broker.is_conflict(one),
                "rejected": claimed and (one.handler.never_succeeds or rejecting),
                "failed": headers.get(ATTEMPTS_HEADER) == retries + 1
                and (may_fail or (one.handled and cut_off[one.digest] > retries)),
            }
            if not right.get(str(headers.get(REASON_HEADER))):
                self._violation("parked without cause", one.body, headers)
            # A body that was recorded before its delivery was a duplicate.
            at_s = recorded_s.get((one.key, one.digest), math.inf)
            if not may_park_twice and at_s < self._broker.given_out_s[message.body]:
                self._violation("parked though it was recorded before", one.body)
        for body, copies in self.parked.items():
            if copies > 1 and body and not may_park_twice:
                self._violation("parked twice without cause", body)

    def _judge_data(self, data: Data) -> None:
        """Judge one life of etcd's data: its records, their effects, and unexpected keys."""
        expected: set[bytes] = {INCARNATION, SHARED_KEY.encode()}
        shared = 0
        for key in [key for key in data.by_key if key.startswith(RECORDS)]:
            expected.add(key)
            recorded = self._judge_record(key, data.by_key[key])
            if recorded is None:
                continue
            one, revision = recorded
            shared += one.handler.shared
            for effect in map(str.encode, effect_keys(one.event_type, one.event_id)):
                expected.add(effect)
                puts = [(c.revision, c.value) for c in data.by_key.get(effect, [])]
                if puts != [(revision, one.digest.encode())]:
                    self._violation(
                        "an effect is not there once, with its record", effect, revision, puts
                    )
        for key in data.by_key.keys() - expected:
            self._violation("unexpected key", key)
        if len(data.by_key.get(SHARED_KEY.encode(), [])) != shared:
            self._violation("the shared effect was not written once for each event", shared)

    def _judge_record(self, key: bytes, steps: list[Change]) -> tuple[Sent, int] | None:
        """Judge that a record was recorded once and keeps its body.

        Returns the body that is recorded, and the revision at which its effects were written.
        """
        values = [json.loads(step.value) if step.value is not None else {} for step in steps]
        known = [self._handled.get((key, value["digest"])) for value in values if value]
        if None in known:
            self._violation("unexpected record", key, [step.value for step in steps])
            return None
        first = next((n for n, value in enumerate(values) if value.get("state") in RECORDED), None)
        if first is None:
            return None
        one = self._handled[key, values[first]["digest"]]
        # With events to publish, "done" is a second step, which the loss of the data may prevent.
        states = [(value.get("state"), value.get("digest")) for value in values[first:]]
        due = [("publishing", one.digest)] * bool(one.announcements) + [("done", one.digest)]
        if states != due[: len(states)]:
            self._violation("double", key, steps)
            return None
        if one.handler.never_succeeds:
            self._violation("recorded though its handler always raises", key)
        # Before that, only bodies with a claimed handler can have held the record.
        before = [self._handled[key, value["digest"]] for value in values[:first] if value]
        if not one.handler.claimed and not all(other.handler.claimed for other in before):
            self._violation("double", key, steps)
        return one, steps[first].revision

    def _judge_claims(self) -> None:
        """Judge that no living process keeps a claim alive that it does not work on."""
        store = self._world.store
        living = {life.token for life in self._world.living()}
        for key in store.keys(RECORDS.decode()):
            value = json.loads(store.get(key).value)
            if value["state"] == "claimed" and _process(value) in living:
                self._violation("a claim is left, and nobody is at it", key, value["token"])

    def _judge_published(self) -> None:
        """Judge that events are published after their record is put, and before it is done."""
        published_s = self._broker.published_s
        due_s: dict[bytes, float] = {}
        for change, record in self._puts:
            for body in self._handled[change.key, record["digest"]].announcements:
                first_s = published_s.get(body, [math.inf])[0]
                if record["state"] == "publishing":
                    due_s[body] = min(change.at_s, due_s.get(body, math.inf))
                elif record["state"] == "done" and first_s > change.at_s:
                    self._violation("done before its event was published", body)
        for body, times_s in published_s.items():
            if times_s[0] < due_s.get(body, math.inf):
                self._violation("published without a record of it", body)
            if len(times_s) > 1:
                self._run.fired["published again"] += 1
                if self._world.plan.replicas == 1 and not self._run.has_fired(*_MAY_PARK_TWICE):
                    self._violation("published twice without cause", body)

    def _judge_calls(self) -> None:
        for call in self._world.outside.calls:
            if call.life.alive and math.isinf(call.end_s):
                self._violation("a call was not cancelled at its time-out", call.event.id)
        # At least once: before a claimed event is done, a call for it has succeeded.
        for change, record in self.done:
            one = self._handled.get((change.key, record["digest"]))
            if one is None or not one.handler.claimed:
                continue
            ends_s = [
                call.end_s
                for call in self.calls.get(one.event_id, [])
                if call.returned and not call.raised and call.event.digest == one.digest
            ]
            if min(ends_s, default=math.inf) > change.at_s + 1e-6:
                self._violation("done without a call", change.key)
        if self._run.has_fired(*OF_DATA):
            return
        for event_id, calls in self.calls.items():
            changes = self._data[-1].by_key.get(record_key(event_id), [])
            deleted_s = [change.at_s for change in changes if change.value is None]
            for first, second in pairwise(calls):
                self._judge_pair(first, second, deleted_s)

    def _judge_pair(self, first: Call, second: Call, deleted_s: list[float]) -> None:
        """Judge two successive calls of one id."""
        run = self._run
        who = (first.event.id, first.life.name, second.life.name, second.start_s)
        if second.start_s < first.end_s and first.reached and second.reached:
            run.fired["calls overlapped"] += 1
            if not run.has_fired(*_MAY_OVERLAP):
                run.violation("calls overlap", *who)
        if first.cut_s is not None:
            if first.cut_s < first.decided_s + self._world.plan.call_timeout_s - 1e-6:
                run.violation("a call was cancelled before its time-out", *who)
            return
        if first.raised:
            return
        run.fired["calls repeated"] += 1
        died = first.life.ended_s is not None and first.life.ended_s <= second.start_s
        # If an operator has revoked its lease, a claim may be gone before its call starts.
        revoked = run.has_fired("lease revoked")
        since_s = 0.0 if revoked else min(first.decided_s, second.decided_s)
        lost = any(since_s <= at_s <= second.start_s for at_s in deleted_s)
        if not died and not lost:
            run.violation("a call was repeated without cause", *who)

    def _judge_counts(self) -> None:
        """Judge the counters' sum in each living process, and what it counts as processed."""
        done = Counter(_process(record) for _, record in self._kept if record["state"] == "done")
        for life in self._world.lives:
            if life.alive:
                life.judge_counts()
            if self._run.has_fired(*OF_DATA):
                continue
            count, name = life.count, life.name
            if count("claim_lost") and not self._run.has_fired("claim ended by its lease"):
                self._violation("a claim was counted as lost, and none was", name)
            recorded, processed = done[life.token], count("processed")
            exact = life.alive and count("returned") == 0
            if processed > recorded or (exact and processed != recorded):
                self._violation("processed is not what it has recorded", name, processed, recorded)


def _process(record: dict[str, str]) -> str:
    return record["token"].partition("/")[0]

"""Judges whether a run has lost, repeated or invented anything.

Modelled on Jepsen's `total-queue` checker, but that one accepts duplicates. Drain the queues
before judging.
"""

import json
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from servers.etcd import Change


@dataclass(frozen=True)
class Verdict:
    """The faults of a run, by event id; `double` has keys, each with its history.

    `torn` are records without their effect, and effects without a record.
    """

    confirmed: int
    lost: AbstractSet[str]
    unexpected: AbstractSet[str]
    torn: AbstractSet[str] = frozenset()
    double: dict[str, list[Change]] = field(default_factory=dict)

    def require(self, *, confirmed_at_least: int) -> None:
        """Raise AssertionError if the run has a fault, or is too small to prove anything.

        An event that was recorded although its confirm was never seen is no fault.
        """
        found = {name: getattr(self, name) for name in ("lost", "unexpected", "torn", "double")}
        faults = [
            f"{name}: {len(ids)}, such as {sorted(ids)[:5]}" for name, ids in found.items() if ids
        ]
        faults += [f"  {change}" for steps in list(self.double.values())[:3] for change in steps]
        if self.confirmed < confirmed_at_least:
            faults.append(f"only {self.confirmed} confirmed, {confirmed_at_least} required")
        if faults:
            raise AssertionError("\n".join(faults))


def judge(
    *,
    attempted: Iterable[str],
    confirmed: Iterable[str],
    recorded: Iterable[str],
    effected: Iterable[str] | None = None,
    parked: Iterable[str] = (),
    double: dict[str, list[Change]] | None = None,
) -> Verdict:
    """Compare what was sent with what one service has done, by event ids.

    `recorded` are the ids whose record is done, `effected` those whose effect is there (None for
    a service without effects), `parked` those in the dead-letter queue; `double` is from `doubles`.
    """
    attempted, confirmed, recorded = set(attempted), set(confirmed), set(recorded)
    return Verdict(
        confirmed=len(confirmed),
        lost=confirmed - recorded - set(parked),
        unexpected=recorded - attempted,
        torn=frozenset() if effected is None else recorded ^ set(effected),
        double=double or {},
    )


def doubles(history: Iterable[Change], *, claimed: tuple[str, ...] = ()) -> dict[str, list[Change]]:
    """Return the keys that were written more often than an event may write them.

    `history` has to be complete: no compaction, no window that expires. A record or an effect is
    put once and never deleted. The records under the prefixes in `claimed` are claimed first: a
    claim may come and go, but only one put says done, and it is the last.
    """
    steps: dict[str, list[Change]] = {}
    for change in history:
        steps.setdefault(change.key, []).append(change)
    return {
        key: changes
        for key, changes in steps.items()
        if _is_double(changes, claimed=bool(claimed) and key.startswith(claimed))
    }


def _is_double(changes: Sequence[Change], *, claimed: bool) -> bool:
    if not claimed:
        return [change.kind for change in changes] != ["put"]
    # A record that is never done is no double: its claim was released, and its event parked.
    before = (json.loads(change.value) for change in changes[:-1] if change.kind == "put")
    return any(record["state"] == "done" for record in before)

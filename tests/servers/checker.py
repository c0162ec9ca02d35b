"""Judge a run: whether anything was lost, done twice, or made up.

After Jepsen's `total-queue` checker, which lets duplicates pass; this one does not. Drain the
queues before judging.
"""

import json
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from servers.etcd import Change


@dataclass(frozen=True)
class Verdict:
    """The faults of a run by event id, and `double` by key with the key's history."""

    confirmed: int
    lost: AbstractSet[str]
    unexpected: AbstractSet[str]
    torn: AbstractSet[str] = frozenset()
    double: dict[str, list[Change]] = field(default_factory=dict)

    def require(self, *, confirmed_at_least: int) -> None:
        """Raise AssertionError unless the run is without fault and large enough to mean it.

        Events that landed although their confirm was never seen are no fault.
        `torn` are records without their effect, and effects without a record.
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
    """Compare what was sent with what one service has done, all as event ids.

    `recorded` are the ids whose record is done, `effected` those whose effect is there (None for
    a service without), `parked` those in the dead-letter queue, and `double` comes from `doubles`.
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

    `history` holds whole histories of records and effects, so: no compaction, no expiring window.
    Such a key is put once and never deleted. Under the prefixes in `claimed` lie records that
    are claimed first: there a claim may come and go, but only one put says done, and it is last.
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
    # Not done at all is no double: a claim that was released because its event is parked.
    before = (json.loads(change.value) for change in changes[:-1] if change.kind == "put")
    return any(record["state"] == "done" for record in before)

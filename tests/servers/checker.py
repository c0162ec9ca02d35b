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
        faults = [
            f"{name}: {len(found)}, such as {sorted(found)[:5]}"
            for name in ("lost", "unexpected", "torn", "double")
            if (found := getattr(self, name))
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
        if not (_one_done(changes) if claimed and key.startswith(claimed) else _one_put(changes))
    }


def _one_put(changes: Sequence[Change]) -> bool:
    return len(changes) == 1 and changes[0].kind == "put"


def _one_done(changes: Sequence[Change]) -> bool:
    # None at all is no double: a claim that was released because its event is parked.
    return not any(_is_done(change) for change in changes[:-1])


def _is_done(change: Change) -> bool:
    return change.kind == "put" and json.loads(change.value).get("state") == "done"

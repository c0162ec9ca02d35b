"""The marks: what the figures must reach for the project's promise of speed to hold."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .calls import SCENARIOS, Scenario
from .figures import Spread
from .ratios import IDLE, of_client, of_slots

_AT_LEAST = {
    "durable, no effect / ceiling": 0.50,
    "durable, one effect / ceiling": 0.40,
    "durable, no effect / ceiling, 128 operations": 0.42,
    "durable, one effect / ceiling, 128 operations": 0.30,
    "all duplicates, cache warm / ceiling": 0.70,
    "durable, no effect / naive": 25.0,
    "confirmed publishing / pika without confirms": 0.60,
    **{of_client(scenario): 0.40 for scenario in SCENARIOS if scenario.answer_ms == 0},
}
_SLOTS, _CLIENT = 0.9, 0.6
"""Of what the slots allow, or of the client alone, to a receiver that takes 100 ms: the less."""
_IDLE_AT_MOST = 2.0


class Mark(NamedTuple):
    """One figure and what it is held against."""

    what: str
    value: float
    target: str
    met: bool

    def __str__(self) -> str:
        return f"{'met' if self.met else 'MISSED'}: {self.what}: {self.value:.3g}, {self.target}"


def verdict(marks: Sequence[Mark]) -> tuple[str, bool]:
    """Return the last line of a run, and whether each mark is met."""
    missed = [mark.what for mark in marks if not mark.met]
    if not missed:
        return f"All {len(marks)} marks are met.", True
    return f"{len(missed)} of {len(marks)} marks MISSED: {'; '.join(missed)}", False


def judge(found: Mapping[str, Spread]) -> list[Mark]:
    """Return every mark with its verdict, by the median of its ratio."""
    over_bare = 1 / found[IDLE].median
    return [
        *(
            Mark(name, found[name].median, f"at least {least:g}", found[name].median >= least)
            for name, least in _AT_LEAST.items()
        ),
        *(_slow(found, scenario) for scenario in SCENARIOS if scenario.answer_ms == 100),
        Mark(
            "publish to recorded, idle / bare steps, medians",
            over_bare,
            f"at most {_IDLE_AT_MOST:g}",
            over_bare <= _IDLE_AT_MOST,
        ),
    ]


def _slow(found: Mapping[str, Spread], scenario: Scenario) -> Mark:
    """Judge calls to a slow receiver: the value is what they reach of the lesser bound."""
    slots, client = found[of_slots(scenario)].median, found[of_client(scenario)].median
    reached = max(slots / _SLOTS, client / _CLIENT)
    return Mark(
        f"calls / ({_SLOTS:g} of the slots or {_CLIENT:g} of the client alone): {scenario.name}",
        reached,
        "at least 1",
        reached >= 1,
    )

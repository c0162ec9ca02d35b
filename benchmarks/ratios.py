"""The ratios of a run: what is kept in the repository, and what a later run is held against.

Ratios of one run, since a rate alone says more about the machine. More is better in all of them:
the latency's is of the bare steps to the service's time.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .calls import SCENARIOS, Scenario
from .figures import Spread, per_s, ratio
from .progress import Rates
from .publishing import CONFIRMED, UNCONFIRMED
from .results import Results
from .subjects import (
    BARE,
    BARE_SMALL,
    CEILING,
    DUPLICATES,
    HALF,
    NAIVE,
    ORDER,
    ORDER_SMALL,
)

KEPT = Path(__file__).parent / "results" / "ratios.json"
"""Those that the repository keeps."""

_CONSUMING = {
    "durable, no effect / ceiling": (BARE, CEILING),
    "durable, one effect / ceiling": (ORDER, CEILING),
    "durable, no effect / ceiling, 128 operations": (BARE_SMALL, CEILING),
    "durable, one effect / ceiling, 128 operations": (ORDER_SMALL, CEILING),
    "half duplicates / ceiling": (HALF, CEILING),
    "all duplicates, cache warm / ceiling": (DUPLICATES, CEILING),
    "durable, no effect / naive": (BARE, NAIVE),
}
_PUBLISHING = {"confirmed publishing / pika without confirms": (CONFIRMED, UNCONFIRMED)}
IDLE = "bare steps / publish to recorded, idle, medians"


def ratios(results: Results) -> dict[str, Spread]:
    """Return each ratio by its name; the idle latency's is one of medians, without a spread."""
    bare_over_recorded = 1 / results.idle.over_bare
    return {
        **{name: ratio(results.consuming, *pair) for name, pair in _CONSUMING.items()},
        **{
            of_client(scenario): ratio(results.calls, scenario.name, scenario.alone)
            for scenario in SCENARIOS
        },
        **{
            of_slots(scenario): _share_of_slots(results.calls, scenario, most_per_s)
            for scenario in SCENARIOS
            if (most_per_s := scenario.most_per_s)
        },
        **{name: ratio(results.publishing, *pair) for name, pair in _PUBLISHING.items()},
        IDLE: Spread(bare_over_recorded, bare_over_recorded, bare_over_recorded),
    }


def of_client(scenario: Scenario) -> str:
    """Return the name of the ratio of calls for events to the same calls by the client alone."""
    return f"calls / client alone: {scenario.name}"


def of_slots(scenario: Scenario) -> str:
    """Return the name of the ratio of calls for events to those that their slots allow."""
    return f"calls / what the slots allow: {scenario.name}"


def _share_of_slots(rounds: Sequence[Rates], scenario: Scenario, most_per_s: float) -> Spread:
    return Spread(*(rate / most_per_s for rate in per_s(rounds, scenario.name)))


def medians(found: Mapping[str, Spread]) -> dict[str, float]:
    """Return what of the ratios is kept."""
    return {name: round(spread.median, 4) for name, spread in found.items()}


def write_ratios(path: Path, found: Mapping[str, float]) -> None:
    """Keep ratios."""
    path.write_text(json.dumps(found, indent=1) + "\n")


def read_ratios(path: Path) -> dict[str, float]:
    """Read what is kept; raises OSError, or ValueError for what are no ratios."""
    kept: object = json.loads(path.read_text())
    if not isinstance(kept, dict) or not all(_is_ratio(value) for value in kept.values()):
        raise ValueError(f"{path} does not hold ratios by name")
    return kept


def _is_ratio(value: object) -> bool:
    return isinstance(value, int | float) and value > 0

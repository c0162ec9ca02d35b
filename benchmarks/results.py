"""Everything that one run has found, and how it is kept as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .figures import percentile
from .latency import Latencies
from .loads import Load
from .percentiles import PER_MILLE
from .progress import Rates


@dataclass
class Results:
    """One run. `events` are of one series of one subject; each list has one entry a round."""

    machine: Mapping[str, str]
    events: int
    consuming: Sequence[Rates]
    publishing: Sequence[Rates]
    idle: Latencies
    sweep: Sequence[Rates] = field(default_factory=list)
    loads: Sequence[Load] = field(default_factory=list)


def write_figures(path: Path, results: Results) -> None:
    """Write the raw figures: the rates of each round, the percentiles of each load."""
    document = {
        "machine": dict(results.machine),
        "events": results.events,
        **{name: [_rates(rates) for rates in getattr(results, name)]
           for name in ("consuming", "publishing", "sweep")},
        "loads": [_load(load) for load in results.loads],
        "idle": asdict(results.idle),
    }
    path.write_text(json.dumps(_rounded(document), indent=1) + "\n")


def _rates(rates: Rates) -> dict[str, object]:
    return {name: rate._asdict() for name, rate in rates.items()}


def _load(load: Load) -> dict[str, object]:
    fields = load._asdict()
    del fields["recorded_ms"]  # Hundreds of thousands.
    return {**fields, "samples": len(load.recorded_ms), **{
        name: percentile(load.recorded_ms, per_mille) for name, per_mille in PER_MILLE.items()
    }}


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value

"""A long run as a table, a line a minute, and the verdict whether anything grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import median
from typing import NamedTuple

from .markdown import table
from .marks import Mark
from .steadily import Run, Sample

_MB = 1_000_000
_MORE_AT_MOST = 1.10
SHORTEST_TO_JUDGE_S = 540
"""Its first third has to hold the window and two compactions; before that everything grows."""


class Setting(NamedTuple):
    """What a run was made with, in seconds. Records go to a lease of ``lease_s``."""

    window_s: int
    lease_s: int
    compaction: str


def report(machine: str, setting: Setting, run: Run) -> tuple[str, bool]:
    """Return the report in Markdown, and whether nothing grew."""
    marks = _judge(setting, run)
    too_short = run.samples[-1].at_s < SHORTEST_TO_JUDGE_S
    text = "\n".join(
        (
            "# At full rate for a while",
            "",
            machine,
            "",
            f"`DEDUP_WINDOW={setting.window_s}s`, no effect, etcd with `{setting.compaction}`.",
            "Medians of each minute; of the oldest lease's age the most. MB are 10⁶ bytes.",
            "",
            table(_minutes(run.samples)),
            "",
            *_endings(setting, run),
            "",
            *(["Too short a run to be judged."] if too_short else [f"- {mark}" for mark in marks]),
        )
    )
    return text, too_short or all(mark.met for mark in marks)


_COLUMNS: tuple[tuple[str, Callable[[Sample], float], str], ...] = (
    ("service MB", lambda s: s.memory / _MB, ",.1f"),
    ("etcd MB", lambda s: s.etcd.memory / _MB, ",.0f"),
    ("file MB", lambda s: s.etcd.file / _MB, ",.0f"),
    ("in use MB", lambda s: s.etcd.used / _MB, ",.0f"),
    ("records", lambda s: s.etcd.keys, ",.0f"),
    ("leases", lambda s: s.etcd.leases, ",.0f"),
    ("ready", lambda s: s.ready, ",.0f"),
)


def _minutes(samples: Sequence[Sample]) -> list[list[str]]:
    head = ["minute", "events/s", *(name for name, _, _ in _COLUMNS), "oldest lease s"]
    ages_s = dict(zip(samples, oldest_lease_s(samples), strict=True))
    rows = []
    for minute, found in groupby(samples, lambda sample: int(sample.at_s // 60)):
        group = list(found)
        if len(group) > 1:
            rows.append(
                [
                    str(minute + 1),
                    f"{_rate(group):,.0f}",
                    *(format(median(map(of, group)), style) for _, of, style in _COLUMNS),
                    f"{max(ages_s[sample] for sample in group):.0f}",
                ]
            )
    return [head, *rows]


def _endings(setting: Setting, run: Run) -> list[str]:
    before, emptied = run.samples[-1].etcd, run.emptied
    used_mb, file_mb = emptied.etcd.used / _MB, emptied.etcd.file / _MB
    return [
        f"- {run.published:,} events were published, and {run.recorded:,} recorded.",
        f"- Leases were granted for {setting.lease_s} s; at the end {before.leases} were there.",
        (
            f"- Without load the last record was gone after {emptied.gone_s:.0f} s, with its lease "
            f"({emptied.etcd.leases} were left)."
        ),
        (
            f"- Its space was free after {emptied.freed_s:.0f} s: {used_mb:,.1f} MB in use, where "
            f"it was {before.used / _MB:,.0f}. The file keeps {file_mb:,.0f} MB for what comes "
            "next."
        ),
    ]


def _judge(setting: Setting, run: Run) -> list[Mark]:
    """Hold the last third against the one before it; the first is left out, there all grows."""
    third = len(run.samples) // 3
    middle, last = run.samples[third : 2 * third], run.samples[2 * third :]

    def grows(what: str, of: Callable[[Sample], float]) -> Mark:
        ratio = median(map(of, last)) / median(map(of, middle))
        return Mark(
            f"{what}, last third ÷ the one before",
            ratio,
            f"at most {_MORE_AT_MOST}",
            ratio <= _MORE_AT_MOST,
        )

    marks = [grows(name, of) for name, of, _ in _COLUMNS[:6]]
    slower = _rate(last) / _rate(middle)
    late_s = max(oldest_lease_s(run.samples)) - setting.lease_s
    return [
        *marks,
        Mark("events/s, last third ÷ the one before", slower, "at least 0.9", slower >= 0.9),
        Mark("the oldest lease, s over its time", late_s, "at most 15", late_s <= 15),
    ]


def _rate(samples: Sequence[Sample]) -> float:
    first, last = samples[0], samples[-1]
    return (last.etcd.written - first.etcd.written) / (last.at_s - first.at_s)


def oldest_lease_s(samples: Sequence[Sample]) -> list[float]:
    """Return how old the oldest lease was at each sample, from above, to within two samples.

    Leases all last equally long, so the first that is not revoked yet is the oldest.
    """
    ages_s, granted_before = [], 0
    for sample in samples:
        while (
            granted_before + 1 < len(samples)
            and samples[granted_before + 1].etcd.granted <= sample.etcd.revoked
        ):
            granted_before += 1
        ages_s.append(max(0.0, sample.at_s - samples[granted_before].at_s))
    return ages_s

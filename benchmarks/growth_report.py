"""What a history costs by its length: the table, and the marks that the longest is held to."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from .figures import Spread, show
from .growing import Grown
from .markdown import table
from .marks import Mark

_MB = 1_000_000


def report(machine: str, grown: Sequence[Grown], deletion_bytes: float) -> tuple[str, bool]:
    """Return the report in Markdown, and whether each mark is met. The first size is empty."""
    empty, longest = grown[0], grown[-1]
    marks = _judge(empty, longest)
    return "\n".join(
        (
            "# What a longer history costs",
            "",
            machine,
            "",
            (
                f"{len(empty.starts)} starts at each size; median (least to greatest). "
                "MB are 10⁶ bytes."
            ),
            "",
            table(
                [
                    ["records in etcd at the start"] + [f"{g.records:,}" for g in grown],
                    *_rows(empty, grown),
                ]
            ),
            "",
            f"Deleted, a record took {deletion_bytes:,.0f} bytes more, until etcd compacts.",
            "",
            *(f"- {mark}" for mark in marks),
        )
    ), all(mark.met for mark in marks)


def _rows(empty: Grown, grown: Sequence[Grown]) -> list[list[str]]:
    longer = grown[1:]
    return [
        [
            "process start to first event recorded, ms",
            *(show(_first_ms(g), "{:,.0f}".format) for g in grown),
        ],
        ["the same ÷ empty", "", *(f"{_slowdown(empty, g):.2f}" for g in longer)],
        ["import, s", *(show(_import_s(g), "{:.2f}".format) for g in grown)],
        ["service's memory after it, MB", *(f"{_memory(g) / _MB:,.1f}" for g in grown)],
        [
            "the same a record, less the empty service's, bytes",
            "",
            *(f"{_memory_per_record(empty, g):,.0f}" for g in longer),
        ],
        [
            "duplicates skipped / transactions etcd saw",
            "",
            *(f"{g.repeats.events:,} / {g.repeats.transactions:,}" for g in longer),
        ],
        ["new events recorded a second", *(f"{g.rate.events_per_s:,.0f}" for g in grown)],
        ["etcd's file in use, MB", *(f"{g.etcd.used / _MB:,.1f}" for g in grown)],
        [
            "the same a record, bytes",
            "",
            *(f"{(g.etcd.used - empty.etcd.used) / g.records:,.0f}" for g in longer),
        ],
        ["etcd's file on disk, MB", *(f"{g.etcd.file / _MB:,.1f}" for g in grown)],
        [
            "etcd's memory, its mapped file included, MB",
            *(f"{g.etcd.memory / _MB:,.1f}" for g in grown),
        ],
    ]


def _judge(empty: Grown, longest: Grown) -> list[Mark]:
    name = f"{longest.records:,} records"
    slowdown, import_s = _slowdown(empty, longest), _import_s(longest).median
    memory, asked = _memory_per_record(empty, longest), longest.repeats.transactions
    return [
        Mark(
            f"{name}: first event recorded ÷ empty start", slowdown, "at most 1.5", slowdown <= 1.5
        ),
        Mark(f"{name}: import, s", import_s, "at most 5", import_s <= 5),
        Mark(f"{name}: resident bytes a record", memory, "at most 100", memory <= 100),
        Mark(
            f"{name}: transactions for {longest.repeats.events:,} duplicates",
            asked,
            "none",
            asked == 0,
        ),
    ]


def _first_ms(grown: Grown) -> Spread:
    return Spread.of(start.first_ms for start in grown.starts)


def _slowdown(empty: Grown, grown: Grown) -> float:
    return _first_ms(grown).median / _first_ms(empty).median


def _import_s(grown: Grown) -> Spread:
    return Spread.of(start.imported.seconds for start in grown.starts)


def _memory(grown: Grown) -> float:
    return median(start.memory_bytes for start in grown.starts)


def _memory_per_record(empty: Grown, grown: Grown) -> float:
    return (_memory(grown) - _memory(empty)) / grown.records

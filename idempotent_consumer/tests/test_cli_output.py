"""How numbers, times and strangers' texts are written."""

from __future__ import annotations

import pytest

from idempotent_consumer.cli.output import counted, duration, plain, size, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.9, "0s"),
        (59, "59s"),
        (60, "1m"),
        (3661, "1h 1m"),
        (86_400, "1d"),
        (90_061, "1d 1h"),
        (31 * 86_400, "31d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (8 << 30, "8.0 GiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text


def test_numbers() -> None:
    assert [counted(n, "event") for n in (0, 1, 2000)] == ["0 events", "1 event", "2,000 events"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("ü ☃", "ü ☃"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udcff", "\\udcff"),
        ("x" * 20, "x" * 9 + "…"),
    ],
)
def test_a_strangers_text_does_nothing_to_a_terminal(text: str, shown: str) -> None:
    assert plain(text, 10 if len(text) > 15 else 200) == shown


def test_a_table() -> None:
    assert table([{"A": "bb", "LONG": "1"}, {"A": "c", "LONG": ""}]) == "A   LONG\nbb  1\nc"

"""What a verb has to say: once as JSON, once for people."""

from __future__ import annotations

from typing import NamedTuple


class Report(NamedTuple):
    """A verb's result. ``ok`` False makes the exit code 1."""

    document: dict[str, object]
    text: str
    ok: bool = True

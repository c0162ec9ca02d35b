"""Lines as they arrive: many at a time from a file, one at a time from somebody who types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from ..event import MAX_BODY_BYTES

_READ_BYTES = 1024 * 1024


class Input(Protocol):
    """Standard input, or a file."""

    def read1(self, size: int, /) -> bytes:
        """Return what is there, at least a byte; nothing at the end."""
        ...

    def readline(self) -> bytes:
        """Return one line."""
        ...

    def isatty(self) -> bool:
        """Return whether a person types it."""
        ...


class Line(NamedTuple):
    """A line with its place, for the person who has to find it."""

    place: str
    body: bytes


def chunks(source: Input) -> Iterator[list[Line]]:
    """Yield the lines that each read brings, without blank ones.

    A line that nothing takes for its length is handed on unfinished, so memory stays bounded.
    """
    number, rest = 0, b""
    while data := source.read1(_READ_BYTES):
        *whole, rest = (rest + data).split(b"\n")
        if len(rest) > MAX_BODY_BYTES:
            whole, rest = [*whole, rest], b""
        if whole:
            yield _lines(whole, number)
            number += len(whole)
    if rest.strip():
        yield _lines([rest], number)


def _lines(bodies: list[bytes], before: int) -> list[Line]:
    return [
        Line(f"line {number}", body)
        for number, raw in enumerate(bodies, before + 1)
        if (body := raw.strip())
    ]

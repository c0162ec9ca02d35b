"""Which dead letters are meant."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .arguments import positive, service
from .dead_letter_queue import Letter
from .errors import UsageError


class Selection(NamedTuple):
    """The letters that have this reason, type and id, each where given; at most so many."""

    reason: str | None
    type: str | None
    id: str | None
    limit: int | None

    def of(self, letters: Iterable[Letter]) -> Iterator[Letter]:
        """Yield those, and read on to the last letter, so that all go back in their order."""
        for number, letter in enumerate(self.meant(letters), 1):
            if self.limit is None or number <= self.limit:
                yield letter

    def meant(self, letters: Iterable[Letter]) -> Iterator[Letter]:
        """Yield those, however many."""
        return filter(self._means, letters)

    @property
    def any(self) -> bool:
        """Whether nothing narrows it."""
        return (self.reason, self.type, self.id, self.limit) == (None, None, None, None)

    def _means(self, letter: Letter) -> bool:
        event = letter.event
        return (
            self.reason in (None, letter.reason)
            and self.type in (None, event and event.type)
            and self.id in (None, event and event.id)
        )


def add_selection(parser: argparse.ArgumentParser, limit: int | None = None) -> None:
    """Add the arguments that select."""
    parser.add_argument("service", type=service, metavar="SERVICE")
    parser.add_argument("--reason", help="invalid, conflict, failed, or RabbitMQ's delivery_limit")
    parser.add_argument("--type", help="the event's type")
    parser.add_argument("--id", help="the event's id")
    parser.add_argument(
        "--limit",
        type=positive,
        default=limit,
        metavar="N",
        help="at most so many" + (f" (default {limit})" if limit else ""),
    )


def add_all(parser: argparse.ArgumentParser) -> None:
    """Add what has to be said where nothing narrows the selection."""
    parser.add_argument("--all", action="store_true", help="all that there are")


def selection(arguments: argparse.Namespace) -> Selection:
    """Return what was selected. Raises UsageError for all of them where that was not said."""
    chosen = Selection(arguments.reason, arguments.type, arguments.id, arguments.limit)
    if chosen.any and not arguments.all:
        raise UsageError("say which: --id, --type, --reason, --limit, or --all")
    return chosen

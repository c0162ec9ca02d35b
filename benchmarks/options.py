"""What both commands take: how many rounds, of how many events."""

import argparse
from collections.abc import Callable

from .measuring import LEAST_EVENTS

EVENTS = 40_000


def parser(program: str, description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with these two options; `rounds` is the default."""
    options = argparse.ArgumentParser(prog=program, description=description)
    options.add_argument("--rounds", type=_at_least(1), default=rounds, help=f"default {rounds}")
    options.add_argument(
        "--events",
        type=_at_least(LEAST_EVENTS),
        default=EVENTS,
        help=f"of a series, at least {LEAST_EVENTS}; default {EVENTS}",
    )
    return options


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number

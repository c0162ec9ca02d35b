"""``dead-letters``: what could not be processed, and what becomes of it."""

from __future__ import annotations

import argparse
from typing import Any

from . import dropping, listing, replaying, showing


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb, with verbs of its own."""
    parser = verbs.add_parser("dead-letters", help="list, show, replay or drop dead letters")
    own = parser.add_subparsers(required=True, metavar="VERB")
    for verb in (listing, showing, replaying, dropping):
        verb.add(own, common)

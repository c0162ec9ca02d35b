"""How the command's own arguments are read."""

from __future__ import annotations

import argparse

from ..names import check_service_name
from ..settings import duration_s
from .web import is_address


def seconds(text: str) -> int:
    """Read a time as the settings write it, as in ``30s`` or ``10m``."""
    try:
        return duration_s(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """Read a whole number from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError("write a whole number from 1")
    return int(text)


def service(text: str) -> str:
    """Read the name of a service."""
    try:
        return check_service_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_services(parser: argparse.ArgumentParser) -> None:
    """Add the names of services, any number of them."""
    parser.add_argument(
        "service",
        nargs="*",
        type=service,
        metavar="SERVICE",
        help="a service; without any, all that have a dead-letter queue",
    )


def address(text: str) -> str:
    """Read the URL of a server."""
    if not is_address(text):
        raise argparse.ArgumentTypeError("write http://host:port")
    return text

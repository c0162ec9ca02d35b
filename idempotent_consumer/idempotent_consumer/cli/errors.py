"""What ends a verb before its work is done."""

from __future__ import annotations

from collections.abc import Mapping


class CommandError(Exception):
    """A foreseeable thing went wrong; the message says in one line what, and what to do.

    ``document`` is what there is to tell of it as JSON, beside the message.
    """

    exit_code = 1

    def __init__(self, message: str, document: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.document = dict(document or {})


class UsageError(CommandError):
    """The command was called in a way that makes no sense."""

    exit_code = 2

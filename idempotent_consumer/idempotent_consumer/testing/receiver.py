"""A fake receiver: what claimed handlers call in a test, in place of what they call outside."""

from __future__ import annotations

from collections import deque
from typing import Any


class Receiver:
    """Takes the calls of claimed handlers, and knows a repeat by its idempotency key.

    Have your code call ``take`` where it would call outside, or ``take_async`` from an
    ``async def``. The ``answers`` are for the first calls, in their order, and ``answer`` is for
    the others: an exception is raised, anything else is returned. What a call brings is stored,
    unless its answer is an exception or an HTTP status other than 2xx.

    A repeat of what is stored is answered as the first time, uses up no answer, and stores nothing.
    A call without a key is never a repeat.
    """

    def __init__(self, *answers: object, answer: object = 200) -> None:
        self._answers, self._answer = deque(answers), answer
        self._answered: dict[str, object] = {}
        self._stored: list[tuple[str | None, object]] = []
        self.calls: list[tuple[str | None, object]] = []
        """Each call's key and content, repeats and failures included."""

    def take(self, key: str | None, content: object = None) -> Any:
        """Take a call, and return its answer, or raise it where it is an exception."""
        self.calls.append((key, content))
        if key is not None and key in self._answered:
            return self._answered[key]
        answer = self._answers.popleft() if self._answers else self._answer
        if isinstance(answer, BaseException):
            raise answer
        if not isinstance(answer, int) or isinstance(answer, bool) or 200 <= answer < 300:
            self._stored.append((key, content))
            if key is not None:
                self._answered[key] = answer
        return answer

    async def take_async(self, key: str | None, content: object = None) -> Any:
        """Do the same for code that awaits it."""
        return self.take(key, content)

    def stored(self) -> list[tuple[str | None, object]]:
        """Return the key and content of what is stored, in no order that calls have made.

        It is what `check_duplicates` and `check_crashes` compare: hand it to them as the outside.
        """
        return sorted(self._stored, key=repr)

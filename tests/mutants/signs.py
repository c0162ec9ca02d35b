"""What a suite says of the code it ran on: a judgement, a crash, or nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

ENDED_BY_AN_EXCEPTION = "an exception ended the process:"
"""How the simulation names what the library raised out of a step."""


@dataclass(frozen=True)
class Sign:
    """The first thing that a suite has found wrong.

    ``judged``: it is a judgement, that is a violation or a failed assertion. Otherwise the code
    or the suite raised something else, which proves nothing: a misspelt name does that as well.
    """

    what: str
    judged: bool


@dataclass(frozen=True)
class Outcome:
    """What became of one run of a suite. ``broken`` of ``runs`` showed a fault, where counted."""

    sign: Sign | None
    runs: int = 0
    broken: int = 0

    def to_json(self) -> str:
        """Write it in one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Outcome:
        """Read what ``to_json`` wrote; raises ValueError for anything else."""
        members = json.loads(line)
        sign = members["sign"]
        return cls(Sign(**sign) if sign else None, members["runs"], members["broken"])


def of_violation(seed: int, violation: str) -> Sign:
    """Return what a violation in a simulated run is a sign of."""
    crashed = violation.startswith(ENDED_BY_AN_EXCEPTION)
    return Sign(f"seed {seed}: {_one_line(violation)}", judged=not crashed)


def of_exception(where: str, error: BaseException) -> Sign:
    """Return what an exception in a test is a sign of."""
    text = str(error) or type(error).__name__
    return Sign(f"{where}: {_one_line(text)}", judged=is_judgement(error))


def is_judgement(error: BaseException) -> bool:
    """Return whether a test has failed by its own words and not by some other exception."""
    if isinstance(error, BaseExceptionGroup):  # Hypothesis, where it found several failures.
        return all(map(is_judgement, error.exceptions))
    # pytest.fail, and pytest.raises without an exception, raise pytest's own Failed.
    return isinstance(error, AssertionError) or type(error).__name__ == "Failed"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]

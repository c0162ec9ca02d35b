"""The guard: which ratios have fallen since those that the repository keeps."""

from collections.abc import Mapping
from typing import NamedTuple

ALLOWED_FALL = 0.20


class Compared(NamedTuple):
    """One ratio, kept and measured now; None where it is missing."""

    name: str
    kept: float | None
    now: float | None

    @property
    def passes(self) -> bool:
        """Whether it has neither fallen by more than is allowed nor got lost."""
        if self.kept is None:
            return True
        return self.now is not None and self.now >= (1 - ALLOWED_FALL) * self.kept

    def __str__(self) -> str:
        if self.kept is None:
            return f"new      {self.name}: {self.now:.3f}, not kept yet: make bench keeps it"
        if self.now is None:
            return f"MISSING  {self.name}: kept {self.kept:.3f}, not measured now"
        verdict = "ok  " if self.passes else "FELL"
        percent = 100 * (self.now / self.kept - 1)
        return (
            f"{verdict}     {self.name}: "
            f"kept {self.kept:.3f}, now {self.now:.3f} ({percent:+.0f} %)"
        )


def compare(kept: Mapping[str, float], now: Mapping[str, float]) -> list[Compared]:
    """Compare by name, in the order in which they were kept; what is new comes last."""
    names = [*kept, *(name for name in now if name not in kept)]
    return [Compared(name, kept.get(name), now.get(name)) for name in names]

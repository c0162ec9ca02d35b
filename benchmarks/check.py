"""Measure the ratios and say which have fallen by more than a fifth since those that are kept."""

import sys

from harness.packages import ServersUnavailableError

from .comparing import compare
from .measuring import start_measuring
from .options import parser
from .progress import NotMeasuredError
from .ratios import KEPT, medians, ratios, read_ratios

_ROUNDS = 3
_NO_RATIOS = (OSError, ValueError, ServersUnavailableError, NotMeasuredError, AssertionError)


def main() -> int:
    """Return 0 if all ratios hold, 1 if one has fallen or is gone, 2 if there are none to tell."""
    chosen = parser("python -m benchmarks.check", __doc__, _ROUNDS).parse_args()
    try:
        kept = read_ratios(KEPT)
        with start_measuring(chosen.rounds, chosen.events) as measuring:
            now = medians(ratios(measuring.ratios_only()))
    except _NO_RATIOS as error:
        print(f"bench-check: {error}", file=sys.stderr)
        return 2
    compared = compare(kept, now)
    for each in compared:
        print(each)
    return int(not all(each.passes for each in compared))


if __name__ == "__main__":
    sys.exit(main())

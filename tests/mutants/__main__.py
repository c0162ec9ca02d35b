"""``python -m mutants``: break the code, one mutant at a time, and see which the tests catch."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from mutants.bench import SEEDS, run_suite
from mutants.catalogue import Mutant, OutOfDate, read_catalogue
from mutants.probe import Outcome


def main() -> int:
    """Run the suites on the code as it is, then on each mutant; return 0 if all are caught."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--only", default="", help="the mutants whose name contains this")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="the most simulated runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    arguments = parser.parse_args()
    mutants = [one for one in read_catalogue() if arguments.only in one.name]
    suites = sorted({mutant.suite for mutant in mutants})
    run = partial(run_suite, seeds=arguments.seeds)
    started_s = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            # A suite that fails on the code as it is would catch every mutant.
            unmutated = zip(suites, pool.map(run, suites), strict=True)
            if failures := [f"{suite}: {found.sign}" for suite, found in unmutated if found.sign]:
                for failure in failures:
                    print(f"mutants: nothing is proven: {failure}", file=sys.stderr)
                return 1
            print(f"the code as it is passes ({time.monotonic() - started_s:.0f} s)\n", flush=True)
            outcomes = pool.map(lambda mutant: run(mutant.suite, mutant), mutants)
            caught = _show(zip(mutants, outcomes, strict=True))
        except OutOfDate as error:
            pool.shutdown(cancel_futures=True)
            print(f"mutants: {error}", file=sys.stderr)
            return 1
    print(f"\n{caught} of {len(mutants)} caught, {time.monotonic() - started_s:.0f} s")
    return 0 if mutants and caught == len(mutants) else 1


def _show(results: Iterable[tuple[Mutant, Outcome]]) -> int:
    """Print a row for each mutant as it is judged; return how many are caught."""
    caught = 0
    print(f"{'mutant':44} {'caught by':26} the first sign")
    for mutant, outcome in results:
        caught += outcome.judged
        by = mutant.suite if outcome.judged else "NOT CAUGHT"
        what = outcome.sign or f"nothing: {mutant.wrong}"
        if outcome.sign and not outcome.judged:
            what = f"a crash, which proves nothing: {what}"
        print(f"{mutant.name:44} {by:26} {what[:150]}", flush=True)
    return caught


if __name__ == "__main__":
    sys.exit(main())

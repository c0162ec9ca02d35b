"""``python -m mutants``: let the suite judge each deliberate fault; 0 where it finds them all."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from mutants.bench import SEEDS, Options, run_suite
from mutants.catalogue import Mutant, OutOfDate, read_catalogue
from mutants.signs import Outcome


def main() -> int:
    """Judge the unmutated code, then each mutant; return the exit code."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at most so many simulated runs")
    parser.add_argument(
        "--rates",
        action="store_true",
        help="do all the runs and tell how many of them show each fault",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    arguments = parser.parse_args()
    options = Options(arguments.seeds, arguments.rates)
    mutants = [one for one in read_catalogue() if arguments.only in one.name]
    started_s = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            if not _unmutated_passes(pool, mutants, options):
                return 1
            print(f"the code as it is passes ({time.monotonic() - started_s:.0f} s)\n", flush=True)
            outcomes = pool.map(lambda one: run_suite(one.suite, one, options), mutants)
            caught = _show(zip(mutants, outcomes, strict=True))
        except OutOfDate as error:
            pool.shutdown(cancel_futures=True)
            print(f"mutants: {error}", file=sys.stderr)
            return 1
    print(f"\n{caught} of {len(mutants)} caught, {time.monotonic() - started_s:.0f} s")
    return 0 if mutants and caught == len(mutants) else 1


def _unmutated_passes(pool: ThreadPoolExecutor, mutants: list[Mutant], options: Options) -> bool:
    """Run the suites on the code as it is: one that fails there would catch everything."""
    suites = sorted({mutant.suite for mutant in mutants})
    outcomes = pool.map(lambda suite: run_suite(suite, None, options), suites)
    failures = [
        f"{suite}: {outcome.sign.what}"
        for suite, outcome in zip(suites, outcomes, strict=True)
        if outcome.sign
    ]
    for failure in failures:
        print(
            f"mutants: the code as it is does not pass, so nothing is proven: {failure}",
            file=sys.stderr,
        )
    return not failures


def _show(results: Iterable[tuple[Mutant, Outcome]]) -> int:
    """Print a row for each mutant as it is judged; return how many are caught."""
    caught = 0
    print(f"{'mutant':44} {'caught by':26} the first sign")
    for mutant, outcome in results:
        sign = outcome.sign
        found = sign is not None and sign.judged
        caught += found
        by = mutant.suite.rpartition("/")[2] if found else "NOT CAUGHT"
        what = sign.what if sign else f"nothing: {mutant.wrong}"
        if sign and not sign.judged:
            what = f"a crash, which proves nothing: {what}"
        share = f"[{outcome.broken} of {outcome.runs} runs] " if outcome.broken > 1 else ""
        print(f"{mutant.name:44} {by:26} {share}{what[:150]}", flush=True)
    return caught


if __name__ == "__main__":
    sys.exit(main())

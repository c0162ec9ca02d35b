"""``python -m simulation``: many runs on all cores, or one that is shown step by step."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from multiprocessing import get_context

from simulation.world import run_seeds, simulate

_CHUNK = 50
_SAY_EVERY_S = 10.0


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first run's seed")
    parser.add_argument("--seed", type=int, help="do this one run, and show it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    options = parser.parse_args()
    if options.seed is not None:
        return _show(options.seed)
    return _run_many(options.first, options.seeds, options.jobs)


def _show(seed: int) -> int:
    run = simulate(seed).run
    print(run.report())
    if run.violations:
        print(
            f"{len(run.violations)} violations. Replay: make simulation SEED={seed}, or "
            f"python -m simulation --seed {seed}",
            flush=True,
        )
        return 1
    print("no violation")
    return 0


def _run_many(first: int, seeds: int, jobs: int) -> int:
    """Run seeds in several processes, in their order; print what has fired."""
    last = first + seeds
    chunks = [range(start, min(start + _CHUNK, last)) for start in range(first, last, _CHUNK)]
    context = get_context("forkserver")
    context.set_forkserver_preload(["simulation.world"])
    total = Counter[str]()
    started_s = said_s = time.monotonic()
    # A new process for each chunk: its memory ends with it, without garbage collection.
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        for fired, broken in pool.imap(run_seeds, chunks):
            if broken is not None:
                return _show(broken)
            total += fired
            if time.monotonic() - said_s > _SAY_EVERY_S:
                said_s = time.monotonic()
                rate = total["runs"] / (said_s - started_s)
                print(f"{total['runs']} of {seeds} runs, no violation, {rate:.0f} a second")
                sys.stdout.flush()
    runs, confirmed, acked = (total.pop(what) for what in ("runs", "confirmed", "acked"))
    for kind, times in sorted(total.items(), key=lambda item: (-item[1], item[0])):
        print(f"{times:10} {kind}")
    print(
        f"{runs} runs from seed {first}, {confirmed} confirmed, {acked} acked, "
        f"no violation, {time.monotonic() - started_s:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One run, from the start of the servers to its results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from harness.servers import Servers, start_servers
from harness.statsd import listen_statsd

from . import latency
from .calls import SCENARIOS, call_alone
from .loads import SECONDS, Load, run_load
from .machine import describe
from .progress import Rates
from .publishing import PUBLISHERS, publish_once
from .results import Results
from .sink import run_sink
from .subjects import BATCH_SIZES, LARGE, Subject, bare, claimed, compared, prefetch, sweep
from .throughput import run_once

LEAST_EVENTS = 4 * prefetch({"BATCH_SIZE": str(max(BATCH_SIZES))})
"""The first prefetch window does not count, nor do the outer tenths: half of it has to be left."""

SWEEP_ROUNDS = 3
"""Of the sweep, at most: it is for a picture."""

Run = Callable[[], Rates]


class Measuring:
    """Measures on servers that run; `rounds` of `events` each."""

    def __init__(
        self, servers: Servers, statsd: Mapping[str, str], sink_url: str, rounds: int, events: int
    ) -> None:
        self._servers, self._statsd, self._sink_url = servers, statsd, sink_url
        self._rounds, self._events = rounds, events
        self._machine = describe(servers)

    def ratios_only(self) -> Results:
        """Measure what the ratios are made of."""
        consumers = self._consumers(compared(self._servers, self._statsd))
        publishers = [
            partial(publish_once, self._servers, name, self._events) for name in PUBLISHERS
        ]
        return Results(
            machine=self._machine,
            events=self._events,
            consuming=_run_rounds("consuming", consumers, self._rounds),
            calls=_run_rounds("calls", self._calls(), self._rounds),
            publishing=_run_rounds("publishing", publishers, self._rounds),
            idle=latency.measure(self._servers, self._bare),
        )

    def everything(self) -> Results:
        """Measure the ratios, the batch sizes and the loads."""
        results = self.ratios_only()
        points = self._consumers(sweep(self._servers, self._statsd))
        results.sweep = _run_rounds("sweep", points, min(self._rounds, SWEEP_ROUNDS))
        results.loads = self._loads()
        return results

    @property
    def _bare(self) -> Subject:
        return bare(self._servers, {**LARGE, **self._statsd})

    def _consumers(self, subjects: Sequence[Subject]) -> list[Run]:
        return [partial(run_once, self._servers, subject, self._events) for subject in subjects]

    def _calls(self) -> list[Run]:
        """Return each service that makes calls, and behind it its client alone."""
        runs: list[Run] = []
        for scenario in SCENARIOS:
            subject = claimed(self._servers, self._statsd, self._sink_url, scenario)
            # Calls are slow. What leaves the queue before the first ack does not count.
            events = subject.prefetch + self._events // 4
            runs += [
                partial(run_once, self._servers, subject, events),
                partial(call_alone, self._sink_url, scenario),
            ]
        return runs

    def _loads(self) -> list[Load]:
        loads = []
        for number in range(self._rounds):
            for per_s, seconds in SECONDS.items():
                print(
                    f"latency, round {number + 1} of {self._rounds}: {per_s:,}/s", file=sys.stderr
                )
                loads.append(run_load(self._servers, self._bare, per_s, seconds))
        return loads


@contextmanager
def start_measuring(rounds: int, events: int) -> Iterator[Measuring]:
    """Start the servers, the sink and a listener for the metrics for as long as the block runs."""
    with (
        start_servers(max_txn_ops=int(LARGE["ETCD_MAX_TXN_OPS"])) as servers,
        listen_statsd() as statsd,
        run_sink() as sink_url,
    ):
        yield Measuring(servers, statsd.settings(), sink_url, rounds, events)


def _run_rounds(what: str, runs: Sequence[Run], rounds: int) -> list[Rates]:
    """Run everything once a round, so that all meet the same machine; tell on standard error.

    Each round begins with another run: what the one before leaves behind (a warm page cache, a
    broker that still writes) shall not always meet the same one.
    """
    results = []
    for number in range(rounds):
        turn = number % len(runs)
        rates: Rates = {}
        for run in (*runs[turn:], *runs[:turn]):
            for name, found in run().items():
                rates[name] = found
                print(
                    f"{what}, round {number + 1} of {rounds}: {name:30} "
                    f"{found.events_per_s:9,.0f}/s",
                    file=sys.stderr,
                )
        results.append(rates)
    return results

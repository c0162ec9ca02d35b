"""The scenarios: each runs on servers that are there, and those of `bench` leave them empty."""

import json
import os
import platform
import queue
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pika

from idempotent_consumer import Settings
from idempotent_consumer.bus import Topology
from servers.broker import Broker
from servers.counters import StatsdListener, listen_statsd
from servers.processes import Child, resident_bytes
from servers.servers import Servers, start_servers
from servers.wait import eventually, stands_still
from servers.web import fetch_json

from . import results
from .keyspace import Keyspace, history_body
from .processes import follow, outcome, process, rate
from .publishers import PERSISTENT, body, new_events, preload, series
from .results import NotMeasuredError, Rate, Rates
from .subjects import BARE, DUPLICATES, LARGE, PUBLISHERS, Calls, Mix, Subject, service

LOAD_S = {1: 21, 100: 6, 1_000: 6, 10_000: 6}
"""How long a round lasts by its events per second, with the first second, which does not count:
it holds the grant of the first lease. At 1/s five rounds give the hundred samples that p99 needs.
"""
COMPACTION = (
    "--auto-compaction-mode=periodic",
    "--auto-compaction-retention=1m",
    "--experimental-compaction-batch-limit=10000",
)
"""Of history a minute, so that what is given back shows within the run; the last as in compose."""

_WINDOW_S = 60
_LEASE_S = _WINDOW_S + 6
"""The library grants a lease for the window and a tenth of it."""
_IDLE_SAMPLES, _DUPLICATES = 200, 5_000
_WARM_UP_EVENTS, _WARM_UP_S = 20, 1
"""The first event waits for a lease, and the first of everything for its imports."""
_SAMPLE_EVERY_S = 5.0
_LOST_AFTER_S, _EMPTY_WITHIN_S = 60.0, 400.0
_QUORUM = {"x-queue-type": "quorum"}
_NEW = "new-"
"""What the ids of events begin with that are no part of the history."""
_PACKAGES = ("pika", "cslab-etcd3", "grpcio", "protobuf", "orjson")


@dataclass(frozen=True)
class Site:
    """The servers of a run, what is read from them, and the machine that all run on."""

    servers: Servers
    statsd: StatsdListener
    keyspace: Keyspace
    machine: str

    @property
    def url(self) -> str:
        """The broker's."""
        return self.servers.rabbitmq.url

    @property
    def broker(self) -> Broker:
        """The broker, for questions."""
        return Broker(self.servers.rabbitmq)

    @contextmanager
    def channel(self) -> Iterator[Any]:
        """Give a channel of pika's, on a connection of its own."""
        parameters = pika.URLParameters(self.url)
        parameters.heartbeat = 0  # Between two questions nobody would send them.
        connection = pika.BlockingConnection(parameters)
        try:
            yield connection.channel()
        finally:
            connection.close()

    @contextmanager
    def process(self, subject: Subject) -> Iterator[tuple[Any, Child]]:
        """Give the process, not started, and a channel on which its queue has been declared."""
        counted, logged = self.statsd.settings(), {"ENABLE_ETCD": "true", "LOG_FORMAT": "json"}
        settings = {**self.servers.settings(), **counted, **logged, **subject.settings}
        with (
            self.channel() as channel,
            process(subject.command, settings, subject.directory) as child,
        ):
            if subject.settings:
                Topology(subject.queue, retry_delays=Settings().retry_delays).declare(channel)
            else:
                channel.queue_declare(subject.queue, durable=True, arguments=_QUORUM)
            yield channel, child

    @contextmanager
    def clean_process(self, subject: Subject) -> Iterator[tuple[Any, Child]]:
        """Do the same, and clear both servers afterwards."""
        try:
            with self.process(subject) as found:
                yield found
        finally:
            self.broker.delete_queues(subject.queue)
            self.keyspace.clear()

    @contextmanager
    def waiting_service(self, subject: Subject) -> Iterator[Any]:
        """Run a service with an empty queue, and give a channel once it consumes."""
        with self.clean_process(subject) as (channel, child):

            def consuming() -> None:
                declared = channel.queue_declare(subject.queue, passive=True).method
                assert declared.consumer_count, f"{subject.name} does not consume: {child.output()}"

            child.start()
            eventually(consuming)
            yield channel


@contextmanager
def start_site(*etcd_flags: str) -> Iterator[Site]:
    """Start servers for as long as the block runs, and what listens for the services' metrics."""
    with (
        start_servers(etcd_flags=etcd_flags) as servers,
        listen_statsd() as statsd,
        closing(Keyspace(servers.etcd)) as keyspace,
    ):
        yield Site(servers, statsd, keyspace, _machine(servers))


def _machine(servers: Servers) -> str:
    """Return what a reader needs to judge the figures by: the machine, and all versions."""
    overview: Any = servers.rabbitmq.management("GET", "/api/overview")
    etcd = fetch_json("GET", f"http://{servers.etcd.endpoint}/version")
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    found = {
        "cores": str(len(os.sched_getaffinity(0))),
        "processor": models[0] if models else platform.machine(),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.release()}",
        "servers": "containers" if servers.kind == "docker" else "processes",
        "rabbitmq": f"{overview['rabbitmq_version']} (Erlang {overview['erlang_version']})",
        "etcd": etcd["etcdserver"],
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }
    return ", ".join(f"{name} {value}" for name, value in found.items())


def consume(site: Site, subject: Subject, events: int) -> Rates:
    """Preload the subject's queue, let it consume everything, and check what it has recorded."""
    bodies, recorded = series(subject.mix, events // subject.one_in)
    with site.clean_process(subject) as (channel, child):
        preload(site.url, subject.queue, bodies)
        child.start()
        seen = follow(channel, subject.queue, child)
        for prefix in subject.records:
            # The queue is empty before the last batches are recorded.
            eventually(partial(site.keyspace.require, prefix, recorded))
    if subject.mix is Mix.REPEATED:
        return {
            subject.name: rate(seen, recorded, behind=recorded, prefetch=subject.prefetch),
            DUPLICATES: rate(seen, recorded, prefetch=subject.prefetch),
        }
    return {subject.name: rate(seen, len(bodies), prefetch=subject.prefetch)}


def publish(site: Site, name: str, events: int) -> Rates:
    """Let a publisher fill an empty quorum queue, and see that the broker has everything."""

    def all_ready() -> None:
        ready = site.broker.ready(BARE.queue)
        assert ready == events, f"{ready} of {events} events in the queue"

    with site.clean_process(BARE):  # For its queue; it is not started.
        told = outcome("benchmarks.publishers", PUBLISHERS[name], site.url, str(events))
        eventually(all_ready)
    return {name: Rate(**told)}


@contextmanager
def receiver() -> Iterator[str]:
    """Run what receives calls while the block runs, and give its URL."""
    with process(("benchmarks.calls", "receiver")) as child:

        def url() -> str:
            said = child.output()
            assert said.endswith("\n"), f"the receiver does not listen: {said}"
            return said.strip()

        child.start()
        yield eventually(url)


def call_alone(receiver_url: str, calls: Calls) -> Rates:
    """Let a process make these calls by the client alone; raises NotMeasuredError."""
    number = max(10_000, 20 * calls.at_once)  # To connect is a small part of so many.
    url, at_once = f"{receiver_url}/{calls.answer_ms}", str(calls.at_once)
    return {calls.alone: Rate(**outcome("benchmarks.calls", calls.kind, url, at_once, str(number)))}


def measure_idle(site: Site) -> results.Idle:
    """Publish single events to a service and take the time until each record is there.

    That is when a watch, opened beforehand, has brought it to this process: one clock for both
    ends, and the watch's way back counts against the service. The bare steps are taken in turns
    with the events, so that all of them meet the same machine.
    """
    found = results.Idle([], [], [])
    subject, reference = service("bare", LARGE), "reference"
    recorded_s: queue.Queue[float] = queue.Queue()
    delivered_s: list[float] = []
    with (
        site.waiting_service(subject) as channel,
        site.keyspace.watch(subject.records[0], lambda at_s, _keys: recorded_s.put(at_s)),
    ):

        def recorded(event: bytes) -> float:
            channel.basic_publish("", subject.queue, event, PERSISTENT)
            return _next(recorded_s)

        def round_trip(event: bytes) -> float:
            channel.basic_publish("", reference, event, PERSISTENT)
            while not delivered_s:
                channel.connection.process_data_events(time_limit=_LOST_AFTER_S)
            return delivered_s.pop()

        def put(_event: bytes) -> float:
            site.keyspace.put("/reference")
            return time.monotonic()

        channel.queue_declare(reference, durable=True, arguments=_QUORUM)
        channel.basic_consume(
            reference, lambda *_: delivered_s.append(time.monotonic()), auto_ack=True
        )
        for number, event in enumerate(new_events(_WARM_UP_EVENTS + _IDLE_SAMPLES)):
            for taken_ms, step in zip(found, (recorded, round_trip, put), strict=True):
                started_s = time.monotonic()
                ended_s = step(event)
                if number >= _WARM_UP_EVENTS:
                    taken_ms.append(1000 * (ended_s - started_s))
            channel.connection.sleep(0.02)
    site.broker.delete_queues(reference)
    return found


def _next(recorded_s: "queue.Queue[float]") -> float:
    """Return when the next record was there; raises NotMeasuredError."""
    try:
        return recorded_s.get(timeout=_LOST_AFTER_S)
    except queue.Empty:
        raise NotMeasuredError(f"an event is not recorded after {_LOST_AFTER_S:g} s") from None


def measure_load(site: Site, per_s: int) -> results.Load:
    """Publish at a rate to a service that waits for it; raises NotMeasuredError.

    Open loop: events are due at a steady rate, whatever has become of those before, and a latency
    begins when its event is due, not when its publisher got round to it. So an event that had to
    wait behind a stall counts with all of its wait (a closed loop would send fewer events then,
    and hide it: "coordinated omission").
    """
    subject, events = service("bare", LARGE), per_s * LOAD_S[per_s]
    prefix = subject.records[0]
    recorded_s: dict[int, float] = {}

    def changed(at_s: float, keys: Sequence[bytes]) -> None:
        recorded_s.update((int(key[len(prefix) :]), at_s) for key in keys)

    def all_recorded() -> None:
        assert len(recorded_s) == events, f"{len(recorded_s)} of {events} events recorded"

    arguments = ("open_loop", site.url, subject.queue, str(per_s), str(events))
    with site.waiting_service(subject), site.keyspace.watch(prefix, changed):
        told = outcome("benchmarks.publishers", *arguments)
        eventually(all_recorded, _LOST_AFTER_S)
    latencies = latencies_ms(per_s, events, told["start_s"], recorded_s)
    return results.Load(per_s, reached_per_s(events, told["took_s"]), told["late_ms"], latencies)


def reached_per_s(events: int, took_s: float) -> float:
    """Return the rate of events that went out from time 0 to `took_s`, both included."""
    return (events - 1) / took_s


def latencies_ms(
    per_s: int, events: int, start_s: float, recorded_s: Mapping[int, float]
) -> list[float]:
    """Return each event's latency from when it was due; those of the first second are left out."""
    return [
        1000 * (recorded_s[number] - start_s - number / per_s)
        for number in range(_WARM_UP_S * per_s, events)
    ]


def measure_size(
    site: Site, subject: Subject, before: int, size: int, starts: int, events: int
) -> results.Size:
    """Let the history grow from one size to the next, and measure everything at that."""
    site.keyspace.clear(subject.records[0] + _NEW)
    site.keyspace.write_history(subject.records[0], before, size)
    found = [_measure_start(site, subject) for _ in range(starts)]
    # Not before: the pages that a write frees count as used until the next one.
    etcd = site.keyspace.gauges()
    with site.process(subject) as (channel, child):
        child.start()
        _imported_s(child)
        numbers = range(0, size, max(1, size // _DUPLICATES))[:_DUPLICATES]
        transactions = _repeat(site, subject, numbers) if numbers else 0
        # New events are published while the service is frozen.
        bodies = [body(f"{_NEW}{uuid.uuid4()}") for _ in range(events)]
        child.pause()
        preload(site.url, subject.queue, bodies)
        child.resume()
        measured = rate(follow(channel, subject.queue, child), events)
    return results.Size(size, etcd, found, len(numbers), transactions, measured)


def _measure_start(site: Site, subject: Subject) -> results.Start:
    """Publish an event, start the service, and wait for the record and for the import's end.

    The record is seen by a watch that was opened before, so its way back counts too.
    """
    recorded_s: queue.Queue[float] = queue.Queue()
    event_id = f"{_NEW}{uuid.uuid4()}"
    key = subject.records[0] + event_id
    with (
        site.process(subject) as (_, child),
        site.keyspace.watch(key, lambda at_s, _keys: recorded_s.put(at_s)),
    ):
        preload(site.url, subject.queue, [body(event_id)])
        started_s = time.monotonic()
        child.start()
        first_ms = 1000 * (_next(recorded_s) - started_s)
        import_s = _imported_s(child)
        time.sleep(1.0)  # Its memory settles.
        return results.Start(first_ms, import_s, resident_bytes(child.pid))


def _imported_s(child: Child) -> float:
    """Wait until a service has said that its import is done, and return how long that took."""

    def said() -> float:
        # The last line may be half written.
        for line in map(json.loads, child.output().rpartition("\n")[0].splitlines()):
            if line["event"].startswith("records imported"):
                return float(line["seconds"])
        raise AssertionError(f"no import has ended:\n{child.output()[-2000:]}")

    return eventually(said, _LOST_AFTER_S)


def _repeat(site: Site, subject: Subject, numbers: Sequence[int]) -> int:
    """Publish duplicates from all over the history, and count etcd's transactions meanwhile."""
    skipped = partial(site.statsd.count, "events_processed_skipped")
    asked, before = site.keyspace.gauges().transactions, skipped()
    preload(site.url, subject.queue, [history_body(number) for number in numbers])

    def all_skipped() -> None:
        count = skipped() - before
        assert count == len(numbers), f"{count} of {len(numbers)} duplicates skipped"

    eventually(all_skipped)
    return site.keyspace.gauges().transactions - asked


def measure_deletion(site: Site, subject: Subject) -> float:
    """Delete all records, and return what each deletion adds to etcd's file, in bytes."""

    def used_now() -> int:
        # What is in use changes once etcd has written to its file, every 0.1 s.
        return stands_still(lambda: site.keyspace.gauges().used)

    before = used_now()
    deleted, _ = site.keyspace.delete(subject.records[0])
    return (used_now() - before) / deleted


def measure_steady(site: Site, load_s: float) -> results.Steady:
    """Keep a service at full rate, stop the load, and wait until etcd is empty again.

    Raises AssertionError if what was published is not recorded, or etcd not empty in time.
    """
    subject = service("bare", {**LARGE, "DEDUP_WINDOW": f"{_WINDOW_S}s"})
    gauges, filled = site.keyspace.gauges, (site.url, subject.queue)
    with site.process(subject) as (_, child):
        child.start()
        _imported_s(child)
        before = gauges()
        with process(("benchmarks.publishers", "filler", *filled)) as filler:
            filler.start()
            samples = list(_samples(site, subject.queue, child, filler, load_s))
            filler.terminate(_LOST_AFTER_S)
            published = int(filler.output())

        def all_recorded() -> int:
            recorded = gauges().written - before.written
            assert recorded == published, f"{recorded} recorded of {published} published"
            return recorded

        recorded = eventually(all_recorded, _LOST_AFTER_S, interval_s=0.5)
        drained_s, used = time.monotonic(), samples[-1].etcd.used

        def seconds_until(true: Callable[[results.Gauges], bool]) -> float:
            def holds() -> float:
                found = gauges()
                assert true(found), f"etcd is not empty: {found}"
                return time.monotonic() - drained_s

            return eventually(holds, _EMPTY_WITHIN_S, interval_s=0.5)

        return results.Steady(
            machine=site.machine,
            window_s=_WINDOW_S,
            lease_s=_LEASE_S,
            compaction=" ".join(COMPACTION),
            samples=samples,
            published=published,
            recorded=recorded,
            # One key is no record: the incarnation.
            gone_s=seconds_until(lambda found: found.keys <= 1),
            freed_s=seconds_until(lambda found: found.used <= used / 50),
            emptied=gauges(),
        )


def _samples(
    site: Site, name: str, child: Child, filler: Child, load_s: float
) -> Iterator[results.Sample]:
    started_s = time.monotonic()
    while (at_s := time.monotonic() - started_s) <= load_s:
        for each in (child, filler):
            if not each.running:
                raise NotMeasuredError(f"{each.command} ended:\n{each.output()[-2000:]}")
        memory, ready = resident_bytes(child.pid), site.broker.ready(name)
        yield results.Sample(at_s, memory, ready, site.keyspace.gauges())
        time.sleep(max(0.0, started_s + at_s + _SAMPLE_EVERY_S - time.monotonic()))

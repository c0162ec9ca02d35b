"""Latency by load: from the moment an event is due until its record is there.

Open loop: events are due at a steady rate, whatever has become of those before, and a latency
begins when its event is due, not when its publisher got round to it. So an event that had to wait
behind a stall counts with all of its wait (a closed loop would send fewer events then, and hide
it: "coordinated omission").
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from harness.servers import Servers
from harness.wait import eventually

from .outcome import outcome
from .preparing import waiting_service
from .subjects import Subject
from .watching import etcd_client, watch

SECONDS = {1: 21, 100: 6, 1_000: 6, 10_000: 6}
"""How long a round lasts by its events per second, with the first second, which does not count:
it holds the grant of the first lease. At 1/s five rounds give the hundred samples that p99 needs.
"""

_WARM_UP_S = 1
_OVERDUE_S = 60.0
_KEPT = 0.99


class Load(NamedTuple):
    """One round at one rate: a latency for each event, and how the publisher did.

    `late_ms` is by how much it was late itself, median; `per_s` is the rate that it reached.
    """

    due_per_s: int
    per_s: float
    late_ms: float
    recorded_ms: list[float]

    @property
    def kept(self) -> bool:
        """Whether the publisher kept its rate: else the latencies are those of its own trouble."""
        return self.per_s >= _KEPT * self.due_per_s


def run_load(servers: Servers, subject: Subject, per_s: int, seconds: int) -> Load:
    """Publish at a rate to a service that waits for it; raises NotMeasuredError."""
    prefix, events = subject.records[0], per_s * seconds
    recorded_s: dict[int, float] = {}

    def changed(at_s: float, keys: Sequence[bytes]) -> None:
        for key in keys:
            recorded_s[int(key[len(prefix) :])] = at_s

    def all_recorded() -> None:
        assert len(recorded_s) == events, f"{len(recorded_s)} of {events} events recorded"

    with (
        waiting_service(servers, subject),
        etcd_client(servers) as etcd,
        watch(etcd, prefix, changed),
    ):
        told = outcome(
            "benchmarks.publishers.open_loop",
            servers.rabbitmq.url,
            subject.queue,
            str(per_s),
            str(events),
            within_s=seconds + _OVERDUE_S,
        )
        eventually(all_recorded, _OVERDUE_S)
    return Load(
        due_per_s=per_s,
        per_s=reached_per_s(events, told["took_s"]),
        late_ms=told["late_ms"],
        recorded_ms=latencies_ms(per_s, events, told["start_s"], recorded_s),
    )


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

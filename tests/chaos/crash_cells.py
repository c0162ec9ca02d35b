"""What a cell of the crash points is made of: the process that kills itself, and its backlog."""

import json
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from chaos.crash_points import PROOF, VARIABLE
from integration.load import order
from servers.publisher import Event
from servers.services import Service, ServiceEndedError
from servers.store import Store

BATCH = 16
SETTINGS = {"BATCH_SIZE": str(BATCH)}
DUPLICATES = 4
"""So many to each batch of new events: half of its own events, half of all before."""

REDELIVERY_TIMEOUT_S = 5.0

REPLICAS = {1: "one_replica", 2: "two_replicas"}
POSITIONS = ("first", "middle", "last")


@dataclass(frozen=True)
class Where:
    """A crash point, and the passage of it that kills."""

    point: str
    passage: int


def start_crashing(
    start: Callable[..., Service], service: str, at: Where, **settings: str
) -> Service:
    """Start a service that kills itself there, and wait until it is ready.

    Where events wait for it already, it may have come to that point before anybody saw it ready.
    """
    crashing = start(
        service,
        wait=False,
        command=[sys.executable, "-m", "chaos.crash_points", service],
        **{**SETTINGS, **settings, VARIABLE: f"{at.point}:{at.passage}"},
    )
    try:
        crashing.wait_ready()
    except ServiceEndedError:
        if PROOF not in crashing.logs():
            raise
    return crashing


def killed_at(service: Service, at: Where) -> dict[str, Any]:
    """Wait until the service is gone, and return what it has left as proof of where it was.

    Raises AssertionError unless it was this point that has ended it.
    """
    code = service.wait_end()
    proofs = [
        json.loads(line.removeprefix(PROOF))
        for line in service.logs().splitlines()
        if line.startswith(PROOF)
    ]
    assert code == -signal.SIGKILL, f"it ended with exit code {code}"
    assert [(proof["point"], proof["passage"]) for proof in proofs] == [(at.point, at.passage)]
    found: dict[str, Any] = proofs[0]
    return found


@contextmanager
def frozen(services: list[Service]) -> Iterator[None]:
    """Freeze services while a backlog is published: it waits in their sockets, dealt out in turn.

    So each of them finds many batches there at once, and they are full.
    """
    alive = [service for service in services if service.running]
    for service in alive:
        service.pause()
    try:
        yield
    finally:
        for service in alive:
            service.resume()


def batches(number: int, prefix: str = "order") -> list[list[Event]]:
    """Return so many batches of new events, with duplicates within each of them and across them."""
    chance = random.Random(number)
    sent: list[Event] = []
    made = []
    for batch in range(number):
        new = [order(f"{prefix}-{batch}-{index}", number=index) for index in range(BATCH)]
        again = chance.sample(new, DUPLICATES // 2) + chance.sample(sent or new, DUPLICATES // 2)
        mixed = new + again
        chance.shuffle(mixed)
        made.append(mixed)
        sent += new
    return made


def assert_done(store: Store, service: str, sent: set[str]) -> None:
    """Raise AssertionError unless all of these are done."""
    missing = sent - store.done(service)
    assert not missing, f"{len(missing)} are not done, such as {sorted(missing)[:3]}"

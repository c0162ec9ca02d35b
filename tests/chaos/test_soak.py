"""The soak: all of it at random, on two replicas, for CHAOS_MINUTES; CHAOS_SEED replays a choice.

Collected only where CHAOS_MINUTES is set.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count

import pytest

from chaos.acks import AckAudit
from chaos.conftest import StartTrial
from chaos.mischief import Mischief, Replica
from chaos.soak import MINUTES, SEED
from chaos.trial import Trial
from chaos.ways import relayed
from integration.load import orders
from servers.servers import Servers
from servers.services import Service
from servers.wait import lasts

REPLICAS = 2
# A fault and the time until the next one; a short soak has no time for the long ones.
EVERY_S = (30.0, 60.0) if MINUTES >= 10 else (6.0, 12.0)
EVENTS_AT_ONCE = 20


@pytest.mark.timeout(MINUTES * 60 + 900)
def test_soak(
    trial: StartTrial,
    clean: Servers,
    acks: AckAudit,
    start_audited: Callable[..., Service],
) -> None:
    """One fault after another, each healed before the next; judged at the end by all of history."""
    chance = random.Random(SEED)
    attempt = trial("soak")
    started_s = time.monotonic()
    with ExitStack() as stack:
        replicas = []
        for _ in range(REPLICAS):
            broker, to_broker = stack.enter_context(relayed("broker", clean, acks))
            etcd, to_etcd = stack.enter_context(relayed("etcd", clean, acks))
            start = partial(start_audited, "order", **to_broker, **to_etcd)
            replicas.append(Replica(start, {"broker": broker, "etcd": etcd}))
        mischief = Mischief(clean, replicas, chance)
        with _publishing(attempt, chance.random()):
            deck: list[str] = []
            while time.monotonic() - started_s < MINUTES * 60:
                if not deck:  # Each fault comes once before any comes again.
                    deck = sorted(mischief.faults)
                    chance.shuffle(deck)
                fault = deck.pop()
                every_s = chance.uniform(*EVERY_S)
                lasts_s = chance.uniform(0.1, 0.6) * every_s
                began_s = time.monotonic()
                print(f"{began_s - started_s:7.1f} s  {fault} for {lasts_s:.1f} s")
                mischief.faults[fault](lasts_s)
                attempt.fired()
                attempt.recovers()
                for replica in replicas:
                    replica.service.wait_ready()
                lasts(every_s - (time.monotonic() - began_s))
        attempt.judge(at_least=int(MINUTES * 100), drained_within_s=120)


@contextmanager
def _publishing(attempt: Trial, seed: float) -> Iterator[None]:
    """Publish new events and some duplicates of earlier ones through the block."""
    ending = threading.Event()
    failures: list[Exception] = []

    def publish() -> None:
        chance = random.Random(seed)
        earlier = orders(1, "soak")
        try:
            for number in count():
                new = orders(EVENTS_AT_ONCE, f"soak-{number}")
                attempt.publish([*new, *chance.sample(earlier, min(len(earlier), 10))])
                earlier = [*earlier[-500:], *new]
                if ending.wait(0.5):
                    return
        except Exception as error:  # noqa: BLE001 - it is raised in the test's thread
            failures.append(error)

    thread = threading.Thread(target=publish, name="soak", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(150)
    if failures:
        raise failures[0]

"""What a service does that holds its deliveries: nothing, and it says why."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from chaos.acks import AckAudit
from integration.judging import not_ready
from servers.services import Service
from servers.wait import eventually

# Past a delivery that is held, a service acks what was settled before only now and then.
_LAST_ACKS_S = 1.0


@contextmanager
def settling_nothing(acks: AckAudit) -> Iterator[None]:
    """Let the last acks pass, then none during the block, be it one that could not be judged."""
    seen, since_s = _passed(acks), time.monotonic()

    def quiet() -> None:
        nonlocal seen, since_s
        if (now := _passed(acks)) != seen:
            seen, since_s = now, time.monotonic()
        assert time.monotonic() - since_s > _LAST_ACKS_S, "acks still pass"

    eventually(quiet)
    yield
    assert _passed(acks) == seen, f"something was acked: {seen} to {_passed(acks)}"


def _passed(acks: AckAudit) -> tuple[int, int]:
    return acks.checked, acks.unknown


def holds(service: Service, why: str = "") -> None:
    """Raise AssertionError unless a service is alive and not ready, for a reason like `why`.

    The reason that it gives for etcd is searched for this regular expression.
    """
    assert service.health("/livez").status == 200
    reason = not_ready(service, "etcd")["etcd"]
    assert re.search(why, reason), reason

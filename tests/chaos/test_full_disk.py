"""The disk that takes the service's log is full."""

from collections.abc import Callable
from pathlib import Path

from chaos.conftest import StartTrial
from chaos.prelude import prelude
from integration.judging import becomes, throughout
from servers.services import Service

ROOM_BYTES = 8192
# To a process that reaches its limit on files, a write fails as it does on a full disk.
_PRELUDE = f"""
import resource

resource.setrlimit(resource.RLIMIT_FSIZE, ({ROOM_BYTES}, {ROOM_BYTES}))
"""


def test_the_log_cannot_be_written(
    trial: StartTrial, start_audited: Callable[..., Service], tmp_path: Path
) -> None:
    """Events go on without it, and so does an orderly end."""
    attempt = trial("disk full (the log's)")
    (code := tmp_path / "code").mkdir()
    service = start_audited("order", **prelude(code, _PRELUDE))
    (log,) = tmp_path.glob("order-*.log")
    with attempt.load():
        becomes(lambda: log.stat().st_size, ROOM_BYTES)
        attempt.works(300)

        def full() -> None:
            assert log.stat().st_size == ROOM_BYTES

        throughout(1, full)
        attempt.fired()
        attempt.recovers()
    attempt.judge(at_least=300)
    assert service.terminate(10) == 0

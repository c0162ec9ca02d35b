"""Each crash point names a function of the library, and nothing that is shipped knows of them."""

import inspect
import os
import subprocess
import sys

import pytest

from chaos.crash_points import POINTS, VARIABLE, find
from integration.test_crash_points import CLAIM_STEPS, SHIPMENT_STEPS, STEPS
from servers.servers import REPOSITORY


@pytest.mark.parametrize("name", POINTS)
def test_a_point_is_a_function_of_the_library_and_has_its_cells(name: str) -> None:
    _, _, function = find(POINTS[name])
    assert POINTS[name].when != "waiting" or inspect.iscoroutinefunction(function)
    assert name in {*STEPS, *SHIPMENT_STEPS, *CLAIM_STEPS}


@pytest.mark.parametrize("setting", ["no such step:1", "txn sent", "txn sent:0"])
def test_a_service_with_a_wrong_crash_point_does_not_start(setting: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "chaos.crash_points", "order"],
        cwd=REPOSITORY / "order",
        env={**os.environ, VARIABLE: setting},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"{VARIABLE}: {setting!r} is not one of these")


def test_no_file_that_is_shipped_knows_of_crash_points() -> None:
    shipped = [
        path
        for project in ("idempotent_consumer/idempotent_consumer", "order", "notify", "example1")
        for path in (REPOSITORY / project).rglob("*.py")
    ]
    assert len(shipped) > 30
    assert [path for path in shipped if VARIABLE in path.read_text()] == []

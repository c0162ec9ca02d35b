"""Crash points name what the library has, and nobody but the launcher knows of them."""

import os
import subprocess
import sys

import pytest

from chaos.crash_points import POINTS, VARIABLE, Point, before, find, waiting
from integration.test_crash_points import CLAIM_STEPS, SHIPMENT_STEPS, STEPS
from servers.servers import REPOSITORY


@pytest.mark.parametrize("name", POINTS)
def test_a_point_is_there_and_has_its_cells(name: str) -> None:
    find(POINTS[name])
    assert name in {*STEPS, *SHIPMENT_STEPS, *CLAIM_STEPS}


@pytest.mark.parametrize(
    "point",
    [
        before("idempotent_consumer.flow:Consumer.no_such_step"),
        before("idempotent_consumer.no_such_module:run"),
        waiting("idempotent_consumer.flow:decode"),
    ],
)
def test_a_point_that_the_library_no_longer_has_is_an_error(point: Point) -> None:
    with pytest.raises(LookupError, match="no longer"):
        find(point)


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

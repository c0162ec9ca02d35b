"""The page: what its board makes of observations, and whom it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
from aiohttp.test_utils import TestClient, TestServer, unused_port

from demo.page.__main__ import Page
from demo.page.board import READINGS, Board
from demo.page.controls import Controls, RefusedError

CARDS = [("rabbitmq-1", "rabbitmq", "running"), ("order-1", "order", "running")]


def confirmed(kind: Any, board: Board) -> None:
    board.confirm(board.publish(kind)[0])


def record(state: str, board: Board) -> None:
    board.record("order", "r-1", state, "aa/1/1")


def says(text: str, board: Board, **members: Any) -> None:
    board.line("order-1", {"event": text, "event_id": "r-1", **members})


def reads(times: int, held: dict[str, int], unacked: int, board: Board) -> None:
    """Have RabbitMQ asked so often; notify's queue keeps its copies."""
    for _ in range(times):
        board.depths({"order": 0, "notify": 9, **held}, {"order": unacked})


OBSERVED: dict[str, Callable[[Board], object]] = {
    "new": partial(confirmed, "new"),
    "again": partial(confirmed, "again"),
    "other": partial(confirmed, "other"),
    "unconfirmed": lambda board: board.publish("new"),
    "claimed": partial(record, "claimed"),
    "released": partial(record, "released"),
    "done": partial(record, "done"),
    "effect": lambda board: board.effect("order", "r-1"),
    "called": lambda board: board.effect("notify", "r-1"),
    "repeated": lambda board: board.repeat("r-1"),
    "memoryless": partial(says, "ENABLE_ETCD is false: every delivery is processed"),
    "processed": partial(says, "processed"),
    "two-processed": partial(says, "settled a batch", processed=2),
    "skipped": partial(says, "skipped: a duplicate"),
    "two-skipped": partial(says, "settled a batch", processed_skipped=2),
    "failed": partial(says, "failed: it comes back later", again_in="10s", error="no"),
    "parked": lambda board: board.park("order", "r-1", "invalid: no JSON"),
    "read": partial(reads, 1, {}, 0),
    "one-ready": partial(reads, 1, {"order": 1}, 0),
    "long": partial(reads, READINGS + 1, {}, 0),
    "long-ready": partial(reads, READINGS + 1, {"order": 1}, 0),
    "long-unacked": partial(reads, READINGS + 1, {}, 1),
    "long-in-retry": partial(reads, READINGS + 1, {"order.retry.10s": 1}, 0),
    "long-a-dead-letter": partial(reads, READINGS + 1, {"order.dead-letter": 1}, 0),
    "next-round": Board.begin,
}
"""Each is about the first event, r-1, or makes another. `long` is as long as makes it lost."""

BY, UNRECORDED = "by order-1", "by order-1, without a record"


@pytest.mark.parametrize(
    ("observed", "dots", "numbers"),
    [
        ("read", ["in flight"], {"confirmed": 1, "order in flight": 1, "notify waiting": 9}),
        ("one-ready", ["waiting"], {"order waiting": 1, "order in flight": 0}),
        ("new one-ready", ["in flight", "waiting"], {}),  # First in, first out.
        ("unconfirmed done", [f"recorded {BY}", "publishing"], {"published": 2, "confirmed": 1}),
        ("claimed", ["claimed"], {"order in flight": 1}),
        ("claimed released", ["in flight"], {"order in flight": 1}),
        ("claimed done", [f"recorded {BY}"], {"order processed": 1, "order in flight": 0}),
        # With memory the record counts, and not the line about it; without, the line.
        ("done processed", [f"recorded {BY}"], {"order processed": 1, "double": 0}),
        ("memoryless processed", [f"processed {UNRECORDED}"], {"order processed": 1, "double": 0}),
        ("memoryless again two-processed", [f"processed {UNRECORDED}"] * 2, {"double": 1}),
        # A second record is double, or a second effect; both of one event are so once.
        ("done effect", [f"recorded {BY}"], {"double": 0}),
        ("done effect effect", [f"recorded {BY}"], {"double": 1}),
        ("done done effect effect", [f"recorded {BY}"], {"double": 1}),
        # A call that the receiver has dropped by its key is repeated, and not double.
        ("called repeated", ["in flight"], {"calls": 2, "repeated": 1, "double": 0}),
        ("called called", ["in flight"], {"calls": 2, "repeated": 0, "double": 1}),
        ("done again skipped", [f"recorded {BY}", f"skipped {BY}"], {"order skipped": 1}),
        (
            "done again again again two-skipped",
            [f"recorded {BY}", f"skipped {BY}", f"skipped {BY}", "in flight"],
            {"order skipped": 2},
        ),
        ("done skipped", [f"recorded came again and was skipped {BY}"], {"order skipped": 1}),
        ("failed", ["retry again in 10s: no"], {"order retry": 1, "order in flight": 0}),
        ("parked long-a-dead-letter", ["parked invalid: no JSON"], {"order parked": 1, "lost": 0}),
        # What is confirmed, in no queue and without a record is lost, unless it comes later.
        ("long", ["in flight"], {"lost": 1}),
        ("long done read", [f"recorded {BY}"], {"lost": 0}),
        ("done unconfirmed long long", [f"recorded {BY}", "publishing"], {"lost": 0}),
        ("long-ready", ["waiting"], {"lost": 0}),
        ("long-unacked", ["in flight"], {"lost": 0}),
        ("long-in-retry", ["in flight"], {"lost": 0}),
        ("long-a-dead-letter", ["in flight"], {"lost": 0}),
        ("done other long", [f"recorded {BY}", "in flight"], {"lost": 1}),  # It is to be parked.
        (
            "done again long",
            [f"recorded {BY}", "skipped it is in no queue, and has its record"],
            {"lost": 0},
        ),
        ("next-round done skipped effect called repeated", [], {"calls": 0, "order processed": 0}),
    ],
)
def test_what_is_observed_is_shown(observed: str, dots: list[str], numbers: dict[str, int]) -> None:
    board = Board()
    board.round = "r"
    board.containers(CARDS)
    says("starting", board, process="aa")
    for name in ("new", *observed.split()):
        OBSERVED[name](board)
    snapshot = board.snapshot()
    assert [f"{state} {why}".strip() for _, state, why in snapshot["dots"]["order"]] == dots
    assert {name: snapshot["numbers"][name] for name in numbers} == numbers


def test_only_the_newest_at_rest_are_kept_and_drawn() -> None:
    board = Board()
    for _ in range(199):
        confirmed("new", board)
    assert len(board.snapshot()["dots"]["order"]) == 30
    for label in list(board.lanes["order"].under_way):
        board.record("order", label, "done", "aa/1/1")
    dots = board.snapshot()["dots"]["order"]
    assert board.snapshot()["numbers"]["order processed"] == 199
    assert dots[-1][0] == f"{board.round}-199"
    assert len(dots) < 30


@pytest.mark.parametrize(
    ("state", "missing", "shown"),
    [
        ("running", {}, ("running", "")),
        ("running", None, ("not ready", "starting")),
        ("running", {"etcd": "no answer"}, ("not ready", "etcd: no answer")),
        ("frozen", {"etcd": "no answer"}, ("frozen", "")),
    ],
)
def test_a_card_says_how_its_process_is(
    state: str, missing: dict[str, str] | None, shown: tuple[str, str]
) -> None:
    board = Board()
    board.containers([("order-1", "order", state)])
    board.answers("order-1", missing)
    assert board.snapshot()["processes"] == [("order-1", *shown)]


# Who is refused.


class FakeControls:
    def __init__(self) -> None:
        self.pressed = False

    def press(self, key: str, _target: str) -> None:
        if key != "p":
            raise RefusedError("there is no such button")
        self.pressed = True


async def _post(headers: dict[str, str], body: str) -> tuple[int, bool]:
    controls, port = FakeControls(), unused_port()
    page = Page(cast("Controls", controls), port)
    async with TestClient(TestServer(page.application(), port=port)) as client:
        own = {"Origin": f"http://localhost:{port}", "X-Token": page.token}
        answer = await client.post("/press", data=body, headers={**own, **headers})
        return answer.status, controls.pressed


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, {"key": "p", "target": "order-1"}, 204),
        ({"X-Token": ""}, {"key": "p", "target": "order-1"}, 403),
        ({"X-Token": "x"}, {"key": "p", "target": "order-1"}, 403),
        ({"X-Token": "ü"}, {"key": "p", "target": "order-1"}, 403),
        ({"Origin": "http://elsewhere.invalid"}, {"key": "p", "target": "order-1"}, 403),
        ({"Origin": "null"}, {"key": "p", "target": "order-1"}, 403),
        ({"Host": "elsewhere.invalid"}, {"key": "p", "target": "order-1"}, 403),
        ({}, {"key": "rm -rf", "target": "order-1"}, 400),
        ({}, ["p"], 400),
    ],
)
def test_only_the_pages_own_buttons_work(
    headers: dict[str, str], body: object, status: int
) -> None:
    assert asyncio.run(_post(headers, json.dumps(body))) == (status, status == 204)

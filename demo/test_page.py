"""The page: what its board makes of observations, and whom it refuses."""

from __future__ import annotations

import asyncio
import json
from typing import cast

import pytest
from aiohttp.test_utils import TestClient, TestServer, unused_port

from demo.page.board import SETTLES_WITHIN_S, Board
from demo.page.controls import Controls, RefusedError, Told
from demo.page.web import Page

CARDS = [
    ("rabbitmq-1", "rabbitmq", "running", ""),
    ("order-1", "order", "running", ""),
    ("notify-1", "notify", "running", ""),
]


@pytest.fixture
def board() -> Board:
    """Give a board with one replica of each service, and one confirmed event."""
    board = Board()
    board.containers(CARDS)
    board.line("order-1", {"event": "starting", "process": "aa"})
    publish(board, "r-1")
    return board


def publish(board: Board, label: str, event_id: str = "", now_s: float = 0.0) -> None:
    board.sent(label, event_id or label, "again" if event_id else "new")
    board.confirm(label, now_s)


def done(board: Board, event_id: str, service: str = "order") -> None:
    board.record(service, event_id, "done", "aa/1/1")


def queues(board: Board, held: int, until_s: float, service: str = "order") -> None:
    """Have RabbitMQ asked every second."""
    for second in range(int(until_s) + 1):
        board.depths({service: held}, {}, float(second))


def dots(board: Board, service: str = "order") -> dict[str, tuple[str, str]]:
    return {
        label: (state, why) for label, _, state, why in board.snapshot()["lanes"][service]["dots"]
    }


def test_an_event_goes_from_the_queue_to_its_record(board: Board) -> None:
    board.depths({"order": 1}, {}, 0.0)
    assert dots(board)["r-1"][0] == "waiting"
    board.depths({"order": 0}, {}, 0.1)
    assert dots(board)["r-1"][0] == "in flight"
    board.record("order", "r-1", "claimed", "aa/1/1")
    assert dots(board)["r-1"][0] == "claimed"
    done(board, "r-1")
    assert dots(board)["r-1"] == ("recorded", "by order-1")
    assert dots(board, "notify")["r-1"][0] == "in flight"
    assert board.processes["order-1"].recorded == 1


def test_the_newest_wait_and_the_oldest_are_in_flight(board: Board) -> None:
    publish(board, "r-2")
    board.depths({"order": 1}, {}, 0.0)
    assert [state for state, _ in dots(board).values()] == ["in flight", "waiting"]


def test_what_is_not_confirmed_is_neither_in_a_queue_nor_lost(board: Board) -> None:
    board.sent("r-2", "r-2", "new")
    done(board, "r-1")
    queues(board, 0, 2 * SETTLES_WITHIN_S)
    assert dots(board)["r-2"][0] == "publishing"
    assert board.snapshot()["lanes"]["order"]["lost"] == 0


def test_a_confirmed_event_in_no_queue_and_without_a_record_is_lost(board: Board) -> None:
    queues(board, 0, SETTLES_WITHIN_S - 1)
    assert board.snapshot()["lost"] == 0
    queues(board, 0, SETTLES_WITHIN_S + 1)
    assert board.snapshot()["lanes"]["order"]["lost"] == 1
    done(board, "r-1")
    board.depths({"order": 0}, {}, SETTLES_WITHIN_S + 2)
    assert board.snapshot()["lanes"]["order"]["lost"] == 0


@pytest.mark.parametrize("queue", ["order", "order.retry.10s", "order.dead-letter"])
def test_what_a_queue_holds_is_not_lost(board: Board, queue: str) -> None:
    for second in range(30):
        board.depths({queue: 1}, {}, float(second))
    assert board.snapshot()["lanes"]["order"]["lost"] == 0


def test_what_is_unacked_is_not_lost(board: Board) -> None:
    for second in range(30):
        board.depths({"order": 0}, {"order": 1}, float(second))
    assert board.snapshot()["lanes"]["order"]["lost"] == 0


def test_nothing_is_judged_right_after_rabbitmq_was_away(board: Board) -> None:
    board.depths({"order": 0}, {}, 0.0)
    board.depths({"order": 0}, {}, 60.0)
    assert board.snapshot()["lost"] == 0


def test_a_second_record_is_double_and_so_is_a_second_effect(board: Board) -> None:
    done(board, "r-1")
    board.effect("r-1")
    assert board.snapshot()["double"] == 0
    board.effect("r-1")
    assert board.snapshot()["double"] == 1
    done(board, "r-1", "notify")
    done(board, "r-1", "notify")
    assert board.snapshot()["double"] == 2


def test_without_memory_what_is_processed_again_is_double(board: Board) -> None:
    board.line("order-1", {"event": "ENABLE_ETCD is false: every delivery is processed"})
    publish(board, "r-2", "r-1")
    for _ in range(2):
        board.line("order-1", {"event": "processed", "event_id": "r-1"})
    assert board.snapshot()["double"] == 1
    assert {state for state, _ in dots(board).values()} == {"processed"}


def test_with_memory_the_record_counts_and_not_the_line_about_it(board: Board) -> None:
    done(board, "r-1")
    board.line("order-1", {"event": "processed", "event_id": "r-1"})
    assert board.snapshot()["lanes"]["order"]["processed"] == 1


def test_a_call_that_the_receiver_knows_by_its_key_is_repeated_and_not_double(board: Board) -> None:
    board.called("r-1", again=False)
    board.called("r-1", again=True)
    assert (board.snapshot()["repeated"], board.snapshot()["double"]) == (1, 0)
    board.called("r-1", again=False)
    assert board.snapshot()["double"] == 1


def test_duplicates_are_skipped_one_by_one_and_in_batches(board: Board) -> None:
    done(board, "r-1")
    for number in range(2, 5):
        publish(board, f"r-{number}", "r-1")
    board.line("order-1", {"event": "skipped: a duplicate", "event_id": "r-1"})
    assert [state for state, _ in dots(board).values()].count("skipped") == 1
    board.line("order-1", {"event": "settled a batch", "processed_skipped": 2})
    assert [state for state, _ in dots(board).values()].count("skipped") == 3
    assert board.snapshot()["lanes"]["order"]["skipped"] == 3


def test_a_recorded_event_that_comes_again_says_so(board: Board) -> None:
    done(board, "r-1")
    board.line("order-1", {"event": "skipped: a duplicate", "event_id": "r-1"})
    assert dots(board)["r-1"] == ("recorded", "came again and was skipped")


def test_a_dead_letter_has_its_reason(board: Board) -> None:
    board.sent("r-2", "r-2", "invalid")
    board.confirm("r-2", 0.0)
    board.depths({"order.dead-letter": 1}, {}, 0.0)
    board.park("order", "r-2", "invalid", "not JSON")
    assert dots(board)["r-2"] == ("parked", "invalid: not JSON")
    assert board.snapshot()["lanes"]["order"]["parked"] == 1


def test_a_retry_says_when(board: Board) -> None:
    line = {"event": "failed: it comes back later", "event_id": "r-1", "again_in": "10s"}
    board.line("order-1", {**line, "error": "no"})
    assert dots(board)["r-1"] == ("retry", "again in 10s: no")


def test_what_is_of_another_round_does_not_count(board: Board) -> None:
    after = board.next_round()
    done(after, "r-1")
    after.effect("r-1")
    after.called("r-1", again=False)
    assert after.snapshot()["lanes"] == board.next_round().snapshot()["lanes"]
    assert list(after.processes) == [name for name, *_ in CARDS]


def test_what_is_at_rest_is_forgotten_but_for_the_newest(board: Board) -> None:
    for number in range(2, 200):
        publish(board, f"r-{number}")
    for number in range(1, 200):
        done(board, f"r-{number}")
    assert board.snapshot()["lanes"]["order"]["processed"] == 199
    assert len(board.lanes["order"].copies) == len(board.lanes["order"].by_id) < 50


@pytest.mark.parametrize(
    ("state", "why", "missing", "shown"),
    [
        ("running", "", {}, ("running", "")),
        ("running", "", None, ("not ready", "starting")),
        ("running", "", {"etcd": "no answer"}, ("not ready", "etcd: no answer")),
        ("frozen", "", {}, ("frozen", "")),
        ("killed", "by signal 9", {}, ("killed", "by signal 9")),
    ],
)
def test_a_card_says_how_its_process_is(
    board: Board, state: str, why: str, missing: dict[str, str] | None, shown: tuple[str, str]
) -> None:
    board.containers([("order-1", "order", state, why)])
    board.ready("order-1", missing)
    (card,) = board.snapshot()["processes"]
    assert (card["state"], card["why"]) == shown


# Who is refused.


class FakeControls:
    def __init__(self) -> None:
        self.pressed: list[tuple[str, str]] = []
        self.board, self.told = Board(), Told()

    def press(self, action: str, target: str) -> None:
        if action != "one":
            raise RefusedError("there is no such action")
        self.pressed.append((action, target))


async def _post(origin: str, token: str, body: str, host: str) -> tuple[int, bool]:
    controls, port = FakeControls(), unused_port()
    page = Page(cast("Controls", controls), port)
    async with TestClient(TestServer(page.application(), port=port)) as client:
        headers = {"Origin": origin.replace("PORT", str(port))}
        headers["X-Token"] = token.replace("TOKEN", page.token)
        if host:
            headers["Host"] = host
        answer = await client.post("/press", data=body, headers=headers)
        return answer.status, bool(controls.pressed)


OWN, TOKEN, ONE = "http://127.0.0.1:PORT", "TOKEN", json.dumps({"action": "one"})


@pytest.mark.parametrize(
    ("origin", "token", "body", "host", "status"),
    [
        (OWN, TOKEN, ONE, "", 204),
        (OWN, "", ONE, "", 403),
        (OWN, "TOKENx", ONE, "", 403),
        (OWN, "ü", ONE, "", 403),
        ("http://elsewhere.invalid", TOKEN, ONE, "", 403),
        ("null", TOKEN, ONE, "", 403),
        (OWN, TOKEN, ONE, "elsewhere.invalid", 403),
        (OWN, TOKEN, '{"action": "rm -rf"}', "", 400),
        (OWN, TOKEN, "[]", "", 400),
        (OWN, TOKEN, "no JSON", "", 400),
    ],
)
def test_only_the_pages_own_buttons_work(
    origin: str, token: str, body: str, host: str, status: int
) -> None:
    answered, pressed = asyncio.run(_post(origin, token, body, host))
    assert (answered, pressed) == (status, status == 204)

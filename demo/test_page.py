"""The page: how its board shows observations, and which requests it refuses."""

import asyncio
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import unused_port

from demo.compose import Ports
from demo.page.__main__ import Page
from demo.page.board import READINGS, Board, Kind, Process
from demo.page.controls import Controls
from servers.servers import REPOSITORY

LINES: dict[str, dict[str, object]] = {
    "memoryless": {"event": "ENABLE_ETCD is false: every delivery is processed"},
    "processed": {"event": "processed"},
    "2-processed": {"event": "settled a batch", "processed": 2},
    "skipped": {"event": "skipped: a duplicate"},
    "2-skipped": {"event": "settled a batch", "processed_skipped": 2},
    "failed": {"event": "failed: it comes back later", "again_in": "10s", "error": "no"},
}
READ = {"read": "", "ready": "order", "retry": "order.retry.10s", "letter": "order.dead-letter"}
"""The queue that holds a message in a reading. "long-" repeats the reading until it may be lost."""


def observe(board: Board, name: str) -> None:
    """Give the board an observation of the first event, r-1, or publish another event."""
    queue = name.removeprefix("long-")
    if name in LINES:
        board.line("order-1", {"event_id": "r-1", **LINES[name]})
    elif name in ("claimed", "released", "done"):
        board.record("order", "r-1", name, "aa/1/1")
    elif name in ("effect", "called", "repeated"):
        board.effect("order" if name == "effect" else "notify", "r-1", name == "repeated")
    elif name == "parked":
        board.park("order", "r-1", "invalid: no JSON")
    elif name == "next-round":
        board.begin()
    elif queue in READ or queue == "unacked":
        for _ in range(READINGS + 1 if queue != name else 1):
            held = {"order": 0, "notify": 9, READ.get(queue, ""): 1}
            board.depths(held, {"order": queue == "unacked"})
    elif name == "unconfirmed":
        board.publish("new")
    else:
        board.confirm(board.publish(cast("Kind", name))[0])


# What is observed about a confirmed event; the dots that are drawn; some of the numbers.
OBSERVED = """
read                        | in flight            | order in flight=1 notify waiting=9
ready                       | waiting                         | order waiting=1 order in flight=0
new ready                   | in flight; waiting              | confirmed=2
unconfirmed done            | recorded BY; publishing         | published=2 confirmed=1
claimed                     | claimed                         | order in flight=1
claimed released            | in flight                       | order in flight=1
memoryless processed        | processed UNRECORDED            | order processed=1 double=0
memoryless again 2-processed | processed UNRECORDED; processed UNRECORDED | double=1
done effect processed       | recorded BY                     | order processed=1 double=0
done effect effect          | recorded BY                     | double=1
done done effect effect     | recorded BY                     | double=1
called repeated             | in flight                       | calls=2 repeated=1 double=0
called called               | in flight                       | calls=2 repeated=0 double=1
done again skipped          | recorded BY; skipped BY         | order skipped=1
done again again again 2-skipped | recorded BY; skipped BY; skipped BY; in flight | order skipped=2
done skipped                | recorded came again and was skipped BY | order skipped=1
failed                      | retry again in 10s: no          | order retry=1 order in flight=0
parked long-letter          | parked invalid: no JSON         | order parked=1 lost=0
long-read                   | in flight                       | lost=1
long-read done read         | recorded BY                     | lost=0
done unconfirmed long-read long-read | recorded BY; publishing | lost=0
long-ready                  | waiting                         | lost=0
long-unacked                | in flight                       | lost=0
long-retry                  | in flight                       | lost=0
long-letter                 | in flight                       | lost=0
done other long-read        | recorded BY; in flight          | lost=1
done again long-read        | recorded BY; skipped it is in no queue, and has its record | lost=0
next-round done skipped effect called repeated |              | calls=0 order processed=0
"""


@pytest.mark.parametrize("row", OBSERVED.strip().splitlines())
def test_observations_are_shown(row: str) -> None:
    observed, dots, numbers = row.replace("UNRECORDED", "BY, without a record").split("|")
    board = Board()
    board.round = "r"
    board.containers({"rabbitmq-1": "running", "order-1": "running"})
    board.line("order-1", {"event": "starting", "process": "aa"})
    for name in ("new", *observed.split()):
        observe(board, name)
    shown = board.snapshot()
    drawn = [f"{state} {why}".strip() for at, _, state, why in shown["dots"] if at == "order"]
    assert "; ".join(drawn) == dots.strip().replace("BY", "by order-1")
    for name, number in re.findall(r"([a-z][a-z ]*)=(\d+)", numbers):
        assert shown["numbers"][name] == int(number), name


def test_only_the_newest_copies_at_rest_are_kept_and_drawn() -> None:
    board = Board()
    labels = [board.publish("new")[0] for _ in range(199)]
    assert len(board.snapshot()["dots"]) == 2 * 30
    for label in labels:
        board.record("order", label, "done", "aa/1/1")
    drawn = [label for at, label, *_ in board.snapshot()["dots"] if at == "order"]
    assert drawn == labels[-28:]
    assert board.snapshot()["numbers"]["order processed"] == 199


def test_a_card_shows_the_state_of_its_process() -> None:
    lacks = {"etcd": "down"}
    assert Process("order", "running", missing={}).shown(2) == ("running", "recorded 2")
    assert Process("order", "running", missing=None).shown(2) == ("not ready", "starting")
    assert Process("order", "running", missing=lacks).shown(2) == ("not ready", "etcd: down")
    assert Process("order", "frozen", missing=lacks).shown(0) == ("frozen", "")


def awaited(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test that is a coroutine."""
    return wraps(test)(lambda **arguments: asyncio.run(test(**arguments)))


@asynccontextmanager
async def served(named: int = 0) -> AsyncIterator[tuple[ClientSession, list[object]]]:
    """Serve a page, as if on port `named`. Yield a client like its own, and what is published."""
    sources: Any = SimpleNamespace(board=Board(), outbox=[])
    port = unused_port()
    url = f"http://127.0.0.1:{port}"
    async with asyncio.TaskGroup() as tasks:
        page = Page(Controls(cast("Any", None), sources, tasks), named or port)
        await page.runner.setup()
        await web.TCPSite(page.runner, "127.0.0.1", port).start()
        async with ClientSession(url, headers={"Origin": url, "X-Token": page.token}) as client:
            yield client, sources.outbox
        await page.runner.cleanup()


ONE = {"key": "p", "target": "order-1"}


@pytest.mark.parametrize(
    ("named", "headers", "body", "answer"),
    [
        (0, {}, ONE, (204, 1)),
        (0, {"X-Token": ""}, ONE, (403, 0)),
        (0, {"X-Token": "ü"}, ONE, (403, 0)),
        (0, {"Origin": "http://elsewhere.invalid"}, ONE, (403, 0)),
        (0, {"Origin": "null"}, ONE, (403, 0)),
        (0, {"Host": "elsewhere.invalid"}, ONE, (403, 0)),
        (0, {"Host": "localhost"}, ONE, (403, 0)),
        (80, {"Host": "localhost", "Origin": "http://localhost"}, ONE, (204, 1)),
        (0, {}, {"key": "rm -rf", "target": "order-1"}, (400, 0)),
        (0, {}, {"key": "k", "target": "/bin/sh"}, (204, 0)),
        (0, {}, ["p"], (400, 0)),
    ],
)
@awaited
async def test_only_its_own_buttons_work(
    named: int, headers: Any, body: object, answer: tuple[int, int]
) -> None:
    """A button for a process needs an existing one; without Docker there is none here."""
    async with served(named) as (client, outbox):
        pressed = await client.post("/press", json=body, headers=headers)
    assert (pressed.status, len(outbox)) == answer


@awaited
async def test_no_other_page_may_frame_it() -> None:
    async with served() as (client, _):
        answer = await client.get("/")
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


@awaited
async def test_sixteen_pages_may_be_open_and_a_closed_one_makes_room() -> None:
    async with served() as (client, _), AsyncExitStack() as opened, asyncio.timeout(5):
        pages = [await opened.enter_async_context(client.get("/events")) for _ in range(17)]
        pages[0].close()
        while pages[-1].status == 503:
            await asyncio.sleep(0.02)
            pages.append(await opened.enter_async_context(client.get("/events")))
    assert [page.status for page in (*pages[15:17], pages[-1])] == [200, 503, 200]


@pytest.mark.parametrize(("act", "first"), [("y", "up"), ("x", "stop")])
@awaited
async def test_a_reset_waits_until_the_command_of_the_act_has_ended(act: str, first: str) -> None:
    """And so does a second reset, pressed meanwhile."""
    loop, ended = asyncio.get_running_loop(), list[str]()

    def run(verb: str, *_: object, **_options: str) -> None:
        if verb == first and not ended:
            for _r in range(2):
                loop.call_soon_threadsafe(controls.press, "r", "")
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), loop).result(5)
        ended.append(verb)

    commands = {name: partial(run, name) for name in ("up", "set", "remove")}
    compose: Any = SimpleNamespace(docker=run, **commands)
    sources: Any = SimpleNamespace(board=Board(), broker=SimpleNamespace(purge=list))
    async with asyncio.TaskGroup() as tasks:
        controls = Controls(compose, sources, tasks)
        controls.press(act, "")
    assert ended[:2] == [first, "remove"]


@pytest.mark.parametrize(
    ("docker", "said"),
    [
        ("", r"\[Errno 8\] Exec format error: 'docker'"),
        ("#!/bin/sh", r"ports in use: \d+ \(PORT_PLAY\)\. Stop what .*: PORT_PLAY=\d+ make play"),
        ('#!/bin/sh\ncase "$*" in *--scale*) exit 1; esac', "docker compose failed: .*"),
    ],
    ids=["docker-is-broken", "port-is-taken", "up-fails"],
)
def test_one_line_says_why_it_cannot_run(tmp_path: Path, docker: str, said: str) -> None:
    (tmp_path / "docker").write_text(docker)
    (tmp_path / "docker").chmod(0o755)
    env = Ports.read(PORT_PLAY="8090").elsewhere().settings()
    env |= {"PATH": str(tmp_path), "PUBLISH_ADDRESS": "127.0.0.2"}
    with socket.create_server(("127.0.0.1", 0)) as other:
        env |= {"PORT_PLAY": str(other.getsockname()[1])} if "PORT_PLAY" in said else {}
        command = [sys.executable, "-m", "demo.page"]
        ended = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, check=False)
    assert re.fullmatch(f"play: {said}\n", ended.stderr.decode())
    assert ended.returncode == 2

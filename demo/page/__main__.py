"""Start the stack, serve the page until Ctrl-C, and take down what was started."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress

from aiohttp import web

from demo.compose import FILES, RECEIVER, Compose, Ports, Project, compose_servers
from demo.interrupt import interrupt_once
from demo.page.board import Board
from demo.page.controls import Controls
from demo.page.sources import Sources
from demo.page.web import HOST, Page
from demo.screen import Screen
from demo.stage import CannotPlayError
from servers.servers import REPOSITORY, docker_available

PROJECT = Project("reliable-play", "play", (*FILES, RECEIVER, "demo/page/page.yaml"), "json")


def main() -> int:
    """Return the exit code: 2 where it cannot run."""
    interrupt_once()
    if not docker_available():
        print("play: it needs a Docker engine, and none answers", file=sys.stderr)
        return 2
    try:
        ports, screen = Ports.read(PORT_PLAY="8090"), Screen()
        stack = compose_servers(REPOSITORY, ports, screen, keep=False, project=PROJECT)
        with stack as compose, suppress(asyncio.CancelledError):
            asyncio.run(_serve(compose, ports, screen))
        return 0
    except CannotPlayError as error:
        print(f"play: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


async def _serve(compose: Compose, ports: Ports, screen: Screen) -> None:
    board, port, loop = Board(), ports.numbers["PORT_PLAY"], asyncio.get_running_loop()
    sources, serving = Sources(PROJECT.name, ports, board), asyncio.current_task()
    assert serving is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, serving.cancel)
    async with asyncio.TaskGroup() as tasks:
        controls = Controls(compose, PROJECT.name, board, sources, tasks)
        runner = web.AppRunner(Page(controls, port).application(), shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, HOST, port).start()
        screen.say("Starting order, notify and their receiver ...")
        await controls.start()
        sources.start()
        screen.say(f"Open http://localhost:{port} and break something. Ctrl-C ends it all.")
        await controls.run()


if __name__ == "__main__":
    sys.exit(main())

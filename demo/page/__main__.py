"""Start the stack, serve the page until Ctrl-C, and take down what was started."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress

from aiohttp import web

from demo.compose import FILES, RECEIVER, Compose, Ports, Project, compose_servers
from demo.interrupt import interrupt_once
from demo.page.acts import add_acts
from demo.page.controls import Controls
from demo.page.sources import Servers, Sources
from demo.page.web import HOST, Page
from demo.screen import Screen
from demo.stage import CannotPlayError
from servers.servers import REPOSITORY, docker_available

PROJECT = Project("reliable-play", "play", (*FILES, RECEIVER, "demo/page/page.yaml"), "json")
_PORT = "8090"


def main() -> int:
    """Return the exit code: 2 where it cannot run."""
    interrupt_once()
    if not docker_available():
        print("play: it needs a Docker engine, and none answers", file=sys.stderr)
        return 2
    try:
        port, ports, screen = _port(), Ports.read(), Screen()
        with compose_servers(REPOSITORY, ports, screen, keep=False, project=PROJECT) as compose:
            asyncio.run(_serve(compose, ports, port, screen))
        return 0
    except CannotPlayError as error:
        print(f"play: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _port() -> int:
    text = os.environ.get("PORT_PLAY") or _PORT
    if not text.isdecimal() or not 0 < int(text) < 65_536:
        raise CannotPlayError(f"PORT_PLAY is {text!r}: write a port, as in PORT_PLAY={_PORT}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, int(text)))
        except OSError as error:
            raise CannotPlayError(f"port {text} (PORT_PLAY): {error.strerror}") from None
    return int(text)


async def _serve(compose: Compose, ports: Ports, port: int, screen: Screen) -> None:
    host, numbers = ports.host, ports.numbers
    servers = Servers(
        PROJECT.name,
        f"amqp://guest:guest@{host}:{numbers['PORT_RABBITMQ']}/",
        f"http://{host}:{numbers['PORT_RABBITMQ_UI']}",
        f"http://{host}:{numbers['PORT_ETCD']}",
    )
    controls = Controls(compose, PROJECT.name, servers.amqp_url)
    add_acts(controls)
    sources = asyncio.create_task(Sources(servers, lambda: controls.board).run())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, sources.cancel)
    page = Page(controls, port).application()
    runner = web.AppRunner(page, access_log=None, shutdown_timeout=1)
    try:
        await runner.setup()
        await web.TCPSite(runner, HOST, port).start()
        screen.say("Starting order, notify and their receiver ...")
        await controls.start()
        screen.say(f"Open http://localhost:{port} and break something. Ctrl-C ends it all.")
        with suppress(asyncio.CancelledError):
            await sources
    finally:
        sources.cancel()
        await runner.cleanup()
        await controls.end()


if __name__ == "__main__":
    sys.exit(main())

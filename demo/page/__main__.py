"""Start the stack, serve the page until Ctrl-C, and take down what was started.

HTTP serves the page's files and the board as server-sent events, and accepts presses of buttons.
"""

import asyncio
import json
import secrets
import sys
from contextlib import suppress
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from demo.compose import FILES, RECEIVER, Compose, Ports, Project, compose_servers
from demo.interrupt import run_program
from demo.page.controls import Controls
from demo.page.sources import Sources
from demo.screen import Screen

PROJECT = Project("reliable-play", "play", (*FILES, RECEIVER, "demo/page/page.yaml"), "json")
_HOST = "127.0.0.1"
_EVERY_S = 0.2
_MOST_STREAMS = 16
_CSP = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    # default-src does not cover these.
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class Page:
    """The page of one stack, served by aiohttp. It refuses requests for any other host name."""

    def __init__(self, controls: Controls, port: int) -> None:
        self.token = secrets.token_urlsafe(24)
        self._controls, self._streams = controls, asyncio.Semaphore(_MOST_STREAMS)
        # Browsers leave out port 80, HTTP's default.
        self._names = {f"{name}:{port}".removesuffix(":80") for name in ("localhost", _HOST)}
        application = web.Application(middlewares=[self._guard])
        application.router.add_get("/{name:(page\\.(css|js))?}", self._file)
        application.router.add_get("/events", self._events)
        application.router.add_post("/press", self._press)
        # Without cancellation, a closed stream would count as open until the board changes.
        self.runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=1)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse requests for another host, and a POST that does not come from the page."""
        if request.host not in self._names:
            raise web.HTTPForbidden(text="This page is http://localhost.")
        if request.method != "GET":
            given = request.headers.get("X-Token", "").encode()
            known = secrets.compare_digest(given, self.token.encode())
            origin = request.headers.get("Origin", "").removeprefix("http://")
            if not known or origin not in self._names:
                raise web.HTTPForbidden(text="Only the page's own buttons work.")
        return await handler(request)

    async def _file(self, request: web.Request) -> web.FileResponse:
        path = Path(__file__).with_name(request.match_info["name"] or "page.html")
        headers = {"Content-Security-Policy": _CSP, "Cache-Control": "no-store"}
        return web.FileResponse(path, headers=headers)

    async def _press(self, request: web.Request) -> web.Response:
        try:
            pressed = json.loads(await request.text())
            self._controls.press(str(pressed["key"]), str(pressed["target"]))
        except (ValueError, TypeError, KeyError) as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        return web.Response(status=204)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Send all that the page draws whenever it has changed. No other site can read it."""
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        stream = web.StreamResponse(headers=headers)
        if self._streams.locked():
            raise web.HTTPServiceUnavailable(text=f"{_MOST_STREAMS} pages are open: close one.")
        said = ""
        async with self._streams:
            await stream.prepare(request)
            with suppress(ConnectionError):
                while True:
                    drawn = self._controls.snapshot() | {"token": self.token}
                    before, said = said, json.dumps(drawn)
                    if said != before:
                        await stream.write(f"data: {said}\n\n".encode())
                    await asyncio.sleep(_EVERY_S)
        return stream


def main() -> int:
    """Return the exit code 0: Ctrl-C is the normal end."""
    ports, screen = Ports.read(PORT_PLAY="8090"), Screen()
    with compose_servers(ports, screen, PROJECT) as compose, suppress(KeyboardInterrupt):
        asyncio.run(_serve(compose, ports, screen))
    return 0


async def _serve(compose: Compose, ports: Ports, screen: Screen) -> None:
    port, tasks = ports.numbers["PORT_PLAY"], asyncio.TaskGroup()
    controls = Controls(compose, Sources(compose, ports), tasks)
    screen.say("Starting order, notify and their receiver ...")
    await controls.reset()
    runner = Page(controls, port).runner
    await runner.setup()
    await web.TCPSite(runner, _HOST, port).start()
    # Not earlier: an error inside would arrive as an ExceptionGroup.
    async with tasks:
        screen.say(f"Open http://localhost:{port} and break something. Ctrl-C ends it all.")
        await controls.run()


if __name__ == "__main__":
    sys.exit(run_program("play", main))

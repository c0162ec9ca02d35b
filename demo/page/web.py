"""The page over HTTP: its files, the board as server-sent events, and its buttons."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from html import escape
from itertools import groupby
from pathlib import Path

from aiohttp import web

from demo.page.controls import Button, Controls, RefusedError

HOST = "127.0.0.1"
_EVERY_S = 0.2
_HERE = Path(__file__).parent
_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:"
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Page:
    """The page of one stack. It answers to no other name than its own."""

    def __init__(self, controls: Controls, port: int) -> None:
        self.token = secrets.token_urlsafe(24)
        self._controls = controls
        self._names = {f"{name}:{port}" for name in ("localhost", HOST)}

    def application(self) -> web.Application:
        """Return it as aiohttp serves it."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/", self._page)
        app.router.add_get("/{name:page\\.(css|js)}", self._file)
        app.router.add_get("/events", self._events)
        app.router.add_post("/press", self._press)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse who reached us by another name, and a POST that is not the page's own."""
        if request.host not in self._names:
            raise web.HTTPForbidden(text="This page is http://localhost.")
        if request.method != "GET":
            given = request.headers.get("X-Token", "").encode()
            known = secrets.compare_digest(given, self.token.encode())
            origins = {f"http://{name}" for name in self._names}
            if not known or request.headers.get("Origin") not in origins:
                raise web.HTTPForbidden(text="Only the page's own buttons work.")
        return await handler(request)

    async def _page(self, _: web.Request) -> web.Response:
        text = (_HERE / "page.html").read_text().replace("{token}", self.token)
        text = text.replace("{buttons}", _fieldsets(self._controls.buttons))
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"}
        return web.Response(text=text, content_type="text/html", headers=headers)

    async def _file(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(_HERE / request.match_info["name"])

    async def _press(self, request: web.Request) -> web.Response:
        try:
            pressed = json.loads(await request.text())
            self._controls.press(str(pressed["key"]), str(pressed["target"]))
        except (ValueError, TypeError, KeyError, RefusedError) as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        return web.Response(status=204)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Send what the page draws, whole, whenever it has changed."""
        stream = web.StreamResponse(headers={"Cache-Control": "no-store"})
        stream.content_type = "text/event-stream"
        await stream.prepare(request)
        said = ""
        with suppress(ConnectionError):
            while True:
                shown = json.dumps(self._controls.snapshot())
                if shown != said:
                    await stream.write(f"data: {shown}\n\n".encode())
                said = shown
                await asyncio.sleep(_EVERY_S)
        return stream


def _fieldsets(buttons: Mapping[str, Button]) -> str:
    """Return the buttons in HTML, by their groups."""
    lines = []
    for group, members in groupby(buttons.items(), key=lambda item: item[1].group):
        lines.append(f"<fieldset><legend>{escape(group)}</legend>")
        for key, button in members:
            keys = f'data-key="{escape(key)}" aria-keyshortcuts="{escape(key)}"'
            lines.append(f"<button {keys}>{escape(button.label)}</button>")
        lines.append("</fieldset>")
    return "\n".join(lines)

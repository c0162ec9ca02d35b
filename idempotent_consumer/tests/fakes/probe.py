"""A service's health as a probe asks for it."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request

PAST_ANY_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def get(port: int, path: str) -> tuple[int, dict[str, object]]:
    """Return the status and the document of an answer."""
    try:
        with PAST_ANY_PROXY.open(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)

"""JSON over HTTP to servers on this machine; a proxy of the environment is not used."""

import base64
import json
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any, cast

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_json(
    method: str,
    url: str,
    body: object = None,
    *,
    login: tuple[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
) -> HTTPResponse:
    """Send a request with a `body` as JSON and a `login` as basic authentication.

    Returns the response, which the caller has to close. Raises OSError; for a status of 400 or
    above that is urllib's HTTPError.
    """
    request = urllib.request.Request(url, method=method, headers=dict(headers or {}))
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    if login is not None:
        token = base64.b64encode(":".join(login).encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    return cast("HTTPResponse", _opener.open(request, timeout=timeout_s))


def fetch_json(method: str, url: str, body: object = None, **options: Any) -> Any:
    """Send such a request, and return the decoded answer: None if it has no body."""
    try:
        with open_json(method, url, body, **options) as response:
            answer = response.read()
    except HTTPException as error:  # The server was killed during its answer.
        raise ConnectionError(f"{url}: {error}") from error
    return json.loads(answer) if answer else None

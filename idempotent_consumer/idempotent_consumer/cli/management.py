"""RabbitMQ's management API: what AMQP does not tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ..settings import Settings, SettingsError
from .web import Page, Tls, WebError, is_address

VARIABLE = "RABBITMQ_MANAGEMENT_URL"

_PORTS = {"http": 15672, "https": 15671}

Fetch = Callable[[str, Tls], Page]


class Management:
    """The API, at the first of the addresses that answers. Raises WebError."""

    def __init__(self, urls: Sequence[str], vhost: str, tls: Tls, fetch: Fetch) -> None:
        self._urls, self._vhost, self._tls, self._fetch = urls, quote(vhost, safe=""), tls, fetch

    def get(self, path: str) -> Any:
        """Return what is at a path below ``/api``; ``{vhost}`` in it stands for the one in use."""
        return self.page(path).json()

    def page(self, path: str) -> Page:
        """Return the same, unread."""
        path = path.replace("{vhost}", self._vhost)
        for left, url in zip(reversed(range(len(self._urls))), self._urls, strict=True):
            try:
                return self._fetch(f"{url}/api{path}", self._tls)
            except WebError as error:
                if error.status or not left:
                    raise WebError(
                        f"RabbitMQ's management API: {error} ({VARIABLE} says where it is)",
                        error.status,
                        error.body,
                    ) from None
        raise AssertionError("there is an address at least")

    def queues(self) -> list[dict[str, Any]]:
        """Return all queues: all there are now, with counts that are some seconds old."""
        found: list[dict[str, Any]] = self.get(
            "/queues/{vhost}?disable_stats=true&enable_queue_totals=true"
        )
        return found

    def policies(self) -> dict[str | None, dict[str, Any]]:
        """Return the definition of each policy by its name, an operator's by ``operator:`` and it.

        A queue shows its policies' names at once, what they amount to only seconds later.
        """
        found: dict[str | None, dict[str, Any]] = {}
        for prefix, path in (("", "policies"), ("operator:", "operator-policies")):
            for each in self.get(f"/{path}/{{vhost}}"):
                found[prefix + each["name"]] = each["definition"]
        return found


def management(environ: Mapping[str, str], settings: Settings, fetch: Fetch) -> Management:
    """Return the API at RABBITMQ_MANAGEMENT_URL, else where RABBITMQ_URL says, by its login.

    With ``amqps://`` that is https on port 15671, else http on 15672. Raises SettingsError.
    """
    tls = Tls(settings.rabbitmq_ca_cert, settings.rabbitmq_cert, settings.rabbitmq_key)
    vhost = unquote(urlsplit(settings.rabbitmq_urls[0]).path[1:]) or "/"
    given = environ.get(VARIABLE, "").strip().rstrip("/")
    if given and not is_address(given):
        raise SettingsError(f"{VARIABLE}: write http://user:password@host:port (or https://)")
    urls = [given] if given else [_beside(url) for url in settings.rabbitmq_urls]
    return Management(urls, vhost, tls, fetch)


def _beside(amqp_url: str) -> str:
    parts = urlsplit(amqp_url)
    scheme = "https" if parts.scheme == "amqps" else "http"
    login, at, _ = parts.netloc.rpartition("@")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{scheme}://{login if at else 'guest:guest'}@{host}:{_PORTS[scheme]}"

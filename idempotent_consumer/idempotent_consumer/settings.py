"""Settings from the environment, checked once at the start."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlencode, urlsplit

T = TypeVar("T")

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_PEM_BYTES = 2**20
_MAX_DELAYS = 100
_MAX_DURATION_S = 100 * 365 * 86400
"""A hundred years: well below the longest lease etcd grants, 9,000,000,000 s (its MaxLeaseTTL)."""


class SettingsError(ValueError):
    """A setting is wrong; the message names the variable and says what it takes."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a service reads from its environment. Every field has a default that works locally.

    Times are in seconds. ``retry_delays`` keeps the texts, which name the retry queues, with
    their seconds. ``dedup_window_s`` of 0 keeps records for good.
    """

    enable_etcd: bool = False
    rabbitmq_urls: tuple[str, ...] = field(
        default=("amqp://guest:guest@localhost:5672/",), repr=False
    )
    rabbitmq_ca_cert: str | None = None
    rabbitmq_cert: str | None = None
    rabbitmq_key: str | None = None
    etcd_endpoints: tuple[tuple[str, int], ...] = (("localhost", 2379),)
    etcd_user: str | None = None
    etcd_password: str | None = field(default=None, repr=False)
    etcd_ca_cert: str | None = None
    etcd_cert: str | None = None
    etcd_key: str | None = None
    statsd_host: str = "localhost"
    statsd_port: int = 8125
    statsd_prefix: str = ""
    dedup_window_s: int = 86400
    batch_size: int = 128
    etcd_max_txn_ops: int = 128
    retry_delays: tuple[tuple[str, int], ...] = (("1s", 1), ("10s", 10), ("60s", 60))
    calls_at_once: int = 100
    health_port: int = 0
    log_level: str = "info"
    log_format: str | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read each setting's variable; one that is unset or blank keeps its default.

        Raises SettingsError, with one line, for the first variable that is wrong.
        """
        given = {}
        for variable, (name, parse) in _VARIABLES.items():
            text = environ.get(variable, "").strip()
            if text:
                try:
                    given[name] = parse(_unicode(text))
                except ValueError as error:
                    hidden = name in _SECRET or "@" in text or "-----BEGIN" in text
                    shown = " is wrong:" if hidden else f" is {text!r}:"
                    raise SettingsError(f"{variable}{shown} {error}") from None
        settings = cls(**given)  # type: ignore[arg-type]
        settings._check_together()
        if "https://" in environ.get("ETCD_ENDPOINTS", "").lower() and not settings.etcd_ca_cert:
            raise SettingsError(
                "ETCD_ENDPOINTS says https://, which needs ETCD_CA_CERT, the "
                "authority that etcd's certificate is from"
            )
        return replace(settings, rabbitmq_urls=settings._urls_with_certificates())

    def _check_together(self) -> None:
        if (self.etcd_user is None) != (self.etcd_password is None):
            raise SettingsError("ETCD_USER and ETCD_PASSWORD go together: set both or neither")
        for name in ("etcd", "rabbitmq"):
            ca_cert, cert, key = (getattr(self, f"{name}_{what}") for what in _CERTIFICATES)
            if (cert is None) != (key is None):
                raise SettingsError(
                    f"{name.upper()}_CERT and {name.upper()}_KEY go together: set both or neither"
                )
            if cert and not ca_cert:
                raise SettingsError(
                    f"{name.upper()}_CERT needs {name.upper()}_CA_CERT, the "
                    "authority that the server's certificate is from"
                )
        if self.rabbitmq_ca_cert and not all(
            url.startswith("amqps://") for url in self.rabbitmq_urls
        ):
            raise SettingsError("RABBITMQ_CA_CERT is for TLS: write amqps:// in each RABBITMQ_URL")

    def _urls_with_certificates(self) -> tuple[str, ...]:
        """Return the URLs with the certificates as pika takes them, in its own query."""
        if not self.rabbitmq_ca_cert:
            return self.rabbitmq_urls
        files = {"ca_certs": self.rabbitmq_ca_cert}
        if self.rabbitmq_cert and self.rabbitmq_key:
            files |= {"certfile": self.rabbitmq_cert, "keyfile": self.rabbitmq_key}
        query = urlencode({"ssl_options": repr(files)})
        return tuple(f"{url}{'&' if '?' in url else '?'}{query}" for url in self.rabbitmq_urls)


def _unicode(text: str) -> str:
    """Return the text; raises ValueError for bytes that Python had to smuggle into it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not UTF-8") from None
    return text


def duration_s(text: str) -> int:
    """Read ``90s``, ``10m``, ``24h`` or ``7d`` (or ``0``) as seconds."""
    if text == "0":
        return 0
    match = re.fullmatch(r"([0-9]{1,10})([smhd])", text)
    if not match:
        raise ValueError("write a whole number and a unit, as in 30s, 10m, 24h or 7d")
    seconds = int(match[1]) * _UNITS_S[match[2]]
    if seconds > _MAX_DURATION_S:
        raise ValueError("write a hundred years at most, or 0 to keep records for good")
    return seconds


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise ValueError(f"write a whole number from {low} to {high}")
        return int(text)

    return parse


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"write one of {', '.join(choices)}")
        return text.lower()

    return parse


def _boolean(text: str) -> bool:
    known = dict.fromkeys(("true", "1", "yes", "on"), True)
    known |= dict.fromkeys(("false", "0", "no", "off"), False)
    if text.lower() not in known:
        raise ValueError("write true or false")
    return known[text.lower()]


def _list_of(parse: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    def parse_list(text: str) -> tuple[T, ...]:
        parts = tuple(parse(part.strip()) for part in text.split(",") if part.strip())
        if not parts:
            raise ValueError("write at least one")
        return parts

    return parse_list


def _delays(text: str) -> tuple[tuple[str, int], ...]:
    delays = _list_of(_delay)(text)
    if len(delays) > _MAX_DELAYS:
        raise ValueError(f"write {_MAX_DELAYS} delays at the most: each has a queue")
    return delays


def _delay(text: str) -> tuple[str, int]:
    seconds = duration_s(text)
    if not 1 <= seconds <= 30 * 86400:
        raise ValueError("each delay is from 1s to 30d")
    return text, seconds


def _amqp_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        _ = parts.port
        complete = parts.scheme in ("amqp", "amqps") and bool(parts.hostname)
    except ValueError:
        complete = False
    # An "@" behind the host is a password's, with a "/", "?" or "#" in it.
    if not complete or "@" in parts.path + parts.query + parts.fragment:
        raise ValueError(
            "write amqp://user:password@host:port/ (or amqps://), or several with ','; within a "
            "part write '/' as %2F, '?' as %3F, '#' as %23, ',' as %2C and '@' as %40"
        )
    return text


def _endpoint(text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(text if "://" in text else f"//{text}")
        host, port = parts.hostname, 2379 if parts.port is None else parts.port
        more = "@" in parts.netloc or parts.query or parts.fragment or parts.path.strip("/")
    except ValueError:
        host = None
    if not host or not port or more or parts.scheme not in ("", "http", "https"):
        raise ValueError(
            "write host:port, commas between several; a login is in ETCD_USER and ETCD_PASSWORD"
        )
    return host, port


def _pem_file(what: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        try:
            with Path(text).open("rb") as file:
                start = file.read(_MAX_PEM_BYTES)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        if not re.search(rf"-----BEGIN [A-Z0-9 ]*{what.upper()}-----".encode(), start):
            raise ValueError(f"there is no {what} in it; it takes a file in PEM format")
        return text

    return parse


_certificate_file, _key_file = _pem_file("certificate"), _pem_file("private key")


def _statsd_prefix(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise ValueError("write letters, digits, '.', '_' and '-'")
    return text.rstrip(".")


_CERTIFICATES = ("ca_cert", "cert", "key")

_SECRET = {"rabbitmq_urls", "etcd_endpoints", "etcd_password"}
"""What may hold a password, in the right place or in a wrong one."""

_VARIABLES: dict[str, tuple[str, Callable[[str], object]]] = {
    "ENABLE_ETCD": ("enable_etcd", _boolean),
    "RABBITMQ_URL": ("rabbitmq_urls", _list_of(_amqp_url)),
    "RABBITMQ_CA_CERT": ("rabbitmq_ca_cert", _certificate_file),
    "RABBITMQ_CERT": ("rabbitmq_cert", _certificate_file),
    "RABBITMQ_KEY": ("rabbitmq_key", _key_file),
    "ETCD_ENDPOINTS": ("etcd_endpoints", _list_of(_endpoint)),
    "ETCD_USER": ("etcd_user", str),
    "ETCD_PASSWORD": ("etcd_password", str),
    "ETCD_CA_CERT": ("etcd_ca_cert", _certificate_file),
    "ETCD_CERT": ("etcd_cert", _certificate_file),
    "ETCD_KEY": ("etcd_key", _key_file),
    "STATSD_HOST": ("statsd_host", str),
    "STATSD_PORT": ("statsd_port", _whole_number(1, 65535)),
    "STATSD_PREFIX": ("statsd_prefix", _statsd_prefix),
    "DEDUP_WINDOW": ("dedup_window_s", duration_s),
    "BATCH_SIZE": ("batch_size", _whole_number(1, 4096)),
    "ETCD_MAX_TXN_OPS": ("etcd_max_txn_ops", _whole_number(4, 100_000)),
    "RETRY_DELAYS": ("retry_delays", _delays),
    "CALLS_AT_ONCE": ("calls_at_once", _whole_number(1, 10_000)),
    "HEALTH_PORT": ("health_port", _whole_number(0, 65535)),
    "LOG_LEVEL": ("log_level", _choice("debug", "info", "warning", "error")),
    "LOG_FORMAT": ("log_format", _choice("console", "json")),
}

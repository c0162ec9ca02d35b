"""Settings from the environment, checked once at the start."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from configparser import ConfigParser
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

T = TypeVar("T")


class SettingsError(ValueError):
    """A setting is wrong; the message names the variable and says what it takes."""


# The parsers of variables. Each raises a ValueError that says what to write.

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_PEM_BYTES = 2**20
_MAX_DELAYS = 100
_MAX_DURATION_S = 100 * 365 * 86400
"""A hundred years: well below the longest lease etcd grants, 9,000,000,000 s (its MaxLeaseTTL)."""


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


def _whole_number(text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
        raise ValueError(f"write a whole number from {low} to {high}")
    return int(text)


def _choice(text: str, *choices: str) -> str:
    if text.lower() not in choices:
        raise ValueError(f"write one of {', '.join(choices)}")
    return text.lower()


def _boolean(text: str) -> bool:
    if text.lower() not in ConfigParser.BOOLEAN_STATES:
        raise ValueError("write true or false")
    return ConfigParser.BOOLEAN_STATES[text.lower()]


def _list(text: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    parts = tuple(parse(part.strip()) for part in text.split(",") if part.strip())
    if not parts:
        raise ValueError("write at least one")
    return parts


def read_delays(texts: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Return each delay's text, which is part of its queue's name, and its seconds."""
    delays = tuple((text, duration_s(text)) for text in texts)
    if len(delays) > _MAX_DELAYS:
        raise ValueError(f"write {_MAX_DELAYS} delays at the most: each has a queue")
    if not all(1 <= seconds <= 30 * 86400 for _, seconds in delays):
        raise ValueError("each delay is from 1s to 30d")
    return delays


def amqp_url(text: str) -> str:
    """Return RabbitMQ's URL, or raise a ValueError that says how to write one."""
    with suppress(ValueError):
        parts = urlsplit(text)
        # Both raise ValueError if they are invalid.
        _ = parts.port, (parts.hostname or "").encode("idna")
        # An "@" after the host means that the password has a "/", "?" or "#" in it.
        misplaced = "@" in parts.path + parts.query or parts.fragment
        whole_login = (parts.username is None) == (parts.password is None)
        if parts.scheme in ("amqp", "amqps") and parts.hostname and whole_login and not misplaced:
            return text
    raise ValueError(
        "write amqp://user:password@host:port/ (or amqps://), or several with ','; within a "
        "part write '/' as %2F, '?' as %3F, '#' as %23, ',' as %2C and '@' as %40"
    )


def _endpoint(text: str) -> tuple[str, int]:
    with suppress(ValueError):
        parts = urlsplit(text if "://" in text else f"//{text}")
        host, port = parts.hostname or "", 2379 if parts.port is None else parts.port
        host.encode("idna")  # It raises ValueError if this cannot be a name.
        more = "@" in parts.netloc or parts.query or parts.fragment or parts.path.strip("/")
        if host and port and not more and parts.scheme in ("", "http", "https"):
            return host, port
    raise ValueError(
        "write host:port, commas between several; a login is in ETCD_USER and ETCD_PASSWORD"
    )


def _pem_file(text: str, what: str) -> str:
    try:
        with Path(text).open("rb") as file:
            start = file.read(_MAX_PEM_BYTES)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if not re.search(rf"-----BEGIN [A-Z0-9 ]*{what.upper()}-----".encode(), start):
        raise ValueError(f"there is no {what} in it; it takes a file in PEM format")
    return text


def _statsd_prefix(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise ValueError("write letters, digits, '.', '_' and '-'")
    return text.rstrip(".")


def _setting(
    default: object, parse: Callable[..., object], *limits: object, shown: bool = True
) -> Any:
    """Return a field with a default and a parser of its variable's text."""
    metadata = {"parse": lambda text: parse(text, *limits)}
    return field(default=default, repr=shown, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """A service's settings. Every field has a default that works locally.

    Times are in seconds. ``retry_delays`` has each delay's text, which is part of its queue's name,
    and its seconds. With a ``dedup_window_s`` of 0 records are kept for ever.
    """

    enable_etcd: bool = _setting(False, _boolean)
    rabbitmq_urls: tuple[str, ...] = _setting(
        ("amqp://guest:guest@localhost:5672/",), _list, amqp_url, shown=False
    )
    rabbitmq_ca_cert: str | None = _setting(None, _pem_file, "certificate")
    rabbitmq_cert: str | None = _setting(None, _pem_file, "certificate")
    rabbitmq_key: str | None = _setting(None, _pem_file, "private key")
    etcd_endpoints: tuple[tuple[str, int], ...] = _setting((("localhost", 2379),), _list, _endpoint)
    etcd_user: str | None = _setting(None, str)
    etcd_password: str | None = _setting(None, str, shown=False)
    etcd_ca_cert: str | None = _setting(None, _pem_file, "certificate")
    etcd_cert: str | None = _setting(None, _pem_file, "certificate")
    etcd_key: str | None = _setting(None, _pem_file, "private key")
    statsd_host: str = _setting("localhost", str)
    statsd_port: int = _setting(8125, _whole_number, 1, 65535)
    statsd_prefix: str = _setting("", _statsd_prefix)
    dedup_window_s: int = _setting(86400, duration_s)
    batch_size: int = _setting(128, _whole_number, 1, 4096)
    etcd_max_txn_ops: int = _setting(128, _whole_number, 4, 100_000)
    retry_delays: tuple[tuple[str, int], ...] = _setting(
        read_delays(["1s", "10s", "60s"]), lambda text: read_delays(_list(text, str))
    )
    calls_at_once: int = _setting(100, _whole_number, 1, 10_000)
    breaker_failures: int = _setting(20, _whole_number, 0, 1_000_000)
    health_port: int = _setting(0, _whole_number, 0, 65535)
    log_level: str = _setting("info", _choice, "debug", "info", "warning", "error")
    log_format: str | None = _setting(None, _choice, "console", "json")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read each setting's variable. If it is unset or blank, the default is used.

        Raises SettingsError, with a message of one line, for the first variable that is wrong.
        """
        given: dict[str, Any] = {}
        for variable, (_, parse) in _VARIABLES.items():
            if text := environ.get(variable, "").strip():
                try:
                    text.encode()  # It raises UnicodeError if the variable is not UTF-8.
                    given[variable] = parse(text)
                except ValueError as error:
                    why = "it is not UTF-8" if isinstance(error, UnicodeError) else error
                    hidden = variable in _SECRET or "@" in text or "-----BEGIN" in text
                    shown = " is wrong:" if hidden else f" is {text!r}:"
                    raise SettingsError(f"{variable}{shown} {why}") from None
        _check_together(given, environ)
        _check_certificates(given)
        if "RABBITMQ_CA_CERT" in given:
            given["RABBITMQ_URL"] = _with_certificates(given)
        return cls(**{_VARIABLES[variable][0]: value for variable, value in given.items()})


def _check_together(given: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    for one, other in _PAIRS:
        if (one in given) != (other in given):
            raise SettingsError(f"{one} and {other} go together: set both or neither")
    for server in ("ETCD", "RABBITMQ"):
        if f"{server}_CERT" in given and f"{server}_CA_CERT" not in given:
            raise SettingsError(f"{server}_CERT needs {server}_CA_CERT, {_AUTHORITY}")
    urls = given.get("RABBITMQ_URL", [""])
    if "RABBITMQ_CA_CERT" in given and not all(url.startswith("amqps://") for url in urls):
        raise SettingsError("RABBITMQ_CA_CERT is for TLS: write amqps:// in each RABBITMQ_URL")
    if "https://" in environ.get("ETCD_ENDPOINTS", "").lower() and "ETCD_CA_CERT" not in given:
        raise SettingsError(f"ETCD_ENDPOINTS says https://, which needs ETCD_CA_CERT, {_AUTHORITY}")


def _check_certificates(given: Mapping[str, Any]) -> None:
    """Load the files: pika and gRPC do not say which is wrong, and pika asks for a pass phrase."""
    for server in ("ETCD", "RABBITMQ"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority, own, key = (f"{server}_{each}" for each in ("CA_CERT", "CERT", "KEY"))
        for variable in (authority, own):
            if variable in given:
                try:
                    context.load_verify_locations(given[variable])
                except OSError:
                    raise SettingsError(f"{variable} is damaged: OpenSSL cannot read it") from None
        if key in given:
            try:
                context.load_cert_chain(given[own], given[key], partial(_no_pass_phrase, key))
            except OSError as error:
                why = getattr(error, "reason", None) or error.strerror
                raise SettingsError(f"{key} is no key of {own}: {why}") from None


def _no_pass_phrase(key: str) -> str:
    raise SettingsError(f"{key} has a pass phrase: it takes a key without one")


def _with_certificates(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return RabbitMQ's URLs with the certificates in pika's query parameter for them."""
    files = {"ca_certs": given["RABBITMQ_CA_CERT"]}
    if "RABBITMQ_CERT" in given:
        files |= {"certfile": given["RABBITMQ_CERT"], "keyfile": given["RABBITMQ_KEY"]}
    query = urlencode({"ssl_options": repr(files)})
    return tuple(f"{url}{'&' if '?' in url else '?'}{query}" for url in given["RABBITMQ_URL"])


# These may hold a password, even if it does not belong there, so errors do not show them.
_SECRET = {"RABBITMQ_URL", "ETCD_ENDPOINTS", "ETCD_PASSWORD"}
_PAIRS = (
    ("ETCD_USER", "ETCD_PASSWORD"),
    ("ETCD_CERT", "ETCD_KEY"),
    ("RABBITMQ_CERT", "RABBITMQ_KEY"),
)
_AUTHORITY = "the authority that the server's certificate is from"
_NAMED_OTHERWISE = {"rabbitmq_urls": "RABBITMQ_URL", "dedup_window_s": "DEDUP_WINDOW"}

_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    _NAMED_OTHERWISE.get(each.name, each.name.upper()): (each.name, each.metadata["parse"])
    for each in fields(Settings)
}

"""Each variable of the contract: its default, its values, and the error for a wrong one."""

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from idempotent_consumer.settings import _VARIABLES, Settings, SettingsError


def read(**environ: str) -> Settings:
    return Settings.from_environ(environ)


@pytest.mark.parametrize("blank", ["", "  ", "\t\n"])
def test_blank_means_the_default_and_other_variables_are_ignored(blank: str) -> None:
    """tests/documents compares the defaults themselves with the page of settings."""
    others = {"PATH": "/bin", "ENABLE_ETC": "true"}
    assert read(**dict.fromkeys(_VARIABLES, blank), **others) == read() == Settings()


TAKES: dict[str, dict[str, Any]] = {
    "ENABLE_ETCD": {"true": True, "TRUE": True, "1": True, "off": False},
    "RABBITMQ_URL": {
        "amqps://u:p@h:5671/v": ("amqps://u:p@h:5671/v",),
        "amqp://a , amqp://b,": ("amqp://a", "amqp://b"),
    },
    "ETCD_ENDPOINTS": {
        "a:1,b": (("a", 1), ("b", 2379)),
        "http://etcd:2379/": (("etcd", 2379),),
        "[::1]:23790": (("::1", 23790),),
    },
    "STATSD_HOST": {" graphite ": "graphite"},
    "STATSD_PORT": {"9125": 9125},
    "STATSD_PREFIX": {"eu.shop.": "eu.shop"},
    "DEDUP_WINDOW": {"0": 0, "90s": 90, "10m": 600, "7d": 7 * 86400},
    "BATCH_SIZE": {"1": 1},
    "CALLS_AT_ONCE": {"1": 1, "10000": 10_000},
    "ETCD_MAX_TXN_OPS": {"1024": 1024},
    "RETRY_DELAYS": {"5s, 2m": (("5s", 5), ("2m", 120))},
    "HEALTH_PORT": {"8080": 8080},
    "LOG_LEVEL": {"DEBUG": "debug"},
    "LOG_FORMAT": {"json": "json"},
}


@pytest.mark.parametrize(
    ("variable", "text"), [(name, text) for name, texts in TAKES.items() for text in texts]
)
def test_a_value_is_read(variable: str, text: str) -> None:
    field, _ = _VARIABLES[variable]
    assert read(**{variable: text}) == replace(Settings(), **{field: TAKES[variable][text]})


TOO_MANY_DELAYS = ",".join(f"{n}s" for n in range(1, 102))

WRONG = {
    "ENABLE_ETCD": ["ture", "2"],
    "RABBITMQ_URL": [
        *("localhost:5672", "http://h", "amqp://", "amqp://h:port/", "amqp://a,b", ","),
        *("amqp://a..b/", f"amqp://{'a' * 64}/", "amqp://user@h/", "amqp://h/v#1"),
    ],
    "ETCD_ENDPOINTS": [
        *("a:b", "a:99999", "a:1/path", "a:0", "ftp://a:1", "user@a:1", "a:1?x"),
        *(":2379", "[::1", ",", "https://a:2379,https://b:2379", "HTTPS://a:2379", "a..b:2379"),
    ],
    "ETCD_PASSWORD": ["\udcff"],
    "ETCD_CA_CERT": ["/no/such/file"],
    "ETCD_CERT": ["/no/such/file"],
    "ETCD_KEY": ["/"],
    "STATSD_PORT": ["0", "65536", "8125.0"],
    "STATSD_PREFIX": ["a:b", "a b"],
    "DEDUP_WINDOW": ["24", "-1s", "1.5h", "1w", "9999999999d", "9000000000s"],
    "BATCH_SIZE": ["0", "many", "4097"],
    "CALLS_AT_ONCE": ["0", "10001", "all"],
    "ETCD_MAX_TXN_OPS": ["3", "1e3"],
    "RETRY_DELAYS": ["1s,10", "0s", "31d", TOO_MANY_DELAYS],
    "HEALTH_PORT": ["-1", "70000", "٣"],
    "LOG_LEVEL": ["loud"],
    "LOG_FORMAT": ["xml"],
}


@pytest.mark.parametrize(
    ("variable", "text"), [(name, text) for name, texts in WRONG.items() for text in texts]
)
def test_the_error_for_a_wrong_value_is_one_line_with_its_variable(
    variable: str, text: str
) -> None:
    with pytest.raises(SettingsError) as raised:
        read(**{variable: text})
    message = str(raised.value)
    assert message.startswith(variable)
    assert "\n" not in message
    assert len(message) > len(variable) + 15, "it says what to write"


# Variables that need others, and files.

TLS = Path(__file__).with_name("fakes") / "tls"
"""A certificate, its key, the same key with a pass phrase, and another key."""


def files(directory: Path, *variables: str) -> dict[str, str]:
    both = [(TLS / name).read_text() for name in ("certificate.pem", "key.pem")]
    (directory / "a.pem").write_text("".join(both))
    return dict.fromkeys(variables, str(directory / "a.pem"))


HALVES = ["CERT", "KEY", "CERT KEY", "CA_CERT CERT", "CA_CERT KEY"]
AMQPS = {"RABBITMQ_URL": "amqps://h/"}


@pytest.mark.parametrize(
    ("environ", "given", "says"),
    [
        *(({}, half, "ETCD_CERT") for half in HALVES),
        *((AMQPS, half, "RABBITMQ_CERT") for half in HALVES),
        ({"ETCD_USER": "root"}, "", "ETCD_USER and ETCD_PASSWORD"),
        ({"ETCD_PASSWORD": "x"}, "", "ETCD_USER and ETCD_PASSWORD"),
        ({"ETCD_ENDPOINTS": "https://a:2379"}, "", r"ETCD_ENDPOINTS.*ETCD_CA_CERT"),
        # The connection to b would be in plain text, against expectation.
        ({"RABBITMQ_URL": "amqps://a/,amqp://b/"}, "CA_CERT", r"RABBITMQ_CA_CERT.*amqps://"),
    ],
)
def test_a_variable_that_needs_another_is_refused_without_it(
    environ: dict[str, str], given: str, says: str, tmp_path: Path
) -> None:
    names = [f"{says.partition('_')[0]}_{name}" for name in given.split()]
    with pytest.raises(SettingsError, match=says):
        read(**environ, **files(tmp_path, *names))


@pytest.mark.parametrize("given", [["ETCD_CA_CERT"], ["ETCD_CA_CERT", "ETCD_CERT", "ETCD_KEY"]])
def test_etcds_certificates_are_files(given: list[str], tmp_path: Path) -> None:
    settings = read(ETCD_ENDPOINTS="https://etcd:2379", **files(tmp_path, *given))
    assert settings.etcd_ca_cert == str(tmp_path / "a.pem")


@pytest.mark.parametrize(
    "kinds",
    [{"ca_certs": "CA_CERT"}, {"ca_certs": "CA_CERT", "certfile": "CERT", "keyfile": "KEY"}],
)
def test_each_url_of_rabbitmq_gets_the_certificates(kinds: dict[str, str], tmp_path: Path) -> None:
    """In pika's format: one option, whose value is a literal of Python."""
    given = files(tmp_path, *(f"RABBITMQ_{kind}" for kind in kinds.values()))
    settings = read(RABBITMQ_URL="amqps://a/,amqps://b/v?heartbeat=5", **given)
    first, second = map(urlsplit, settings.rabbitmq_urls)
    assert (first.hostname, second.hostname, second.path) == ("a", "b", "/v")
    assert parse_qs(second.query)["heartbeat"] == ["5"]
    for url in (first, second):
        [options] = parse_qs(url.query)["ssl_options"]
        assert ast.literal_eval(options) == dict.fromkeys(kinds, str(tmp_path / "a.pem"))


NO_CERTIFICATE = "is .*wrong.pem': there is no certificate in it"
NO_KEY = "is .*wrong.pem': there is no private key in it"
DAMAGED = "-----BEGIN CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\n"


@pytest.mark.parametrize("server", ["RABBITMQ", "ETCD"])
@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        ("CA_CERT", "", NO_CERTIFICATE),
        ("CA_CERT", "0\x82 in DER", NO_CERTIFICATE),
        ("CERT", "-----BEGIN RSA PRIVATE KEY-----", NO_CERTIFICATE),
        ("KEY", "-----BEGIN CERTIFICATE-----", NO_KEY),
        ("CA_CERT", DAMAGED, "is damaged"),
        ("CERT", DAMAGED, "is damaged"),
        ("KEY", DAMAGED, "is no key of [A-Z]*_CERT: .*PEM"),
        ("KEY", TLS / "other_key.pem", "is no key of [A-Z]*_CERT: KEY_VALUES_MISMATCH"),
        ("KEY", TLS / "encrypted_key.pem", "has a pass phrase"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_refused_by_its_name(
    server: str, kind: str, content: str | Path, says: str, tmp_path: Path
) -> None:
    """And nobody is asked for a pass phrase, which would hold up the service for ever."""
    given = files(tmp_path, *(f"{server}_{each}" for each in ("CA_CERT", "CERT", "KEY")))
    variable, wrong = f"{server}_{kind}", tmp_path / "wrong.pem"
    wrong.write_text(content if isinstance(content, str) else content.read_text())
    with pytest.raises(SettingsError, match=f"^{variable} {says}"):
        read(**AMQPS, **given | {variable: str(wrong)})

"""How the command is called, how it ends, and how it writes numbers, times and texts."""

import io
import sys
import tomllib
from contextlib import redirect_stdout
from pathlib import Path
from pkgutil import resolve_name
from typing import TextIO

import orjson
import pytest

from fakes.operator import ETCD_AWAY, RABBITMQ_AWAY, Operator
from idempotent_consumer.cli import command
from idempotent_consumer.cli.context import Context
from idempotent_consumer.cli.output import counted, duration, plain, size
from idempotent_consumer.etcd import EtcdError, Failure
from idempotent_consumer.settings import Settings

PROJECT = Path(__file__).parents[1] / "pyproject.toml"

VERBS: list[tuple[str, ...]] = [
    ("publish", '{"id":"1","type":"a"}'),
    ("status", "order"),
    ("inspect", "order", "1"),
    ("dead-letters", "list", "order"),
    ("dead-letters", "show", "order"),
    ("dead-letters", "replay", "order", "--all"),
    ("dead-letters", "drop", "order", "--all", "--yes"),
    ("forget", "order", "1", "--yes"),
    ("doctor", "order"),
    ("gauges", "order"),
]


@pytest.fixture
def operator() -> Operator:
    return Operator()


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_prints_one_json_document(operator: Operator, verb: tuple[str, ...]) -> None:
    operator.has_service("order")
    operator.has_record("order", "1")
    operator.has_letter(b"{", reason="invalid")
    ran = operator.run(*verb, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert isinstance(ran.json, dict)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_reports_in_one_line_that_a_server_is_away_and_does_nothing(
    operator: Operator, verb: tuple[str, ...]
) -> None:
    operator.etcd_error, operator.rabbitmq_error = ETCD_AWAY, RABBITMQ_AWAY
    operator.has_letter(b'{"id":"1","type":"a"}', reason="failed")
    ran = operator.run(*verb, "--json")
    assert (ran.code, "is away" in ran.out, "Traceback" in ran.err) == (1, True, False)
    assert ran.err.count("\n") <= 1
    assert ran.json
    assert (operator.published, operator.resent, operator.removed) == ([], [], [])


@pytest.mark.parametrize(
    "arguments",
    [
        *("", "nonsense", "inspect order", "inspect Order 1", "status --ready localhost"),
        *("dead-letters", "dead-letters list order --limit 0"),
        *("publish --args []", "publish --timeout soon", "publish --exchange amq.topic {}"),
        *("publish --exchange= {}", "gauges --effects order", "gauges --effects order="),
        # How Python reads an argument that is not UTF-8.
        *(f"{verb} caf\udce9" for verb in ("inspect order", "forget order", "find", "publish")),
        *("publish --id caf\udce9 --type a", "publish --id 1 --type caf\udce9"),
        "gauges --effects order=caf\udce9",
    ],
    ids=ascii,
)
def test_a_wrong_call_ends_with_2(operator: Operator, arguments: str) -> None:
    ran = operator.run(*arguments.split())
    assert (ran.code, ran.out, "error: " in ran.err) == (2, "", True)


def test_an_unforeseen_error_is_one_line_and_has_a_traceback_at_debug(operator: Operator) -> None:
    def fail() -> None:
        raise LookupError("line\nby line")

    operator.meanwhile = fail
    ran = operator.run("inspect", "order", "1", "--json")
    assert (ran.code, ran.json) == (1, {"error": "LookupError: line\\nby line"})
    assert ran.err == "idempotent-consumer: LookupError: line\\nby line\n"
    assert "in fail\n" in operator.run("inspect", "order", "1", LOG_LEVEL="debug").err


def test_an_error_about_a_path_that_is_not_utf8_is_printed_as_json(operator: Operator) -> None:
    inspect = ("inspect", "order", "1", "--body", "caf\udce9")
    assert operator.run(*inspect, "--json").json["error"].startswith("caf\\udce9 cannot be read")


HOSTILE, ESCAPED = "\x1b]0;\x07", r"\x1b]0;\x07"


@pytest.mark.parametrize("verb", [("status",), ("doctor",), ("find", "1"), ("remove", "order")])
def test_control_codes_in_a_queues_name_are_escaped(operator: Operator, verb: tuple[str]) -> None:
    operator.has_service("order", consumers=0)
    queue = f"order.retry.{HOSTILE}"
    operator.queues.append({**operator.queue("order.retry.1s"), "name": queue})
    operator.has_letter(b'{"id":"1","type":"a"}', queue)
    operator.types("n\n")
    ran = operator.run(*verb)
    assert (ESCAPED in ran.out + ran.err, HOSTILE in ran.out + ran.err) == (True, False)


def test_control_codes_in_a_servers_error_are_escaped(operator: Operator) -> None:
    operator.etcd_error = EtcdError(Failure.UNKNOWN, HOSTILE)
    ran = operator.run("inspect", "order", "1")
    assert (ran.code, ran.err) == (1, f"idempotent-consumer: {ESCAPED}\n")


def run_into(out: TextIO, operator: Operator, *arguments: str) -> int:
    """Run the command with this standard output."""
    operator.environ, operator.settings = {}, Settings()
    with redirect_stdout(out):
        return command.main(arguments, {}, lambda _: operator)


@pytest.mark.parametrize("json", [(), ("--json",)])
@pytest.mark.parametrize("event_id", ["1", "2"])
def test_a_full_disk_at_standard_output_is_one_line(
    operator: Operator, capsys: pytest.CaptureFixture[str], event_id: str, json: tuple[str, ...]
) -> None:
    operator.has_record("order", "1")
    with Path("/dev/full").open("w") as full:
        assert run_into(full, operator, "inspect", "order", event_id, *json) == 1
    why = "standard output takes nothing: No space left on device" if event_id == "1" else "no rec"
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line


def test_what_a_terminal_cannot_show_is_escaped_and_json_is_utf8(operator: Operator) -> None:
    operator.has_service("order")
    operator.has_letter('{"id":"☃","type":"a"}'.encode(), reason="failed")
    for json, shown in ((), rb"\u2603   a "), (("--json",), '"id": "☃"'.encode()):
        out = io.TextIOWrapper(io.BytesIO(), "ascii")
        assert run_into(out, operator, "dead-letters", "list", "order", *json) == 0
        assert shown in out.buffer.getvalue()


def test_an_error_is_not_written_to_standard_output_if_standard_error_is_closed(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert run_into(out := io.StringIO(), operator, "inspect", "order", "1", "--json") == 1
    assert orjson.loads(out.getvalue())["found"] is False


def test_closed_standard_streams_are_empty_and_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stderr", None)
    context = Context({})
    assert (context.stdin.isatty(), context.stdin.read(), context.err.isatty()) == (0, b"", 0)


@pytest.mark.parametrize(
    ("typed", "code", "says"),
    [("y\n", 0, "[y/N]"), ("n\n", 1, "nothing was done"), (None, 1, "say --yes")],
)
def test_deleting_needs_a_yes_on_the_terminal(
    operator: Operator, typed: str | None, code: int, says: str
) -> None:
    operator.has_record("order", "1")
    if typed is not None:
        operator.types(typed)
    operator.ends(code, says, "forget", "order", "1")
    assert operator.store.keys("/service/order/") == ["/service/order/1"] * code


def test_the_project_installs_the_command_under_its_name() -> None:
    scripts = tomllib.loads(PROJECT.read_text())["project"]["scripts"]
    assert resolve_name(scripts[command.NAME]) is command.main


def test_numbers_and_times_are_written_for_people() -> None:
    times = {0.9: "0s", 59: "59s", 60: "1m", 3661: "1h 1m", 86_400: "1d", 90_061: "1d 1h"}
    assert {seconds: duration(seconds) for seconds in times} == times
    sizes = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 8 << 30: "8.0 GiB", 5 << 40: "5120.0 GiB"}
    assert {size_bytes: size(size_bytes) for size_bytes in sizes} == sizes
    numbers = {0: "0 events", 1: "1 event", 2000: "2,000 events"}
    assert {number: counted(number, "event") for number in numbers} == numbers


def test_a_strangers_text_is_escaped_and_cut_short() -> None:
    texts = {
        "ü ☃": "ü ☃",
        "a\nb\tc": "a\\nb\\tc",
        "\x1b[2J": "\\x1b[2J",
        "\u202egnp.exe": "\\u202egnp.exe",
        "\udcff": "\\udcff",
        "x" * 20: "x" * 13 + "…",
    }
    assert {text: plain(text, 14) for text in texts} == texts

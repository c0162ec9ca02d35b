"""``dead-letters``: what is selected, shown, sent back, held back and removed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pika
import pytest

from fakes.headers import HOSTILE, encoded, entry, header_entries, table
from fakes.operator import NOW_S, Operator, Typed
from idempotent_consumer.amqp import Properties
from idempotent_consumer.cli.dead_letters import DeadLetterQueue, Letter


def body(event_id: str, event_type: str = "a") -> bytes:
    return b'{"id":"%s","type":"%s"}' % (event_id.encode(), event_type.encode())


def ago(seconds: float) -> str:
    return datetime.fromtimestamp(NOW_S - seconds, UTC).isoformat(timespec="seconds")


@pytest.fixture
def operator() -> Operator:
    """Somebody who looks at four dead letters of order."""
    operator = Operator()
    operator.has_service("order")
    operator.has_letter(
        body("1"),
        reason="failed",
        error="RuntimeError: full",
        attempts=4,
        parked_at=ago(90),
        trace="t-1",
    )
    operator.has_letter(body("2", "b"), reason="conflict", error="used before", parked_at=ago(3600))
    operator.has_letter(b"\xff", reason="invalid", error="not JSON", parked_at=ago(10))
    operator.has_letter(body("1"), reason="failed", error="again", attempts=4, parked_at=ago(5))
    return operator


# list and show


def test_all_are_listed_and_none_is_removed(operator: Operator) -> None:
    ran = operator.run("dead-letters", "list", "order")
    assert ran.out.splitlines() == [
        "ID  TYPE  REASON    ATTEMPTS  AGE     ERROR",
        "1   a     failed    4         1m 30s  RuntimeError: full",
        "2   b     conflict  -         1h      used before",
        "-   -     invalid   -         10s     not JSON",
        "1   a     failed    4         5s      again",
        "4 dead letters of order: 2 failed, 1 conflict, 1 invalid; 4 listed",
    ]
    assert operator.removed == operator.resent == []


def test_a_listing_is_a_document_too(operator: Operator) -> None:
    found = operator.run("dead-letters", "list", "order", "--limit", "1", "--json").json
    assert found == {
        "service": "order",
        "total": 4,
        "reasons": {"failed": 2, "conflict": 1, "invalid": 1},
        "letters": [
            {
                "id": "1",
                "type": "a",
                "reason": "failed",
                "error": "RuntimeError: full",
                "attempts": 4,
                "since": ago(90),
                "age_s": 90,
                "bytes": len(body("1")),
            }
        ],
        "warning": None,
    }


@pytest.mark.parametrize(
    ("arguments", "errors"),
    [
        (("--reason", "failed"), ["RuntimeError: full", "again"]),
        (("--type", "b"), ["used before"]),
        (("--id", "1", "--limit", "1"), ["RuntimeError: full"]),
        (("--reason", "failed", "--type", "b"), []),
        (("--id", "None"), []),
    ],
)
def test_they_are_selected_by_all_that_is_given(
    operator: Operator, arguments: tuple[str, ...], errors: list[str]
) -> None:
    found = operator.run("dead-letters", "list", "order", *arguments, "--json").json
    assert [letter["error"] for letter in found["letters"]] == errors
    assert found["total"] == 4


def test_every_letter_is_read_so_that_all_go_back_in_their_order(operator: Operator) -> None:
    operator.run("dead-letters", "list", "order", "--limit", "1")
    assert operator.looked_at == 4


def test_a_queue_that_drops_what_was_looked_at_often_is_warned_of(operator: Operator) -> None:
    operator.queue("order.dead-letter")["arguments"] = {"x-queue-type": "quorum"}
    for verb in ("list", "show"):
        out = operator.run("dead-letters", verb, "order").out
        assert "RabbitMQ drops a letter from it after some 20 looks" in out


def test_no_dead_letters(operator: Operator) -> None:
    operator.dead.clear()
    assert operator.run("dead-letters", "list", "order").out == "no dead letters of order\n"


def test_a_letter_is_shown_whole(operator: Operator) -> None:
    (letter,) = operator.run("dead-letters", "show", "order", "--id", "1", "--json").json["letters"]
    assert letter["body"] == body("1").decode()
    assert letter["headers"]["x-trace"] == "t-1"
    out = operator.run("dead-letters", "show", "order", "--id", "1").out
    assert "x-trace           t-1" in out
    assert f"age               1m 30s, {ago(90)}" in out


def test_show_says_when_there_are_more(operator: Operator) -> None:
    there = len(operator.dead)
    assert operator.run("dead-letters", "show", "order").out.endswith(
        f"\n1 of {there} shown; --limit says how many\n"
    )
    assert operator.run("dead-letters", "show", "order", "--json").json["total"] == there
    assert "shown;" not in operator.run("dead-letters", "show", "order", "--id", "2").out


def test_what_an_invalid_letter_lacks_is_a_dash(operator: Operator) -> None:
    out = operator.run("dead-letters", "show", "order", "--reason", "invalid").out
    assert out.startswith("id                -\ntype              -\nreason            invalid\n")


def test_a_body_that_is_no_text_is_shown_in_base64(operator: Operator) -> None:
    run = operator.run("dead-letters", "show", "order", "--reason", "invalid", "--json")
    (letter,) = run.json["letters"]
    assert (letter["body"], letter["body_encoding"]) == ("/w==", "base64")


def test_a_header_of_a_type_that_json_lacks_is_shown_as_text(operator: Operator) -> None:
    operator.dead.clear()
    operator.has_letter(body("1"), odd=b"\xff", when=datetime(2027, 1, 1, tzinfo=UTC))
    assert operator.run("dead-letters", "show", "order", "--json").code == 0


# replay


@pytest.mark.parametrize("theirs", HOSTILE.values(), ids=HOSTILE)
def test_a_letter_is_shown_whatever_its_headers_are(operator: Operator, theirs: bytes) -> None:
    headers = table(theirs, entry(b"x-reason", b"S", b"\0\0\0\x07invalid"))
    operator.dead = [(Properties().decode(encoded(headers)), b"no event")]
    assert "invalid" in operator.run("dead-letters", "show", "order").out
    (letter,) = operator.run("dead-letters", "show", "order", "--json").json["letters"]
    assert letter["reason"] == "invalid"
    assert len(letter["headers"]) >= 2


class Channel:
    """A channel that keeps what is published and acked on it."""

    def __init__(self) -> None:
        self.published: list[tuple[Any, ...]] = []
        self.acked: list[int] = []

    def basic_publish(self, *message: Any, mandatory: bool) -> None:
        assert mandatory
        self.published.append(message)

    def basic_ack(self, tag: int) -> None:
        self.acked.append(tag)


@pytest.mark.parametrize("theirs", HOSTILE.values(), ids=HOSTILE)
def test_what_is_sent_back_has_the_bytes_of_its_own_headers_and_none_of_ours(theirs: bytes) -> None:
    ours = (b"x-reason", b"x-error", b"x-attempts", b"x-parked-at")
    headers = table(theirs, *(entry(name, b"V", b"") for name in ours))
    channel: Any = Channel()
    letters = DeadLetterQueue(channel, "order")
    letters.resend(Letter(7, Properties().decode(encoded(headers)), b"body"))
    ((exchange, queue, body, properties),) = channel.published
    assert (exchange, queue, body, channel.acked) == ("", "order", b"body", [7])
    assert header_entries(properties) == theirs


def test_failed_ones_are_sent_back(operator: Operator) -> None:
    ran = operator.run("dead-letters", "replay", "order", "--reason", "failed")
    assert (ran.code, ran.out) == (0, "2 dead letters sent back to order\n")
    assert operator.resent == [body("1"), body("1")]
    assert len(operator.dead) == 2


@pytest.mark.parametrize("verb", ["replay", "drop"])
def test_all_of_them_only_if_that_is_said(operator: Operator, verb: str) -> None:
    ran = operator.run("dead-letters", verb, "order")
    assert ran.code == 2
    assert "--all" in ran.err
    assert len(operator.dead) == 4


def risky(operator: Operator, *more: str, **environ: str) -> Any:
    """Replay the one letter there is; return what was held back."""
    return operator.run("dead-letters", "replay", "order", "--all", "--json", *more, **environ).json


@pytest.mark.parametrize(
    ("window", "age_s", "held"),
    [
        ("1h", 3599, 0),
        ("1h", 3600, 1),
        ("1h", 90_000, 1),
        ("0", 90_000, 0),
    ],
)
def test_what_is_older_than_the_window_is_held_back(window: str, age_s: float, held: int) -> None:
    """A copy may have been processed since, and the record of that have ended."""
    operator = Operator()
    operator.has_letter(body("1"), reason="failed", parked_at=ago(age_s))
    assert len(risky(operator, DEDUP_WINDOW=window)["held"]) == held
    assert len(operator.resent) == 1 - held


def test_what_has_a_record_is_sent_back_however_old_it_is() -> None:
    """The record decides: it is skipped as a duplicate, or parked again as a conflict."""
    operator = Operator()
    operator.has_record("order", "1")
    operator.has_letter(body("1"), reason="conflict", parked_at=ago(90_000))
    assert risky(operator)["replayed"] == 1


def test_a_conflict_whose_record_is_gone_is_held_back_however_young_it_is() -> None:
    operator = Operator()
    operator.has_letter(body("1"), reason="conflict", parked_at=ago(1))
    ran = operator.run("dead-letters", "replay", "order", "--all")
    assert ran.code == 1
    assert "held back: 1: the record that it was in conflict with is gone" in ran.out
    assert "--force" in ran.out


@pytest.mark.parametrize(
    "headers",
    [
        {"reason": "failed"},
        {"reason": "failed", "parked_at": "yesterday"},
        {},
        {"reason": "failed", "parked_at": 7},
    ],
)
def test_what_does_not_say_since_when_is_held_back(headers: dict[str, object]) -> None:
    operator = Operator()
    operator.has_letter(body("1"), **headers)
    assert "how long" in risky(operator)["held"][0]["why"]


def test_force_sends_back_what_is_held_back_and_needs_no_etcd() -> None:
    operator = Operator()
    operator.has_letter(body("1"), reason="conflict")
    assert risky(operator, "--force") == {"service": "order", "replayed": 1, "held": []}


def test_what_is_no_event_is_sent_back() -> None:
    """It has no id, so no record: the service parks it again, unless it can read it now."""
    operator = Operator()
    operator.has_letter(b"{", reason="invalid")
    assert risky(operator)["replayed"] == 1


# drop


def test_drop_removes_what_is_selected(operator: Operator) -> None:
    ran = operator.run("dead-letters", "drop", "order", "--reason", "invalid", "--yes")
    assert (ran.code, ran.out) == (0, "1 dead letter of order removed\n")
    assert operator.removed == [b"\xff"]
    assert operator.resent == []


def test_drop_asks_with_their_number(operator: Operator) -> None:
    operator.types("n\n")
    ran = operator.run("dead-letters", "drop", "order", "--all")
    assert ran.code == 1
    assert "Remove 4 dead letters of order for good? [y/N]" in ran.err
    assert operator.removed == []


def test_drop_leaves_what_came_while_it_asked(operator: Operator) -> None:
    """Even one with the same body: who said yes has not seen it."""

    class Slow(Typed):
        def readline(self, _size: int | None = -1, /) -> bytes:
            operator.has_letter(b"\xff", reason="invalid", error="not JSON", parked_at=ago(0))
            return b"y\n"

    operator.stdin = Slow()
    operator.run("dead-letters", "drop", "order", "--reason", "invalid")
    assert operator.removed == [b"\xff"]
    assert (operator.dead[-1][0].headers["x-parked-at"], len(operator.dead)) == (ago(0), 4)


# What a message of the queue says of itself.


def death(reason: str, when: datetime) -> dict[str, Any]:
    return {"x-death": [{"reason": reason, "queue": "order", "time": when, "count": 1}]}


def test_what_the_broker_dead_lettered_has_its_reason_and_time() -> None:
    """A producer can have written our headers into its message: RabbitMQ's word counts more."""
    when = datetime(2027, 1, 1)  # noqa: DTZ001 - pika's are naive, and in UTC
    forged = {"x-reason": "failed", "x-parked-at": ago(0)}
    properties = pika.BasicProperties(headers={**death("delivery_limit", when), **forged})
    letter = Letter(1, properties, body("1"))
    assert (letter.reason, letter.since) == ("delivery_limit", when.replace(tzinfo=UTC))


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {},
        {"x-death": "never"},
        {"x-death": []},
        {"x-death": [7]},
        {"x-attempts": "many"},
        {"x-attempts": True},
    ],
)
def test_headers_without_sense_say_nothing(headers: Any) -> None:
    letter = Letter(1, pika.BasicProperties(headers=headers), body("1"))
    assert (letter.reason, letter.attempts, letter.since) == ("unknown", None, None)


def test_a_look_does_not_change_what_a_letter_is_known_by() -> None:
    first, again = ({"x-reason": "failed"}, {"x-reason": "failed", "x-delivery-count": 3})
    other = {"x-reason": "failed", "x-parked-at": ago(timedelta(hours=1).total_seconds())}
    known = [
        Letter(1, pika.BasicProperties(headers=headers), body("1")).fingerprint
        for headers in (first, again, other)
    ]
    assert known[0] == known[1] != known[2]

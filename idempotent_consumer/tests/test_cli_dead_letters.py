"""``dead-letters``: which letters are selected, shown, replayed, held back and dropped."""

from datetime import UTC, datetime
from shlex import split
from time import process_time
from typing import Any

import pika
import pytest

from fakes.headers import HOSTILE, encoded, entry, header_entries, table
from fakes.operator import ETCD_AWAY, NOW_S, RABBITMQ_AWAY, Operator
from idempotent_consumer.amqp import Properties
from idempotent_consumer.cli.broker import BrokerError, Depth
from idempotent_consumer.cli.dead_letters import Letter


def body(event_id: str, event_type: str = "a") -> bytes:
    return b'{"id":"%s","type":"%s"}' % (event_id.encode(), event_type.encode())


def ago(seconds: float) -> str:
    return datetime.fromtimestamp(NOW_S - seconds, UTC).isoformat(timespec="seconds")


FULL, OTHER = "Refused: order 1 of customer 17", "Refused: order nine of customer 99"


@pytest.fixture
def operator() -> Operator:
    """An operator with four dead letters of order."""
    operator = Operator()
    operator.has_service("order")
    failed: dict[str, object] = {"reason": "failed", "attempts": 4}
    operator.has_letter(body("1"), **failed, error=FULL, parked_at=ago(90), trace="t-1")
    operator.has_letter(body("2", "b"), reason="conflict", error="used before", parked_at=ago(3600))
    operator.has_letter(b"\xff", reason="invalid", error="not JSON")
    operator.has_letter(body("nine"), **failed, error=OTHER, parked_at=ago(5))
    return operator


# list, groups and show


def test_list_shows_all_letters_and_removes_none(operator: Operator) -> None:
    assert operator.run("dead-letters", "list", "order").lines == [
        "ID    TYPE  REASON    ATTEMPTS  AGE     ERROR",
        "1     a     failed    4         1m 30s  Refused: order 1 of customer 17",
        "2     b     conflict  -         1h      used before",
        "-     -     invalid   -         ?       not JSON",
        "nine  a     failed    4         5s      Refused: order nine of customer 99",
        "4 dead letters of order: 2 failed, 1 conflict, 1 invalid; 4 listed",
    ]
    assert (operator.removed, operator.resent) == ([], [])
    operator.dead.clear()
    for verb in ("list", "groups"):
        assert operator.run("dead-letters", verb, "order").out == "no dead letters of order\n"


def test_list_prints_json(operator: Operator) -> None:
    """All letters are read, whatever the limit, so that they return in their order."""
    found = operator.run("dead-letters", "list", "order", "--limit", "1", "--json").json
    letter = {"id": "1", "type": "a", "reason": "failed", "error": FULL, "attempts": 4}
    letter |= {"replays": 0, "since": ago(90), "age_s": 90, "bytes": len(body("1"))}
    assert found.pop("letters") == [letter]
    reasons = {"failed": 2, "conflict": 1, "invalid": 1}
    assert found == {"service": "order", "total": 4, "reasons": reasons, "warning": None}
    assert operator.looked_at == 4


def test_letters_are_grouped_by_reason_type_and_kind_of_error(operator: Operator) -> None:
    assert operator.run("dead-letters", "groups", "order").lines == [
        "COUNT  REASON    TYPE  FIRST       LAST    ERROR",
        "2      failed    a     1m 30s ago  5s ago  Refused: order # of customer #",
        "1      conflict  b     1h ago      1h ago  used before",
        "1      invalid   -     ?           ?       not JSON",
        "4 dead letters of order in 3 groups",
    ]
    found = operator.run("dead-letters", "groups", "order", "--json").json
    shared = {"reason": "failed", "type": "a", "error": "Refused: order # of customer #"}
    assert found["groups"][0] == {**shared, "count": 2, "first": ago(90), "last": ago(5)}


@pytest.mark.parametrize(
    ("event_id", "error"),
    [("1", "a-" * 16_000), ("x" * 1_000_000, FULL)],
    ids=["long error", "long id"],
)
def test_a_strangers_long_texts_are_grouped_quickly(event_id: str, error: str) -> None:
    dead = letter({"x-error": error}, event_id)
    began_s = process_time()
    assert len(dead.kind_of_error) <= 1_100
    assert process_time() - began_s < 0.2


def test_the_longest_error_of_a_service_is_grouped_whole() -> None:
    error = f"{'E' * 490}: order %s ({'f' * 490}.py:%s)"
    assert letter({"x-error": error % (17, 12)}).kind_of_error == error % ("#", "#")


@pytest.mark.parametrize(
    ("arguments", "errors"),
    [
        ("--reason failed", [FULL, OTHER]),
        ("--type b", ["used before"]),
        ("--type a --limit 1", [FULL]),
        ("--reason failed --type b", []),
        ("--id None", []),
        ("--error 'order 1'", [FULL]),
        ("--error 'order # of customer'", [FULL, OTHER]),
    ],
)
def test_letters_are_selected_by_all_options_together(
    operator: Operator, arguments: str, errors: list[str]
) -> None:
    found = operator.run("dead-letters", "list", "order", *split(arguments), "--json").json
    assert [letter["error"] for letter in found["letters"]] == errors
    assert found["total"] == 4


@pytest.mark.parametrize("verb", ["list", "show"])
def test_there_is_a_warning_if_the_queue_has_a_delivery_limit(
    operator: Operator, verb: str
) -> None:
    operator.queue("order.dead-letter")["arguments"] = {"x-queue-type": "quorum"}
    out = operator.run("dead-letters", verb, "order").out
    assert "RabbitMQ drops a letter from it after some 20 looks" in out


@pytest.mark.parametrize("verb", ["list", "replay --all", "drop --all --yes"])
def test_letters_that_somebody_else_holds_are_an_error(operator: Operator, verb: str) -> None:
    name, *options = verb.split()
    look = ("dead-letters", name, "order", *options)
    operator.left["order.dead-letter"] = 1
    operator.ends(1, "order.dead-letter: 1 messages did not arrive in time", *look)
    operator.dead.clear()
    operator.left.clear()
    operator.depths["order.dead-letter"] = Depth(0, 1)
    operator.ends(1, "order.dead-letter: somebody else is looking at all there are", *look)


@pytest.mark.parametrize("verb", ["list", "groups"])
def test_letters_beyond_the_prefetch_are_fetched_one_by_one(operator: Operator, verb: str) -> None:
    operator.most_prefetched = 1
    assert operator.run("dead-letters", verb, "order").code == 0
    assert operator.looked_at == len(operator.dead) > 1


def test_show_prints_a_whole_letter_and_how_many_there_are(operator: Operator) -> None:
    which = ("dead-letters", "show", "order", "--reason", "failed")
    ran = operator.run(*which)
    assert "x-trace           t-1" in ran.out
    assert f"age               1m 30s, {ago(90)}" in ran.out
    assert ran.out.endswith("\n1 of 2 shown; --limit says how many\n")
    assert "shown;" not in operator.run("dead-letters", "show", "order", "--id", "2").out
    found = operator.run(*which, "--json").json
    (letter,) = found["letters"]
    assert (found["total"], letter["body"]) == (2, body("1").decode())
    assert letter["headers"]["x-trace"] == "t-1"


def test_an_invalid_letter_has_dashes_and_its_body_in_base64(operator: Operator) -> None:
    which = ("dead-letters", "show", "order", "--reason", "invalid")
    out = operator.run(*which).out
    assert out.startswith("id                -\ntype              -\nreason            invalid\n")
    (letter,) = operator.run(*which, "--json").json["letters"]
    assert (letter["body"], letter["body_encoding"]) == ("/w==", "base64")


@pytest.mark.parametrize("theirs", HOSTILE.values(), ids=HOSTILE)
def test_a_replay_keeps_the_producers_headers_byte_for_byte_and_none_of_ours(theirs: bytes) -> None:
    ours = [entry(name, b"V", b"") for name in (b"x-error", b"x-attempts", b"x-parked-at")]
    headers = table(theirs, entry(b"x-reason", b"S", b"\0\0\0\x07invalid"), *ours)
    operator = Operator()
    operator.dead[:] = [(Properties().decode(encoded(headers)), b"no event")]
    assert "invalid" in operator.run("dead-letters", "show", "order").out
    (letter,) = operator.run("dead-letters", "show", "order", "--json").json["letters"]
    assert letter["reason"] == "invalid"
    assert len(letter["headers"]) >= 5
    operator.run("dead-letters", "replay", "order", "--all")
    ((queue, properties, body),) = operator.resent
    assert (queue, body, operator.removed) == ("order", b"no event", [b"no event"])
    assert header_entries(properties) == theirs + entry(b"x-replays", b"I", b"\0\0\0\x01")


# replay


@pytest.mark.parametrize("verb", ["replay", "drop"])
def test_all_letters_need_the_option_all(operator: Operator, verb: str) -> None:
    operator.ends(2, "--all", "dead-letters", verb, "order")
    assert len(operator.dead) == 4


REPLAY = ("dead-letters", "replay", "order", "--all")
UNREAD = b'{"amount":42}'


@pytest.mark.parametrize(
    ("letter", "window", "reason", "parked_at", "why"),
    [
        (body("1"), "1h", "failed", ago(3599), ""),
        (body("1"), "1h", "failed", ago(3600), "it has been here for 1h, and the window is 1h"),
        (body("1"), "1h", "failed", ago(90_000), "it has been here for 1d 1h"),
        (body("1"), "0", "failed", ago(90_000), ""),
        (body("1"), "1d", "failed", "yesterday", "nothing says how long"),
        (body("1"), "1d", "failed", 7, "nothing says how long"),
        (body("1"), "1d", "unknown", None, "nothing says how long"),
        (body("1"), "1d", "conflict", ago(1), "the record that it was in conflict with is gone"),
        (UNREAD, "1h", "failed", ago(3599), ""),
        (UNREAD, "1h", "failed", ago(3600), "it has been here for 1h, and the window is 1h"),
        (UNREAD, "0", "failed", ago(90_000), ""),
        (UNREAD, "1d", "failed", None, "nothing says how long"),
        (UNREAD, "1d", "delivery_limit", ago(90_000), "it has been here for 1d 1h"),
        (UNREAD, "1d", "conflict", ago(1), "the record that it was in conflict with may be gone"),
        # The service could not read it either, so it was never processed.
        (UNREAD, "1h", "invalid", ago(90_000), ""),
    ],
)
def test_a_letter_is_held_back_if_its_event_may_have_been_processed_meanwhile(
    letter: bytes, window: str, reason: str, parked_at: object, why: str
) -> None:
    """That is, if its record may be gone. A record that exists decides when the letter arrives."""
    operator = Operator()
    operator.has_letter(letter, reason=reason, parked_at=parked_at)
    operator.given["DEDUP_WINDOW"] = window
    ran = operator.run(*REPLAY)
    assert (ran.code, len(operator.resent)) == ((1, 0) if why else (0, 1))
    if why:
        event_id = None if letter is UNREAD else "1"
        own_decoder = "its id cannot be read, because the service has a decoder of its own, so its "
        unread = f"{own_decoder}record was not looked for; " * (letter is UNREAD)
        assert f"held back: {event_id or '-'}: {unread}{why}" in ran.out
        assert "--force replays these too" in ran.out
        assert [each["id"] for each in operator.run(*REPLAY, "--json").json["held"]] == [event_id]
        operator.has_record("order", "1")
        again = () if event_id else ("--force",)
        assert (operator.run(*REPLAY, *again).code, len(operator.resent)) == (0, 1)


def test_force_replays_what_is_held_back_and_needs_no_etcd(operator: Operator) -> None:
    operator.etcd_error, waits = ETCD_AWAY, list[int]()
    operator.waits = lambda: waits.append(len(operator.removed))
    replay = ("dead-letters", "replay", "order", "--reason", "conflict", "--force")
    assert operator.run(*replay)[:2] == (0, "1 dead letter sent back to order\n")
    assert [sent[2] for sent in operator.resent] == [body("2", "b")]
    assert waits == [0, 0, 1, 1, 1], (
        "heartbeats are answered at each letter, and the last acks have time"
    )
    assert len(operator.dead) == 3


@pytest.mark.parametrize(
    ("before", "after"), [(None, 1), (1, 2), ("many", 1), (-5, 1), (2**31 - 1, 1)]
)
def test_a_replay_is_counted_in_a_header(before: object, after: int) -> None:
    operator = Operator()
    operator.has_service("order")
    operator.has_letter(body("1"), replays=before)
    shown = operator.run("dead-letters", "show", "order").out
    assert ("replays           1\n" in shown) == (before == 1)
    operator.run(*REPLAY, "--force")
    ((_, properties, _),) = operator.resent
    assert properties.headers["x-replays"] == after


# drop


def test_drop_leaves_what_arrives_while_it_asks(operator: Operator) -> None:
    """Even an equal letter, which was not there when the question was asked."""
    equal = {"reason": "invalid", "error": "not JSON"}
    operator.types("y\n", meanwhile=lambda: operator.has_letter(b"\xff", **equal))
    ran = operator.run("dead-letters", "drop", "order", "--reason", "invalid")
    assert ran[:2] == (0, "1 dead letter of order removed\n")
    assert "Remove 1 dead letter of order for good? [y/N]" in ran.err
    assert operator.removed == [b"\xff"]
    assert [body for _, body in operator.dead].count(b"\xff") == 1


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted; "),
        (RABBITMQ_AWAY, 1, "RabbitMQ is away; "),
    ],
    ids=["Ctrl-C", "connection lost"],
)
@pytest.mark.parametrize(
    ("verb", "done"),
    [
        ("replay --all --force", "sent back before that: 2"),
        ("drop --all --yes", "removed before that: at most 3"),
    ],
)
def test_an_error_says_what_was_done_before_it(
    operator: Operator, verb: str, done: str, error: BaseException, code: int, says: str
) -> None:
    def ack() -> None:
        if len(operator.removed) == 2:
            operator.waits = lose
            raise error

    def lose() -> None:
        """RabbitMQ closes the connection after a frame that was cut in two."""
        raise BrokerError("half a frame")

    operator.acks = ack
    name, *options = verb.split()
    ran = operator.run("dead-letters", name, "order", *options)
    line = f"idempotent-consumer: {says}{done}, the others stay\n"
    assert (ran.code, ran.out, ran.err) == (code, "", line)
    assert len(operator.dead) == 2


# a letter's headers


def letter(headers: Any, event_id: str = "1") -> Letter:
    return Letter(1, pika.BasicProperties(headers=headers), body(event_id))


def test_a_letter_that_the_broker_dead_lettered_has_the_brokers_reason_and_time() -> None:
    """A producer may have written our headers into its message, but not the broker's."""
    when = datetime(2027, 1, 1)  # noqa: DTZ001 - pika's are naive, and in UTC
    death = {"reason": "delivery_limit", "queue": "order", "time": when, "count": 1}
    dead = letter({"x-death": [death], "x-reason": "failed", "x-parked-at": ago(0)})
    assert (dead.reason, dead.since) == ("delivery_limit", when.replace(tzinfo=UTC))


@pytest.mark.parametrize(
    "headers",
    [
        None,
        *({"x-death": deaths} for deaths in ("never", [], [7])),
        *({"x-attempts": attempts} for attempts in ("many", True, -1, 2**63 - 1)),
        {"x-parked-at": "0001-01-01T00:00:00+14:00"},
        {"x-parked-at": "9999-12-31T23:59:59-14:00"},
    ],
)
def test_meaningless_headers_are_ignored(headers: Any) -> None:
    dead = letter(headers)
    assert (dead.reason, dead.attempts, dead.since) == ("unknown", None, None)


def test_a_letters_fingerprint_does_not_change_when_it_is_fetched_again() -> None:
    first = {"x-reason": "failed"}
    assert letter(first).fingerprint == letter({**first, "x-delivery-count": 3}).fingerprint
    assert letter(first).fingerprint != letter({**first, "x-parked-at": ago(3600)}).fingerprint

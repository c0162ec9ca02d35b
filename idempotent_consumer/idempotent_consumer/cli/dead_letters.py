"""``dead-letters``: what could not be processed is listed, grouped, shown, sent back or removed."""

from __future__ import annotations

import argparse
import base64
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, TypeVar

import orjson

from .. import names
from ..amqp import forwarded_properties
from ..bus import LAST_ACKS_S, queue_arguments
from ..etcd import EtcdError
from ..event import InvalidEvent, decode
from .broker import Broker, BrokerError
from .context import SERVICE, YES, Argument, Context, Verb, argument, flag
from .etcd import Etcd, Records
from .output import CommandError, Report, UsageError, counted, duration, ended, plain, table

T = TypeVar("T")

_ARRIVE_WITHIN_S = 10.0
_MOST_PREFETCHED = 65_535
_SHOWN_CHARACTERS = 20_000
_VARYING = re.compile(r"\b[\w-]*\d[\w-]*\b")
_GROUPED_CHARACTERS = 1_100
"""More than any error that a service writes; a stranger's can be long, and costs time."""

_OURS = (names.REASON_HEADER, names.ERROR_HEADER, names.ATTEMPTS_HEADER, names.PARKED_AT_HEADER)


class Letter:
    """A dead letter. Its headers are anybody's, and can be of any type.

    ``id`` and ``type`` are None if its body is not valid, or only to a decoder of the service's
    own. ``reason`` is the one it was parked for, or RabbitMQ's own word where the broker put it
    here. ``since`` is when that was, by the clock of the machine that did it; None where nobody
    said.
    """

    def __init__(self, tag: int, properties: Any, body: bytes) -> None:
        self.tag, self.properties, self.body = tag, properties, body
        self.headers: dict[str, Any] = properties.headers or {}
        self.id = self.type = None
        with suppress(InvalidEvent):
            event = decode(body)
            self.id, self.type = event.id, event.type
        # What is parked has no deaths any more, so those that are there are the broker's own.
        deaths = self.headers.get("x-death")
        latest = deaths[0] if isinstance(deaths, list) and deaths else None
        death = latest if isinstance(latest, dict) else {}
        self.reason = str(death.get("reason") or self.headers.get(names.REASON_HEADER, "unknown"))
        self.since = _time(death.get("time") or self.headers.get(names.PARKED_AT_HEADER))
        self.error = str(self.headers.get(names.ERROR_HEADER, ""))
        self.attempts = self._count(names.ATTEMPTS_HEADER)
        self.replays = self._count(names.REPLAYS_HEADER) or 0

    def _count(self, header: str) -> int | None:
        """Return a count that a service or a replay can have written: one more fits into AMQP."""
        count = self.headers.get(header)
        return count if type(count) is int and 0 <= count < 2**31 - 1 else None

    @property
    def kind_of_error(self) -> str:
        """Return the error with its numbers and ids blanked: what events with one cause share."""
        error = self.error[:_GROUPED_CHARACTERS]
        # An id that is not in it can be a megabyte long, and takes a second to compile.
        if self.id and self.id in error:
            error = re.sub(rf"(?<!\w){re.escape(self.id)}(?!\w)", "#", error)
        return _VARYING.sub("#", error)

    @property
    def fingerprint(self) -> bytes:
        """Return what tells it from others over two looks; a look changes its delivery count."""
        counts = ("x-delivery-count", "x-acquired-count")
        headers = [each for each in self.headers.items() if each[0] not in counts]
        return sha256(self.body + repr(sorted(headers)).encode()).digest()

    def facts(self, now_s: float) -> dict[str, Any]:
        """Return what it is, without its body."""
        since = self.since
        return {
            "id": self.id,
            "type": self.type,
            "reason": self.reason,
            "error": self.error,
            "attempts": self.attempts,
            "replays": self.replays,
            "since": since.isoformat() if since else None,
            "age_s": max(0, round(now_s - since.timestamp())) if since else None,
            "bytes": len(self.body),
        }

    def group(self, _now_s: float) -> tuple[tuple[str, str | None, str], list[datetime]]:
        """Return what it shares with others of its group, and since when it is here, if known."""
        since = [self.since.astimezone(UTC)] if self.since else []
        return (self.reason, self.type, self.kind_of_error), since

    def whole(self, now_s: float) -> dict[str, Any]:
        """Return all of it. AMQP has times, decimals and bytes in headers, and JSON has not."""
        headers = dict(self.headers)
        for name, value in headers.items():
            try:
                orjson.dumps(value)
            except TypeError:
                headers[name] = str(value)
        try:
            body, encoding = self.body.decode(), "text"
        except UnicodeDecodeError:
            body, encoding = base64.b64encode(self.body).decode(), "base64"
        return {**self.facts(now_s), "headers": headers, "body": body, "body_encoding": encoding}


def _time(value: object) -> datetime | None:
    """Return a header's time; pika's are naive, and in UTC."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        return None
    time = value if value.tzinfo else value.replace(tzinfo=UTC)
    try:
        time.astimezone(UTC)
    except OverflowError:  # A stranger's, in the first or the last hours that Python can write.
        return None
    return time


class NotArrivedError(BrokerError):
    """Messages that were counted have left the queue since, or somebody else holds them."""


class DeadLetterQueue:
    """The messages of a queue, unacked: what is not resent or removed goes back in place.

    ``queue`` is the one of the service's dead letters, unless another of its queues is given.
    """

    def __init__(self, channel: Any, service: str, queue: str = "") -> None:
        self._channel, self._service = channel, service
        self._queue = queue or names.dead_letter_queue(service)
        self.removed = 0

    def __iter__(self) -> Iterator[Letter]:
        """Yield all that are ready at this instant, in their order; none that comes later.

        Raises NotArrivedError where one of them does not come.

        All of them, whoever looks for one: what goes back goes to the end, so a look at a part
        would leave them in another order.
        """
        found = self._channel.queue_declare(self._queue, passive=True).method
        if not (left := found.message_count):
            if found.consumer_count:
                raise NotArrivedError(f"{self._queue}: somebody else is looking at all there are")
            return
        for method, properties, body in self._arriving():
            if method is None:
                raise NotArrivedError(
                    f"{self._queue}: {left} messages did not arrive in time; "
                    "somebody else may be looking at them"
                )
            yield Letter(method.delivery_tag, properties, body)
            left -= 1
            if not left:
                return

    def _arriving(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yield the messages that come, and a method of None where none does.

        A consumer without a prefetch gets 2,000 of a quorum queue, and AMQP has no larger one than
        this. What is beyond is taken one by one.
        """
        self._channel.basic_qos(prefetch_count=_MOST_PREFETCHED)
        for arrived in self._channel.consume(self._queue, inactivity_timeout=_ARRIVE_WITHIN_S):
            if arrived[0] is None:
                break
            yield arrived
        while True:
            yield self._channel.basic_get(self._queue)

    def resend(self, letter: Letter, outlet: Any) -> None:
        """Publish a letter to its service's own queue as it first was, and then remove it.

        ``outlet`` is a channel of another connection: while it waits for a confirm, pika reads on,
        and would have all of a large queue in memory.
        """
        replays: dict[str, object] = {names.REPLAYS_HEADER: letter.replays + 1}
        properties = forwarded_properties(letter.properties, replays, without=_OURS)
        outlet.basic_publish(
            names.DEFAULT_EXCHANGE, self._service, letter.body, properties, mandatory=True
        )
        self.remove(letter)

    def remove(self, letter: Letter) -> None:
        """Remove a letter for good."""
        self._channel.basic_ack(letter.tag)
        self.removed += 1


@contextmanager
def open_dead_letter_queue(
    broker: Broker, service: str, queue: str = ""
) -> Iterator[DeadLetterQueue]:
    """Hold a service's dead letters, or another queue's messages, for the block. BrokerError."""
    with broker.channel() as channel:
        letters = DeadLetterQueue(channel, service, queue)
        try:
            yield letters
        except BaseException:
            if letters.removed:
                # What has ended the block counts; an interrupt can have cut a frame in two.
                with suppress(BrokerError):
                    broker.wait(LAST_ACKS_S)
            raise
        if letters.removed:
            broker.wait(LAST_ACKS_S)


_SELECTORS = ("reason", "type", "id", "error")


class _Selection:
    """The letters that have this reason, type, id and error, each where given; at most so many.

    ``reasons`` counts all letters that were looked at, ``matching`` those that are meant, however
    many. Raises UsageError where nothing narrows it and it was not said that all are meant.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        given = {"limit": None, "all": True, **vars(arguments)}
        self._wanted = {name: given[name] for name in _SELECTORS if given[name] is not None}
        self._limit = given["limit"]
        if not self._wanted and self._limit is None and not given["all"]:
            raise UsageError("say which: --id, --type, --reason, --error, --limit, or --all")
        self.reasons, self.matching = Counter[str](), 0

    def of(self, letters: Iterable[Letter]) -> Iterator[Letter]:
        """Yield those, and read on to the last letter, so that all go back in their order."""
        for letter in letters:
            self.reasons[letter.reason] += 1
            if all(self._has(letter, name, value) for name, value in self._wanted.items()):
                self.matching += 1
                if self._limit is None or self.matching <= self._limit:
                    yield letter

    def _has(self, letter: Letter, name: str, value: str) -> bool:
        if name == "error":
            return value in letter.error or value in letter.kind_of_error
        return bool(getattr(letter, name) == value)


def _look(
    chosen: _Selection,
    arguments: argparse.Namespace,
    context: Context,
    facts: Callable[[Letter, float], T],
) -> tuple[list[T], str | None]:
    """Return the facts of the letters chosen, and a warning where a look costs something.

    The facts are kept, not the letters: each holds a body of up to a megabyte.
    """
    name, queue = arguments.service, names.dead_letter_queue(arguments.service)
    with context.rabbitmq() as broker:
        with open_dead_letter_queue(broker, name) as letters:
            found = [facts(letter, context.now_s()) for letter in chosen.of(letters)]
        expected = queue_arguments(name, ())[queue]
        if broker.depth(queue) is None or not broker.differs(queue, expected):
            return found, None
    return found, (
        f"{queue} is of an older version: RabbitMQ drops a letter from it after some 20 looks, "
        "of which this was one. idempotent-consumer doctor says what to do"
    )


def _report(
    name: str, lines: list[str], warning: str | None, document: Mapping[str, object]
) -> Report:
    """Return what there is to say of a service's letters, and the warning behind it."""
    lines += [f"warning: {warning}"] * bool(warning)
    return Report({"service": name, **document, "warning": warning}, "\n".join(lines))


def _list(arguments: argparse.Namespace, context: Context) -> Report:
    chosen, name = _Selection(arguments), arguments.service
    letters, warning = _look(chosen, arguments, context, Letter.facts)
    rows = [
        {
            "ID": plain(each["id"] or "-", 40),
            "TYPE": plain(each["type"] or "-", 24),
            "REASON": plain(each["reason"], 16),
            "ATTEMPTS": "-" if each["attempts"] is None else str(each["attempts"]),
            "AGE": "?" if each["age_s"] is None else duration(each["age_s"]),
            "ERROR": plain(each["error"], 80),
        }
        for each in letters
    ]
    reasons, total = chosen.reasons, chosen.reasons.total()
    by_reason = ", ".join(f"{number} {plain(why, 40)}" for why, number in reasons.items())
    end = f"{_total(total, name)}: {by_reason}; {len(letters)} listed"
    lines = [*([table(rows)] if rows else []), end if total else f"no dead letters of {name}"]
    document = {"total": total, "reasons": dict(reasons), "letters": letters}
    return _report(name, lines, warning, document)


def _total(number: int, name: str) -> str:
    return f"{counted(number, 'dead letter')} of {name}"


def _groups(arguments: argparse.Namespace, context: Context) -> Report:
    """Count those that have a reason, a type and a kind of error in common."""
    chosen, name, now_s = _Selection(arguments), arguments.service, context.now_s()
    letters, warning = _look(chosen, arguments, context, Letter.group)
    times: dict[tuple[str, str | None, str], list[datetime]] = {}
    for shared, since in letters:
        times.setdefault(shared, []).extend(since)
    sizes = Counter(shared for shared, _ in letters)
    groups, rows = list[dict[str, object]](), list[dict[str, object]]()
    for shared, number in sizes.most_common():
        (reason, event_type, error), known = shared, times[shared]
        first, last = (min(known), max(known)) if known else (None, None)
        groups.append(
            {
                "reason": reason,
                "type": event_type,
                "error": error,
                "count": number,
                "first": first and first.isoformat(),
                "last": last and last.isoformat(),
            }
        )
        rows.append(
            {
                "COUNT": number,
                "REASON": plain(reason, 16),
                "TYPE": plain(event_type or "-", 24),
                "FIRST": _ago(first, now_s),
                "LAST": _ago(last, now_s),
                "ERROR": plain(error, 80),
            }
        )
    end = f"{_total(len(letters), name)} in {counted(len(groups), 'group')}"
    lines = [table(rows), end] if rows else [f"no dead letters of {name}"]
    return _report(name, lines, warning, {"total": len(letters), "groups": groups})


def _ago(since: datetime | None, now_s: float) -> str:
    return f"{duration(max(0, now_s - since.timestamp()))} ago" if since else "?"


def _show(arguments: argparse.Namespace, context: Context) -> Report:
    chosen, name = _Selection(arguments), arguments.service
    shown, warning = _look(chosen, arguments, context, Letter.whole)
    if not shown:
        raise CommandError(f"no such dead letter of {name}")
    lines = ["\n\n".join(map(_text, shown))]
    if chosen.matching > len(shown):
        lines.append(f"\n{len(shown)} of {chosen.matching:,} shown; --limit says how many")
    return _report(name, lines, warning, {"total": chosen.matching, "letters": shown})


def _text(shown: dict[str, Any]) -> str:
    age_s, facts = shown["age_s"], ["id", "type", "reason", "error", "attempts"]
    if shown["replays"]:
        facts.append("replays")
    lines = [(name, "-" if shown[name] is None else str(shown[name])) for name in facts]
    lines.append(("age", "unknown" if age_s is None else f"{duration(age_s)}, {shown['since']}"))
    lines += [(plain(name, 40), str(value)) for name, value in shown["headers"].items()]
    texts = [f"{name:<18}{plain(text, 1000)}" for name, text in lines]
    return "\n".join([*texts, f"{'body':<18}{plain(shown['body'], _SHOWN_CHARACTERS)}"])


def _replay(arguments: argparse.Namespace, context: Context) -> Report:
    """Send letters back, and say what was held back. Not ok where something was."""
    chosen, name, replayed = _Selection(arguments), arguments.service, 0
    held: list[dict[str, str | None]] = []
    try:
        with (
            context.etcd() as etcd,
            context.rabbitmq() as broker,
            open_dead_letter_queue(broker, name) as letters,
            context.rabbitmq() as sender,
            sender.channel() as outlet,
        ):
            outlet.confirm_delivery()
            for letter in chosen.of(_meanwhile(letters, sender)):
                why = None if arguments.force else _risk(letter, name, context, etcd)
                if why is None:
                    letters.resend(letter, outlet)
                    replayed += 1
                else:
                    held.append({"id": letter.id, "why": why})
    except (BrokerError, EtcdError, KeyboardInterrupt) as error:
        done = f"sent back before that: {replayed}, the others stay"
        raise ended(error, done, {"replayed": replayed}) from None
    if not replayed and not held:
        raise CommandError(f"no such dead letter of {name}")
    lines = [f"{counted(replayed, 'dead letter')} sent back to {name}"]
    lines += [f"held back: {plain(each['id'] or '-')}: {each['why']}" for each in held]
    if held:
        lines.append("--force replays these too: whatever was done for them once is done again")
    document = {"service": name, "replayed": replayed, "held": held}
    return Report(document, "\n".join(lines), not held)


def _meanwhile(letters: Iterable[Letter], other: Broker) -> Iterator[Letter]:
    """Yield letters, and answer another connection's heartbeats, be it not used for long."""
    for letter in letters:
        other.wait(0)
        yield letter


def _risk(letter: Letter, service: str, context: Context, etcd: Etcd) -> str | None:
    """Return why a replay could process an event a second time, or None where it cannot.

    A record that is there decides by itself when the letter comes. One that is not may have been
    there and have ended with its window, unless that would be too long for the letter's age: what
    failed had no record when it was parked. A conflict had one, by another body.
    """
    if letter.id is None:
        # What the service could not read either was never processed.
        why = None if letter.reason == names.INVALID else _risk_without_record(letter, context)
        return why and f"{_UNREAD}; {why}"
    if Records(etcd, service).get(letter.id) is not None:
        return None
    return _risk_without_record(letter, context)


_UNREAD = (
    "its id cannot be read, because the service has a decoder of its own, so its record was not "
    "looked for"
)


def _risk_without_record(letter: Letter, context: Context) -> str | None:
    if letter.reason == names.CONFLICT:
        if letter.id is None:
            return "the record that it was in conflict with may be gone"
        return "the record that it was in conflict with is gone: it would be processed as new"
    window_s = context.settings.dedup_window_s
    if not window_s:
        return None
    if letter.since is None:
        return "nothing says how long it has been here, so its record may be gone with the window"
    age_s = context.now_s() - letter.since.timestamp()
    if age_s < window_s:
        return None
    window = f"the window is {duration(window_s)}: a record of it would be gone"
    return f"it has been here for {duration(age_s)}, and {window}"


def _drop(arguments: argparse.Namespace, context: Context) -> Report:
    """Remove what was there when it was asked about, and nothing that came while it was.

    Nothing is in flight meanwhile: nobody answers RabbitMQ's heartbeats while a person thinks.
    """
    chosen, name = _Selection(arguments), arguments.service
    with context.rabbitmq() as broker, open_dead_letter_queue(broker, name) as letters:
        seen = Counter(letter.fingerprint for letter in chosen.of(letters))
    if not seen:
        raise CommandError(f"no such dead letter of {name}")
    context.confirm(f"Remove {_total(seen.total(), name)} for good?", arguments.yes)
    dropped = 0
    try:
        with context.rabbitmq() as broker, open_dead_letter_queue(broker, name) as letters:
            for letter in letters:
                if seen[letter.fingerprint]:
                    seen[letter.fingerprint] -= 1
                    dropped += 1
                    letters.remove(letter)
    except (BrokerError, KeyboardInterrupt) as error:
        # RabbitMQ confirms no ack: the last may not have arrived.
        done = f"removed before that: at most {dropped}, the others stay"
        raise ended(error, done, {"dropped": dropped}) from None
    document = {"service": name, "dropped": dropped}
    return Report(document, f"{_total(dropped, name)} removed")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError("write a whole number from 1")
    return int(text)


def _limit(number: int | None = None) -> Argument:
    text = "at most so many" + (f" (default {number})" if number else "")
    return argument("--limit", type=_positive, default=number, metavar="N", help=text)


_FORCE = (
    "also what may have been processed before the window: it would be processed again; etcd is not "
    "asked"
)
_WHICH = (
    SERVICE,
    argument("--reason", help="invalid, conflict, failed, or RabbitMQ's delivery_limit"),
    argument("--type", help="the event's type"),
    argument("--id", help="the event's id"),
    argument(
        "--error", metavar="TEXT", help="a part of the error, as it is or as `groups` shows it"
    ),
)
_MANY = (*_WHICH, _limit(), flag("--all", "all that there are"))

DEAD_LETTERS = Verb(
    "dead-letters",
    "list, group, show, replay or drop dead letters",
    [
        Verb("list", "list them; none is removed", _list, [*_WHICH, _limit(100)]),
        Verb("groups", "count them by reason, type and error; none is removed", _groups, _WHICH),
        Verb("show", "show bodies and headers; none is removed", _show, [*_WHICH, _limit(1)]),
        Verb(
            "replay", "send them back to their service", _replay, [*_MANY, flag("--force", _FORCE)]
        ),
        Verb("drop", "remove them for good; asks first", _drop, [*_MANY, YES]),
    ],
)

"""``dead-letters``: lists, groups, shows, replays or drops what could not be processed."""

from __future__ import annotations

import argparse
import base64
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
from .etcd import Etcd
from .output import CommandError, Report, UsageError, ago, counted, duration, ended, plain, table

T = TypeVar("T")

_ARRIVE_WITHIN_S = 10.0
_MOST_PREFETCHED = 65_535
_SHOWN_CHARACTERS = 20_000
_VARYING = re.compile(r"\b[\w-]*\d[\w-]*\b")
_GROUPED_CHARACTERS = 1_100
"""Longer than any error that a service writes; a stranger's error may be slow to search."""

_OURS = (names.REASON_HEADER, names.ERROR_HEADER, names.ATTEMPTS_HEADER, names.PARKED_AT_HEADER)


class Letter:
    """A dead letter. Anybody may have written its headers, with values of any type.

    ``id`` and ``type`` are None if the body is not a valid event in the default form. ``reason`` is
    the one it was parked for, or RabbitMQ's if the broker dead-lettered it. ``since`` is when that
    happened, by the clock of the machine that did it, or None if that is not known.
    """

    def __init__(self, tag: int, properties: Any, body: bytes) -> None:
        self.tag, self.properties, self.body = tag, properties, body
        self.headers: dict[str, Any] = properties.headers or {}
        self.id = self.type = None
        with suppress(InvalidEvent):
            event = decode(body)
            self.id, self.type = event.id, event.type
        # Parking removes x-death, so what is there is from the broker's own dead-lettering.
        deaths = self.headers.get("x-death")
        latest = deaths[0] if isinstance(deaths, list) and deaths else None
        death = latest if isinstance(latest, dict) else {}
        self.reason = str(death.get("reason") or self.headers.get(names.REASON_HEADER, "unknown"))
        self.since = moment(death.get("time") or self.headers.get(names.PARKED_AT_HEADER))
        self.error = str(self.headers.get(names.ERROR_HEADER, ""))
        self.attempts = self._count(names.ATTEMPTS_HEADER)
        self.replays = self._count(names.REPLAYS_HEADER) or 0

    def _count(self, header: str) -> int | None:
        """Return a header's count, or None unless it and the next one fit into AMQP."""
        count = self.headers.get(header)
        return count if type(count) is int and 0 <= count < 2**31 - 1 else None

    @property
    def kind_of_error(self) -> str:
        """Return the error with ``#`` for numbers and ids: equal for events with one cause."""
        error = self.error[:_GROUPED_CHARACTERS]
        # An id that is not in it may be a megabyte long, which takes a second to compile.
        if self.id and self.id in error:
            error = re.sub(rf"(?<!\w){re.escape(self.id)}(?!\w)", "#", error)
        return _VARYING.sub("#", error)

    @property
    def fingerprint(self) -> bytes:
        """Return what identifies it when it is fetched again, with another delivery count."""
        counts = ("x-delivery-count", "x-acquired-count")
        headers = [each for each in self.headers.items() if each[0] not in counts]
        return sha256(self.body + repr(sorted(headers)).encode()).digest()

    def facts(self, now_s: float) -> dict[str, Any]:
        """Return everything but its headers and body."""
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

    def whole(self, now_s: float) -> dict[str, Any]:
        """Return everything. Header values that JSON does not have are written as text."""
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


def moment(value: object) -> datetime | None:
    """Return a time from a header or a record; one without a time zone is in UTC, as pika's are."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        return None
    time = value if value.tzinfo else value.replace(tzinfo=UTC)
    try:
        time.astimezone(UTC)
    except OverflowError:  # It is within hours of the first or last that Python can represent.
        return None
    return time


class NotArrivedError(BrokerError):
    """Messages that were ready have not arrived: they left the queue, or others hold them."""


class HeldMessages:
    """The messages of a queue, kept unacked: those that are not removed return to their places."""

    def __init__(self, channel: Any, queue: str) -> None:
        self._channel, self._queue, self.removed = channel, queue, 0

    def __iter__(self) -> Iterator[Letter]:
        """Yield all messages that are ready now, in order, and none that arrives later.

        Raises NotArrivedError. Read on to the end: what returns goes behind the messages that were
        not fetched, so a partial look would change their order.
        """
        found = self._channel.queue_declare(self._queue, passive=True).method
        if found.consumer_count and not found.message_count:
            raise NotArrivedError(f"{self._queue}: somebody else is looking at all there are")
        arriving = self._arriving()
        for left in range(found.message_count, 0, -1):
            method, properties, body = next(arriving)
            if method is None:
                raise NotArrivedError(
                    f"{self._queue}: {left} messages did not arrive in time; "
                    "somebody else may be looking at them"
                )
            yield Letter(method.delivery_tag, properties, body)

    def _arriving(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yield messages as they arrive, with a method of None if none does.

        Without a prefetch a consumer of a quorum queue gets 2,000, and with the largest one that
        AMQP has, this many. The rest are fetched one by one.
        """
        self._channel.basic_qos(prefetch_count=_MOST_PREFETCHED)
        for arrived in self._channel.consume(self._queue, inactivity_timeout=_ARRIVE_WITHIN_S):
            if arrived[0] is None:
                break
            yield arrived
        while True:
            yield self._channel.basic_get(self._queue)

    def remove(self, letter: Letter) -> None:
        """Remove a message from the queue."""
        self._channel.basic_ack(letter.tag)
        self.removed += 1


@contextmanager
def hold(broker: Broker, queue: str) -> Iterator[HeldMessages]:
    """Hold a queue's messages for the block. Raises BrokerError."""
    with broker.channel() as channel:
        messages = HeldMessages(channel, queue)
        try:
            yield messages
        except BaseException:
            if messages.removed:
                # The block's error counts; an interrupt may have cut a frame in two.
                with suppress(BrokerError):
                    broker.wait(LAST_ACKS_S)
            raise
        if messages.removed:
            broker.wait(LAST_ACKS_S)


class _Selection:
    """A service's letters with the given reason, type, id and error, up to the limit.

    ``reasons`` counts all letters that were read, and ``matching`` those selected, whatever the
    limit. Raises UsageError if nothing selects letters and ``--all`` is missing.
    """

    def __init__(self, arguments: argparse.Namespace, context: Context) -> None:
        given = {"limit": None, "all": True, **vars(arguments)}
        selectors = ("reason", "type", "id", "error")
        self._wanted = {name: given[name] for name in selectors if given[name] is not None}
        self._limit = given["limit"]
        if not self._wanted and self._limit is None and not given["all"]:
            raise UsageError("say which: --id, --type, --reason, --error, --limit, or --all")
        self._context, self.service = context, arguments.service
        self.queue = names.dead_letter_queue(self.service)
        self.reasons, self.matching = Counter[str](), 0
        self._warning: str | None = None

    def of(self, letters: Iterable[Letter]) -> Iterator[Letter]:
        """Yield the selected ones, and read on to the last letter."""
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

    def look(self, facts: Callable[[Letter, float], T]) -> list[T]:
        """Return facts of the selected letters. A letter may hold a megabyte, so none is kept."""
        with self._context.rabbitmq() as broker:
            with hold(broker, self.queue) as letters:
                found = [facts(letter, self._context.now_s()) for letter in self.of(letters)]
            expected = queue_arguments(self.service, ())[self.queue]
            if broker.depth(self.queue) is not None and broker.differs(self.queue, expected):
                self._warning = (
                    f"{self.queue} is of an older version: RabbitMQ drops a letter from it after "
                    "some 20 looks, of which this was one. idempotent-consumer doctor says what to "
                    "do"
                )
        return found

    def report(self, lines: list[str], **document: object) -> Report:
        """Return the report of a look, with a warning if looking does harm."""
        if self._warning:
            lines = [*lines, f"warning: {self._warning}"]
        shown = {"service": self.service, **document, "warning": self._warning}
        return Report(shown, "\n".join(lines))

    def total(self, number: int) -> str:
        """Write how many dead letters these are."""
        return f"{counted(number, 'dead letter')} of {self.service}"


def _list(arguments: argparse.Namespace, context: Context) -> Report:
    chosen = _Selection(arguments, context)
    letters = chosen.look(Letter.facts)
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
    end = f"{chosen.total(total)}: {by_reason}; {len(letters)} listed"
    lines = [table(rows)] if rows else []
    lines.append(end if total else f"no dead letters of {chosen.service}")
    return chosen.report(lines, total=total, reasons=dict(reasons), letters=letters)


def _groups(arguments: argparse.Namespace, context: Context) -> Report:
    """Count the letters that have a reason, a type and a kind of error in common."""
    chosen, now_s = _Selection(arguments, context), context.now_s()
    letters = chosen.look(lambda it, _: ((it.reason, it.type, it.kind_of_error), it.since))
    times: dict[tuple[str, str | None, str], list[datetime | None]] = {}
    for shared, since in letters:
        times.setdefault(shared, []).append(since and since.astimezone(UTC))
    groups, rows = list[dict[str, object]](), list[dict[str, object]]()
    for (reason, event_type, error), all_since in sorted(
        times.items(), key=lambda group: len(group[1]), reverse=True
    ):
        known = [since for since in all_since if since]
        first, last = min(known, default=None), max(known, default=None)
        groups.append(
            {
                "reason": reason,
                "type": event_type,
                "error": error,
                "count": len(all_since),
                "first": first and first.isoformat(),
                "last": last and last.isoformat(),
            }
        )
        rows.append(
            {
                "COUNT": len(all_since),
                "REASON": plain(reason, 16),
                "TYPE": plain(event_type or "-", 24),
                "FIRST": ago(first, now_s) or "?",
                "LAST": ago(last, now_s) or "?",
                "ERROR": plain(error, 80),
            }
        )
    lines = [f"no dead letters of {chosen.service}"]
    if rows:
        lines = [table(rows), f"{chosen.total(len(letters))} in {counted(len(groups), 'group')}"]
    return chosen.report(lines, total=len(letters), groups=groups)


def _show(arguments: argparse.Namespace, context: Context) -> Report:
    chosen = _Selection(arguments, context)
    shown = chosen.look(Letter.whole)
    if not shown:
        raise CommandError(f"no such dead letter of {chosen.service}")
    lines = ["\n\n".join(map(_text, shown))]
    if chosen.matching > len(shown):
        lines.append(f"\n{len(shown)} of {chosen.matching:,} shown; --limit says how many")
    return chosen.report(lines, total=chosen.matching, letters=shown)


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
    """Send letters back to their service's queue. Not ok if any is held back."""
    chosen, replayed = _Selection(arguments, context), 0
    name, held = chosen.service, list[dict[str, str | None]]()
    try:
        with (
            context.etcd() as etcd,
            context.rabbitmq() as broker,
            hold(broker, chosen.queue) as letters,
            # On another connection: while pika waits for a confirm it reads on, and would have all
            # of a large queue in memory.
            context.rabbitmq() as sender,
            sender.channel() as outlet,
        ):
            outlet.confirm_delivery()
            for letter in chosen.of(_meanwhile(letters, sender)):
                why = None if arguments.force else _risk(letter, name, context, etcd)
                if why is not None:
                    held.append({"id": letter.id, "why": why})
                    continue
                replays: dict[str, object] = {names.REPLAYS_HEADER: letter.replays + 1}
                properties = forwarded_properties(letter.properties, replays, without=_OURS)
                outlet.basic_publish(
                    names.DEFAULT_EXCHANGE, name, letter.body, properties, mandatory=True
                )
                letters.remove(letter)
                replayed += 1
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
    """Yield letters, and answer the heartbeats of another connection, which may be idle."""
    for letter in letters:
        other.wait(0)
        yield letter


_UNREAD = (
    "its id cannot be read, because the service has a decoder of its own, so its record was not "
    "looked for"
)


def _risk(letter: Letter, service: str, context: Context, etcd: Etcd) -> str | None:
    """Return why a replay might process an event a second time, or None if it cannot.

    A record that exists decides when the letter arrives. If there is none, it may have expired with
    the window, unless the letter is younger than that: what failed had no record when it was
    parked. A conflict had one, of another body.
    """
    if letter.id is None:
        # What the service could not read either was never processed.
        why = None if letter.reason == names.INVALID else _risk_without_record(letter, context)
        return why and f"{_UNREAD}; {why}"
    if etcd.record(service, letter.id) is not None:
        return None
    return _risk_without_record(letter, context)


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
    """Remove letters, but none that arrives while it asks.

    The letters are read twice, and none is held while a person thinks, because nobody answers
    RabbitMQ's heartbeats then.
    """
    chosen = _Selection(arguments, context)
    with context.rabbitmq() as broker, hold(broker, chosen.queue) as letters:
        seen = Counter(letter.fingerprint for letter in chosen.of(letters))
    if not seen:
        raise CommandError(f"no such dead letter of {chosen.service}")
    context.confirm(f"Remove {chosen.total(seen.total())} for good?", arguments.yes)
    dropped = 0
    try:
        with context.rabbitmq() as broker, hold(broker, chosen.queue) as letters:
            for letter in letters:
                if seen[letter.fingerprint]:
                    seen[letter.fingerprint] -= 1
                    dropped += 1
                    letters.remove(letter)
    except (BrokerError, KeyboardInterrupt) as error:
        # RabbitMQ confirms no ack: the last may not have arrived.
        done = f"removed before that: at most {dropped}, the others stay"
        raise ended(error, done, {"dropped": dropped}) from None
    document = {"service": chosen.service, "dropped": dropped}
    return Report(document, f"{chosen.total(dropped)} removed")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ValueError("write a whole number from 1")
    return int(text)


def _limit(number: int | None = None) -> Argument:
    text = "at most so many" + (f" (default {number})" if number else "")
    return argument("--limit", read=_positive, default=number, metavar="N", help=text)


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

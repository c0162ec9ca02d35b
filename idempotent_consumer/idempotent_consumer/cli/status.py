"""``status`` shows queues and records, ``gauges`` sends them to statsd, ``remove`` deletes queues.

A service that is killed loses the counts it has not sent. Gauges are counted each time, and by
another process, so they also show what waits for a service that is down.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import orjson

from .. import names
from ..etcd import EtcdError
from ..metrics import Metrics
from ..records import CLAIMED, DONE, PUBLISHING, RELEASED
from ..settings import duration_s
from .broker import Broker, BrokerError, Queues
from .context import SERVICE, SERVICES, YES, Context, Verb, argument, flag, utf8
from .etcd import Etcd
from .output import CommandError, Report, counted, duration, plain, table
from .web import Tls, WebError, is_address, without_login

READ_AT_MOST = 20_000
"""Above this number records are counted by state only with ``--states``: all of them are read."""

_NOT_RUN = "it has not run yet, or this is another name"


def _address(text: str) -> str:
    if not is_address(text):
        raise ValueError("write http://host:port")
    return text


def _effects(text: str) -> tuple[str, str]:
    name, _, prefix = utf8(text).partition("=")
    if not prefix:
        raise ValueError("write SERVICE=PREFIX, as in order=/orders/")
    return name, prefix


def _status(arguments: argparse.Namespace, context: Context) -> Report:
    """Show what can be seen. Not ok if a server does not answer or a service does not run."""
    found = context.management().queues()
    rows: dict[str, dict[str, Any]] = {name: {} for name in found.services(arguments.service)}
    versions, problems = {"idempotent-consumer": "not installed"}, list[str]()
    with suppress(PackageNotFoundError):
        versions["idempotent-consumer"] = version("idempotent-consumer")
    try:
        with context.rabbitmq() as broker:
            versions["rabbitmq"] = broker.version
            for name, row in rows.items():
                row.update(_queues(name, context, broker, found))
                problems += _idle(name, row)
    except BrokerError as error:
        problems.append(str(error))
    try:
        with context.etcd() as etcd:
            for name, row in rows.items():
                row.update(_records(name, etcd, arguments.states))
            versions["etcd"] = etcd.status().version
    except EtcdError as error:
        problems.append(str(error))
    ready = [_ready(url, context) for url in arguments.ready]
    for each in ready:
        if not each["ready"]:
            missing = ", ".join(f"{what}: {why}" for what, why in each["missing"].items())
            problems.append(f"{each['url']} is not ready: {missing or 'it says no why'}")
    parts = [
        ", ".join(f"{name} {number}" for name, number in versions.items()),
        table([_row(*each) for each in rows.items()])
        if rows
        else "no service has declared its queues yet",
    ]
    if found.why_not:
        parts.append(f"what is unacked or waits for a retry is not known. {found.why_not}")
    parts += [f"{each['url']} is ready" for each in ready if each["ready"]]
    parts += [_ages(each["url"], each["duplicates"]) for each in ready if each["duplicates"]]
    parts += [plain(problem, 500) for problem in problems]
    document = {"versions": versions, "services": rows, "problems": problems, "ready": ready}
    return Report(document, "\n".join(parts), not problems)


def _idle(name: str, row: dict[str, Any]) -> list[str]:
    """Return the problem if nobody consumes a service's queue."""
    if row["ready"] is None:
        return [f"{name} has no queue: {_NOT_RUN}"]
    if not row["consumers"]:
        why = f"{name} has no consumer, and its queue grows with each event: start it, or take its"
        return [f"{why} queues away with idempotent-consumer remove {name}"]
    return []


def _queues(name: str, context: Context, broker: Broker, found: Queues) -> dict[str, Any]:
    """Return counts of a service's queues. That of unacked messages may be five seconds old."""
    own, dead = broker.depth(name), broker.depth(names.dead_letter_queue(name))
    # RabbitMQ logs an error for each queue that does not exist.
    retries = {
        delay: depth.ready
        for delay, queue in found.retries(name, context.settings).items()
        if queue in found.facts and (depth := broker.depth(queue))
    }
    return {
        "ready": own and own.ready,
        "unacked": found.facts.get(name, {}).get("messages_unacknowledged"),
        "consumers": own and own.consumers,
        "dead_letters": dead and dead.ready,
        "retries": None if found.why_not else retries,
    }


def _records(name: str, etcd: Etcd, all_states: bool) -> dict[str, object]:
    total = etcd.count(names.record_prefix(name))
    states = etcd.states(name) if all_states or total <= READ_AT_MOST else None
    kinds = (DONE, CLAIMED, PUBLISHING, RELEASED)
    return {
        "records": total,
        "states": {state: states[state] for state in kinds} if states is not None else None,
        "incarnation": etcd.incarnation(name),
    }


def _ready(url: str, context: Context) -> dict[str, Any]:
    """Ask a service whether it is ready, and how old the records of its duplicates were."""
    asked = url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/readyz"
    answer: dict[str, Any] = {"url": without_login(url), "ready": True}
    try:
        answer["missing"] = {**context.fetch(asked, Tls()).json()["missing"]}
    except (WebError, KeyError, TypeError) as error:
        answer |= {"ready": False, "missing": {"answer": str(error)}}
        with suppress(orjson.JSONDecodeError, KeyError, TypeError):
            answer["missing"] = {**orjson.loads(getattr(error, "body", b""))["missing"]}
    return {**answer, "duplicates": _duplicates(url, context)}


def _duplicates(url: str, context: Context) -> dict[str, Any] | None:
    """Return the ages of a service's duplicates, or None if there are none or no answer."""
    asked = urlunsplit(urlsplit(url)._replace(path="/duplicates", query="", fragment=""))
    with suppress(WebError, KeyError, TypeError, ValueError):
        ages = context.fetch(asked, Tls()).json()
        if ages["read"]:
            return {
                "read": int(ages["read"]),
                "oldest_s": float(ages["oldest_s"]),
                "within": dict(ages["within"]),
            }
    return None


def _ages(url: str, ages: dict[str, Any]) -> str:
    within = [
        f"{number:,} within {bound}"
        for bound, number in ages["within"].items()
        if 0 < number < ages["read"]
    ]
    late = f"{counted(ages['read'], 'duplicate')} looked at: {duration(ages['oldest_s'])} at most"
    return plain(", ".join([f"{url}: {late} after the record", *within]), 500)


def _row(name: str, row: dict[str, Any]) -> dict[str, object]:
    states, retries = row.get("states") or {}, row.get("retries")
    if retries is not None:
        retries = " ".join(f"{delay}:{n}" for delay, n in retries.items() if n) or "0"
    return {
        "SERVICE": name,
        "READY": row.get("ready"),
        "UNACKED": row.get("unacked"),
        "CONSUMERS": row.get("consumers"),
        "RETRIES": retries,
        "DEAD": row.get("dead_letters"),
        "RECORDS": row.get("records"),
        "CLAIMED": states.get(CLAIMED),
        "PUBLISHING": states.get(PUBLISHING),
        "INCARNATION": (row.get("incarnation", "?") or "none")[:8],
    }


def _remove(arguments: argparse.Namespace, context: Context) -> Report:
    """Delete the queues of a service, unless it runs."""
    name, known = arguments.service, context.management().queues()
    if known.why_not:
        tells = f"it alone tells which queues {name} has"
        raise CommandError(f"{known.why_not}; {tells}: try again once it answers")
    with context.rabbitmq() as broker:
        found = {queue: broker.depth(queue) for queue in known.of(name, context.settings)}
    depths = {queue: depth for queue, depth in found.items() if depth is not None}
    if not depths:
        raise CommandError(f"{name} has no queues: {_NOT_RUN}")
    if any(depth.consumers for depth in depths.values()):
        raise CommandError(f"{name} is running: stop its replicas first")
    held = [f"{queue} with {counted(depth.ready, 'message')}" for queue, depth in depths.items()]
    context.confirm(f"Delete for good {', '.join(held)}?", arguments.yes)
    # On another connection: nobody answers RabbitMQ's heartbeats while a person thinks.
    with context.rabbitmq() as broker:
        depth = broker.depth(name)
        if depth is not None and depth.consumers:
            raise CommandError(f"{name} has been started meanwhile: nothing was deleted")
        deleted = {queue: broker.delete(queue) for queue in depths}
    lines = [
        f"{queue} deleted, with {counted(number, 'message')}" for queue, number in deleted.items()
    ]
    lines.append(f"{name}'s records stay in etcd until their window ends")
    return Report({"service": name, "deleted": deleted}, "\n".join(lines))


def _gauges(arguments: argparse.Namespace, context: Context) -> Report:
    """Send the gauges once and show them, or send them until interrupted."""
    every_s = arguments.every
    with context.etcd() as etcd, closing(context.metrics()) as metrics:
        sender = _Sender(arguments, context, etcd, metrics)
        while True:
            try:
                # One connection for all rounds, because RabbitMQ logs each one.
                with context.rabbitmq() as broker:
                    report = sender.send(broker)
                    while every_s:
                        broker.wait(every_s)
                        sender.send(broker)
            except BrokerError as error:
                report = sender.send(None, str(error))
                time.sleep(every_s or 0)
            if not every_s:
                return report


class _Sender:
    """Counts and sends the gauges. A gauge that cannot be counted is not sent."""

    def __init__(
        self, arguments: argparse.Namespace, context: Context, etcd: Etcd, metrics: Metrics
    ) -> None:
        self._arguments, self._context, self._etcd = arguments, context, etcd
        self._metrics, self._services = metrics, arguments.service
        self._missing: dict[str, str] = {}

    def send(self, broker: Broker | None, why_not: str = "") -> Report:
        """Count and send once. Raises BrokerError if the connection is lost."""
        gauges: dict[str, int | None] = {}
        missing = {} if broker else {"rabbitmq": why_not}
        if broker:
            found = self._context.management().queues()
            try:
                # The services found last, while the management API does not list them.
                given = self._services if found.why_not else self._arguments.service
                self._services = found.services(given)
            except CommandError as error:
                missing["services"] = str(error)
            for name in self._services:
                held = _queues(name, self._context, broker, found)
                held["retries"] = None if found.why_not else sum(held["retries"].values())
                if held["ready"] is not None:
                    unknown = [what for what in ("unacked", "retries") if held[what] is None]
                    why = found.why_not or "RabbitMQ's management API does not tell"
                    missing |= dict.fromkeys(unknown, why)
                counts = ("ready", "unacked", "retries", "dead_letters")
                gauges |= {f"{name}_{what}": held[what] for what in counts}
        try:
            for name in self._services:
                gauges[f"{name}_records"] = self._etcd.count(names.record_prefix(name))
            for name, prefix in self._arguments.effects:
                gauges[f"{name}_effects"] = self._etcd.count(prefix)
        except EtcdError as error:
            missing["etcd"] = str(error)
        sent = {name: number for name, number in gauges.items() if number is not None}
        for name, number in sent.items():
            self._metrics.gauge(name, number)
        self._metrics.send()
        faults = {what: f"not counted: {what}: {plain(why, 500)}" for what, why in missing.items()}
        if self._arguments.every:
            self._say(faults)
        lines = [f"{name} {number:,}" for name, number in sent.items()] + list(faults.values())
        return Report({"gauges": sent, "missing": missing}, "\n".join(lines), not missing)

    def _say(self, missing: dict[str, str]) -> None:
        """Write to standard error what can no longer be counted and what can be again."""
        was, self._missing = self._missing, missing
        lines = [line for what, line in missing.items() if what not in was]
        lines += [f"counted again: {what}" for what in was if what not in missing]
        for line in lines:
            print(f"idempotent-consumer: {line}", file=self._context.err, flush=True)


_READY = "ask the service at http://host:port for /readyz and /duplicates, too"
_STATES = (
    f"count by state also where there are over {READ_AT_MOST:,} records: all of them are read, "
    "which takes seconds for a million"
)
_EFFECTS = "count the keys in etcd that begin with PREFIX as SERVICE's effects, too"
_EVERY = "do it again after that time, until stopped"

STATUS = Verb(
    "status",
    "show queues, records and versions",
    _status,
    [
        SERVICES,
        argument("--ready", action="append", default=[], read=_address, metavar="URL", help=_READY),
        flag("--states", _STATES),
    ],
)
REMOVE = Verb("remove", "delete a service's queues for good", _remove, [SERVICE, YES])
GAUGES = Verb(
    "gauges",
    "count what RabbitMQ and etcd hold, and send it to statsd",
    _gauges,
    [
        SERVICES,
        argument(
            "--effects",
            action="append",
            default=[],
            read=_effects,
            metavar="SERVICE=PREFIX",
            help=_EFFECTS,
        ),
        argument("--every", read=duration_s, metavar="TIME", help=_EVERY),
    ],
)

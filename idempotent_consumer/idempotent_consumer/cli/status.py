"""``status``: what is where, at a glance. ``remove``: a service's queues are taken away."""

from __future__ import annotations

import argparse
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import orjson

from .. import names
from ..etcd import EtcdError
from ..records import CLAIMED, DONE, PUBLISHING, RELEASED
from .broker import Broker, BrokerError, Queues
from .context import Context, add_services, service
from .etcd import Records
from .output import CommandError, Report, counted, duration, plain, table
from .web import Tls, WebError, is_address, without_login

READ_AT_MOST = 20_000
"""So many records are read for their states; of more only the number is told, unless asked for."""


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser("status", parents=[common], help="show queues, records and versions")
    add_services(parser)
    parser.add_argument(
        "--ready",
        action="append",
        default=[],
        type=_address,
        metavar="URL",
        help="ask the service at http://host:port for /readyz and /duplicates, too",
    )
    parser.add_argument(
        "--states",
        action="store_true",
        help=f"count by state also where there are over {READ_AT_MOST:,} records: "
        "all of them are read, which takes seconds for a million",
    )
    parser.set_defaults(run=_status)
    parser = verbs.add_parser("remove", parents=[common], help="delete a service's queues for good")
    parser.add_argument("service", type=service, metavar="SERVICE")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(run=_remove)


def _address(text: str) -> str:
    if not is_address(text):
        raise argparse.ArgumentTypeError("write http://host:port")
    return text


def _status(arguments: argparse.Namespace, context: Context) -> Report:
    """Show what can be seen. Not ok where a server does not answer, or a service does not run."""
    found = context.management().queues()
    rows: dict[str, dict[str, Any]] = {name: {} for name in found.services(arguments.service)}
    versions = {"idempotent-consumer": _library()}
    problems = []
    try:
        with context.rabbitmq() as broker:
            versions["rabbitmq"] = broker.version
            for name, row in rows.items():
                row.update(queues(name, context, broker, found))
                problems += _idle(name, row)
    except BrokerError as error:
        problems.append(str(error))
    try:
        with context.etcd() as etcd:
            for name, row in rows.items():
                row.update(_records(Records(etcd, name), arguments.states))
            versions["etcd"] = etcd.status().version
    except EtcdError as error:
        problems.append(str(error))
    ready = [_ready(url, context) for url in arguments.ready]
    problems += [
        f"{each['url']} is not ready: {_missing(each)}" for each in ready if not each["ready"]
    ]
    document = {"versions": versions, "services": rows, "problems": problems, "ready": ready}
    return Report(document, _text(document, found.why_not), not problems)


def _library() -> str:
    try:
        return version("idempotent-consumer")
    except PackageNotFoundError:
        return "not installed"


def queues(name: str, context: Context, broker: Broker, found: Queues) -> dict[str, Any]:
    """Return a service's queues: what is ready is exact, what is unacked is five seconds old."""
    own, dead = broker.depth(name), broker.depth(names.dead_letter_queue(name))
    # RabbitMQ logs an error for each queue that is asked for and not there.
    retries = {
        delay: broker.depth(queue)
        for delay, queue in found.retries(name, context.settings).items()
        if found.why_not or queue in found.facts
    }
    return {
        "ready": own and own.ready,
        "unacked": found.facts.get(name, {}).get("messages_unacknowledged"),
        "consumers": own and own.consumers,
        "dead_letters": dead and dead.ready,
        "retries": {delay: depth.ready for delay, depth in retries.items() if depth},
    }


def _idle(name: str, row: dict[str, Any]) -> list[str]:
    """Return what is wrong where nobody consumes a service's queue."""
    if row["ready"] is None:
        return [f"{name} has no queue: it has not run yet, or this is another name"]
    if not row["consumers"]:
        why = f"{name} has no consumer, and its queue grows with each event: start it, or take its"
        return [f"{why} queues away with idempotent-consumer remove {name}"]
    return []


def _records(records: Records, all_states: bool) -> dict[str, object]:
    total = records.count()
    states = records.states() if all_states or total <= READ_AT_MOST else None
    kinds = (DONE, CLAIMED, PUBLISHING, RELEASED)
    return {
        "records": total,
        "states": {state: states[state] for state in kinds} if states is not None else None,
        "incarnation": records.incarnation(),
    }


def _ready(url: str, context: Context) -> dict[str, Any]:
    """Ask a service whether it is ready, and how late its duplicates came."""
    asked = url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/readyz"
    answer: dict[str, Any] = {"url": without_login(url), "ready": True}
    try:
        answer["missing"] = context.fetch(asked, Tls()).json()["missing"]
    except (WebError, KeyError, TypeError) as error:
        answer |= {"ready": False, "missing": {"answer": str(error)}}
        with suppress(orjson.JSONDecodeError, KeyError, TypeError):
            answer["missing"] = orjson.loads(getattr(error, "body", b""))["missing"]
    return {**answer, "duplicates": _duplicates(url, context)}


def _duplicates(url: str, context: Context) -> dict[str, Any] | None:
    """Ask a service for the ages of its duplicates; None where there are none, or no answer."""
    asked = urlunsplit(urlsplit(url)._replace(path="/duplicates", query="", fragment=""))
    try:
        ages = context.fetch(asked, Tls()).json()
        if not ages["read"]:
            return None
        return {
            "read": int(ages["read"]),
            "oldest_s": float(ages["oldest_s"]),
            "within": dict(ages["within"]),
        }
    except (WebError, KeyError, TypeError, ValueError):
        return None


def _missing(ready: dict[str, Any]) -> str:
    return ", ".join(f"{what}: {why}" for what, why in ready["missing"].items()) or "it says no why"


def _text(document: dict[str, Any], why_not: str) -> str:
    parts = [", ".join(f"{name} {number}" for name, number in document["versions"].items())]
    rows = [_row(name, row) for name, row in document["services"].items()]
    parts.append(table(rows) if rows else "no service has declared its queues yet")
    if why_not:
        parts.append(f"what is unacked is not known. {why_not}")
    ready = document["ready"]
    parts += [f"{each['url']} is ready" for each in ready if each["ready"]]
    parts += [_ages(each["url"], each["duplicates"]) for each in ready if each["duplicates"]]
    parts += [plain(problem, 500) for problem in document["problems"]]
    return "\n".join(parts)


def _ages(url: str, ages: dict[str, Any]) -> str:
    within = [
        f"{number:,} within {bound}"
        for bound, number in ages["within"].items()
        if 0 < number < ages["read"]
    ]
    late = f"{counted(ages['read'], 'duplicate')} looked at: {duration(ages['oldest_s'])} at most"
    return plain(", ".join([f"{url}: {late} after the record", *within]), 500)


def _row(name: str, row: dict[str, Any]) -> dict[str, str]:
    """Return a service's line, by the columns' headers."""
    states, retries = row.get("states") or {}, row.get("retries", {})
    return {
        "SERVICE": name,
        "READY": _cell(row.get("ready")),
        "UNACKED": _cell(row.get("unacked")),
        "CONSUMERS": _cell(row.get("consumers")),
        "RETRIES": " ".join(f"{delay}:{n}" for delay, n in retries.items() if n) or "0",
        "DEAD": _cell(row.get("dead_letters")),
        "RECORDS": _cell(row.get("records")),
        "CLAIMED": _cell(states.get(CLAIMED)),
        "PUBLISHING": _cell(states.get(PUBLISHING)),
        "INCARNATION": (row.get("incarnation", "?") or "none")[:8],
    }


def _cell(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _remove(arguments: argparse.Namespace, context: Context) -> Report:
    """Delete the queues of a service that does not run. Raises CommandError for one that does."""
    name, known = arguments.service, context.management().queues()
    with context.rabbitmq() as broker:
        depths = {
            queue: depth
            for queue in known.of(name, context.settings)
            if (depth := broker.depth(queue)) is not None
        }
    if not depths:
        raise CommandError(f"{name} has no queues: it has not run yet, or this is another name")
    if any(depth.consumers for depth in depths.values()):
        raise CommandError(f"{name} is running: stop its replicas first")
    held = [f"{queue} with {counted(depth.ready, 'message')}" for queue, depth in depths.items()]
    context.confirm(f"Delete for good {', '.join(held)}?", arguments.yes)
    # Connected again: nobody answers RabbitMQ's heartbeats while a person thinks.
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

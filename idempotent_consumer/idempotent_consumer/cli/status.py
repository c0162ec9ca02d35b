"""``status``: what is where, at a glance."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import orjson

from .. import names
from ..etcd import EtcdError
from ..records import CLAIMED, DONE, PUBLISHING, RELEASED
from .arguments import add_services, address
from .broker import BrokerError
from .context import Context, RabbitMQ
from .etcd import Records, member
from .output import counted, duration, plain, table
from .report import Report
from .services import Queues, queues, retry_queues, services
from .web import Tls, WebError, without_login

READ_AT_MOST = 20_000
"""So many records are read for their states; of more only the number is told, unless asked for."""

_STATES = (DONE, CLAIMED, PUBLISHING, RELEASED)


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser("status", parents=[common], help="show queues, records and versions")
    add_services(parser)
    parser.add_argument(
        "--ready",
        action="append",
        default=[],
        type=address,
        metavar="URL",
        help="ask the service at http://host:port for /readyz and /duplicates, too",
    )
    parser.add_argument(
        "--states",
        action="store_true",
        help=f"count by state also where there are over {READ_AT_MOST:,} records: "
        "all of them are read, which takes seconds for a million",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, context: Context) -> Report:
    """Show what can be seen. Not ok where RabbitMQ or etcd does not answer, or one is not ready."""
    found = queues(context)
    rows: dict[str, dict[str, object]] = {name: {} for name in services(arguments.service, found)}
    document: dict[str, Any] = {
        "versions": {"idempotent-consumer": _library()},
        "services": rows,
        "problems": [],
    }
    try:
        with context.rabbitmq() as rabbitmq:
            document["versions"]["rabbitmq"] = rabbitmq.version
            for name, row in rows.items():
                row.update(_queues(name, context, rabbitmq, found))
    except BrokerError as error:
        document["problems"].append(str(error))
    try:
        with context.etcd() as etcd:
            for name, row in rows.items():
                row.update(_records(Records(etcd, name), arguments.states))
            document["versions"]["etcd"] = member(etcd).version
    except EtcdError as error:
        document["problems"].append(str(error))
    document["ready"] = [
        {**_ready(url, context), "duplicates": _duplicates(url, context)} for url in arguments.ready
    ]
    document["problems"] += [
        f"{each['url']} is not ready: {_missing(each)}"
        for each in document["ready"]
        if not each["ready"]
    ]
    return Report(document, _text(document, found), not document["problems"])


def _queues(name: str, context: Context, rabbitmq: RabbitMQ, found: Queues) -> dict[str, object]:
    """Return a service's queues: what is ready is exact, what is unacked is not."""
    own = rabbitmq.depth(name)
    dead = rabbitmq.depth(names.dead_letter_queue(name))
    retries = {
        delay: rabbitmq.depth(queue) for delay, queue in retry_queues(name, context, found).items()
    }
    return {
        "ready": own and own.ready,
        "unacked": found.facts.get(name, {}).get("messages_unacknowledged"),
        "consumers": own and own.consumers,
        "dead_letters": dead and dead.ready,
        "retries": {delay: depth.ready for delay, depth in retries.items() if depth},
    }


def _records(records: Records, all_states: bool) -> dict[str, object]:
    total = records.count()
    states = records.states() if all_states or total <= READ_AT_MOST else None
    return {
        "records": total,
        "states": {state: states[state] for state in _STATES} if states is not None else None,
        "incarnation": records.incarnation(),
    }


def _ready(url: str, context: Context) -> dict[str, Any]:
    """Ask a service whether it is ready."""
    asked = url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/readyz"
    try:
        missing = context.fetch(asked, Tls()).json()["missing"]
        return {"url": without_login(url), "ready": True, "missing": missing}
    except (WebError, KeyError, TypeError) as error:
        try:
            missing = orjson.loads(getattr(error, "body", b""))["missing"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            missing = {"answer": str(error)}
        return {"url": without_login(url), "ready": False, "missing": missing}


def _duplicates(url: str, context: Context) -> dict[str, Any] | None:
    """Ask a service for the ages of its duplicates; None where there are none, or no answer."""
    try:
        asked = urlsplit(url)._replace(path="/duplicates", query="", fragment="")
        ages = context.fetch(urlunsplit(asked), Tls()).json()
        return (
            {
                "read": int(ages["read"]),
                "oldest_s": float(ages["oldest_s"]),
                "within": dict(ages["within"]),
            }
            if ages["read"]
            else None
        )
    except (WebError, KeyError, TypeError, ValueError):
        return None


def _missing(ready: dict[str, Any]) -> str:
    return ", ".join(f"{what}: {why}" for what, why in ready["missing"].items()) or "it says no why"


def _library() -> str:
    try:
        return version("idempotent-consumer")
    except PackageNotFoundError:
        return "not installed"


_HEADER = (
    "SERVICE",
    "READY",
    "UNACKED",
    "CONSUMERS",
    "RETRIES",
    "DEAD",
    "RECORDS",
    "CLAIMED",
    "PUBLISHING",
    "INCARNATION",
)


def _text(document: dict[str, Any], found: Queues) -> str:
    parts = [", ".join(f"{name} {number}" for name, number in document["versions"].items())]
    if document["services"]:
        rows = (_row(name, row) for name, row in document["services"].items())
        parts.append(table(_HEADER, rows))
    else:
        parts.append("no service has declared its queues yet")
    parts += [
        f"{name} has no queue: it has not run yet, or this is another name"
        for name, row in document["services"].items()
        if row.get("ready", 0) is None
    ]
    if found.why_not:
        parts.append(f"what is unacked is not known. {found.why_not}")
    parts += [f"{each['url']} is ready" for each in document["ready"] if each["ready"]]
    parts += [
        _ages(each["url"], each["duplicates"]) for each in document["ready"] if each["duplicates"]
    ]
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


def _row(name: str, row: dict[str, Any]) -> list[str]:
    retries = " ".join(
        f"{delay}:{number}" for delay, number in row.get("retries", {}).items() if number
    )
    states = row.get("states") or {}
    numbers = [row.get(what) for what in ("ready", "unacked", "consumers")]
    counts = [
        row.get("dead_letters"),
        row.get("records"),
        states.get(CLAIMED),
        states.get(PUBLISHING),
    ]
    return [
        name,
        *map(_cell, numbers),
        retries or "0",
        *map(_cell, counts),
        (row.get("incarnation", "?") or "none")[:8],
    ]


def _cell(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"

"""``doctor``: finds what would break the guarantee, and says what to do about it."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson
from etcd3.etcdrpc import AlarmRequest, AlarmType, TxnRequest

from .. import names
from ..bus import DELIVERY_LIMIT, queue_arguments
from ..etcd import EtcdError, get
from ..settings import Settings, duration_s
from .broker import BrokerError, Management, Queues
from .context import SERVICES, Context, Verb, argument
from .etcd import Etcd
from .output import Report, counted, duration, plain, size
from .web import Tls, WebError

OK, UNKNOWN, WARNING, PROBLEM = "ok", "unknown", "warning", "problem"
"""From fine to what breaks the guarantee. Unknown is what could not be checked."""


class Finding(NamedTuple):
    """One line: how bad it is, where, what it is, and what to do about it."""

    level: str
    about: str
    what: str
    do: str = ""


Findings = Iterator[Finding]
Facts = Mapping[str, Any]
Policies = list[tuple[str, str, Facts]]
"""For each: the member of a queue's facts that names it, its name, and its definition."""


def _doctor(arguments: argparse.Namespace, context: Context) -> Report:
    """Check everything, and list the findings. Not ok if there is a problem."""
    findings = list(_findings(arguments, context))
    levels = Counter(each.level for each in findings)
    said: dict[tuple[str, str, str], list[str]] = {}
    for level, about, what, do in findings:
        said.setdefault((level, what, do), []).append(about)
    lines = [
        f"{level:<8} {', '.join(abouts)}: {plain(what, 1000)}" + (f"  -> {do}" if do else "")
        for (level, what, do), abouts in said.items()
    ]
    counts = [counted(levels[level], level) for level in (PROBLEM, WARNING)]
    lines.append(f"{', '.join(counts)}, {levels[UNKNOWN]} not looked at")
    document = {
        "findings": [each._asdict() for each in findings],
        "problems": levels[PROBLEM],
        "warnings": levels[WARNING],
    }
    return Report(document, "\n".join(lines), not levels[PROBLEM])


def _findings(arguments: argparse.Namespace, context: Context) -> Findings:
    known = arguments.service
    yield from _settings(context.settings)
    yield from _nodes(context)
    found = context.management().queues()
    if found.why_not:
        what = "queue arguments, policies, bindings and alarms were not looked at"
        yield Finding(UNKNOWN, "rabbitmq", f"{what}: {found.why_not}")
    else:
        yield from _alarms(context)
        known = found.services(known)
    if not known:
        yield Finding(UNKNOWN, "services", "there is none, or none was found: name them")
    if not found.why_not:
        yield from _queues(known, found, context, arguments)
    yield from _counts([name for name in known if found.why_not or name in found.facts], context)
    for host, port in context.settings.etcd_endpoints:
        yield from _member(context, host, port)
    yield from _cluster(context, known)


# The settings, compared with each other.

CONSUMER_TIMEOUT_S = 1800
"""RabbitMQ's default: a delivery that has been in flight for so long is delivered again."""


def _settings(settings: Settings) -> Findings:
    """Check the settings, which the services share if their environment is the same.

    A record must outlast every copy of its event. If an event is in the queue twice, one delivery
    can succeed while the other fails and is retried; the record must be there after all its delays.
    """
    about = "settings"
    if settings.enable_etcd:
        yield Finding(OK, about, "ENABLE_ETCD is true")
    else:
        what = "where the services have it so, each duplicate is processed"
        do = "set ENABLE_ETCD=true for the services"
        yield Finding(WARNING, about, f"ENABLE_ETCD is false here: {what}", do)
    window_s, retries_s = settings.dedup_window_s, sum(s for _, s in settings.retry_delays)
    window, longest_s = f"DEDUP_WINDOW is {duration(window_s)}", retries_s + CONSUMER_TIMEOUT_S
    if not window_s:
        yield Finding(OK, about, "records are kept for good (DEDUP_WINDOW=0)")
    elif window_s <= retries_s:
        what = (
            f"{window}, and a retry can come {duration(retries_s)} later (RETRY_DELAYS): "
            "a duplicate would be taken for a new event"
        )
        do = f"set DEDUP_WINDOW well above {duration(retries_s)}"
        yield Finding(PROBLEM, about, what, do)
    elif window_s <= longest_s:
        longest = duration(longest_s)
        what = f"{window}; a copy that a stuck consumer holds comes again after up to {longest}"
        yield Finding(WARNING, about, what, f"set DEDUP_WINDOW well above {longest}")
    else:
        yield Finding(OK, about, f"{window}, retries come within {duration(retries_s)}")


# What both servers have: a version and a clock.

Releases = tuple[str, Mapping[str, tuple[str, str]]]
"""The oldest series that may still get fixes; and by series, the first release without known
faults, and what those were."""

RABBITMQ: Releases = (
    "4.2",
    {
        "4.0": ("4.0.8", "rare ones in the replication of quorum queues"),
        "4.3": ("4.3.5", "Raft leaders could commit too early, and queues be recovered in part"),
    },
)
"""Community support ended in April 2025 for 4.0 and in January 2026 for 4.1 (endoflife.date). The
faults are in the release notes of 4.0.8, 4.3.3 (rabbitmq/ra#637) and 4.3.5 (#17012)."""

_STALE = "reads after a pause can be stale"

ETCD: Releases = (
    "3.5",
    {
        "3.5": ("3.5.28", f"{_STALE}, and before 3.5.17 a transaction be applied in part"),
        "3.6": ("3.6.9", _STALE),
    },
)
"""etcd supports the current series and the one before (its page "Versioning"): with 3.6, 3.5. The
faults are in the changelogs of 3.5.17, 3.5.28 and 3.6.9 (etcd-io/etcd#20418)."""


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version such as ``4.0.8`` or ``3.6.0-rc.1``."""
    return tuple(map(int, re.findall(r"\d+", version.partition("-")[0])))


def _version(about: str, version: str, releases: Releases) -> Finding:
    """Check that a server's version is supported and has no known faults."""
    (oldest, faults), release = releases, numbers(version)
    fixed_in, what = faults.get(".".join(map(str, release[:2])), ("", ""))
    unsupported, faulty = release[:2] < numbers(oldest), release < numbers(fixed_in)
    amiss = ["is out of support"] * unsupported
    amiss += [f"has known faults, fixed in {fixed_in}: {what}"] * faulty
    if not amiss:
        return Finding(OK, about, f"version {version}")
    do = f"upgrade it to {oldest if unsupported else fixed_in} or newer"
    return Finding(WARNING, about, f"version {version} {', and '.join(amiss)}", do)


_MUCH_S = 5.0
"""The servers send their time in whole seconds, and their answer takes a while."""


def clock(about: str, date: datetime | None, now_s: float) -> Finding:
    """Compare a server's clock with this machine's.

    No decision of a service depends on the time of day, but people and replays read it.
    """
    if date is None:
        return Finding(UNKNOWN, about, "its clock was not seen")
    ahead_s = date.timestamp() - now_s
    if abs(ahead_s) <= _MUCH_S:
        return Finding(OK, about, "its clock agrees with this machine's")
    what = (
        f"its clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this "
        "machine's: the times of records and the ages of dead letters mislead"
    )
    return Finding(WARNING, about, what, "synchronise the clocks (NTP)")


# RabbitMQ.


def _nodes(context: Context) -> Findings:
    """Check that each node of RABBITMQ_URL answers, and check its version."""
    for url in context.settings.rabbitmq_urls:
        about = f"rabbitmq {urlsplit(url).netloc.rpartition('@')[2]}"
        try:
            with context.rabbitmq(url) as broker:
                yield _version(about, broker.version, RABBITMQ)
        except BrokerError as error:
            yield Finding(PROBLEM, about, str(error), "start it, or correct RABBITMQ_URL")


def _alarms(context: Context) -> Findings:
    """Check that no node has an alarm, and check the clock of the one that answers."""
    date = None
    try:
        date = context.management().page("/health/checks/alarms").date
        yield Finding(OK, "rabbitmq", "no alarm is on")
    except WebError as error:
        if error.status == 503:
            reason = "it does not say which"
            with suppress(orjson.JSONDecodeError, KeyError, TypeError):
                reason = orjson.loads(error.body)["reason"]
            what = f"an alarm is on: {reason}; nothing can be published, nor retried or parked"
            yield Finding(PROBLEM, "rabbitmq", what, "free memory or disk space")
        else:
            yield Finding(UNKNOWN, "rabbitmq", f"alarms were not looked at: {error}")
    yield clock("rabbitmq", date, context.now_s())


def _queues(
    services: Sequence[str], found: Queues, context: Context, arguments: argparse.Namespace
) -> Findings:
    """Check each service's queues, policies, bindings and consumer time-out."""
    running = [name for name in services if name in found.facts]
    for name in services:
        if name not in running:
            what = "there is no such queue: it has not run yet, or this is another name"
            yield Finding(PROBLEM, name, what, "start it: it makes its queues")
    management, settings = context.management(), context.settings
    # A queue names its policies at once, and shows their definitions only seconds later.
    pages = yield from _seen(management, "policies", "policies", "operator-policies")
    policies = [
        (kind, each["name"], each["definition"])
        for kind, page in zip(("policy", "operator_policy"), pages or ((), ()), strict=True)
        for each in page
    ]
    bindings = yield from _seen(management, "bindings", "bindings")
    for name in running:
        expected = queue_arguments(name, settings.retry_delays)
        faults = [
            fault
            for queue, has in expected.items()
            for fault in _faults(queue, has, found.facts.get(queue), policies)
        ]
        fine = f"all {len(expected)} queues are as they should be"
        yield from faults or [Finding(OK, name, fine)]
        there = found.facts.keys() & set(found.retries(name, settings).values())
        for queue in sorted(there - expected.keys()):
            yield _own_delay(queue, found.facts[queue], settings.dedup_window_s)
        if bindings is not None:
            yield from _bindings(name, bindings[0], arguments)
        yield _consumer_timeout(name, found.facts[name], policies, arguments.longest_call)


def _seen(
    management: Management, what: str, *paths: str
) -> Generator[Finding, None, list[list[Facts]] | None]:
    """Return the pages at these paths, or yield a finding and return None."""
    try:
        return [management.get(f"/{path}/{{vhost}}") for path in paths]
    except WebError as error:
        yield Finding(UNKNOWN, "rabbitmq", f"{what} were not looked at: {error}")
        return None


_WITHOUT = {
    "x-queue-type": "only a quorum queue keeps messages over the loss of a node, and dead-letters "
    "at least once",
    "x-delivery-limit": "messages are dropped, or dead-lettered, after other numbers of returns",
    "x-dead-letter-exchange": "what reaches its delivery limit, or has waited, is lost",
    "x-dead-letter-routing-key": "what reaches its delivery limit, or has waited, goes astray",
    "x-dead-letter-strategy": "dead letters can be lost on their way",
    "x-overflow": "dead letters can be lost on their way",
    "x-message-ttl": "retries wait for another time",
}

_DROPS = ("message-ttl", "max-length", "max-length-bytes", "expires")
"""What makes RabbitMQ drop messages or queues, as an argument (with x-) or in a policy."""


def _faults(
    queue: str, expected: Mapping[str, object], facts: Facts | None, policies: Policies
) -> Findings:
    """Check a queue's arguments and policies."""
    if facts is None:
        do = "start the service: it makes it"
        yield Finding(PROBLEM, queue, "there is no such queue", do)
        return
    found = {**facts["arguments"], "x-queue-type": facts["type"]}
    wrong = [
        f"{name} is {repr(found[name]) if found.get(name) is not None else 'missing'}, "
        f"not {value!r}: {_WITHOUT[name]}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    drops = [f"x-{name}" for name in _DROPS]
    wrong += [
        f"{name} throws messages away" for name in drops if name in found and name not in expected
    ]
    if wrong:
        do = (
            "a queue's arguments never change: empty it, delete it (rabbitmqctl delete_queue "
            f"{queue}) and restart the service, which makes it"
        )
        yield Finding(PROBLEM, queue, "; ".join(wrong), do)  # One finding: it has one remedy.
    do = "take the queue out of that policy"
    for policy, definition in _policies_of(facts, policies):
        for name in _DROPS:
            if name in definition:
                what = f"policy {policy} has {name}, which throws messages away"
                yield Finding(PROBLEM, queue, what, do)
        limit = definition.get("delivery-limit", -1)
        if 0 <= limit < DELIVERY_LIMIT:
            what = "messages are dropped, or dead-lettered, after so many returns"
            yield Finding(PROBLEM, queue, f"policy {policy} has delivery-limit {limit}: {what}", do)


def _own_delay(queue: str, facts: Facts, window_s: int) -> Finding:
    """Check a retry queue whose delay is not in RETRY_DELAYS but may be a handler's own."""
    what = "RETRY_DELAYS does not have its delay; a handler's retry_delays may"
    do = "if no handler has it, delete the queue once it is empty"
    delay_s = facts["arguments"].get("x-message-ttl", 0) / 1000
    if not 0 < window_s <= delay_s:
        return Finding(UNKNOWN, queue, what, do)
    delay = duration(delay_s)
    what += (
        f"; DEDUP_WINDOW is {duration(window_s)}, and such a retry comes {delay} later: "
        "a duplicate would be taken for a new event"
    )
    return Finding(WARNING, queue, what, f"set DEDUP_WINDOW well above {delay}; {do}")


def _policies_of(facts: Facts, policies: Policies) -> list[tuple[str, Facts]]:
    """Return the queue's policy and the operator's, where it has them."""
    return [(name, definition) for kind, name, definition in policies if facts.get(kind) == name]


def _bindings(service: str, bindings: list[Facts], arguments: argparse.Namespace) -> Findings:
    """Check that the service gets the events it asks for, and no others.

    Only the service knows its bindings. Unless they are given, they are assumed to be all events
    of the exchange ``events``, if its queue has that binding or none.
    """
    found = [
        (each["source"], each["routing_key"])
        for each in bindings
        if each["destination"] == service
        and each["source"]  # All queues are bound to the default one.
    ]
    exchange, keys = arguments.exchange, arguments.binding
    expected = [(exchange or names.EXCHANGE, key) for key in keys or [names.BINDING_KEY]]
    if not (exchange or keys) and found and expected[0] not in found:
        what = f"bound to {_listed(found)}: --exchange and --binding hold that against the service"
        yield Finding(OK, service, what)
        return
    for missing in [each for each in expected if each not in found]:
        what = f"its queue is not bound to {_listed([missing])}: it does not get those events"
        yield Finding(PROBLEM, service, what, "restart it: it binds its queue")
    if others := [each for each in found if each not in expected]:
        what = f"its queue is bound to {_listed(others)} too, which is not asked for"
        do = "unbind it in RabbitMQ's management UI, or name it with --exchange and --binding"
        yield Finding(WARNING, service, what, do)
    elif set(found) == set(expected):
        yield Finding(OK, service, f"bound to {_listed(found)}")


def _listed(bindings: list[tuple[str, str]]) -> str:
    return ", ".join(f"exchange {exchange} by {key or 'no key'}" for exchange, key in bindings)


def _consumer_timeout(
    service: str, facts: Facts, policies: Policies, longest_call_s: int | None
) -> Finding:
    """Compare a handler's longest call with RabbitMQ's consumer time-out."""
    set_ms = facts["arguments"].get("x-consumer-timeout")
    for _, definition in _policies_of(facts, policies):
        set_ms = set_ms or definition.get("consumer-timeout")
    timeout_s = set_ms / 1000 if set_ms else CONSUMER_TIMEOUT_S
    what = f"a delivery can be in flight for {duration(timeout_s)}"
    if not set_ms:
        what += ", if the broker's consumer_timeout is the default: it does not tell"
    if longest_call_s is None:
        what += "; --longest-call holds a handler's time-out against that"
        return Finding(OK, service, what)
    what += f"; the longest call takes {duration(longest_call_s)}"
    if longest_call_s <= timeout_s / 2:
        return Finding(OK, service, what)
    level = PROBLEM if longest_call_s >= timeout_s else WARNING
    do = "raise consumer_timeout in rabbitmq.conf, or shorten the call"
    return Finding(level, service, what, do)


_GONE = "where it is gone for good, delete its queues: they keep all events"


def _counts(services: Sequence[str], context: Context) -> Findings:
    """Check that each queue has a consumer and that no dead letters wait."""
    # If RabbitMQ is away, that has been reported.
    with suppress(BrokerError), context.rabbitmq() as broker:
        for name in services:
            own, dead = broker.depth(name), broker.depth(names.dead_letter_queue(name))
            if not own or not own.consumers:
                do = f"start it, or see its log; {_GONE}"
                yield Finding(WARNING, name, "nobody consumes its queue", do)
            if dead and dead.ready:
                what = f"{counted(dead.ready, 'dead letter')} waiting"
                do = f"idempotent-consumer dead-letters list {name}"
                yield Finding(WARNING, name, what, do)


# etcd.

_MUCH, _TOO_MUCH = 0.7, 0.9
"""Shares of the quota. When it is used up, etcd takes no writes until somebody makes room."""

_COMPACTED_LATE = 1_000_000
"""More revisions of history than an etcd that compacts by itself usually has."""


def _member(context: Context, host: str, port: int) -> Findings:
    """Check one member through its API, and through its HTTP pages if it has them."""
    about, settings = f"etcd {host}:{port}", context.settings
    tls = Tls(settings.etcd_ca_cert, settings.etcd_cert, settings.etcd_key)
    url = f"{'https' if tls.ca_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    metrics, variables, date = "", "", None
    with suppress(WebError):
        page = context.fetch(f"{url}/metrics", tls)
        variables = context.fetch(f"{url}/debug/vars", tls).body.decode(errors="replace")
        metrics, date = page.body.decode(errors="replace"), page.date
    try:
        with context.etcd((host, port)) as etcd:
            status = etcd.status()
    except EtcdError as error:
        yield Finding(PROBLEM, about, str(error), "start it, or correct ETCD_ENDPOINTS")
    else:
        yield _version(about, status.version, ETCD)
        if not status.leader:
            yield Finding(PROBLEM, about, "it has no leader", "start the other members")
        yield _room(about, status.dbSize, _metric(metrics, "server_quota_backend_bytes"))
        yield _compaction(about, metrics, variables)
    yield clock(about, date, context.now_s())


def _metric(metrics: str, name: str) -> float | None:
    """Return the value of a metric that has no labels."""
    found = re.search(rf"^etcd_{name} (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else None


def _room(about: str, size_bytes: int, quota_bytes: float | None) -> Finding:
    if not quota_bytes:
        return Finding(UNKNOWN, about, f"{size(size_bytes)} in use; its quota is not shown")
    share = size_bytes / quota_bytes
    what = f"{size(size_bytes)} of its quota of {size(quota_bytes)} in use"
    if share < _MUCH:
        return Finding(OK, about, what)
    level = PROBLEM if share > _TOO_MUCH else WARNING
    do = "defragment it, raise --quota-backend-bytes, or shorten DEDUP_WINDOW"
    return Finding(level, about, what + ": full, it takes no records", do)


def _compaction(about: str, metrics: str, variables: str) -> Finding:
    """Check that its history is compacted."""
    # From its command line; what is set in its environment is not shown.
    flag = re.search(r'"--auto-compaction-retention=([^"]*)"', variables)
    retention = flag[1] if flag else ""
    if retention not in ("", "0"):
        return Finding(OK, about, f"compacts by itself ({retention})")
    now = _metric(metrics, "debugging_mvcc_current_revision")
    compacted = _metric(metrics, "debugging_mvcc_compact_revision")
    not_shown = "whether it compacts by itself is not shown"
    if now is None or compacted is None:
        return Finding(UNKNOWN, about, not_shown)
    revisions = int(now - max(0, compacted))
    keeps = f"it keeps {counted(revisions, 'revision')} of history"
    do = "start it with --auto-compaction-mode=periodic --auto-compaction-retention=10m"
    if retention == "0" or revisions > _COMPACTED_LATE:
        return Finding(WARNING, about, f"{keeps}, and seems not to compact by itself", do)
    return Finding(UNKNOWN, about, f"{not_shown}; {keeps}", do)


def _cluster(context: Context, services: Sequence[str]) -> Findings:
    """Check what all members share. The user may be allowed to read only some of it."""
    checks: dict[str, Callable[[Etcd], Finding]] = {"alarms": _raised}
    if services:
        operations = context.settings.etcd_max_txn_ops
        checks["limit of operations"] = partial(_operations, operations, services[0])
    if context.settings.enable_etcd:  # Otherwise there are no records.
        checks |= {f"records of {name}": partial(_incarnation, name) for name in services}
    unseen: dict[str, list[str]] = {}
    with context.etcd() as etcd:
        for part, check in checks.items():
            try:
                yield check(etcd)
            except EtcdError as error:
                unseen.setdefault(str(error), []).append(part)
    for why, parts in unseen.items():
        yield Finding(UNKNOWN, "etcd", f"its {', '.join(parts)} could not be looked at: {why}")


def _raised(etcd: Etcd) -> Finding:
    alarms = etcd.ask("Alarm", AlarmRequest(action=AlarmRequest.GET)).alarms
    if not alarms:
        return Finding(OK, "etcd", "no alarm is on")
    raised = ", ".join(sorted({AlarmType.Name(each.alarm) for each in alarms}))
    do = "make room: etcdctl compact, defrag, then alarm disarm"
    return Finding(PROBLEM, "etcd", f"alarm {raised} is on: no record can be written", do)


def _operations(operations: int, service: str, etcd: Etcd) -> Finding:
    """Check that etcd takes ETCD_MAX_TXN_OPS operations, here reads, in a transaction."""
    request, limit = TxnRequest(), f"ETCD_MAX_TXN_OPS ({operations}) operations"
    for _ in range(operations):
        get(request.success, names.incarnation_key(service).encode())
    try:
        etcd.ask("Txn", request)
    except EtcdError as error:
        if "too many operations" not in str(error):
            raise
        what = f"refuses a transaction of {limit}: nothing is ever recorded under load"
        do = f"start it with --max-txn-ops={operations}, or lower ETCD_MAX_TXN_OPS"
        return Finding(PROBLEM, "etcd", what, do)
    return Finding(OK, "etcd", f"takes {limit} in a transaction")


def _incarnation(service: str, etcd: Etcd) -> Finding:
    incarnation = etcd.incarnation(service)
    if incarnation is not None:
        return Finding(OK, service, f"etcd has its history (incarnation {incarnation[:8]})")
    what = "etcd does not know it: it has never run with ENABLE_ETCD=true, or this etcd was wiped"
    return Finding(WARNING, service, what, "start it, and see its log")


_LONGEST_CALL = "the longest time-out of a handler, to hold against the broker's"
_EXCHANGE = "the exchange that the services are made with (events)"
_BINDING = 'a binding key that the services are made with, once for each ("#")'

DOCTOR = Verb(
    "doctor",
    "find what would break the guarantee; changes nothing",
    _doctor,
    [
        SERVICES,
        argument("--longest-call", read=duration_s, metavar="TIME", help=_LONGEST_CALL),
        argument("--exchange", metavar="NAME", help=_EXCHANGE),
        argument("--binding", action="append", metavar="KEY", help=_BINDING),
    ],
)

"""``doctor``: what would break the guarantee, and what to do about it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from .. import names
from .arguments import add_services, seconds
from .broker import BrokerError
from .checks import broker, clocks, configuration, queues, records
from .checks.finding import PROBLEM, UNKNOWN, WARNING, Finding
from .context import Context
from .output import counted, plain
from .report import Report
from .services import Queues, services
from .services import queues as ask_queues
from .web import WebError


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "doctor", parents=[common], help="find what would break the guarantee; changes nothing"
    )
    add_services(parser)
    parser.add_argument(
        "--longest-call",
        type=seconds,
        metavar="TIME",
        help="the longest time-out of a handler, to hold against the broker's",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, context: Context) -> Report:
    """Look at everything, and say what was found. Not ok where there is a problem."""
    findings = list(_findings(arguments.service, arguments.longest_call, context))
    counts = {
        level: sum(each.level == level for each in findings)
        for level in (PROBLEM, WARNING, UNKNOWN)
    }
    document: dict[str, object] = {
        "findings": [each._asdict() for each in findings],
        **{f"{level}s": number for level, number in counts.items() if level != UNKNOWN},
    }
    lines = [_line(each) for each in findings]
    lines.append(
        f"{counted(counts[PROBLEM], PROBLEM)}, {counted(counts[WARNING], WARNING)}, "
        f"{counts[UNKNOWN]} not looked at"
    )
    return Report(document, "\n".join(lines), not counts[PROBLEM])


def _findings(
    given: Sequence[str], longest_call_s: int | None, context: Context
) -> Iterator[Finding]:
    yield from configuration.check(context.settings)
    yield from broker.check(context)
    found = ask_queues(context)
    if found.why_not:
        yield Finding(
            UNKNOWN,
            "rabbitmq",
            f"queue arguments, policies, bindings and alarms were not looked at: {found.why_not}",
        )
    else:
        alarms, date = broker.check_alarms(context.management())
        yield from (alarms, clocks.check("rabbitmq", date, context.now_s()))
    known = services(given, found) if given or not found.why_not else []
    if not known:
        yield Finding(UNKNOWN, "services", "there is none, or none was found: name them")
    yield from _services(known, found, longest_call_s, context)
    for address in context.settings.etcd_endpoints:
        pages = records.pages_of(context, address)
        yield from records.check(context, pages, address)
        yield clocks.check(f"etcd {address[0]}:{address[1]}", pages.date, context.now_s())
    yield from records.check_cluster(context, known)


def _services(
    known: Sequence[str], found: Queues, longest_call_s: int | None, context: Context
) -> Iterator[Finding]:
    if not found.why_not:
        yield from (queues.absent(name) for name in known if name not in found.facts)
        known = [name for name in known if name in found.facts]
        try:
            policies = context.management().policies()
        except WebError as error:
            policies = {}
            yield Finding(UNKNOWN, "rabbitmq", f"policies were not looked at: {error}")
        try:
            bindings = _bindings(context)
        except WebError as error:
            bindings = None
            yield Finding(UNKNOWN, "rabbitmq", f"bindings were not looked at: {error}")
        for name in known:
            yield from queues.check(name, found.facts, policies, context.settings)
            if bindings is not None:
                yield queues.check_binding(name, bindings)
            yield queues.check_consumer_timeout(name, found.facts[name], policies, longest_call_s)
    yield from _counts(known, context)


def _bindings(context: Context) -> Any:
    try:
        return context.management().get(f"/exchanges/{{vhost}}/{names.EXCHANGE}/bindings/source")
    except WebError as error:
        if error.status != 404:
            raise
        return []  # There is no such exchange, so nothing is bound to it.


def _counts(known: Sequence[str], context: Context) -> Iterator[Finding]:
    try:
        with context.rabbitmq() as rabbitmq:
            for name in known:
                own, dead = (
                    rabbitmq.depth(queue) for queue in (name, names.dead_letter_queue(name))
                )
                yield from queues.check_counts(
                    name, own.consumers if own else 0, dead.ready if dead else 0
                )
    except BrokerError:
        return  # Its being unreachable has been found.


def _line(finding: Finding) -> str:
    do = f"  -> {finding.do}" if finding.do else ""
    return f"{finding.level:<8} {finding.about}: {plain(finding.what, 1000)}{do}"

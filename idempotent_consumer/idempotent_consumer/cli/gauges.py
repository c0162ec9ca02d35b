"""``gauges``: what RabbitMQ and etcd hold, counted and sent to statsd, once or again and again.

A service's own counters lose what it had not sent when it was killed. These are counted afresh each
time, by a process that is no service: they also tell what waits for a service that is down.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from .. import names
from ..etcd import EtcdError
from ..metrics import Metrics
from .broker import Broker, BrokerError
from .context import Context, add_services, seconds
from .etcd import Etcd
from .output import CommandError, Report, plain
from .status import queues


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "gauges", parents=[common], help="count what RabbitMQ and etcd hold, and send it to statsd"
    )
    add_services(parser)
    parser.add_argument(
        "--effects",
        action="append",
        default=[],
        metavar="SERVICE=PREFIX",
        help="count the keys in etcd that begin with PREFIX as SERVICE's effects, too",
    )
    parser.add_argument(
        "--every", type=seconds, metavar="TIME", help="do it again after that time, until stopped"
    )
    parser.set_defaults(run=_gauges)


def _gauges(arguments: argparse.Namespace, context: Context) -> Report:
    """Send once and show it, or send until interrupted."""
    every_s = arguments.every
    with context.etcd() as etcd, closing(context.metrics()) as metrics:
        sender = _Sender(arguments, context, etcd, metrics, arguments.service)
        while True:
            try:
                # One connection for all rounds: RabbitMQ logs each that is opened.
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


@dataclass
class _Sender:
    """Counts and sends. What cannot be counted is not sent: no old number passes for a new one."""

    arguments: argparse.Namespace
    context: Context
    etcd: Etcd
    metrics: Metrics
    services: list[str]
    missing: dict[str, str] = field(default_factory=dict)

    def send(self, broker: Broker | None, why_not: str = "") -> Report:
        """Count what can be counted, once. Raises BrokerError where the connection is lost."""
        gauges: dict[str, int | None] = {}
        missing = {"rabbitmq": why_not} if broker is None else {}
        if broker is not None:
            found = self.context.management().queues()
            try:
                # Those seen last, while the management API does not say which there are.
                given = self.services if found.why_not else self.arguments.service
                self.services = found.services(given)
            except CommandError as error:
                missing["services"] = str(error)
            for name in self.services:
                held = queues(name, self.context, broker, found)
                held["retries"] = sum(held["retries"].values())
                if held["unacked"] is None and held["ready"] is not None:
                    missing["unacked"] = found.why_not or "RabbitMQ's management API does not tell"
                gauges |= {f"{name}_{what}": held[what] for what in _HELD}
        try:
            for name in self.services:
                gauges[f"{name}_records"] = self.etcd.count(names.record_prefix(name))
            for name, _, prefix in (text.partition("=") for text in self.arguments.effects):
                gauges[f"{name}_effects"] = self.etcd.count(prefix)
        except EtcdError as error:
            missing["etcd"] = str(error)
        sent = {name: number for name, number in gauges.items() if number is not None}
        for name, number in sent.items():
            self.metrics.gauge(name, number)
        self.metrics.send()
        lines = [f"{name} {number:,}" for name, number in sent.items()]
        lines += [_not_counted(what, why) for what, why in missing.items()]
        if self.arguments.every:
            self._say(missing)
        return Report({"gauges": sent, "missing": missing}, "\n".join(lines), not missing)

    def _say(self, missing: dict[str, str]) -> None:
        """Say on standard error what has begun to be missing, and what is there again."""
        was, self.missing = self.missing, missing
        lines = [_not_counted(what, why) for what, why in missing.items() if what not in was]
        lines += [f"counted again: {what}" for what in was if what not in missing]
        for line in lines:
            print(f"idempotent-consumer: {line}", file=self.context.err, flush=True)


_HELD = ("ready", "unacked", "retries", "dead_letters")


def _not_counted(what: str, why: str) -> str:
    return f"not counted: {what}: {plain(why, 500)}"

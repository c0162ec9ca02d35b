"""RabbitMQ's nodes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from urllib.parse import urlsplit

import orjson

from ..broker import BrokerError
from ..context import Context
from ..management import Management
from ..web import WebError
from . import versions
from .finding import PROBLEM, UNKNOWN, Finding, ok


def check(context: Context) -> Iterator[Finding]:
    """Check that each node of RABBITMQ_URL answers, and its version."""
    for url in context.settings.rabbitmq_urls:
        about = f"rabbitmq {urlsplit(url).netloc.rpartition('@')[2]}"
        try:
            with context.rabbitmq(url) as rabbitmq:
                yield versions.check(about, rabbitmq.version, versions.RABBITMQ)
        except BrokerError as error:
            yield Finding(PROBLEM, about, str(error), "start it, or correct RABBITMQ_URL")


def check_alarms(management: Management) -> tuple[Finding, datetime | None]:
    """Check that no node has an alarm; return the broker's clock too, where it told it."""
    try:
        page = management.page("/health/checks/alarms")
    except WebError as error:
        if error.status == 503:
            return Finding(
                PROBLEM,
                "rabbitmq",
                f"an alarm is on: {_reason(error.body)}; nothing "
                "can be published, nor retried or parked",
                "free memory or disk space",
            ), None
        return Finding(UNKNOWN, "rabbitmq", f"alarms were not looked at: {error}"), None
    return ok("rabbitmq", "no alarm is on"), page.date


def _reason(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["reason"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "it does not say which"

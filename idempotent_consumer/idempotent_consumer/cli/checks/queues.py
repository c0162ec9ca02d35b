"""A service's queues: the arguments, policies and binding that the guarantee rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ... import names
from ...bus import DELIVERY_LIMIT, queue_arguments
from ...settings import Settings
from ..output import counted, duration
from .configuration import BROKERS_CONSUMER_TIMEOUT_S
from .finding import PROBLEM, WARNING, Finding, ok

Facts = Mapping[str, Any]
Policies = Mapping[str | None, Facts]

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
"""What makes RabbitMQ throw messages or queues away, as an argument (with x-) or by a policy."""


def absent(service: str) -> Finding:
    """Return what is found of a service that has no queue."""
    return Finding(
        PROBLEM,
        service,
        "there is no such queue: it has not run yet, or this is another name",
        "start it: it makes its queues",
    )


def check(
    service: str, queues: Mapping[str, Facts], policies: Policies, settings: Settings
) -> Iterator[Finding]:
    """Check the arguments and the policies of all queues that a service declares."""
    expected = queue_arguments(service, settings.retry_delays)
    faults: list[Finding] = []
    for queue, arguments in expected.items():
        facts = queues.get(queue)
        if facts is None:
            faults.append(
                Finding(PROBLEM, queue, "there is no such queue", "start the service: it makes it")
            )
        else:
            faults += _arguments(queue, arguments, facts)
            faults += _policies(queue, _policies_of(facts, policies))
    yield from faults or [ok(service, f"its {len(expected)} queues are as they should be")]


def check_consumer_timeout(
    service: str, facts: Facts, policies: Policies, longest_call_s: int | None
) -> Finding:
    """Compare a handler's longest call with how long RabbitMQ lets a delivery be in hand."""
    set_ms = facts["arguments"].get("x-consumer-timeout")
    for _, definition in _policies_of(facts, policies):
        set_ms = set_ms or definition.get("consumer-timeout")
    timeout_s = set_ms / 1000 if set_ms else BROKERS_CONSUMER_TIMEOUT_S
    shown = duration(timeout_s) + (
        "" if set_ms else ", if the broker's consumer_timeout is the default: it does not tell"
    )
    what = f"a delivery can be in hand for {shown}"
    if longest_call_s is None:
        return ok(service, what + "; --longest-call holds a handler's time-out against that")
    what += f"; the longest call takes {duration(longest_call_s)}"
    if longest_call_s <= timeout_s / 2:
        return ok(service, what)
    return Finding(
        PROBLEM if longest_call_s >= timeout_s else WARNING,
        service,
        what,
        "raise consumer_timeout in rabbitmq.conf, or shorten the call",
    )


def check_binding(service: str, bindings: list[Facts]) -> Finding:
    """Check that the service gets all events."""
    if any(
        each["destination"] == service and each["routing_key"] == names.BINDING_KEY
        for each in bindings
    ):
        return ok(service, f"bound to exchange {names.EXCHANGE}")
    return Finding(
        PROBLEM,
        service,
        f"its queue is not bound to exchange {names.EXCHANGE} by "
        f"{names.BINDING_KEY}: it gets no events",
        "restart it: it binds its queue",
    )


def check_counts(service: str, consumers: int, dead_letters: int) -> Iterator[Finding]:
    """Check that somebody consumes, and that nothing waits for an operator."""
    if not consumers:
        yield Finding(
            WARNING,
            service,
            "nobody consumes its queue",
            "start it, or see its log; "
            "where it is gone for good, delete its queues: they keep all events",
        )
    if dead_letters:
        yield Finding(
            WARNING,
            service,
            f"{counted(dead_letters, 'dead letter')} waiting",
            f"idempotent-consumer dead-letters list {service}",
        )


def _arguments(queue: str, expected: Mapping[str, object], facts: Facts) -> Iterator[Finding]:
    """Find what is wrong with a queue's arguments: however much, there is one thing to do."""
    found = {**facts["arguments"], "x-queue-type": facts["type"]}
    wrong = [
        f"{name} is {_shown(found.get(name))}, not {value!r}: {_WITHOUT[name]}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    wrong += [
        f"x-{name} throws messages away"
        for name in _DROPS
        if f"x-{name}" in found and f"x-{name}" not in expected
    ]
    if wrong:
        yield Finding(
            PROBLEM,
            queue,
            "; ".join(wrong),
            "a queue's arguments never change: empty "
            f"it, delete it (rabbitmqctl delete_queue {queue}) and restart the service, "
            "which makes it",
        )


def _policies(queue: str, policies: list[tuple[str, Facts]]) -> Iterator[Finding]:
    for policy, definition in policies:
        for name in _DROPS:
            if name in definition:
                yield Finding(
                    PROBLEM,
                    queue,
                    f"policy {policy} has {name}, which throws messages away",
                    "take the queue out of that policy",
                )
        if 0 <= definition.get("delivery-limit", -1) < DELIVERY_LIMIT:
            yield Finding(
                PROBLEM,
                queue,
                f"policy {policy} has delivery-limit "
                f"{definition['delivery-limit']}: messages are dropped, or dead-lettered,"
                " after so many returns",
                "take the queue out of that policy",
            )


def _policies_of(facts: Facts, policies: Policies) -> list[tuple[str, Facts]]:
    """Return the queue's policy and the operator's, where it has them."""
    named = (facts.get("policy"), f"operator:{facts.get('operator_policy')}")
    return [
        (name.removeprefix("operator:"), policies[name])
        for name in named
        if name and name in policies
    ]


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)

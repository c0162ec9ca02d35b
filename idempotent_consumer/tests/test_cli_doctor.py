"""``doctor``: each fault is found, and none where all is well."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from fakes.operator import ETCD_AWAY, NO_QUEUES, NOW_S, PAGE_AWAY, RABBITMQ_AWAY, Operator
from idempotent_consumer.cli.broker import Depth
from idempotent_consumer.cli.doctor import clock
from idempotent_consumer.cli.web import WebError

METRICS = (
    b"etcd_server_quota_backend_bytes 8.589934592e+09\n"
    b"etcd_debugging_mvcc_compact_revision -1\netcd_debugging_mvcc_current_revision 12\n"
)
COMPACTS = b'{"cmdline": ["etcd","--max-txn-ops=1024","--auto-compaction-retention=1h"]}'
RABBITMQ, ETCD = "rabbitmq localhost:5672", "etcd localhost:2379"


@pytest.fixture
def operator() -> Operator:
    """An operator whose service and servers have no fault."""
    operator = Operator()
    operator.has_service("order")
    operator.pages |= {"metrics": METRICS, "debug/vars": COMPACTS}
    return operator


def found(operator: Operator, *more: str, **environ: str) -> dict[tuple[str, str], str]:
    """Return the findings that are not ok, by level and by what they are about."""
    findings = operator.run("doctor", *more, "--json", **environ).json["findings"]
    amiss: dict[tuple[str, str], str] = {}
    for each in findings:
        if each["level"] != "ok" and "clock was not seen" not in each["what"]:
            amiss.setdefault((each["level"], each["about"]), each["what"])
    return amiss


# faults

Fault = Callable[[Operator], object]
ORDER, DEAD, RETRY = "order", "order.dead-letter", "order.retry.1s"


def declared(queue: str = ORDER, **arguments: object) -> Fault:
    """Let a queue have these arguments, and not have those that are None."""

    def change(operator: Operator) -> None:
        has = operator.queue(queue)["arguments"]
        has |= {f"x-{name.replace('_', '-')}": value for name, value in arguments.items()}
        for name in [name for name, value in has.items() if value is None]:
            del has[name]

    return change


def policy(**definition: object) -> Fault:
    """Let a queue have this policy. Another policy is not for it."""

    def change(operator: Operator) -> None:
        named = {name.replace("_", "-"): value for name, value in definition.items()}
        operator.queue(ORDER)["policy"] = "p"
        operator.policies.append({"name": "p", "definition": named})
        operator.policies.append({"name": "of-others", "definition": {"max-length": 1}})

    return change


def absent(*names: str) -> Fault:
    def change(operator: Operator) -> None:
        operator.queues = [queue for queue in operator.queues if queue["name"] not in names]

    return change


def others(facts_of: Callable[[Operator], dict[str, Any]]) -> Callable[..., Fault]:
    """Return a function that makes a fault of facts to be changed."""
    return lambda given=(), **facts: lambda operator: facts_of(operator).update(given, **facts)


has, etcd = others(vars), others(lambda operator: vars(operator.store))
setting, queue = others(lambda operator: operator.given), others(lambda it: it.queue(ORDER))
pages, depths = others(lambda operator: operator.pages), others(lambda operator: operator.depths)


def history(metrics: bytes, variables: bytes) -> Fault:
    return pages({"metrics": metrics, "debug/vars": variables})


def quota(text: str) -> Fault:
    return pages(metrics=f"etcd_server_quota_backend_bytes {text}\n".encode())


def retries_after(delay: str, seconds: int) -> Fault:
    """Let there be the retry queue of a handler's own delay."""
    arguments = {"x-message-ttl": seconds * 1000}
    facts = {"name": f"order.retry.{delay}", "type": "quorum", "arguments": arguments}
    return lambda operator: operator.queues.append(facts)


DAY_S = 86_400
ALARM = pages({"api/health/checks/alarms": WebError("503", 503, b'{"reason":"memory"}')})
COMPACTS_NOT = b'{"cmdline": ["etcd","--auto-compaction-retention=0"]}'
MUCH_HISTORY = METRICS.replace(b"revision 12", b"revision 5e6")
LOST, KNOWN = "can be lost on their way", "has known faults, fixed in"
STUCK = "a copy that a stuck consumer holds comes again after up to 31m 11s"

PROBLEMS: list[tuple[str, str, Fault]] = [
    (ORDER, "x-dead-letter-exchange is missing, not ''", declared(dead_letter_exchange=None)),
    (ORDER, "x-delivery-limit is missing, not 1000", declared(delivery_limit=None)),
    (ORDER, "x-delivery-limit is 20, not 1000", declared(delivery_limit=20)),
    (DEAD, "x-delivery-limit is missing, not -1", declared(DEAD, delivery_limit=None)),
    (ORDER, LOST, declared(dead_letter_strategy="at-most-once")),
    (ORDER, LOST, declared(overflow=None)),
    (ORDER, "x-message-ttl throws messages away", declared(message_ttl=1000)),
    (RETRY, "not 1000", declared(RETRY, message_ttl=1)),
    (ORDER, "x-queue-type is 'classic', not 'quorum'", queue(type="classic")),
    (ORDER, "policy p has max-length", policy(max_length=10)),
    (ORDER, "policy p has delivery-limit 5", policy(delivery_limit=5)),
    (RETRY, "there is no such queue", absent(RETRY)),
    ("rabbitmq", "an alarm is on: memory", ALARM),
    ("etcd", "alarm NOSPACE is on", etcd(out_of_space=True)),
    ("etcd", "refuses a transaction of ETCD_MAX_TXN_OPS (128)", etcd(max_txn_ops=127)),
    (RABBITMQ, "RabbitMQ is away", has(rabbitmq_error=RABBITMQ_AWAY)),
    (ETCD, "etcd is away", has(etcd_error=ETCD_AWAY)),
    (ETCD, "2.0 KiB of its quota of 2.1 KiB in use", quota("2.1e3")),
    ("settings", "a retry can come 1m 11s later", setting(DEDUP_WINDOW="71s")),
    ("settings", "a retry can come 1d later", setting(RETRY_DELAYS="1d")),
]
"""Each breaks the guarantee: what the finding is about, what it says, and the fault."""

WARNINGS: list[tuple[str, str, Fault]] = [
    (RABBITMQ, f"out of support, and {KNOWN} 4.0.8: ", has(rabbitmq_version="4.0.5")),
    (RABBITMQ, "version 4.1.8 is out of support", has(rabbitmq_version="4.1.8")),
    (RABBITMQ, "version 3.13.7 is out of support", has(rabbitmq_version="3.13.7")),
    (RABBITMQ, f"version 4.3.4 {KNOWN} 4.3.5: ", has(rabbitmq_version="4.3.4")),
    (ETCD, "version 3.4.42 is out of support", etcd(version="3.4.42")),
    (ETCD, f"version 3.5.9 {KNOWN} 3.5.28: ", etcd(version="3.5.9")),
    (ETCD, f"version 3.6.8 {KNOWN} 3.6.9: ", etcd(version="3.6.8")),
    (ETCD, f"version 3.6.8-rc.1 {KNOWN} 3.6.9: ", etcd(version="3.6.8-rc.1")),
    (ETCD, "seems not to compact by itself", history(METRICS, COMPACTS_NOT)),
    (ETCD, "5,000,000 revisions of history", history(MUCH_HISTORY, b"{}")),
    (ETCD, "of its quota", quota("2.6e3")),
    (ORDER, "nobody consumes", depths({ORDER: Depth(5, 0)})),
    (ORDER, "2 dead letters waiting", depths({DEAD: Depth(2, 0)})),
    (ORDER, "etcd does not know it", lambda operator: operator.store.wipe()),
    (
        "order.retry.1d",
        "DEDUP_WINDOW is 1d, and such a retry comes 1d later",
        retries_after("1d", DAY_S),
    ),
    ("settings", STUCK, setting(DEDUP_WINDOW="72s")),
    ("settings", STUCK, setting(DEDUP_WINDOW="31m")),
    ("settings", "each duplicate is processed", setting(ENABLE_ETCD="false")),
]
"""Each may become a problem."""


@pytest.mark.parametrize(
    ("level", "about", "says", "fault"),
    [("problem", *each) for each in PROBLEMS] + [("warning", *each) for each in WARNINGS],
)
def test_a_fault_is_found_with_what_to_do_about_it(
    operator: Operator, level: str, about: str, says: str, fault: Fault
) -> None:
    fault(operator)
    assert says in found(operator)[level, about]
    ran = operator.run("doctor")
    assert ran.code == (1 if level == "problem" else 0)
    start = f"{level}  {about}: "
    assert any(line.startswith(start) and "  -> " in line for line in ran.lines)


@pytest.mark.parametrize(
    "setup",
    [
        has(),
        setting(DEDUP_WINDOW="0"),
        setting(DEDUP_WINDOW="32m"),
        *(has(rabbitmq_version=version) for version in ("4.2.0", "4.3.5", "4.10.0")),
        *(etcd(version=version) for version in ("3.5.28", "3.6.9", "3.7.0-rc.1")),
    ],
)
def test_nothing_is_found_where_all_is_well(operator: Operator, setup: Fault) -> None:
    setup(operator)
    assert found(operator) == {}
    ran = operator.run("doctor")
    assert (ran.code, ran.lines[-1][:22]) == (0, "0 problems, 0 warnings")


@pytest.mark.parametrize(
    ("longest", "timeout_ms", "level"),
    [
        ("30m", None, "problem"),
        ("16m", None, "warning"),
        ("15m", None, ""),
        ("61s", 60_000, "problem"),
        ("31m", 7_200_000, ""),
    ],
)
def test_the_longest_call_is_compared_with_the_brokers_consumer_timeout(
    operator: Operator, longest: str, timeout_ms: int | None, level: str
) -> None:
    if timeout_ms:
        policy(consumer_timeout=timeout_ms)(operator)
    amiss = found(operator, "--longest-call", longest)
    assert list(amiss) == ([(level, ORDER)] if level else [])


# what is reported once, and what cannot be checked


def test_all_wrong_arguments_of_a_queue_are_one_finding(operator: Operator) -> None:
    declared(overflow=None, delivery_limit=20, expires=1000)(operator)
    what = found(operator)["problem", "order"]
    assert all(name in what for name in ("x-overflow", "x-delivery-limit", "x-expires"))
    said = operator.run("doctor").out
    assert said.count("  -> a queue's arguments never change") == 1


def test_a_finding_about_several_services_is_one_line(operator: Operator) -> None:
    operator.has_service("notify")
    missing = RETRY, "order.retry.10s"
    absent(*missing)(operator)
    said = operator.run("doctor").lines
    sentences = [line.partition(": ")[2] for line in said]
    assert len(set(sentences)) == len(sentences)
    assert "ok       notify, order: bound to exchange events by #" in said
    assert any(line.startswith(f"problem  {', '.join(missing)}: there is no such") for line in said)


def test_without_etcd_there_is_one_warning(operator: Operator) -> None:
    """No service has an incarnation then."""
    operator.store.wipe()
    assert list(found(operator, ENABLE_ETCD="false")) == [("warning", "settings")]


def test_checks_that_fail_for_one_reason_are_one_line(operator: Operator) -> None:
    operator.etcd_error = ETCD_AWAY
    unseen = "its alarms, limit of operations, records of order could not be looked at"
    assert f"unknown  etcd: {unseen}: etcd is away" in operator.run("doctor").lines


def test_a_service_without_its_queue_is_one_problem(operator: Operator) -> None:
    ran = operator.run("doctor", "oder")
    (problem,) = (line for line in ran.lines if line.startswith("problem"))
    assert problem.startswith("problem  oder: there is no such queue")
    assert "nobody consumes" not in ran.out


def test_a_faulty_unsupported_server_should_be_upgraded_to_a_supported_one(
    operator: Operator,
) -> None:
    """Not to the release that fixes the faults, which is out of support as well."""
    has(rabbitmq_version="4.0.5")(operator)
    (line,) = (each for each in operator.run("doctor").lines if "4.0.5" in each)
    assert line.endswith("  -> upgrade it to 4.2 or newer")


NOT = "were not looked at"


@pytest.mark.parametrize(
    ("setup", "says"),
    [
        (pages(NO_QUEUES), f"rabbitmq: queue arguments, policies, bindings and alarms {NOT}"),
        (pages(NO_QUEUES), "services: there is none, or none was found: name them"),
        (pages({"api/health/checks/alarms": PAGE_AWAY}), f"rabbitmq: alarms {NOT}: "),
        (pages({"api/policies/%2F": PAGE_AWAY}), f"rabbitmq: policies {NOT}: "),
        (pages({"api/bindings/%2F": PAGE_AWAY}), f"rabbitmq: bindings {NOT}: "),
        (pages(metrics=PAGE_AWAY), f"{ETCD}: 2.0 KiB in use; its quota is not shown"),
        (pages(metrics=PAGE_AWAY), f"{ETCD}: whether it compacts by itself is not shown"),
        (retries_after("5m", 300), "order.retry.5m: RETRY_DELAYS"),
        (retries_after("23h", DAY_S - 3600), "order.retry.23h: RETRY_DELAYS"),
    ],
)
def test_what_cannot_be_checked_is_reported_and_is_no_problem(
    operator: Operator, setup: Fault, says: str
) -> None:
    setup(operator)
    operator.ends(0, f"unknown  {says}", "doctor")


def test_without_the_management_api_named_services_are_checked(operator: Operator) -> None:
    operator.pages |= NO_QUEUES
    assert "dead letters" not in operator.run("doctor", "order").out
    operator.depths[DEAD] = Depth(3, 0)
    assert "warning  order: 3 dead letters" in operator.run("doctor", "order").out


@pytest.mark.parametrize(
    ("ahead_s", "level", "says"),
    [
        (4, "ok", "agrees"),
        (-4, "ok", "agrees"),
        (60, "warning", "ahead of"),
        (-60, "warning", "60 s behind"),
    ],
)
def test_a_clock_that_is_off_is_a_warning(ahead_s: int, level: str, says: str) -> None:
    finding = clock("etcd", datetime.fromtimestamp(NOW_S + ahead_s, UTC), NOW_S)
    assert finding.level == level
    assert says in finding.what


ALL, SHOP, BILLS = ("events", "#"), ("shop", "order.#"), ("shop", "bill.#")
BOTH = "exchange shop by order.#, exchange shop by bill.#"


@pytest.mark.parametrize(
    ("bound", "options", "told"),
    [
        ([ALL], "", ["ok: bound to exchange events by #"]),
        ([ALL, SHOP], "", ["warning: bound to exchange shop by order.# too, which is not"]),
        ([SHOP, BILLS], "", [f"ok: bound to {BOTH}: --exchange"]),
        ([], "", ["problem: not bound to exchange events by #"]),
        ([SHOP], "--exchange shop --binding order.#", ["ok: bound to exchange shop by order.#"]),
        (
            [SHOP],
            "--exchange shop --binding bill.#",
            ["problem: not bound to exchange shop by bill.#", "warning: shop by order.# too"],
        ),
        (
            [SHOP, BILLS],
            "--exchange shop --binding order.# --binding bill.#",
            [f"ok: bound to {BOTH}"],
        ),
    ],
)
def test_bindings_are_compared_with_those_that_the_service_asks_for(
    operator: Operator, bound: list[tuple[str, str]], options: str, told: list[str]
) -> None:
    operator.bindings[:] = [
        {"source": source, "destination": "order", "routing_key": key} for source, key in bound
    ]
    ran = operator.run("doctor", "order", *options.split())
    lines = [line for line in ran.out.splitlines() if "bound to" in line]
    for line, expected in zip(lines, told, strict=True):
        level, _, says = expected.partition(": ")
        assert line.split()[0] == level
        assert says in line

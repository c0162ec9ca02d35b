"""``doctor``: each fault is found, and nothing is where there is none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from fakes.operator import NOW_S, Operator
from idempotent_consumer.cli.broker import BrokerError, Depth
from idempotent_consumer.cli.doctor import clock, numbers
from idempotent_consumer.cli.web import WebError
from idempotent_consumer.etcd import EtcdError, Failure

METRICS = (
    b"etcd_server_quota_backend_bytes 8.589934592e+09\n"
    b"etcd_debugging_mvcc_compact_revision -1\netcd_debugging_mvcc_current_revision 12\n"
)
COMPACTS = b'{"cmdline": ["etcd","--max-txn-ops=1024","--auto-compaction-retention=1h"]}'


@pytest.fixture
def operator() -> Operator:
    """Somebody whose services have nothing wrong with them."""
    operator = Operator()
    operator.has_service("order")
    operator.pages |= {"metrics": METRICS, "debug/vars": COMPACTS}
    return operator


def found(operator: Operator, *more: str, **environ: str) -> dict[tuple[str, str], str]:
    """Return what the doctor finds amiss, by level and by what it is about."""
    findings: list[dict[str, Any]] = operator.run("doctor", *more, "--json", **environ).json[
        "findings"
    ]
    return {
        (each["level"], each["about"]): each["what"]
        for each in findings
        if each["level"] != "ok" and "clock was not seen" not in each["what"]
    }


def test_nothing_is_found_where_all_is_well(operator: Operator) -> None:
    assert found(operator) == {}
    ran = operator.run("doctor")
    assert ran.code == 0
    assert ran.out.splitlines()[-1].startswith("0 problems, 0 warnings")


def argument(name: str, value: object, queue: str = "order") -> Callable[[Operator], None]:
    def change(operator: Operator) -> None:
        operator.queue(queue)["arguments"][name] = value

    return change


def without(name: str, queue: str = "order") -> Callable[[Operator], None]:
    def change(operator: Operator) -> None:
        del operator.queue(queue)["arguments"][name]

    return change


def policy(**definition: object) -> Callable[[Operator], None]:
    def change(operator: Operator) -> None:
        named = {name.replace("_", "-"): value for name, value in definition.items()}
        operator.queue("order")["policy"] = "p"
        operator.policies.append({"name": "p", "definition": named})
        operator.policies.append({"name": "of-others", "definition": {"max-length": 1}})

    return change


def classic(operator: Operator) -> None:
    operator.queue("order")["type"] = "classic"


def absent(operator: Operator) -> None:
    operator.queues = [queue for queue in operator.queues if queue["name"] != "order.retry.10s"]


def unbound(operator: Operator) -> None:
    operator.bindings[0]["routing_key"] = "new_order"


def alarmed(operator: Operator) -> None:
    operator.pages["api/health/checks/alarms"] = WebError("503", 503, b'{"reason":"memory"}')


def full(operator: Operator) -> None:
    operator.store.out_of_space = True


def few_operations(operator: Operator) -> None:
    operator.store.max_txn_ops = 127


def rabbitmq_away(operator: Operator) -> None:
    operator.rabbitmq_error = BrokerError("RabbitMQ is away")


def etcd_away(operator: Operator) -> None:
    operator.etcd_error = EtcdError(Failure.UNKNOWN, "etcd is away")


def nearly_full(operator: Operator) -> None:
    operator.pages["metrics"] = b"etcd_server_quota_backend_bytes 2.1e3\n"


@pytest.mark.parametrize(
    ("fault", "about", "says"),
    [
        (without("x-dead-letter-exchange"), "order", "x-dead-letter-exchange is missing, not ''"),
        (without("x-delivery-limit"), "order", "x-delivery-limit is missing, not 1000"),
        (argument("x-delivery-limit", 20), "order", "x-delivery-limit is 20, not 1000"),
        (
            without("x-delivery-limit", "order.dead-letter"),
            "order.dead-letter",
            "x-delivery-limit is missing, not -1",
        ),
        (argument("x-dead-letter-strategy", "at-most-once"), "order", "can be lost on their way"),
        (without("x-overflow"), "order", "can be lost on their way"),
        (argument("x-message-ttl", 1000), "order", "x-message-ttl throws messages away"),
        (argument("x-message-ttl", 1, "order.retry.1s"), "order.retry.1s", "not 1000"),
        (classic, "order", "x-queue-type is 'classic', not 'quorum'"),
        (policy(max_length=10), "order", "policy p has max-length"),
        (policy(delivery_limit=5), "order", "policy p has delivery-limit 5"),
        (absent, "order.retry.10s", "there is no such queue"),
        (unbound, "order", "is not bound to exchange events"),
        (alarmed, "rabbitmq", "an alarm is on: memory"),
        (full, "etcd", "alarm NOSPACE is on"),
        (few_operations, "etcd", "refuses a transaction of ETCD_MAX_TXN_OPS (128)"),
        (rabbitmq_away, "rabbitmq localhost:5672", "RabbitMQ is away"),
        (etcd_away, "etcd localhost:2379", "etcd is away"),
        (nearly_full, "etcd localhost:2379", "2.0 KiB of its quota of 2.1 KiB in use"),
    ],
)
def test_a_fault_that_breaks_the_guarantee_is_a_problem(
    operator: Operator, fault: Callable[[Operator], None], about: str, says: str
) -> None:
    fault(operator)
    assert says in found(operator)["problem", about]
    ran = operator.run("doctor")
    assert ran.code == 1
    assert any(
        line.startswith(f"problem  {about}: ") and "  -> " in line for line in ran.out.splitlines()
    )


def rabbitmq(version: str) -> Callable[[Operator], None]:
    def change(operator: Operator) -> None:
        operator.rabbitmq_version = version

    return change


def etcd(version: str) -> Callable[[Operator], None]:
    def change(operator: Operator) -> None:
        operator.store.version = version

    return change


def not_compacting(operator: Operator) -> None:
    operator.pages["debug/vars"] = b'{"cmdline": ["etcd","--auto-compaction-retention=0"]}'


def much_history(operator: Operator) -> None:
    operator.pages["debug/vars"] = b"{}"
    operator.pages["metrics"] = METRICS.replace(b"revision 12", b"revision 5e6")


def filling(operator: Operator) -> None:
    operator.pages["metrics"] = b"etcd_server_quota_backend_bytes 2.6e3\n"


def nobody_consumes(operator: Operator) -> None:
    operator.depths["order"] = Depth(5, 0)


def dead_letters(operator: Operator) -> None:
    operator.depths["order.dead-letter"] = Depth(2, 0)


def no_history(operator: Operator) -> None:
    operator.store.wipe()


@pytest.mark.parametrize(
    ("fault", "about", "says"),
    [
        (
            rabbitmq("4.0.5"),
            "rabbitmq localhost:5672",
            "version 4.0.5 is out of support, and has known faults, fixed in 4.0.8: ",
        ),
        (rabbitmq("4.1.8"), "rabbitmq localhost:5672", "version 4.1.8 is out of support"),
        (rabbitmq("3.13.7"), "rabbitmq localhost:5672", "version 3.13.7 is out of support"),
        (rabbitmq("4.3.4"), "rabbitmq localhost:5672", "4.3.4 has known faults, fixed in 4.3.5: "),
        (etcd("3.4.42"), "etcd localhost:2379", "version 3.4.42 is out of support"),
        (etcd("3.5.16"), "etcd localhost:2379", "3.5.16 has known faults, fixed in 3.5.28: "),
        (etcd("3.6.8"), "etcd localhost:2379", "3.6.8 has known faults, fixed in 3.6.9: "),
        (not_compacting, "etcd localhost:2379", "seems not to compact by itself"),
        (much_history, "etcd localhost:2379", "5,000,000 revisions of history"),
        (filling, "etcd localhost:2379", "of its quota"),
        (nobody_consumes, "order", "nobody consumes"),
        (dead_letters, "order", "2 dead letters waiting"),
        (no_history, "order", "etcd does not know it"),
    ],
)
def test_what_could_come_to_that_is_a_warning(
    operator: Operator, fault: Callable[[Operator], None], about: str, says: str
) -> None:
    fault(operator)
    warnings = [
        f"{each['about']}: {each['what']}"
        for each in operator.run("doctor", "--json").json["findings"]
        if each["level"] == "warning"
    ]
    assert any(each.startswith(f"{about}: ") and says in each for each in warnings), warnings
    assert operator.run("doctor").code == 0


@pytest.mark.parametrize(
    ("environ", "level", "says"),
    [
        ({"DEDUP_WINDOW": "71s"}, "problem", "a retry can come 1m 11s later"),
        ({"DEDUP_WINDOW": "72s"}, "warning", "comes again after up to 31m 11s"),
        ({"DEDUP_WINDOW": "31m"}, "warning", "comes again"),
        ({"RETRY_DELAYS": "1d"}, "problem", "a retry can come 1d later"),
        ({"ENABLE_ETCD": "false"}, "warning", "each duplicate is processed"),
    ],
)
def test_settings_that_do_not_go_together_are_found(
    operator: Operator, environ: dict[str, str], level: str, says: str
) -> None:
    assert says in found(operator, **environ)[level, "settings"]


def test_however_much_is_wrong_with_a_queue_it_is_said_once_what_to_do(operator: Operator) -> None:
    without("x-overflow")(operator)
    argument("x-delivery-limit", 20)(operator)
    argument("x-expires", 1000)(operator)
    what = found(operator)["problem", "order"]
    assert all(name in what for name in ("x-overflow", "x-delivery-limit", "x-expires"))
    assert operator.run("doctor").out.count("  -> a queue's arguments never change") == 1


def test_what_cannot_be_seen_for_one_reason_is_said_once(operator: Operator) -> None:
    etcd_away(operator)
    ran = operator.run("doctor")
    assert (
        "unknown  etcd: its alarms, limit of operations, records of order could not be looked "
        "at: etcd is away"
    ) in ran.out.splitlines()


def test_a_service_without_its_queue_is_one_problem(operator: Operator) -> None:
    ran = operator.run("doctor", "oder")
    (problem,) = (line for line in ran.out.splitlines() if line.startswith("problem"))
    assert problem.startswith("problem  oder: there is no such queue")
    assert "nobody consumes" not in ran.out


@pytest.mark.parametrize("window", ["0", "32m"])
def test_a_window_that_is_long_enough_is_fine(operator: Operator, window: str) -> None:
    assert found(operator, DEDUP_WINDOW=window) == {}


@pytest.mark.parametrize(
    ("longest", "timeout_ms", "level"),
    [
        ("31m", None, "problem"),
        ("30m", None, "problem"),
        ("16m", None, "warning"),
        ("15m", None, ""),
        ("61s", 60_000, "problem"),
        ("31m", 7_200_000, ""),
    ],
)
def test_a_call_is_held_against_the_brokers_consumer_timeout(
    operator: Operator, longest: str, timeout_ms: int | None, level: str
) -> None:
    if timeout_ms:
        policy(consumer_timeout=timeout_ms)(operator)
    amiss = found(operator, "--longest-call", longest)
    assert list(amiss) == ([(level, "order")] if level else [])


def test_without_the_management_api_it_says_what_it_did_not_see(operator: Operator) -> None:
    operator.pages["api/queues/%2F"] = WebError("away")
    ran = operator.run("doctor")
    assert ran.code == 0
    assert "unknown  rabbitmq: queue arguments, policies, bindings and alarms were not" in ran.out
    assert "unknown  services: " in ran.out
    assert "warning  order: 3 dead letters" not in operator.run("doctor", "order").out
    operator.depths["order.dead-letter"] = Depth(3, 0)
    assert "warning  order: 3 dead letters" in operator.run("doctor", "order").out


def test_an_etcd_that_shows_no_pages_is_not_judged_by_them(operator: Operator) -> None:
    del operator.pages["metrics"]
    amiss = operator.run("doctor")
    assert amiss.code == 0
    assert "2.0 KiB in use; its quota is not shown" in amiss.out
    assert "whether it compacts by itself is not shown" in amiss.out


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("3.5.9", "3.5.28"),
        ("3.5.28", "3.6.0"),
        ("4.0.8", "4.0.10"),
        ("4.1.0-rc.1", "4.1.1"),
    ],
)
def test_versions_are_compared_as_numbers(older: str, newer: str) -> None:
    assert numbers(older) < numbers(newer)


@pytest.mark.parametrize(
    ("change", "about"),
    [
        *((rabbitmq(each), "rabbitmq localhost:5672") for each in ("4.2.0", "4.3.5", "4.10.0")),
        *((etcd(each), "etcd localhost:2379") for each in ("3.5.28", "3.6.9", "3.7.0-rc.1")),
    ],
)
def test_a_version_that_gets_fixes_and_has_no_known_faults_is_fine(
    operator: Operator, change: Callable[[Operator], None], about: str
) -> None:
    change(operator)
    findings = operator.run("doctor", "--json").json["findings"]
    (level,) = {e["level"] for e in findings if e["about"] == about and "version" in e["what"]}
    assert level == "ok"


def test_out_of_support_and_faulty_is_one_finding_that_names_a_series_with_support(
    operator: Operator,
) -> None:
    """Not the release that mends the faults: that one is out of support as well."""
    rabbitmq("4.0.5")(operator)
    (line,) = (each for each in operator.run("doctor").out.splitlines() if "4.0.5" in each)
    assert line.endswith("  -> upgrade it to 4.2 or newer")


def test_bindings_that_cannot_be_seen_are_no_problem(operator: Operator) -> None:
    operator.pages["api/exchanges/%2F/events/bindings/source"] = WebError("timed out")
    ((level, _),) = found(operator)
    assert level == "unknown"
    assert operator.run("doctor").code == 0


@pytest.mark.parametrize(
    ("ahead_s", "level", "says"),
    [
        (0, "ok", "agrees"),
        (4, "ok", "agrees"),
        (-4, "ok", "agrees"),
        (60, "warning", "60 s ahead of"),
        (-60, "warning", "60 s behind"),
    ],
)
def test_a_clock_that_is_off_is_a_warning(ahead_s: int, level: str, says: str) -> None:
    finding = clock("etcd", datetime.fromtimestamp(NOW_S + ahead_s, UTC), NOW_S)
    assert finding.level == level
    assert says in finding.what


def test_a_clock_that_was_not_seen_is_unknown() -> None:
    assert clock("etcd", None, NOW_S).level == "unknown"

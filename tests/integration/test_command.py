"""The operator's command on real servers."""

import json
import signal
from contextlib import closing
from functools import partial
from typing import Any

import pika
import pytest

from chaos.checks import becomes, says
from chaos.load import order, orders
from chaos.receiver import Receiver
from chaos.rig import Rig
from idempotent_consumer import bus
from idempotent_consumer.cli.broker import Broker as Rabbit
from idempotent_consumer.cli.dead_letters import hold
from integration.command import Command
from servers.broker import Broker
from servers.processes import free_port
from servers.servers import Servers
from servers.wait import eventually

ONE = '{"id":"1","type":"new_order"}'
OTHER_BODY = '{"id":"1","type":"new_order","args":{"n":2}}'


@pytest.fixture
def command(clean: Servers) -> Command:
    return Command(clean)


@pytest.fixture
def queues(rig: Rig) -> str:
    """Declare the queues of the order service, and return its name."""
    with rig.broker.channel() as channel:
        bus.Topology("order").declare(channel)
    return "order"


def park(broker: Broker, *bodies: str, **headers: object) -> None:
    """Publish dead letters of order with these headers: ``reason`` becomes x-reason."""
    named = {f"x-{name.replace('_', '-')}": value for name, value in headers.items()}
    properties = pika.BasicProperties(headers=named, delivery_mode=2)
    parked = (body.encode() for body in bodies)
    broker.publish_raw(*parked, properties=properties, exchange="", routing_key="order.dead-letter")


def ids(command: Command, *arguments: str) -> list[str]:
    """Return the ids of order's dead letters, in their order."""
    found = command.json("dead-letters", "list", "order", *arguments)
    return [letter["id"] for letter in found["letters"]]


def test_an_event_is_found_wherever_it_is(rig: Rig, command: Command) -> None:
    rig.start("order")
    rig.start("notify", NOTIFY_URL=f"http://127.0.0.1:{free_port()}/", RETRY_DELAYS="60s")
    assert command.run("find", "1").code == 1
    command.run("publish", ONE)
    becomes(lambda: rig.statsd.count("notifications_retried"), 1)
    becomes(lambda: rig.store.done("order"), {"1"})
    park(rig.broker, ONE, reason="failed", error="KeyError: 'EUR'")

    def find() -> list[str]:
        out = command.run("find", "1", RETRY_DELAYS="60s").out
        return sorted(line.partition(",")[0].partition(" for ")[0] for line in out.splitlines())

    find()  # It takes nothing away.
    assert find() == [
        "notify: released",
        "notify: waits in notify.retry.60s",
        "order: a dead letter: failed: KeyError: 'EUR'",
        "order: done",
    ]


def test_a_frozen_broker_is_reported_in_one_line(rig: Rig, command: Command) -> None:
    rig.servers.rabbitmq.pause()
    ran = command.run("gauges", "order")
    assert (ran.code, ran.err) == (1, "")
    assert "\nnot counted: rabbitmq: RabbitMQ at 127.0.0.1:" in f"\n{ran.out}"


def test_gauges_are_sent_while_a_service_or_a_server_is_away(rig: Rig) -> None:
    """A service that is frozen or dead cannot count what waits for it."""
    service = rig.start("order")
    command = Command(rig.servers, rig.statsd.settings())
    gauges = command.start("gauges", "--every", "1s", "--effects", "order=/orders/")

    def publish(**held: int) -> None:
        rig.broker.publish(orders(1, str(held)))
        shows(**held)

    def shows(**held: int) -> None:
        becomes(lambda: {what: rig.statsd.gauge(f"order_{what}") for what in held}, held)

    publish(records=1, effects=1, retries=0)
    service.pause()
    publish(ready=0, unacked=1)
    service.kill()
    publish(ready=2, unacked=0)
    rig.servers.etcd.stop()
    publish(ready=3)
    rig.servers.etcd.start()
    rig.servers.rabbitmq.stop()
    rig.store.client.delete("/service/")
    shows(records=0)
    rig.servers.rabbitmq.start()
    publish(ready=4, dead_letters=0)
    park(rig.broker, ONE, reason="failed")
    shows(ready=4, dead_letters=1)
    gauges.send_signal(signal.SIGINT)
    _, err = gauges.communicate(timeout=20)
    said = [line.split(": ")[1:3] for line in err.splitlines()]
    assert (gauges.returncode, said[-1]) == (130, ["interrupted"])
    for server in ("etcd", "rabbitmq"):
        about = [line for line in said if line[-1] == server]
        assert about == [["not counted", server], ["counted again", server]], err


def test_published_events_are_processed_and_shown_and_their_service_is_removed(
    rig: Rig, command: Command
) -> None:
    port = free_port()
    service = rig.start("order", HEALTH_PORT=str(port))
    lines = "\n".join(json.dumps(event) for event in orders(2_500))
    ran = command.run("publish", "-", stdin=lines)
    assert (ran.code, ran.out) == (0, "2,500 events confirmed\n")
    assert command.json("publish", ONE, OTHER_BODY) == {"confirmed": 2}
    becomes(lambda: rig.statsd.count("orders_processed"), 2_501)
    becomes(lambda: rig.statsd.count("orders_conflicted"), 1)
    found = command.json("status", "--ready", f"http://127.0.0.1:{port}")
    row = found["services"]["order"]
    assert (row["ready"], row["consumers"], row["dead_letters"]) == (0, 1, 1)
    assert (row["records"], row["states"]["done"]) == (2_501, 2_501)
    assert (found["ready"][0]["ready"], found["ready"][0]["duplicates"]) == (True, None)
    assert [found["versions"][server].count(".") for server in ("rabbitmq", "etcd")] == [2, 2]
    refused = command.run("remove", "order", "--yes")
    assert (refused.code, "order is running" in refused.err) == (1, True)
    service.terminate()
    command.run("publish", ONE)
    idle = command.run("status", "order")
    assert (idle.code, "order has no consumer" in idle.out) == (1, True)
    ran = command.run("remove", "order", "--yes")
    assert ran.code == 0
    assert "order deleted, with 1 message\n" in ran.out
    assert not [name for name in rig.broker.queues() if name.startswith("order")]


def test_an_event_is_published_while_standard_input_stays_open(
    rig: Rig, command: Command, queues: str
) -> None:
    """If a log is piped into it, each event is published when it is written, not at the end."""
    running = command.start("publish", "-")
    assert running.stdin is not None
    running.stdin.write(ONE + "\n")
    running.stdin.flush()
    becomes(lambda: rig.broker.ready(queues), 1)
    assert running.poll() is None
    out, err = running.communicate(OTHER_BODY, timeout=30)
    assert (running.returncode, out, err) == (0, "2 events confirmed\n", "")
    assert [message.body.decode() for message in rig.broker.drain(queues)] == [ONE, OTHER_BODY]


def test_a_record_is_inspected_and_forgotten_and_the_event_is_new_again(
    rig: Rig, command: Command
) -> None:
    """A running replica, which had it in its cache, learns that from its watch."""
    service = rig.start("order")
    command.run("publish", ONE)
    becomes(lambda: rig.statsd.count("orders_processed"), 1)
    found = command.json("inspect", "order", "1")
    assert found["state"] == "done"
    assert found["replica"] == says(service, "starting")[0]["process"]
    assert 86_000 < found["remaining_s"] < 90_000
    command.run("publish", ONE)
    becomes(lambda: rig.statsd.count("orders_processed_skipped"), 1)
    becomes(lambda: len(rig.statsd.timers_ms("orders_duplicate_age")), 1)
    assert command.json("forget", "order", "1", "--yes")["forgotten"] is True
    assert command.json("inspect", "order", "1", code=1)["found"] is False

    def processed_again() -> None:
        command.run("publish", ONE)
        assert rig.statsd.count("orders_processed") == 2

    eventually(processed_again)
    assert [step for step in rig.store.steps("order")["1"] if step != "done"] == ["gone"]


def test_an_etcd_that_needs_a_login_gets_it(rig: Rig, command: Command) -> None:
    rig.store.client.put("/service/order/1", b"not ours")
    rig.servers.etcd.require_login()
    user, password = rig.servers.etcd.login or ("", "")
    try:
        inspect = partial(command.run, "inspect", "order", "1")
        none = inspect()
        wrong, right = (inspect(ETCD_USER=user, ETCD_PASSWORD=each) for each in ("no", password))
    finally:
        rig.servers.etcd.require_no_login()
    assert (none.code, "ETCD_USER and ETCD_PASSWORD say who asks" in none.err) == (1, True)
    assert (wrong.code, "authentication failed" in wrong.err) == (1, True)
    assert right.code == 0


# dead-letters


def test_a_failed_event_is_listed_shown_and_replayed_once_its_cause_is_gone(
    rig: Rig, command: Command, receiver: Receiver
) -> None:
    """It has all its retries again."""
    rig.start("notify", NOTIFY_URL=receiver.url, RETRY_DELAYS="1s")
    receiver.refuse("1", times=2)
    command.run("publish", ONE)
    becomes(lambda: rig.statsd.count("notifications_failed"), 1)
    found = command.json("dead-letters", "list", "notify", "--reason", "failed")
    (letter,) = found["letters"]
    assert (letter["id"], letter["attempts"], found["warning"]) == ("1", 2, None)
    assert 0 <= letter["age_s"] < 60
    assert "answered 500" in letter["error"]
    (shown,) = command.json("dead-letters", "show", "notify", "--id", "1")["letters"]
    assert shown["body"] == ONE
    assert command.json("dead-letters", "replay", "notify", "--id", "1")["replayed"] == 1
    becomes(lambda: rig.store.done("notify"), {"1"})
    rig.drained("notify", "notify.dead-letter", "notify.retry.1s")
    assert command.run("dead-letters", "replay", "notify", "--all").code == 1


def test_of_many_letters_those_that_may_be_are_replayed_and_the_others_stay_in_place(
    rig: Rig, command: Command, queues: str
) -> None:
    """Most of those without a record are young, and two are older than the window."""
    rig.store.client.put("/service/order/known", b"{}")
    bodies = [json.dumps(order(id_)) for id_ in ("old", "known", "old")]
    park(rig.broker, *bodies, reason="failed", parked_at="2020-01-01T00:00:00+00:00")
    now, young = "2999-01-01T00:00:00+00:00", orders(101, "young")
    park(rig.broker, *map(json.dumps, young), reason="failed", parked_at=now)
    park(rig.broker, json.dumps(order("other")), reason="conflict", parked_at=now)
    found = command.json("dead-letters", "replay", "order", "--all", code=1)
    assert found["replayed"] == 102
    assert [each["id"] for each in found["held"]] == ["old", "old", "other"]
    replayed = [json.loads(message.body)["id"] for message in rig.broker.drain(queues)]
    assert replayed == ["known", *(event["id"] for event in young)]
    assert ids(command) == ["old", "old", "other"]
    assert command.json("dead-letters", "replay", "order", "--all", "--force")["replayed"] == 3


def test_a_letter_stays_if_its_service_has_no_queue(
    rig: Rig, command: Command, queues: str
) -> None:
    park(rig.broker, ONE, reason="failed")
    rig.servers.rabbitmq.ctl("delete_queue", queues)
    ran = command.run("dead-letters", "replay", "order", "--all", "--force")
    assert (ran.code, "no queue takes what is sent" in ran.err) == (1, True)
    assert ids(command) == ["1"]


def test_looking_at_dead_letters_leaves_them_in_their_order_and_loses_none(
    rig: Rig, command: Command, queues: str
) -> None:
    """By default RabbitMQ drops a message that was returned 20 times."""
    park(rig.broker, *map(json.dumps, orders(3)), reason="failed")
    url, dead_letters = rig.servers.rabbitmq.url, f"{queues}.dead-letter"
    for _ in range(25):
        # The messages are returned a moment after their channel is closed.
        becomes(lambda: rig.broker.ready(dead_letters), 3)
        with closing(Rabbit([url])) as rabbit, hold(rabbit, dead_letters) as dead:
            assert len(list(dead)) == 3
    becomes(lambda: ids(command, "--limit", "1"), ["order-0"])
    becomes(lambda: ids(command), ["order-0", "order-1", "order-2"])


def test_of_many_letters_none_that_is_dropped_comes_back_and_the_others_stay(
    rig: Rig, command: Command, queues: str
) -> None:
    """RabbitMQ hands on acks 32 at a time, and forgets the last if their channel closes.

    A consumer without a prefetch gets at most 2,000 unacked messages of a quorum queue.
    """
    park(rig.broker, *["{", ONE] * 1_050, "{", reason="invalid")
    park(rig.broker, "{", reason="none of ours")
    drop = ("dead-letters", "drop", queues, "--reason", "invalid")
    asked = command.run(*drop, stdin="y\n")
    assert (asked.code, "say --yes" in asked.err) == (1, True)
    assert command.json(*drop, "--yes")["dropped"] == 2_101
    (left,) = rig.broker.drain("order.dead-letter")
    assert left.headers["x-reason"] == "none of ours"


def test_doctor_finds_nothing_where_all_is_well_and_then_each_fault(
    rig: Rig, command: Command
) -> None:
    def problems(**settings: Any) -> list[str]:
        findings = command.json("doctor", "order", code=1, **settings)["findings"]
        problems = (each for each in findings if each["level"] == "problem")
        return [f"{each['about']}: {each['what']}" for each in problems]

    for service in ("order", "notify"):
        rig.start(service)
    found = command.json("doctor")
    assert found["problems"] == 0
    ok = {each["about"]: each["what"] for each in found["findings"] if each["level"] == "ok"}
    assert ok["order"].startswith("etcd has its history")
    assert {"notify", "rabbitmq", "etcd"} <= set(ok)
    assert any("of its quota of 8.0 GiB" in each["what"] for each in found["findings"])
    assert sum("clock agrees" in each["what"] for each in found["findings"]) == 2

    policy = ("--apply-to", "queues", "loses", "^order$", '{"max-length":1000000}')
    rig.servers.rabbitmq.ctl("set_policy", *policy)
    try:
        loses = problems()
    finally:
        rig.servers.rabbitmq.ctl("clear_policy", "loses")
    assert loses == ["order: policy loses has max-length, which throws messages away"]
    for setting, value, fault in (
        ("RETRY_DELAYS", "1s,5m", "order.retry.5m: there is no such queue"),
        ("ETCD_MAX_TXN_OPS", "1025", "etcd: refuses a transaction of ETCD_MAX_TXN_OPS (1025)"),
        ("DEDUP_WINDOW", "1s", "settings: DEDUP_WINDOW is 1s"),
    ):
        (problem,) = problems(**{setting: value})
        assert problem.startswith(fault)

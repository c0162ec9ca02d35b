"""What etcd's and RabbitMQ's failures are taken for, and what people are told of them."""

from __future__ import annotations

import pika.exceptions as amqp
import pytest

from idempotent_consumer.amqp import explain, parameters_of
from idempotent_consumer.ledger.etcd import Failure, _classify
from idempotent_consumer.settings import SettingsError


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("etcdserver: requested lease not found", Failure.LEASE_NOT_FOUND),
        ("etcdserver: mvcc: required revision has been compacted", Failure.COMPACTED),
        ("etcdserver: invalid auth token", Failure.AUTHENTICATION),
        ("etcdserver: user name is empty", Failure.AUTHENTICATION),
        ("etcdserver: permission denied", Failure.AUTHENTICATION),
        ("etcdserver: authentication failed, invalid user ID or password", Failure.AUTHENTICATION),
        ("etcdserver: authentication is not enabled", Failure.AUTHENTICATION),
        ("etcdserver: mvcc: database space exceeded", Failure.UNKNOWN),
        ("etcdserver: request timed out, possibly due to previous leader failure", Failure.UNKNOWN),
        (
            "etcdserver: request timed out, waiting for the applied index took too long",
            Failure.UNKNOWN,
        ),
        ("etcdserver: leader changed", Failure.UNKNOWN),
        ("etcdserver: too many requests", Failure.UNKNOWN),
        ("etcdserver: duplicate key given in txn request", Failure.UNKNOWN),
        ("etcdserver: too many operations in txn request", Failure.UNKNOWN),
        ("etcdserver: request is too large", Failure.UNKNOWN),
        ("Deadline Exceeded", Failure.UNKNOWN),
        ("failed to connect to all addresses; last error:\n connection refused", Failure.UNKNOWN),
        ("", Failure.UNKNOWN),
    ],
)
def test_an_error_of_etcds_is_known_by_its_text_and_every_other_is_unknown(
    text: str, failure: Failure
) -> None:
    """None of them says that the request did not apply."""
    found, line = _classify(text)
    assert found is failure
    assert line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "Tls handshake failed: OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: unable",
            "ETCD_CA_CERT",
        ),
        ("UNAUTHENTICATED: Hostname Verification Check failed.", "ETCD_ENDPOINTS"),
        ("ipv4:127.0.0.1:2379: Unwrap failed (TSI_DATA_CORRUPTED)", "ETCD_CERT"),
        ("ipv4:127.0.0.1:2379: Socket closed", "ETCD_CA_CERT"),
        ("etcdserver: too many operations in txn request", "ETCD_MAX_TXN_OPS"),
    ],
)
def test_what_etcd_or_grpc_says_comes_with_the_setting_to_look_at(text: str, part: str) -> None:
    """The texts are those of real servers, in the integration tests."""
    failure, line = _classify(text)
    assert failure is Failure.UNKNOWN
    assert part in line.removesuffix(text)
    assert line.endswith(text)


class Workflow(Exception):
    """pika wraps the errors of its attempts in one of these."""

    def __init__(self, *inner: Exception) -> None:
        super().__init__("a workflow failed")
        self.exceptions = inner


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (
            amqp.ChannelClosedByBroker(
                406, "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit'"
            ),
            "delete",
        ),
        (amqp.ProbableAuthenticationError("closed"), "user or the password"),
        (amqp.ConnectionClosedByBroker(403, "ACCESS_REFUSED"), "user or the password"),
        (Workflow(Workflow(amqp.ProbableAuthenticationError("closed"))), "user or the password"),
        (Workflow(OSError(111, "Connection refused")), "Connection refused"),
        (
            amqp.ConnectionClosedByBroker(320, "CONNECTION_FORCED - by an operator"),
            "by an operator",
        ),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_failure_of_rabbitmqs_is_told_in_one_line(error: Exception, part: str) -> None:
    line = explain(error)
    assert part in line
    assert "\n" not in line
    assert len(line) <= 700


def test_a_url_gets_the_librarys_heartbeat_unless_it_names_one() -> None:
    assert parameters_of("amqp://h/", "test").heartbeat == 10
    assert parameters_of("amqp://h/?heartbeat=60", "test").heartbeat == 60


@pytest.mark.parametrize(
    "query",
    [
        "heartbeat=soon",
        "socket_timeout=-1",
        "channel_max=x",
        "ssl_options=[]",
        "ssl_options={",
        "tcp_options={'TCP_KEEPIDLE':'abc'}",
    ],
)
def test_an_option_that_pika_does_not_take_is_a_wrong_setting(query: str) -> None:
    """And the password does not stand in the message."""
    with pytest.raises(SettingsError, match=r"^RABBITMQ_URL") as raised:
        parameters_of(f"amqp://guest:hunter2@h/?{query}", "test")
    assert "hunter2" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_virtual_host_that_no_frame_can_hold_is_a_wrong_setting() -> None:
    assert parameters_of("amqp://h/" + "v" * 255, "test").virtual_host == "v" * 255
    with pytest.raises(SettingsError, match=r"^RABBITMQ_URL: its virtual host"):
        parameters_of("amqp://h/" + "v" * 256, "test")


def test_the_advice_to_delete_a_queue_is_given_for_its_arguments_alone() -> None:
    """A consumer's time-out has the same code, and the advice would cost its events."""
    late = "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out"
    other = "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'order'"
    assert "delete" not in explain(amqp.ChannelClosedByBroker(406, late))
    assert "delete" in explain(amqp.ChannelClosedByBroker(406, other))


def test_a_url_without_heartbeats_is_a_wrong_setting() -> None:
    """Nothing else tells that a broker is frozen."""
    with pytest.raises(SettingsError, match="heartbeats"):
        parameters_of("amqp://localhost/?heartbeat=0", "test")

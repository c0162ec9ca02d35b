"""What etcd's failures are taken for, and what people are told of them."""

from __future__ import annotations

import pytest

from idempotent_consumer.etcd import Failure, _classify


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

"""Keys in which no two ids meet, and the names that a service may have."""

from __future__ import annotations

import unicodedata
from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from idempotent_consumer import names

AWKWARD = {
    "plain": "123",
    "a slash": "a/b",
    "a trailing slash": "123/",
    "two trailing slashes": "123//",
    "a NUL": "123\0",
    "only a NUL": "\0",
    "a space": " ",
    "a newline": "123\n",
    "upper case": "ABC",
    "lower case": "abc",
    "composed": unicodedata.normalize("NFC", "é"),
    "decomposed": unicodedata.normalize("NFD", "é"),
    "the last code point": "\U0010ffff",
    "percent": "%2F",
    "looks hashed": "sha256:" + "0" * 64,
    "the start of what looks hashed": "sha256:",
    "nearly looks hashed": "sha256",
    "128 bytes": "x" * 128,
    "129 bytes": "x" * 129,
    "128 bytes in two-byte letters": "é" * 64,
    "129 characters less one byte": "é" * 64 + "x",
    "10 kB": "x" * 10_000,
    "10 kB and one": "x" * 10_001,
    "looks like a key": "/service/order/123",
}
AWKWARD["the encoding of a long id"] = names.encode_id(AWKWARD["10 kB"])
AWKWARD["the encoding of that"] = names.encode_id(AWKWARD["the encoding of a long id"])

IDS = st.text(min_size=1) | st.sampled_from(sorted(AWKWARD.values()))


def test_awkward_ids_never_meet() -> None:
    encoded = {name: names.encode_id(event_id) for name, event_id in AWKWARD.items()}
    for one, other in combinations(encoded, 2):
        assert encoded[one] != encoded[other], (one, other)


@given(IDS, IDS)
def test_two_ids_meet_only_if_they_are_equal(one: str, other: str) -> None:
    assert (names.encode_id(one) == names.encode_id(other)) == (one == other)


@given(IDS)
@example("x" * 200)
def test_an_id_never_meets_the_encoding_of_another(event_id: str) -> None:
    """Whoever uses an encoded id as an id is another producer with another event."""
    encoded = names.encode_id(event_id)
    if encoded != event_id:
        assert names.encode_id(encoded) != encoded


@given(st.text(min_size=1, max_size=600))
def test_a_key_is_bounded(event_id: str) -> None:
    assert len(names.encode_id(event_id).encode()) <= names.MAX_ID_BYTES


def test_short_ids_stand_in_the_key_as_they_are() -> None:
    """An operator reads `/service/order/123`."""
    assert names.record_prefix("order") + names.encode_id("123") == "/service/order/123"
    assert names.encode_id("ä/\0 \n") == "ä/\0 \n"


def test_a_long_id_is_its_hash() -> None:
    """A stored format: the same id must find its record after every upgrade."""
    assert names.encode_id("x" * 129) == (
        "sha256:0ec9eb33e74510bcdd1f2ea55206e82f21649c5c2becbf2b433eb475b34c01bd"
    )


def test_nothing_but_records_lies_under_a_services_prefix() -> None:
    assert not names.incarnation_key("order").startswith(names.record_prefix("order"))
    for key in (names.incarnation_key("order"), names.record_prefix("order")):
        assert key.startswith(names.RESERVED_PREFIXES)


def test_a_services_prefix_is_no_start_of_anothers() -> None:
    assert not names.record_prefix("order-eu").startswith(names.record_prefix("order"))


def test_queues_are_named_after_the_service() -> None:
    assert names.dead_letter_queue("order") == "order.dead-letter"
    assert names.retry_queue("order", "10s") == "order.retry.10s"


@pytest.mark.parametrize("name", ["order", "o", "order-2", "a" * 63])
def test_a_service_name_that_is_fine(name: str) -> None:
    assert names.check_service_name(name) == name


@pytest.mark.parametrize("name", ["", "Order", "2nd", "-a", "a.b", "a/b", "a b", "order\n", "ä",
                                  "a" * 64, "a_b"])
def test_a_service_name_that_would_spoil_keys_or_queues_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="service name"):
        names.check_service_name(name)

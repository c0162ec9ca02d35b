"""Keys in which no two ids meet, and the names that a service may have."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from hashlib import sha256
from itertools import combinations
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fakes.bodies import AWKWARD_IDS, IDS
from idempotent_consumer import names

LONG_ID = "x" * 10_000
AWKWARD = [*AWKWARD_IDS, names.encode_id(LONG_ID), names.encode_id(names.encode_id(LONG_ID))]

VARIANTS: dict[str, Callable[[str], str]] = {
    "composed": lambda text: unicodedata.normalize("NFC", text),
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "compatible": lambda text: unicodedata.normalize("NFKC", text),
    "in upper case": str.upper,
    "in lower case": str.lower,
    "case folded": str.casefold,
    "with a slash": lambda text: text + "/",
    "without its slashes": lambda text: text.strip("/"),
    "below another": lambda text: "a/../" + text,
    "without white space": str.strip,
    "with a NUL": lambda text: text + "\0",
    "up to a NUL": lambda text: text.partition("\0")[0],
    "in percents": quote,
    "out of percents": lambda text: unquote(text, errors="ignore"),
    "cut": lambda text: text.encode()[: names.MAX_ID_BYTES].decode(errors="ignore"),
    "longer by one": lambda text: text + "x",
    "filled up": lambda text: text.ljust(names.MAX_ID_BYTES, "x"),
    "filled over": lambda text: text.ljust(names.MAX_ID_BYTES + 1, "x"),
    "encoded": names.encode_id,
    "hashed": lambda text: "sha256:" + sha256(text.encode()).hexdigest(),
    "as a key": lambda text: names.record_prefix("order") + text,
    "of ASCII": lambda text: text.encode("ascii", "ignore").decode(),
}
"""What a careless writer of keys does to an id, or a producer who has seen a key."""


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@settings(max_examples=50, deadline=None)
@given(event_id=IDS)
def test_an_id_and_a_variant_of_it_meet_only_if_they_are_equal(
    variant: Callable[[str], str], event_id: str
) -> None:
    other = variant(event_id)
    assert (names.encode_id(event_id) == names.encode_id(other)) == (event_id == other)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_an_awkward_id_and_a_variant_of_it_meet_only_if_they_are_equal(
    variant: Callable[[str], str],
) -> None:
    for event_id in AWKWARD:
        other = variant(event_id)
        assert (names.encode_id(event_id) == names.encode_id(other)) == (event_id == other)


@given(IDS)
def test_an_id_stands_in_its_key_as_it_is_or_as_its_hash(event_id: str) -> None:
    """And the key under the service's prefix, whatever the id holds: etcd knows no directories."""
    prefix = names.record_prefix("order")
    key = (prefix + names.encode_id(event_id)).encode()
    last = key.removeprefix(prefix.encode())
    assert key.startswith(b"/service/order/")
    assert last
    hashed = b"sha256:" + sha256(event_id.encode()).hexdigest().encode()
    short = len(event_id.encode()) <= 128 and not event_id.startswith("sha256:")
    assert last == (event_id.encode() if short else hashed)


def test_awkward_ids_never_meet() -> None:
    assert len(set(AWKWARD)) == len(AWKWARD)
    for one, other in combinations(AWKWARD, 2):
        assert names.encode_id(one) != names.encode_id(other), (one, other)


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


@pytest.mark.parametrize(
    "name", ["", "Order", "2nd", "-a", "a.b", "a/b", "a b", "order\n", "ä", "a" * 64, "a_b"]
)
def test_a_service_name_that_would_spoil_keys_or_queues_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="service name"):
        names.check_service_name(name)

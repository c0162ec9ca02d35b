"""Keys in which no two ids meet, and the names that a service may have."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from hashlib import sha256
from itertools import combinations
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings

from fakes.bodies import IDS
from fakes.corpus import AWKWARD_IDS
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
    """Also where it is the encoding of another: whoever uses that as an id has another event."""
    for each in (event_id, *AWKWARD):
        other = variant(each)
        assert (names.encode_id(each) == names.encode_id(other)) == (each == other)


def test_awkward_ids_never_meet() -> None:
    for one, other in combinations(AWKWARD, 2):
        assert one != other
        assert names.encode_id(one) != names.encode_id(other), (one, other)


@given(IDS)
def test_an_id_stands_in_its_key_as_it_is_or_as_its_hash(event_id: str) -> None:
    """A stored format: after every upgrade an id must find its record, and an operator reads it.

    The key stands under the service's prefix whatever the id holds: etcd knows no directories.
    """
    for each in (event_id, LONG_ID):
        key = names.record_prefix("order").encode() + names.encode_id(each).encode()
        hashed = b"sha256:" + sha256(each.encode()).hexdigest().encode()
        short = len(each.encode()) <= 128 and not each.startswith("sha256:")
        assert key == b"/service/order/" + (each.encode() if short else hashed)


def test_nothing_but_records_lies_under_a_services_prefix() -> None:
    assert not names.incarnation_key("order").startswith(names.record_prefix("order"))
    for key in (names.incarnation_key("order"), names.record_prefix("order")):
        assert key.startswith(names.RESERVED_PREFIXES)
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

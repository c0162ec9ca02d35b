"""Unique keys for ids, and the names that a service may have."""

from hashlib import sha256

import pytest
from hypothesis import given

from fakes.bodies import IDS
from fakes.corpus import AWKWARD_IDS
from idempotent_consumer import names

HASHED = names.encode_id("x" * 10_000)
AWKWARD = [*AWKWARD_IDS, HASHED, names.encode_id(HASHED)]
"""An id that equals the encoding of another one is an id of its own."""


@given(IDS)
def test_a_key_has_its_id_or_the_hash_of_it(event_id: str) -> None:
    """So no two ids have the same key, and an id finds its record after every upgrade."""
    for each in (event_id, *AWKWARD):
        short = len(each.encode()) <= 128 and not each.startswith("sha256:")
        shown = each if short else "sha256:" + sha256(each.encode()).hexdigest()
        assert names.record_key("order", each) == f"/service/order/{shown}".encode()


def test_nothing_but_records_lies_under_a_services_prefix() -> None:
    assert not names.incarnation_key("order").startswith(names.record_prefix("order"))
    for key in (names.incarnation_key("order"), names.record_prefix("order")):
        assert key.startswith(names.RESERVED_PREFIXES)
    assert not names.record_prefix("order-eu").startswith(names.record_prefix("order"))


@pytest.mark.parametrize("name", ["order", "o", "order-2", "a" * 63])
def test_a_service_name_that_is_fine(name: str) -> None:
    assert names.check_service_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "Order", "2nd", "-a", "a.b", "a/b", "a b", "order\n", "ä", "a" * 64, "a_b"]
)
def test_a_service_name_that_would_spoil_keys_or_queues_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="service name"):
        names.check_service_name(name)

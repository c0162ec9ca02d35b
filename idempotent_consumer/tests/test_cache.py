"""The bounded memory of what is done."""

from __future__ import annotations

import random
from hashlib import sha256

import pytest

from idempotent_consumer.ledger.cache import Cache, fingerprint


def digest(number: int) -> str:
    return "1:" + sha256(str(number).encode()).hexdigest()[:32]


def test_what_was_added_is_held() -> None:
    cache = Cache()
    cache.add(digest(1))
    assert cache.holds(digest(1))
    assert not cache.holds(digest(2))


def test_a_digest_that_nobody_here_wrote_is_no_ones() -> None:
    cache = Cache()
    for foreign in ("unreadable", "", "1:", "1:" + "0" * 30, "2:" + "f" * 64):
        cache.add(foreign)
    assert not any(cache.holds("1:" + each * 32) for each in "0f")
    cache.add(digest(1))
    cache.discard_all([fingerprint("unreadable")])
    assert cache.holds(digest(1))


def test_what_stands_across_two_entries_is_none() -> None:
    """Entries lie side by side: the end of one and the beginning of the next look like a third."""
    first, second = "00" * 8 + "11" * 8, "22" * 8 + "33" * 8
    across = "1:" + first[16:] + second[:16]
    cache = Cache(4)
    cache.add("1:" + first)
    cache.add("1:" + second)
    assert not cache.holds(across)
    cache.discard_all([fingerprint(across)])
    assert cache.holds("1:" + first)
    assert cache.holds("1:" + second)
    cache = Cache(10)
    for each in ("1:" + first, "1:" + second, across):
        cache.add(each)
    assert len(cache) == 3
    assert cache.holds(across)


@pytest.mark.parametrize("seed", range(5))
def test_it_holds_what_a_set_holds(seed: int) -> None:
    chance, cache, model = random.Random(seed), Cache(100_000), set[bytes]()
    for _ in range(3_000):
        # Of few different bytes, so that one often stands across two others.
        entry = bytes(chance.choices(b"ab", k=4)) * 4
        if chance.random() < 0.3:
            cache.discard_all([entry])
            model.discard(entry)
        else:
            cache.add_all([entry])
            model.add(entry)
        assert cache.holds("1:" + entry.hex()) == (entry in model)
    assert len(cache) == len(model)
    assert all(cache.holds("1:" + entry.hex()) for entry in model)


def test_it_never_grows_past_its_bound_and_keeps_the_youngest() -> None:
    cache = Cache(100)
    for number in range(1000):
        cache.add(digest(number))
        assert len(cache) <= 100
        assert all(cache.holds(digest(n)) for n in range(max(0, number - 20), number + 1))
    assert not any(cache.holds(digest(n)) for n in range(700))
    assert len(cache) > 90


def test_an_import_of_more_than_its_bound_keeps_the_bound() -> None:
    cache = Cache(100)
    for start in range(0, 1000, 40):
        cache.add_all([fingerprint(digest(n)) for n in range(start, start + 40)])
    assert len(cache) <= 100


def test_half_its_bound_finds_room() -> None:
    """Blocks fill unevenly: a full one forgets while others have room, but hardly before that."""
    cache, bound = Cache(1 << 15), 1 << 15
    for number in range(bound // 2):
        cache.add(digest(number))
    forgotten = sum(not cache.holds(digest(number)) for number in range(bound // 2))
    assert forgotten < bound // 2 / 1000


def test_the_smallest_cache_still_works() -> None:
    cache = Cache(1)
    cache.add(digest(1))
    assert cache.holds(digest(1))
    cache.add(digest(2))
    assert not cache.holds(digest(1))


def test_what_etcd_deleted_is_forgotten() -> None:
    cache = Cache(4)
    for number in range(3):
        cache.add(digest(number))
    cache.discard_all([fingerprint(digest(0)), fingerprint(digest(2))])
    assert [cache.holds(digest(n)) for n in range(3)] == [False, True, False]


def test_forgetting_what_is_not_there_does_nothing() -> None:
    cache = Cache()
    cache.discard_all([fingerprint(digest(1))])
    assert len(cache) == 0


def test_a_cleared_cache_holds_nothing() -> None:
    cache = Cache(4)
    for number in range(3):
        cache.add(digest(number))
    cache.clear()
    assert not any(cache.holds(digest(n)) for n in range(3))
    assert len(cache) == 0

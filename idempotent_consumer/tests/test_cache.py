"""The bounded memory of what is done."""

from __future__ import annotations

from idempotent_consumer.ledger.cache import Cache, fingerprint


def digest(number: int) -> str:
    return f"1:{number:032x}"


def test_what_was_added_is_held() -> None:
    cache = Cache()
    cache.add(digest(1))
    assert cache.holds(digest(1))
    assert not cache.holds(digest(2))


def test_a_digest_that_nobody_here_wrote_is_no_ones() -> None:
    cache = Cache()
    cache.add("unreadable")
    assert not cache.holds(digest(1))


def test_it_never_grows_past_its_bound_and_keeps_the_younger_half() -> None:
    cache = Cache(100)
    for number in range(1000):
        cache.add(digest(number))
        assert len(cache) <= 100
        assert all(cache.holds(digest(n)) for n in range(max(0, number - 48), number + 1))
    assert not cache.holds(digest(0))


def test_an_import_larger_than_a_generation_keeps_the_bound_in_pages() -> None:
    cache = Cache(100)
    for start in range(0, 1000, 40):
        cache.add_all([fingerprint(digest(n)) for n in range(start, start + 40)])
    assert len(cache) <= 100 + 40


def test_the_smallest_cache_still_works() -> None:
    cache = Cache(1)
    cache.add(digest(1))
    assert cache.holds(digest(1))
    cache.add(digest(2))
    assert not cache.holds(digest(1))


def test_what_etcd_deleted_is_forgotten_in_both_generations() -> None:
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

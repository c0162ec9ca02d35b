"""The bounded memory of what is done."""

from __future__ import annotations

from idempotent_consumer.ledger.cache import Cache, fingerprint

DIGEST, OTHER = "1:" + "a" * 32, "1:" + "b" * 32


def key(number: int) -> bytes:
    return b"/service/order/%d" % number


def test_what_was_added_is_held() -> None:
    cache = Cache()
    cache.add(key(1), DIGEST)
    assert cache.holds(key(1), DIGEST)
    assert not cache.holds(key(2), DIGEST)


def test_the_same_id_with_another_body_is_no_hit() -> None:
    cache = Cache()
    cache.add(key(1), DIGEST)
    assert not cache.holds(key(1), OTHER)


def test_it_never_grows_past_its_bound_and_keeps_the_younger_half() -> None:
    cache = Cache(100)
    for number in range(1000):
        cache.add(key(number), DIGEST)
        assert len(cache) <= 100
        assert all(cache.holds(key(n), DIGEST) for n in range(max(0, number - 48), number + 1))
    assert not cache.holds(key(0), DIGEST)


def test_an_import_larger_than_a_generation_keeps_the_bound_in_pages() -> None:
    cache = Cache(100)
    for start in range(0, 1000, 40):
        cache.add_all([fingerprint(key(n), DIGEST) for n in range(start, start + 40)])
    assert len(cache) <= 100 + 40


def test_the_smallest_cache_still_works() -> None:
    cache = Cache(1)
    cache.add(key(1), DIGEST)
    assert cache.holds(key(1), DIGEST)
    cache.add(key(2), DIGEST)
    assert not cache.holds(key(1), DIGEST)


def test_what_etcd_deleted_is_forgotten_in_both_generations() -> None:
    cache = Cache(4)
    for number in range(3):
        cache.add(key(number), DIGEST)
    cache.discard_all([fingerprint(key(0), DIGEST), fingerprint(key(2), DIGEST)])
    assert [cache.holds(key(n), DIGEST) for n in range(3)] == [False, True, False]


def test_forgetting_what_is_not_there_does_nothing() -> None:
    cache = Cache()
    cache.discard_all([fingerprint(key(1), DIGEST)])
    assert len(cache) == 0


def test_a_cleared_cache_holds_nothing() -> None:
    cache = Cache(4)
    for number in range(3):
        cache.add(key(number), DIGEST)
    cache.clear()
    assert not any(cache.holds(key(n), DIGEST) for n in range(3))
    assert len(cache) == 0

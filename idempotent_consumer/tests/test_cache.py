"""The bounded cache of done records: its entries, its import, and the watch on deletions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from etcd3.etcdrpc import LeaseGrantRequest
from structlog.testing import LogCapture

from fakes.ledger import digest_of, system_of
from idempotent_consumer.cache import IMPORT_AFTER_S, PAGE_RECORDS, Cache, Follower
from idempotent_consumer.etcd import Client
from idempotent_consumer.records import encode
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing import etcd
from idempotent_consumer.testing.etcd import Call, Fate
from idempotent_consumer.testing.loop import Loop
from idempotent_consumer.testing.process import captured


def digest(number: int) -> str:
    return digest_of(str(number))


def test_a_digest_in_another_format_belongs_to_no_event() -> None:
    cache = Cache()
    for foreign in ("unreadable", "", "1:", "1:" + "0" * 30, "2:" + "f" * 64):
        cache.add(foreign)
    assert not any(cache.holds("1:" + each * 32) for each in "0f")
    cache.add(digest(1))
    cache.discard_all(["unreadable"])
    assert cache.holds(digest(1))


@pytest.mark.parametrize("seed", range(5))
def test_it_holds_what_a_set_holds(seed: int) -> None:
    chance, cache, model = random.Random(seed), Cache(100_000), set[str]()
    for _ in range(3_000):
        # Made of few different bytes, so that one is often found across two others.
        entry = "1:" + (bytes(chance.choices(b"ab", k=4)) * 4).hex()
        if chance.random() < 0.3:
            cache.discard_all([entry])
            model.discard(entry)
        else:
            cache.add(entry)
            model.add(entry)
        assert cache.holds(entry) == (entry in model)
    assert len(cache) == len(model)
    assert all(map(cache.holds, model))
    cache.clear()
    assert len(cache) == 0
    assert not any(map(cache.holds, model))


@pytest.mark.parametrize(("bound", "youngest"), [(1, 1), (100, 20)])
def test_it_keeps_to_its_bound_and_keeps_the_youngest(bound: int, youngest: int) -> None:
    cache = Cache(bound)
    for number in range(1000):
        cache.add(digest(number))
        assert len(cache) <= bound
        first = max(0, number + 1 - youngest)
        assert all(cache.holds(digest(n)) for n in range(first, number + 1))
    assert not any(cache.holds(digest(n)) for n in range(700))
    assert len(cache) > 0.9 * bound


def test_half_its_bound_fits() -> None:
    """Blocks fill unevenly, so a full one forgets entries while others have room."""
    cache, bound = Cache(1 << 15), 1 << 15
    for number in range(bound // 2):
        cache.add(digest(number))
    forgotten = sum(not cache.holds(digest(number)) for number in range(bound // 2))
    assert forgotten < bound // 2 / 1000


# The import of every record at one revision, then the watch on deletions.

PREFIX = "/service/order/"
SETTINGS = Settings(enable_etcd=True)
REPLY_TOO_LARGE = Fate(None, error=etcd.TOO_LARGE)


class Breaking(etcd.FakeEtcd):
    """An etcd whose next ``breaks`` watches break after ``replies`` replies each."""

    breaks = replies = 0

    def watch(self, watch: Any) -> None:
        if self.breaks:
            self.breaks -= 1
            deliver, left = watch.deliver, iter(range(self.replies))
            watch.deliver = lambda reply: deliver(
                etcd.CLOSED if next(left, None) is None else reply
            )
        super().watch(watch)


class Following:
    """A cache that follows an etcd in memory."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.store = etcd.Store(self.loop.time)
        self.etcd = Breaking(self.loop.agenda, self.store)
        self.cache, self.lines = Cache(), LogCapture()
        self.task: Any = None

    def record(self, *ids: str, state: str = "done", lease: int = 0) -> None:
        for each in ids:
            self.store.put(PREFIX + each, encode(state, digest_of(each), "t", "now"), lease)

    def under_one_lease(self, *ids: str) -> int:
        """Record under a new lease and return it. When it ends, all go in one revision."""
        lease = int(self.store.apply("LeaseGrant", LeaseGrantRequest(TTL=1_000_000)).ID)
        self.record(*ids, lease=lease)
        return lease

    def stuck(self) -> list[Any]:
        """Return the warnings of a watch that makes no progress."""
        return [line for line in self.lines.entries if "no progress" in line["event"]]

    def begin(self, revision: int = 0, settings: Settings = SETTINGS) -> None:
        system = system_of(self.etcd)
        client = Client(settings, system)
        follower = Follower(self.cache, PREFIX.encode(), client, system, captured(self.lines))
        self.task = self.loop.create_task(follower.run(revision))
        self.loop.run_until_idle()

    def start(self, revision: int = 0) -> Any:
        """Import, and return the request of the watch that follows."""
        self.begin(revision)
        return self.wait()

    def wait(self) -> Any:
        """Let time pass until there is a watch that does not break, and return its request."""
        for _ in range(1000):
            self.loop.advance(0.1)
            if not (self.etcd.breaks or all(watch.ended for watch in self.store.watches)):
                return self.watch
        raise AssertionError("there is none")

    def reconnect(self) -> Any:
        """End the watch, and return the request of the next one."""
        self.store.end_watches()
        return self.wait()

    def break_watches(self, times: int, replies: int = 0) -> None:
        """End the watch, and break the next ones after this many replies each."""
        self.etcd.breaks, self.etcd.replies = times, replies
        self.store.end_watches()

    @property
    def pages(self) -> list[Call]:
        return [call for call in self.etcd.calls if call.method == "Range"]

    @property
    def watch(self) -> Any:
        return self.etcd.sent("Watch")[-1].create_request

    def holds(self, event_id: str) -> bool:
        return self.cache.holds(digest_of(event_id))


@pytest.fixture
def following() -> Following:
    return Following()


def random_ids(chance: random.Random, number: int) -> set[str]:
    """Draw ids of every kind: sequential, random, with common prefixes, short and long."""
    kinds = [
        lambda: str(chance.randrange(20_000)),
        lambda: f"{chance.randrange(10**9):010}",
        lambda: f"{chance.getrandbits(128):032x}",
        lambda: "sha256:" + f"{chance.getrandbits(256):064x}",
        lambda: "a" * chance.randrange(1, 128) + str(chance.randrange(100)),
        lambda: "".join(chance.choice("\0\1/~\x7f") for _ in range(chance.randrange(1, 12))),
        lambda: "x" * 127 + chance.choice("abc\0\x7f"),
    ]
    chosen = chance.sample(kinds, chance.randrange(1, len(kinds)))
    return {chance.choice(chosen)() for _ in range(number)}


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_ids_each_record_is_imported_once(following: Following, seed: int) -> None:
    chance = random.Random(seed)
    ids = random_ids(chance, chance.choice([100, 7_000, 13_000]))
    following.record(*ids)
    for other in ("/service/orde", "/service/order0/1", "/service/orders/1"):
        following.store.put(other, b"")
    following.start()
    seen = Counter(kv.key for page in following.pages for kv in page.outcome.kvs)
    assert set(seen) == {(PREFIX + each).encode() for each in ids}
    assert set(seen.values()) == {1}
    assert all(following.holds(each) for each in ids)
    assert len(following.pages) < 2_000


def test_sequential_ids_take_about_as_many_pages_as_they_fill(following: Following) -> None:
    """And etcd does not walk all the rest of the records for each page."""
    following.record(*(f"{number:08}" for number in range(5 * PAGE_RECORDS)))
    following.start()
    assert 5 <= len(following.pages) < 60
    walked = sum(page.outcome.count for page in following.pages)
    assert walked < 2 * 5 * PAGE_RECORDS


def test_a_cache_that_is_full_ends_the_import(following: Following) -> None:
    """The rest is not read. The watch starts at the same revision all the same."""
    following.cache = Cache(PAGE_RECORDS)
    following.record(*(f"{number:08}" for number in range(4 * PAGE_RECORDS)))
    watch = following.start()
    assert len(following.pages) <= 4
    assert len(following.cache) <= PAGE_RECORDS
    assert watch.start_revision == following.store.revision + 1
    (line,) = (line for line in following.lines.entries if "records" in line)
    assert line["records"] < line["of"] == 4 * PAGE_RECORDS


def test_all_pages_are_of_one_revision_and_the_watch_starts_after_it(following: Following) -> None:
    """What is written meanwhile is in none of the pages."""
    following.record(*map(str, range(2 * PAGE_RECORDS + 100)))
    revision = following.store.revision

    def write_before_each_but_the_first(_: Call) -> Fate:
        if len(following.pages) > 1:
            following.record(f"0-late-{len(following.pages)}")
        return etcd.FINE

    following.etcd.fate = write_before_each_but_the_first
    watch = following.start()
    assert len(following.pages) > 2
    assert {page.request.revision for page in following.pages[1:]} == {revision}
    assert not any(b"late" in kv.key for page in following.pages for kv in page.outcome.kvs)
    assert watch.start_revision == revision + 1


def test_only_what_is_done_at_its_revision_is_imported(following: Following) -> None:
    """What this process has recorded since then, it has added to the cache itself."""
    following.record("done")
    following.record("claimed", state="claimed")
    following.record("released", state="released")
    following.store.put(PREFIX + "foreign", b"an operator's")
    revision = following.store.revision
    following.record("later")
    following.cache.add(digest_of("its own"))
    watch = following.start(revision)
    ids = ("done", "claimed", "released", "foreign", "later", "its own")
    assert {each for each in ids if following.holds(each)} == {"done", "its own"}
    assert watch.start_revision == revision + 1


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("not deleted", True),
        ("deleted", True),
        ("deleted unwatched", True),
        # The watch cannot tell what was deleted, so the cache is cleared.
        ("deleted unwatched, compacted", False),
        # The watch has missed deletions, so everything is imported again.
        ("deleted unwatched, compacted after another", True),
    ],
)
def test_what_is_deleted_is_new_again(following: Following, how: str, kept: bool) -> None:
    """A reply from before the deletion is not remembered.

    Otherwise the event would be acked as a duplicate of a record that is not there.
    """
    following.record("1", "other")
    read_at = following.store.revision
    following.start()
    if "unwatched" in how:
        following.store.end_watches()
    if how != "not deleted":
        following.store.delete(PREFIX + "1")
    if "another" in how:
        following.record("later")
    if "compacted" in how:
        following.store.compact()
    following.wait()
    held = [following.holds(each) for each in ("1", "other", "later")]
    assert held == [how == "not deleted", kept, "another" in how]
    assert len(following.pages) == 1 + ("another" in how)
    assert following.stuck() == []
    following.cache.add(digest_of("1"), read_at)
    assert following.holds("1") == (how == "not deleted")
    following.cache.add(digest_of("1"), following.store.revision)
    assert following.holds("1")
    watched_to = following.store.revision
    following.store.put("/elsewhere", b"")
    assert following.reconnect().start_revision == watched_to + 1


@pytest.mark.parametrize("progress", [True, False])
def test_after_progress_the_next_watch_starts_later(following: Following, progress: bool) -> None:
    """But not after the reply that says that a watch was created."""
    first = following.start().start_revision
    following.store.put("/elsewhere", b"")
    if progress:
        following.store.progress()
        following.loop.run_until_idle()
    following.reconnect()
    expected = following.store.revision + 1 if progress else first
    assert following.reconnect().start_revision == expected


def test_an_import_that_fails_in_the_middle_starts_again(following: Following) -> None:
    """Nothing is held that the first attempt has seen and that was deleted before the second."""
    ids = [f"{number:08}" for number in range(PAGE_RECORDS + 10)]
    following.record(*ids)
    held: list[int] = []

    def fail_the_second_page(_: Call) -> Fate:
        held.append(len(following.cache))
        if len(following.pages) != 2:
            return etcd.FINE
        following.store.delete(PREFIX + ids[0])
        following.store.compact()
        return etcd.REQUEST_LOST

    following.etcd.fate = fail_the_second_page
    following.start(following.store.revision)
    assert len(following.pages) > 3
    assert held[:3] == [0, PAGE_RECORDS, 0]
    assert [each for each in ids if not following.holds(each)] == ids[:1]


def test_an_import_whose_first_page_takes_long_is_not_repeated(following: Following) -> None:
    """As with tens of millions of keys. With two members, other calls have even less time."""
    following.record("a")
    following.etcd.fate = lambda call: Fate(0.0, 30.0) if call.method == "Range" else etcd.FINE
    following.begin(settings=replace(SETTINGS, etcd_endpoints=(("a", 2379), ("b", 2379))))
    assert following.pages == [], "what is in the queue is recorded first"
    following.loop.advance(IMPORT_AFTER_S + 31.0)
    assert following.holds("a")
    assert len(following.pages) == 1


# A revision with more deletions than fit into one reply.

MANY = [f"{number:02}" for number in range(10)]


def test_a_watch_that_breaks_between_fragments_resumes_at_their_revision(
    following: Following,
) -> None:
    """The rest of that revision has not come yet."""
    lease = following.under_one_lease(*MANY)
    following.record("before")
    following.start()
    following.store.events_a_reply = 3
    following.break_watches(1, replies=3)
    following.store.delete(PREFIX + "before")
    following.store.revoke(lease)
    assert following.wait().start_revision == following.store.revision
    assert len(following.cache) == 0
    assert following.reconnect().start_revision == following.store.revision + 1


@pytest.mark.parametrize("replies", [1, 2], ids=["once open", "after a fragment"])
def test_a_watch_that_keeps_failing_at_one_revision_is_given_up(
    following: Following, replies: int
) -> None:
    """Otherwise a deletion that it cannot deliver would never reach the cache."""
    lease = following.under_one_lease("0", "1")
    following.record("2")
    following.start()
    following.store.events_a_reply = 1
    following.break_watches(5, replies)
    following.store.revoke(lease)
    following.record("3")
    assert following.wait().start_revision == following.store.revision + 1
    assert [following.holds(each) for each in "0123"] == [False, False, True, True]
    (line,) = following.stuck()
    assert line["log_level"] == "warning"


def nothing_happens(following: Following) -> None:
    for _ in range(10):
        following.store.progress()
        following.reconnect()
    assert len(following.etcd.sent("Watch")) == 11


def fails_now_and_then(following: Following) -> None:
    """In between it delivers deletions, or is open for long enough to do so."""
    for each in MANY[:8]:
        following.break_watches(3, replies=1)
        following.store.delete(PREFIX + each)
        following.wait()
    for _ in range(8):
        following.loop.advance(60)
        following.reconnect()


def is_away_for_long(following: Following) -> None:
    following.break_watches(10_000)
    following.loop.advance(1000)
    assert 100 < 10_000 - following.etcd.breaks < 1_000, "it is tried again with pauses"
    following.etcd.breaks = 0
    following.wait()


@pytest.mark.parametrize("happens", [nothing_happens, fails_now_and_then, is_away_for_long])
def test_a_watch_that_makes_progress_is_not_given_up(
    following: Following, happens: Callable[[Following], None]
) -> None:
    following.record("kept", *MANY)
    following.start()
    happens(following)
    assert following.stuck() == []
    assert len(following.pages) == 1
    assert following.holds("kept")


def test_what_is_deleted_before_a_second_import_is_new_again(following: Following) -> None:
    """Nothing was watched between the two imports."""
    following.record("1", "2")
    following.start()
    following.store.end_watches()
    following.store.delete(PREFIX + "2")
    following.record("3")
    following.store.compact()
    read_at, held = following.store.revision, list[bool]()

    def delete_what_is_held(call: Call) -> Fate:
        if call.method == "Range":
            held.append(following.holds("2"))
            following.cache.add(digest_of("1"), read_at)
            following.store.delete(PREFIX + "1")
        return etcd.FINE

    following.etcd.fate = delete_what_is_held
    following.wait()
    assert len(following.pages) > 1
    assert not any(held), "nor during the second import"
    assert not following.holds("1")
    following.cache.add(digest_of("1"), read_at)
    assert not following.holds("1")


# A page that is too large for gRPC.


def test_a_page_that_is_too_large_is_read_in_smaller_ones(following: Following) -> None:
    ids = [f"{number:04}" for number in range(1000)]
    following.record(*ids)
    following.etcd.fate = lambda call: etcd.FINE if fits(call) else REPLY_TOO_LARGE

    def fits(call: Call) -> bool:
        return call.method != "Range" or len(following.store.apply("Range", call.request).kvs) <= 99

    following.start()
    assert all(following.holds(each) for each in ids)
    seen = Counter(kv.key for page in following.pages if fits(page) for kv in page.outcome.kvs)
    assert len(seen) == 1000
    assert set(seen.values()) == {1}
    assert sum(not fits(page) for page in following.pages) == 2

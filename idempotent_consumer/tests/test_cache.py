"""The bounded cache of what is done: its entries, its import, and the watch on deletions."""

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


def test_a_digest_that_nobody_here_wrote_is_no_ones() -> None:
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
        # Of few different bytes, so that one often stands across two others.
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
def test_it_never_grows_past_its_bound_and_keeps_the_youngest(bound: int, youngest: int) -> None:
    cache = Cache(bound)
    for number in range(1000):
        cache.add(digest(number))
        assert len(cache) <= bound
        first = max(0, number + 1 - youngest)
        assert all(cache.holds(digest(n)) for n in range(first, number + 1))
    assert not any(cache.holds(digest(n)) for n in range(700))
    assert len(cache) > 0.9 * bound


def test_half_its_bound_finds_room() -> None:
    """Blocks fill unevenly: a full one forgets while others have room, but hardly before that."""
    cache, bound = Cache(1 << 15), 1 << 15
    for number in range(bound // 2):
        cache.add(digest(number))
    forgotten = sum(not cache.holds(digest(number)) for number in range(bound // 2))
    assert forgotten < bound // 2 / 1000


# The import: every record once, at one revision; then the deletions.

PREFIX = "/service/order/"
LONGER_THAN_ANY_BACKOFF_S = 10.0
SETTINGS = Settings(enable_etcd=True)
REPLY_TOO_LARGE = Fate(None, error=etcd.TOO_LARGE)


class Breaking(etcd.FakeEtcd):
    """An etcd whose next ``breaks`` watches break after so many replies."""

    breaks = replies = 0

    def watch(self, watch: Any) -> None:
        """Open a watch, one that breaks where that is due."""
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
        """Record under a lease of their own, and return it: its end is one revision."""
        lease = self.store.apply("LeaseGrant", LeaseGrantRequest(TTL=1_000_000)).ID
        self.record(*ids, lease=lease)
        return int(lease)

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
        """Import, and return the watch that follows."""
        self.begin(revision)
        self.loop.advance(IMPORT_AFTER_S + LONGER_THAN_ANY_BACKOFF_S)
        return self.watch

    def reconnect(self) -> Any:
        """End the watch, and return the next one."""
        self.etcd.store.end_watches()
        self.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
        return self.watch

    def until_watched(self) -> None:
        """Let pass what it takes until there is a watch that does not break."""
        for _ in range(1000):
            if not (self.etcd.breaks or all(watch.ended for watch in self.store.watches)):
                return
            self.loop.advance(0.1)
        raise AssertionError("there is none")

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
    """Ids of every make: sequential, random, with common beginnings, short and long."""
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
    """Not one range that etcd walks to its end for each page."""
    following.record(*(f"{number:08}" for number in range(5 * PAGE_RECORDS)))
    following.start()
    assert 5 <= len(following.pages) < 60
    walked = sum(page.outcome.count for page in following.pages)
    assert walked < 2 * 5 * PAGE_RECORDS


def test_a_cache_that_is_full_ends_the_import(following: Following) -> None:
    """What is left out is not read; the deletions of all are watched from the same revision."""
    following.cache = Cache(PAGE_RECORDS)
    following.record(*(f"{number:08}" for number in range(4 * PAGE_RECORDS)))
    watch = following.start()
    assert len(following.pages) <= 4
    assert len(following.cache) <= PAGE_RECORDS
    assert watch.start_revision == following.store.revision + 1
    (line,) = (line for line in following.lines.entries if "records" in line)
    assert line["records"] < line["of"] == 4 * PAGE_RECORDS


def test_all_pages_are_of_one_revision_and_the_watch_begins_after_it(following: Following) -> None:
    """What is written meanwhile is in none of them."""
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
    """What the process that starts it has recorded since, it has put in the cache by itself."""
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
        # What it deleted cannot be told, and so not found in the cache: everything is cleared.
        ("deleted unwatched, compacted", False),
        # Deletions have been missed, so nothing held may be trusted: all is imported again.
        ("deleted unwatched, compacted behind another", True),
    ],
)
def test_what_is_deleted_is_new_again(following: Following, how: str, kept: bool) -> None:
    """An answer that the deletion has overtaken is not remembered: nobody would tell of it again.

    The event would be acked as a duplicate of what is not there.
    """
    following.record("1", "other")
    read_at = following.store.revision
    following.start()
    if "unwatched" in how:
        following.etcd.store.end_watches()
    if how != "not deleted":
        following.store.delete(PREFIX + "1")
    if "another" in how:
        following.record("later")
    if "compacted" in how:
        following.store.compact()
    following.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
    held = [following.holds(each) for each in ("1", "other", "later")]
    assert held == [how == "not deleted", kept, "another" in how]
    assert len(following.pages) == 1 + ("another" in how)
    following.cache.add(digest_of("1"), read_at)
    assert following.holds("1") == (how == "not deleted")
    following.cache.add(digest_of("1"), following.store.revision)
    assert following.holds("1")
    watched_to = following.store.revision
    following.store.put("/elsewhere", b"")
    assert following.reconnect().start_revision == watched_to + 1


@pytest.mark.parametrize("told", [True, False])
def test_progress_moves_the_watchs_beginning(following: Following, told: bool) -> None:
    """The reply that says that it was created does not."""
    first = following.start().start_revision
    for _ in range(100):
        following.store.put("/elsewhere", b"")
    if told:
        following.store.progress()
        following.loop.run_until_idle()
    following.reconnect()
    expected = following.store.revision + 1 if told else first
    assert following.reconnect().start_revision == expected


def test_an_import_that_fails_in_the_middle_begins_again(following: Following) -> None:
    """Of what its first attempt saw, nothing is held that was deleted before the second."""
    ids = [f"{number:08}" for number in range(PAGE_RECORDS + 10)]
    following.record(*ids)
    held: list[int] = []

    def fail_the_second_page(_: Call) -> Fate:
        held.append(len(following.cache))
        if len(following.pages) != 2:
            return etcd.FINE
        following.store.delete(PREFIX + ids[0])
        return etcd.REQUEST_LOST

    following.etcd.fate = fail_the_second_page
    following.start()
    assert len(following.pages) > 3
    assert held[:3] == [0, PAGE_RECORDS, 0]
    assert [each for each in ids if not following.holds(each)] == ids[:1]


def test_an_import_whose_first_page_takes_long_is_not_begun_again(following: Following) -> None:
    """Tens of millions of keys have to be walked; with two members a call has less time."""
    following.record("a")
    following.etcd.fate = lambda call: Fate(0.0, 30.0) if call.method == "Range" else etcd.FINE
    following.begin(settings=replace(SETTINGS, etcd_endpoints=(("a", 2379), ("b", 2379))))
    assert following.pages == [], "what waits in the queue goes first"
    following.loop.advance(IMPORT_AFTER_S + 31.0)
    assert following.holds("a")
    assert len(following.pages) == 1


# A revision with more deletions than one reply has room for.

MANY = [f"{number:02}" for number in range(10)]


def test_a_watch_that_breaks_between_fragments_resumes_there(following: Following) -> None:
    """The rest of that revision has not come yet: past it, it never would."""
    lease = following.under_one_lease(*MANY)
    following.record("before")
    following.start()
    following.store.events_a_reply = 3
    following.etcd.breaks, following.etcd.replies = 1, 3
    following.etcd.store.end_watches()
    following.store.delete(PREFIX + "before")
    following.store.revoke(lease)
    revision = following.store.revision
    following.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
    assert following.watch.start_revision == revision
    assert len(following.cache) == 0
    assert following.reconnect().start_revision == revision + 1


@pytest.mark.parametrize("replies", [1, 2], ids=["once open", "behind a fragment"])
def test_a_watch_that_keeps_failing_at_one_revision_is_given_up(
    following: Following, replies: int
) -> None:
    """What it cannot tell has been deleted would be acked from the cache without a record."""
    lease = following.under_one_lease("0", "1")
    following.record("2")
    following.start()
    following.store.events_a_reply = 1
    following.etcd.breaks, following.etcd.replies = 5, replies
    following.etcd.store.end_watches()
    following.store.revoke(lease)
    following.record("3")
    following.loop.advance(5 * LONGER_THAN_ANY_BACKOFF_S)
    assert [following.holds(each) for each in "0123"] == [False, False, True, True]
    assert following.watch.start_revision == following.store.revision + 1
    (line,) = following.stuck()
    assert line["log_level"] == "warning"


def nothing_happens(following: Following) -> None:
    for _ in range(10):
        following.store.progress()
        following.reconnect()
    assert len(following.etcd.sent("Watch")) == 11


def fails_now_and_then(following: Following) -> None:
    """It has told of what was deleted in between, or would have had the time to."""
    for each in MANY[:8]:
        following.etcd.breaks, following.etcd.replies = 3, 1
        following.etcd.store.end_watches()
        following.store.delete(PREFIX + each)
        following.until_watched()
    for _ in range(8):
        following.loop.advance(60)
        following.reconnect()


def is_away_for_long(following: Following) -> None:
    following.etcd.breaks, following.etcd.replies = 10_000, 0
    following.etcd.store.end_watches()
    following.loop.advance(100 * LONGER_THAN_ANY_BACKOFF_S)
    assert 100 < 10_000 - following.etcd.breaks < 1_000, "it is tried again with pauses"
    following.etcd.breaks = 0
    following.until_watched()


@pytest.mark.parametrize("happens", [nothing_happens, fails_now_and_then, is_away_for_long])
def test_a_watch_that_gets_further_stays(
    following: Following, happens: Callable[[Following], None]
) -> None:
    following.record("kept", *MANY)
    following.start()
    happens(following)
    assert following.stuck() == []
    assert len(following.pages) == 1
    assert following.holds("kept")


def test_what_went_before_a_second_import_is_not_held(following: Following) -> None:
    """Its deletion was between the two, when nothing was watched."""
    following.record("1", "2")
    following.start()
    following.etcd.breaks, following.etcd.replies = 100, 0
    following.etcd.store.end_watches()
    following.store.delete(PREFIX + "2")
    following.record("3")
    following.store.compact()
    following.etcd.breaks = 0
    read_at, held = following.store.revision, list[bool]()

    def delete_what_is_held(call: Call) -> Fate:
        if call.method == "Range":
            held.append(following.holds("2"))
            following.cache.add(digest_of("1"), read_at)
            following.store.delete(PREFIX + "1")
        return etcd.FINE

    following.etcd.fate = delete_what_is_held
    following.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
    assert len(following.pages) > 1
    assert not any(held), "nor until then"
    assert not following.holds("1")
    following.cache.add(digest_of("1"), read_at)
    assert not following.holds("1")


# A page that is larger than gRPC receives.


def test_pages_that_are_too_large_are_asked_for_in_smaller_ones(following: Following) -> None:
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

"""The bounded cache of what is done: its entries, its import, and the watch on deletions."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from etcd3.etcdrpc import LeaseGrantRequest, WatchResponse, kv_pb2
from structlog.testing import LogCapture

from fakes.ledger import digest_of, system_of
from idempotent_consumer.cache import IMPORT_AFTER_S, PAGE_RECORDS, Cache, Follower
from idempotent_consumer.etcd import Client
from idempotent_consumer.records import encode
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.etcd import (
    CLOSED,
    FINE,
    REQUEST_LOST,
    TOO_LARGE,
    Call,
    FakeEtcd,
    Fate,
    Store,
)
from idempotent_consumer.testing.loop import Loop
from idempotent_consumer.testing.process import captured


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
    cache.discard_all(["unreadable"])
    assert cache.holds(digest(1))


def test_what_stands_across_two_entries_is_none() -> None:
    """Entries lie side by side: the end of one and the beginning of the next look like a third."""
    first, second = "00" * 8 + "11" * 8, "22" * 8 + "33" * 8
    across = "1:" + first[16:] + second[:16]
    cache = Cache(4)
    cache.add("1:" + first)
    cache.add("1:" + second)
    assert not cache.holds(across)
    cache.discard_all([across])
    assert cache.holds("1:" + first)
    assert cache.holds("1:" + second)
    cache = Cache(10)
    for each in ("1:" + first, "1:" + second, across):
        cache.add(each)
    assert len(cache) == 3
    assert cache.holds(across)


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


def test_it_never_grows_past_its_bound_and_keeps_the_youngest() -> None:
    cache = Cache(100)
    for number in range(1000):
        cache.add(digest(number))
        assert len(cache) <= 100
        assert all(cache.holds(digest(n)) for n in range(max(0, number - 20), number + 1))
    assert not any(cache.holds(digest(n)) for n in range(700))
    assert len(cache) > 90


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
    cache.discard_all([digest(0), digest(2)])
    assert [cache.holds(digest(n)) for n in range(3)] == [False, True, False]


def test_forgetting_what_is_not_there_does_nothing() -> None:
    cache = Cache()
    cache.discard_all([digest(1)])
    assert len(cache) == 0


def test_a_cleared_cache_holds_nothing() -> None:
    cache = Cache(4)
    for number in range(3):
        cache.add(digest(number))
    cache.clear()
    assert not any(cache.holds(digest(n)) for n in range(3))
    assert len(cache) == 0


# The import: every record once, at one revision; then the deletions.

PREFIX = "/service/order/"
LONGER_THAN_ANY_BACKOFF_S = 10.0
SETTINGS = Settings(enable_etcd=True)
REPLY_TOO_LARGE = Fate(None, error=TOO_LARGE)


class Breaking(FakeEtcd):
    """An etcd whose next ``breaks`` watches break after so many replies."""

    breaks = replies = 0

    def watch(self, watch: Any) -> None:
        """Open a watch, one that breaks where that is due."""
        if self.breaks:
            self.breaks -= 1
            deliver, left = watch.deliver, iter(range(self.replies))
            watch.deliver = lambda reply: deliver(CLOSED if next(left, None) is None else reply)
        super().watch(watch)


class Following:
    """A cache that follows an etcd in memory."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.store = Store(self.loop.time)
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
        follower = Follower(self.cache, PREFIX, client, system, captured(self.lines))
        self.task = self.loop.create_task(follower.run(revision))
        self.loop.run_until_idle()

    def start(self, revision: int = 0) -> Any:
        """Import, and return the watch that follows."""
        self.begin(revision)
        self.loop.advance(IMPORT_AFTER_S + LONGER_THAN_ANY_BACKOFF_S)
        return self.watch

    def reconnect(self) -> Any:
        """End the watch, and return the next one."""
        self.etcd.end_watches()
        self.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
        return self.watch

    def until_watched(self) -> None:
        """Let pass what it takes until there is a watch that does not break."""
        for _ in range(1000):
            if not self.etcd.breaks and self.store.watched:
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
def test_whatever_the_ids_each_record_is_imported_exactly_once(
    following: Following, seed: int
) -> None:
    chance = random.Random(seed)
    ids = random_ids(chance, chance.choice([100, 7_000, 13_000]))
    following.record(*ids)
    following.store.put("/service/orders/1", b"")
    following.store.put("/service/orde", b"")
    following.start()
    seen = Counter(kv.key for page in following.pages for kv in page.outcome.kvs)
    assert set(seen) == {(PREFIX + each).encode() for each in ids}
    assert set(seen.values()) == {1}
    assert all(following.holds(each) for each in ids)
    assert len(following.pages) < 2_000


def test_sequential_ids_take_about_as_many_pages_as_they_fill(following: Following) -> None:
    """Not one range that etcd walks to its end for each page."""
    following.record(*(f"{number:08}" for number in range(3 * PAGE_RECORDS)))
    following.start()
    assert 3 <= len(following.pages) < 60
    walked = sum(page.outcome.count for page in following.pages)
    assert walked < 4 * 3 * PAGE_RECORDS


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
    following.record(*map(str, range(PAGE_RECORDS + 100)))
    revision = following.store.revision

    def write_before_each_but_the_first(_: Call) -> Fate:
        if len(following.pages) > 1:
            following.record(f"0-late-{len(following.pages)}")
        return FINE

    following.etcd.fate = write_before_each_but_the_first
    watch = following.start()
    assert len(following.pages) > 1
    assert {page.request.revision for page in following.pages[1:]} == {revision}
    assert not any(b"late" in kv.key for page in following.pages for kv in page.outcome.kvs)
    assert watch.start_revision == revision + 1


def test_only_what_is_done_is_held(following: Following) -> None:
    following.record("1")
    following.record("2", state="claimed")
    following.record("3", state="released")
    following.store.put(PREFIX + "4", b"an operator's")
    following.start()
    assert [following.holds(each) for each in "1234"] == [True, False, False, False]


def test_an_empty_etcd_is_imported_too(following: Following) -> None:
    watch = following.start()
    assert len(following.cache) == 0
    assert watch.start_revision == following.store.revision + 1
    assert any(line.get("records") == 0 for line in following.lines.entries)


def test_what_is_deleted_is_new_again(following: Following) -> None:
    following.record("1", "2")
    following.start()
    following.store.delete(PREFIX + "1")
    revision = following.store.revision
    following.loop.run_until_idle()
    assert [following.holds("1"), following.holds("2")] == [False, True]
    following.store.put("/elsewhere", b"")
    assert following.reconnect().start_revision == revision + 1


def test_what_is_deleted_while_there_is_no_watch_is_new_again(following: Following) -> None:
    following.record("1", "2")
    following.start()
    following.etcd.end_watches()
    following.store.delete(PREFIX + "1")
    following.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
    assert [following.holds("1"), following.holds("2")] == [False, True]


def test_a_deletion_that_does_not_tell_what_it_deleted_clears_everything(
    following: Following,
) -> None:
    """Its old value has been compacted; without it the entry cannot be found."""
    following.record("1", "2")
    following.start()
    following.etcd.end_watches()
    following.store.delete(PREFIX + "1")
    following.store.compact()
    pages = len(following.pages)
    following.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
    assert len(following.cache) == 0
    assert len(following.pages) == pages


@pytest.mark.parametrize("how", ["deleted", "deleted and compacted", "deleted before an import"])
def test_an_answer_that_a_deletion_has_overtaken_is_not_remembered(
    following: Following, how: str
) -> None:
    """The event is new again, and would be acked as a duplicate of what is not there."""
    following.record("1")
    revision = following.store.revision
    following.start()
    following.etcd.end_watches()
    following.store.delete(PREFIX + "1")
    if how == "deleted before an import":
        following.record("2")
    if how != "deleted":
        following.store.compact()
    pages = len(following.pages)
    following.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
    assert (len(following.pages) > pages) == (how == "deleted before an import")
    following.cache.add(digest_of("1"), revision)
    assert not following.holds("1")
    following.cache.add(digest_of("1"), following.store.revision)
    assert following.holds("1")


def test_an_answer_that_no_deletion_has_overtaken_is_remembered(following: Following) -> None:
    following.record("1")
    revision = following.store.revision
    following.start()
    following.cache.add(digest_of("2"), revision)
    assert following.holds("2")


def test_progress_moves_the_watchs_beginning(following: Following) -> None:
    following.start()
    for _ in range(100):
        following.store.put("/elsewhere", b"")
    following.store.progress()
    following.loop.run_until_idle()
    assert following.reconnect().start_revision == following.store.revision + 1


def test_the_reply_that_says_created_is_no_progress(following: Following) -> None:
    first = following.start()
    for _ in range(100):
        following.store.put("/elsewhere", b"")
    following.reconnect()
    assert following.reconnect().start_revision == first.start_revision


def test_after_a_compaction_everything_is_imported_again(following: Following) -> None:
    """Deletions have been missed, so nothing held may be trusted."""
    following.record("1", "2")
    following.start()
    following.etcd.end_watches()
    following.store.delete(PREFIX + "1")
    following.record("3")
    following.store.compact()
    following.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
    assert [following.holds(each) for each in "123"] == [False, True, True]
    assert following.watch.start_revision == following.store.revision + 1


def test_a_watch_that_ends_is_opened_again_without_another_import(following: Following) -> None:
    following.record("1")
    following.start()
    pages, watches = len(following.pages), len(following.etcd.sent("Watch"))
    following.reconnect()
    assert len(following.etcd.sent("Watch")) == watches + 1
    assert len(following.pages) == pages
    assert following.holds("1")


def test_an_import_that_fails_in_the_middle_begins_again(following: Following) -> None:
    """Of what its first attempt saw, nothing is held that was deleted before the second."""
    ids = [f"{number:08}" for number in range(PAGE_RECORDS + 10)]
    following.record(*ids)

    def fail_the_second_page(_: Call) -> Fate:
        if len(following.pages) != 2:
            return FINE
        following.store.delete(PREFIX + ids[0])
        return REQUEST_LOST

    following.etcd.fate = fail_the_second_page
    following.start()
    assert len(following.pages) > 3
    assert [each for each in ids if not following.holds(each)] == ids[:1]


def test_a_page_that_is_too_large_for_a_reply_is_asked_for_in_smaller_ones(
    following: Following,
) -> None:
    ids = [f"{number:08}" for number in range(3000)]
    following.record(*ids)
    following.etcd.fate = lambda call: (
        REPLY_TOO_LARGE if call.method == "Range" and call.request.limit > 1000 else FINE
    )
    following.start()
    seen = Counter(kv.key for page in following.pages if page.outcome for kv in page.outcome.kvs)
    assert set(seen.values()) == {1}
    assert all(following.holds(each) for each in ids)


def test_an_import_whose_first_page_takes_long_is_not_begun_again(following: Following) -> None:
    """Tens of millions of keys have to be walked; with two members a call has less time."""
    following.record("a")
    following.etcd.fate = lambda call: Fate(0.0, 30.0) if call.method == "Range" else FINE
    following.begin(settings=replace(SETTINGS, etcd_endpoints=(("a", 2379), ("b", 2379))))
    following.loop.advance(IMPORT_AFTER_S + 31.0)
    assert following.holds("a")
    assert len(following.pages) == 1


def test_deletions_may_come_in_fragments_of_a_revision(following: Following) -> None:
    """What is lost behind the first comes again: the next watch begins at the same revision."""
    following.record("1", "2")
    assert b"\x40\x01" in following.start().SerializeToString()
    following.store.delete(PREFIX + "1")
    reply = WatchResponse(events=[deletion("2", revision=9)]).SerializeToString()
    following.etcd._watches[0].deliver(WatchResponse.FromString(reply + b"\x38\x01"))
    following.loop.run_until_idle()
    assert not following.holds("2")
    assert following.reconnect().start_revision == 9


def deletion(event_id: str, revision: int) -> Any:
    key = (PREFIX + event_id).encode()
    before = kv_pb2.KeyValue(key=key, value=encode("done", digest_of(event_id), "t", "now"))
    gone = kv_pb2.KeyValue(key=key, mod_revision=revision)
    return kv_pb2.Event(type=kv_pb2.Event.DELETE, kv=gone, prev_kv=before)


def test_a_watch_that_gets_no_further_is_given_up_for_a_new_import(following: Following) -> None:
    """As where a reply is larger than gRPC takes, each time it comes."""
    following.record("1")
    following.start()
    following.store.put("/elsewhere", b"")
    for _ in range(10):
        following.reconnect()
    warned = [line for line in following.lines.entries if "makes no progress" in line["event"]]
    assert warned
    assert len(following.pages) == 1 + len(warned)
    assert following.holds("1")


def test_a_watch_in_which_nothing_happens_is_not_given_up(following: Following) -> None:
    following.record("1")
    following.start()
    for _ in range(10):
        following.store.progress()
        following.reconnect()
    assert len(following.pages) == 1


def test_records_from_after_its_revision_are_left_out_and_their_deletions_are_not(
    following: Following,
) -> None:
    """The process that starts it has put those in the cache by itself."""
    following.record("before")
    revision = following.store.revision
    following.record("later")
    following.cache.add(digest_of("its own"))
    watch = following.start(revision)
    assert following.holds("before")
    assert not following.holds("later")
    assert following.holds("its own")
    assert watch.start_revision == revision + 1


def test_cancelled_before_it_begins_it_reads_nothing(following: Following) -> None:
    following.begin()
    following.loop.advance(IMPORT_AFTER_S / 2)
    following.task.cancel()
    following.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
    assert following.task.cancelled()
    assert not following.etcd.calls


def test_cancelled_it_ends_its_watch(following: Following) -> None:
    following.start()
    assert following.store.watched
    following.task.cancel()
    following.loop.run_until_idle()
    assert following.task.cancelled()
    assert not following.store.watched


# A revision with more deletions than one reply has room for.

MANY = [f"{number:02}" for number in range(10)]


def test_a_revision_of_many_deletions_comes_in_fragments(following: Following) -> None:
    """One reply with all of them may be larger than gRPC receives, at each attempt again."""
    lease = following.under_one_lease(*MANY)
    following.record("kept")
    following.start()
    following.store.events_a_reply = 3
    following.store.revoke(lease)
    following.loop.run_until_idle()
    assert not any(following.holds(each) for each in MANY)
    assert following.holds("kept")
    assert len(following.etcd.sent("Watch")) == 1


def test_a_gap_of_many_deletions_comes_in_fragments(following: Following) -> None:
    leases = [following.under_one_lease(*(f"{n}-{each}" for each in MANY)) for n in range(3)]
    following.start()
    following.store.events_a_reply = 4
    following.etcd.end_watches()
    for lease in leases:
        following.store.revoke(lease)
    following.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
    assert len(following.cache) == 0
    assert len(following.etcd.sent("Watch")) == 2
    assert following.reconnect().start_revision == following.store.revision + 1


def test_a_watch_that_breaks_between_two_fragments_resumes_at_their_revision(
    following: Following,
) -> None:
    """The rest of that revision has not come yet: past it, it never would."""
    lease = following.under_one_lease(*MANY)
    following.record("before")
    following.start()
    following.store.events_a_reply = 3
    following.etcd.breaks, following.etcd.replies = 1, 3
    following.etcd.end_watches()
    following.store.delete(PREFIX + "before")
    following.store.revoke(lease)
    revision = following.store.revision
    following.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
    assert following.watch.start_revision == revision
    assert len(following.cache) == 0
    assert following.reconnect().start_revision == revision + 1


def test_a_watch_that_fails_again_and_again_at_one_revision_is_given_up(
    following: Following,
) -> None:
    """What it cannot tell has been deleted would be acked from the cache without a record."""
    following.record("1", "2")
    following.start()
    following.etcd.breaks, following.etcd.replies = 5, 1
    following.etcd.end_watches()
    following.store.delete(PREFIX + "1")
    following.record("3")
    following.loop.advance(5 * LONGER_THAN_ANY_BACKOFF_S)
    assert [following.holds(each) for each in "123"] == [False, True, True]
    assert following.watch.start_revision == following.store.revision + 1
    (line,) = following.stuck()
    assert line["log_level"] == "warning"


def test_a_watch_that_fails_now_and_then_is_not_given_up(following: Following) -> None:
    """It has told of what was deleted in between, or would have had the time to."""
    following.record(*MANY)
    following.start()
    pages = len(following.pages)
    for each in MANY[:8]:
        following.etcd.breaks, following.etcd.replies = 3, 1
        following.etcd.end_watches()
        following.store.delete(PREFIX + each)
        following.until_watched()
    for _ in range(8):
        following.loop.advance(60)
        following.reconnect()
    assert following.stuck() == []
    assert len(following.pages) == pages


def test_an_etcd_that_is_away_for_long_is_not_stuck(following: Following) -> None:
    following.record("1")
    following.start()
    pages = len(following.pages)
    following.etcd.breaks, following.etcd.replies = 100, 0
    following.etcd.end_watches()
    following.loop.advance(100 * LONGER_THAN_ANY_BACKOFF_S)
    assert following.etcd.breaks == 0
    assert following.stuck() == []
    assert len(following.pages) == pages
    assert following.holds("1")


# What is added while the watch is further, or there is none.


def test_what_was_read_before_a_deletion_that_the_watch_has_seen_is_not_held(
    following: Following,
) -> None:
    """The answer was under way when the record went: nobody would tell of it again."""
    following.record("1", "2")
    following.start()
    read_at = following.store.revision
    following.store.delete(PREFIX + "1")
    following.loop.run_until_idle()
    following.cache.add(digest_of("1"), read_at)
    assert not following.holds("1")
    following.cache.add(digest_of("3"), following.store.revision)
    assert following.holds("3")


def test_what_was_done_before_a_second_import_and_is_not_in_it_is_not_held(
    following: Following,
) -> None:
    """Its deletion was between the two, when nothing was watched."""
    following.record("1", "2")
    following.start()
    following.etcd.breaks, following.etcd.replies = 100, 0
    following.etcd.end_watches()
    following.store.delete(PREFIX + "2")
    following.record("3")
    following.store.compact()
    following.etcd.breaks = 0
    read_at = following.store.revision

    def delete_what_is_held(call: Call) -> Fate:
        if call.method == "Range":
            following.cache.add(digest_of("1"), read_at)
            following.store.delete(PREFIX + "1")
        return FINE

    following.etcd.fate = delete_what_is_held
    following.loop.advance(LONGER_THAN_ANY_BACKOFF_S)
    assert len(following.pages) > 1
    assert not following.holds("1")
    following.cache.add(digest_of("1"), read_at)
    assert not following.holds("1")


# A page that is larger than gRPC receives.


def test_pages_that_are_too_large_are_asked_for_in_smaller_ones(following: Following) -> None:
    ids = [f"{number:04}" for number in range(1000)]
    following.record(*ids)
    following.etcd.fate = lambda call: FINE if fits(call) else REPLY_TOO_LARGE

    def fits(call: Call) -> bool:
        return call.method != "Range" or len(following.store.apply("Range", call.request).kvs) <= 99

    following.start()
    assert all(following.holds(each) for each in ids)
    seen = Counter(kv.key for page in following.pages if fits(page) for kv in page.outcome.kvs)
    assert len(seen) == 1000
    assert set(seen.values()) == {1}
    assert sum(not fits(page) for page in following.pages) == 2

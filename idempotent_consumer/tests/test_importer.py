"""The import: every record once, at one revision; then the deletions."""

from __future__ import annotations

import queue
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from etcd3.etcdrpc import kv_pb2, rpc_pb2
from structlog.testing import LogCapture

from fakes.desk import digest_of
from idempotent_consumer.ledger.cache import Cache
from idempotent_consumer.ledger.etcd import Answered, EtcdError, Failure
from idempotent_consumer.ledger.importer import Importer
from idempotent_consumer.ledger.keyspace import PAGE_RECORDS
from idempotent_consumer.ledger.records import encode
from idempotent_consumer.testing.etcd import FakeEtcd
from idempotent_consumer.testing.loop import ManualLoop
from idempotent_consumer.testing.store import Store

PREFIX = "/service/order/"
DEADLINE_S = 20.0


class WatchedEtcd(FakeEtcd):
    """The etcd in memory, with watches whose replies the test hands in."""

    def __init__(self, loop: ManualLoop, store: Store) -> None:
        super().__init__(loop, store)
        self.pages: list[Any] = []
        self.watches: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.before_page: Callable[[int], None] = lambda _number: None

    def call(self, method: str, request: Any, answered: Answered) -> None:
        """Answer at once with a page, and keep it."""
        try:
            self.before_page(len(self.pages))
            reply = self.store.apply(method, request)
        except EtcdError as error:
            answered(None, error)
            return
        self.pages.append((request, reply))
        answered(reply, None)

    def watch(self, request: Any) -> Iterator[Any]:
        """Iterate over what the test hands in; an EtcdError ends the watch."""
        self.watches.put(request.create_request)
        while True:
            reply = self.replies.get()
            if isinstance(reply, EtcdError):
                raise reply
            yield reply


class Desk:
    """An importer on its thread, and the loop that the test runs for it."""

    def __init__(self) -> None:
        self.loop = ManualLoop()
        self.store = Store(self.loop.now_s)
        self.etcd = WatchedEtcd(self.loop, self.store)
        self.cache, self.lines = Cache(), LogCapture()
        self._importers: list[Importer] = []

    def record(self, *ids: bytes | str, state: str = "done") -> None:
        for each in ids:
            event_id = each if isinstance(each, str) else each.decode("latin-1")
            self.store.put(PREFIX + event_id, encode(state, digest_of(event_id), "t", "now"))

    def start(self, revision: int = 0) -> Any:
        """Start, and return the watch that follows the import."""
        log: Any = structlog.wrap_logger(None, processors=[self.lines])
        self._importers.append(
            Importer(PREFIX, self.etcd, self.cache, self.loop, log, revision, begin_after_s=0)
        )
        return self.next_watch()

    def next_watch(self) -> Any:
        watch = self.etcd.watches.get(timeout=DEADLINE_S)
        self.loop.run_until_idle()
        return watch

    def holds(self, event_id: str) -> bool:
        return self.cache.holds(digest_of(event_id))

    def reply(self, reply: Any) -> None:
        """Hand in a watch reply, and end the watch, so that its work is done at the next."""
        self.etcd.replies.put(reply)
        self.etcd.replies.put(EtcdError(Failure.UNKNOWN, "the watch ended"))

    def close(self) -> None:
        for importer in self._importers:
            importer.close()
            self.etcd.replies.put(EtcdError(Failure.UNKNOWN, "closed"))


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


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
def test_whatever_the_ids_each_record_is_imported_exactly_once(desk: Desk, seed: int) -> None:
    chance = random.Random(seed)
    ids = random_ids(chance, chance.choice([100, 7_000, 13_000]))
    desk.record(*ids)
    desk.store.put("/service/orders/1", b"")
    desk.store.put("/service/orde", b"")
    desk.start()
    seen = Counter(kv.key for _, reply in desk.etcd.pages for kv in reply.kvs)
    assert set(seen) == {(PREFIX + each).encode() for each in ids}
    assert set(seen.values()) == {1}
    assert all(desk.holds(each) for each in ids)
    assert len(desk.etcd.pages) < 2_000


def test_sequential_ids_take_about_as_many_pages_as_they_fill(desk: Desk) -> None:
    """Not one range that etcd walks to its end for each page."""
    desk.record(*(f"{number:08}" for number in range(3 * PAGE_RECORDS)))
    desk.start()
    assert len(desk.etcd.pages) < 60
    walked = sum(reply.count for _, reply in desk.etcd.pages)
    assert walked < 4 * 3 * PAGE_RECORDS


def test_a_cache_that_is_full_ends_the_import(desk: Desk) -> None:
    """What is left out is not read; the deletions of all are watched from the same revision."""
    desk.cache = Cache(PAGE_RECORDS)
    desk.record(*(f"{number:08}" for number in range(4 * PAGE_RECORDS)))
    watch = desk.start()
    assert len(desk.etcd.pages) <= 4
    assert len(desk.cache) <= PAGE_RECORDS
    assert watch.start_revision == desk.store.revision + 1
    (line,) = (line for line in desk.lines.entries if "records" in line)
    assert line["records"] < line["of"] == 4 * PAGE_RECORDS


def test_all_pages_are_of_one_revision_and_the_watch_begins_after_it(desk: Desk) -> None:
    """What is written meanwhile is in none of them."""
    desk.record(*map(str, range(PAGE_RECORDS + 100)))
    revision = desk.store.revision
    desk.etcd.before_page = lambda number: desk.record(f"0-late-{number}") if number else None
    watch = desk.start()
    assert {request.revision for request, _ in desk.etcd.pages[1:]} == {revision}
    assert not any(b"late" in kv.key for _, reply in desk.etcd.pages for kv in reply.kvs)
    assert watch.start_revision == revision + 1


def test_only_what_is_done_is_held(desk: Desk) -> None:
    desk.record("1")
    desk.record("2", state="claimed")
    desk.record("3", state="released")
    desk.store.put(PREFIX + "4", b"an operator's")
    desk.start()
    assert [desk.holds(each) for each in "1234"] == [True, False, False, False]


def test_an_empty_etcd_is_imported_too(desk: Desk) -> None:
    watch = desk.start()
    assert len(desk.cache) == 0
    assert watch.start_revision == desk.store.revision + 1
    assert any(line.get("records") == 0 for line in desk.lines.entries)


def deletion(event_id: str, revision: int, previous: bytes) -> Any:
    key = (PREFIX + event_id).encode()
    return kv_pb2.Event(
        type=kv_pb2.Event.DELETE,
        kv=kv_pb2.KeyValue(key=key, mod_revision=revision),
        prev_kv=kv_pb2.KeyValue(key=key, value=previous) if previous else None,
    )


def test_what_is_deleted_is_new_again(desk: Desk) -> None:
    desk.record("1", "2")
    desk.start()
    gone = deletion("1", 9, encode("done", digest_of("1"), "t", "now"))
    desk.reply(rpc_pb2.WatchResponse(events=[gone]))
    watch = desk.next_watch()
    assert [desk.holds("1"), desk.holds("2")] == [False, True]
    assert watch.start_revision == 10


def test_a_deletion_that_does_not_tell_what_it_deleted_clears_everything(desk: Desk) -> None:
    """Its old value has been compacted; without it the entry cannot be found."""
    desk.record("1", "2")
    desk.start()
    desk.reply(rpc_pb2.WatchResponse(events=[deletion("1", 9, b"")]))
    desk.next_watch()
    assert len(desk.cache) == 0


def test_progress_moves_the_watchs_beginning(desk: Desk) -> None:
    desk.start()
    desk.reply(rpc_pb2.WatchResponse(header=rpc_pb2.ResponseHeader(revision=500)))
    assert desk.next_watch().start_revision == 501


def test_the_reply_that_says_created_is_no_progress(desk: Desk) -> None:
    first = desk.start()
    created = rpc_pb2.WatchResponse(header=rpc_pb2.ResponseHeader(revision=500), created=True)
    desk.reply(created)
    assert desk.next_watch().start_revision == first.start_revision


def test_after_a_compaction_everything_is_imported_again(desk: Desk) -> None:
    """Deletions have been missed, so nothing held may be trusted."""
    desk.record("1", "2")
    desk.start()
    desk.store.delete(PREFIX + "1")
    desk.record("3")
    desk.etcd.replies.put(EtcdError(Failure.COMPACTED, "has been compacted"))
    watch = desk.next_watch()
    assert [desk.holds(each) for each in "123"] == [False, True, True]
    assert watch.start_revision == desk.store.revision + 1


def test_a_watch_that_ends_is_opened_again_without_another_import(desk: Desk) -> None:
    desk.record("1")
    desk.start()
    pages = len(desk.etcd.pages)
    desk.etcd.replies.put(EtcdError(Failure.UNKNOWN, "reset"))
    desk.next_watch()
    assert len(desk.etcd.pages) == pages
    assert desk.holds("1")


def test_an_import_that_fails_in_the_middle_begins_again(desk: Desk) -> None:
    """Of what its first attempt saw, nothing is held that was deleted before the second."""
    ids = [f"{number:08}" for number in range(PAGE_RECORDS + 10)]
    desk.record(*ids)
    failures = iter([EtcdError(Failure.UNKNOWN, "reset")])

    def before_page(number: int) -> None:
        if number == 1 and (error := next(failures, None)):
            desk.store.delete(PREFIX + ids[0])
            raise error

    desk.etcd.before_page = before_page
    desk.start()
    missing = [each for each in ids if not desk.holds(each)]
    assert missing == ids[:1]


def test_records_from_after_its_revision_are_left_out_and_their_deletions_are_not(
    desk: Desk,
) -> None:
    """The process that starts it has put those in the cache by itself."""
    desk.record("before")
    revision = desk.store.revision
    desk.record("later")
    desk.cache.add(digest_of("its own"))
    watch = desk.start(revision)
    assert desk.holds("before")
    assert not desk.holds("later")
    assert desk.holds("its own")
    assert watch.start_revision == revision + 1


def test_closed_before_it_begins_it_reads_nothing(desk: Desk) -> None:
    log: Any = structlog.wrap_logger(None, processors=[desk.lines])
    importer = Importer(PREFIX, desk.etcd, desk.cache, desk.loop, log, begin_after_s=DEADLINE_S)
    (thread,) = [t for t in threading.enumerate() if t.name == "import" and t.is_alive()][-1:]
    importer.close()
    thread.join(DEADLINE_S / 2)
    assert not thread.is_alive()
    assert not desk.etcd.pages


def test_closing_ends_the_thread(desk: Desk) -> None:
    desk.start()
    (thread,) = [t for t in threading.enumerate() if t.name == "import" and t.is_alive()][-1:]
    desk.close()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()

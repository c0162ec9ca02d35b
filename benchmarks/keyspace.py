"""etcd beside the services: what has been recorded, a clean start, and what etcd says of itself."""

import re
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import etcd3

from idempotent_consumer import Settings, encode_id
from idempotent_consumer.event import decode
from idempotent_consumer.records import DONE, encode
from servers.servers import Etcd
from servers.web import open_json

from .publishers import body
from .results import Gauges

ALL = "/"
"""The prefix of every key."""

_TIMEOUT_S = 60
_RECORDS_A_LEASE = 10_000
"""As many as the library puts under one."""
_PUTS = 1_000
"""In one transaction, which needs no comparison here: nobody else writes."""


class Keyspace:
    """The keys of one etcd, by etcd3's own client. Raises etcd3's Etcd3Exception throughout."""

    def __init__(self, etcd: Etcd) -> None:
        self._endpoint = etcd.endpoint
        host, port = etcd.endpoint.rsplit(":", 1)
        self._client = etcd3.client(host=host, port=int(port), timeout=_TIMEOUT_S)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def put(self, key: str) -> None:
        """Put one key."""
        self._client.put(key, "done")

    def require(self, prefix: str, events: int) -> None:
        """Raise AssertionError unless there is a key for each event, and no more."""
        count = self._client.get_prefix_response(prefix, count_only=True).count
        if count != events:
            raise AssertionError(f"{prefix}: {count} keys for {events} events")

    def delete(self, prefix: str = ALL) -> tuple[int, int]:
        """Delete everything below a prefix, not its history; return how many, and the revision."""
        answer = self._client.delete_prefix(prefix)
        return int(answer.deleted), int(answer.header.revision)

    def clear(self, prefix: str = ALL) -> None:
        """Delete everything below a prefix, and the history of all.

        `physical` waits until the space is given back, which would else happen during the next
        run and slow that down.
        """
        deleted, revision = self.delete(prefix)
        if deleted:  # Else nothing is new, and etcd refuses to compact twice.
            self._client.compact(revision, physical=True)

    @contextmanager
    def watch(
        self, prefix: str, changed: Callable[[float, Sequence[bytes]], None]
    ) -> Iterator[None]:
        """Watch the keys below a prefix while the block runs.

        `changed` is called on the client's thread with the time, on the monotonic clock, and the
        keys that one answer brought. The watch is there when the block begins.
        """
        watch_id = self._client.add_watch_prefix_callback(
            prefix,
            lambda answer: changed(time.monotonic(), [event.key for event in answer.events]),
        )
        try:
            yield
        finally:
            self._client.cancel_watch(watch_id)

    def gauges(self) -> Gauges:
        """Read etcd's metrics page; raises OSError."""
        with open_json("GET", f"http://{self._endpoint}/metrics") as page:
            return gauges_of(page.read().decode())

    def write_history(self, prefix: str, first: int, end: int) -> None:
        """Write the records of a long life, numbered, as the service would have left them."""
        process, put = secrets.token_hex(16), self._client.transactions.put
        for start in range(first, end, _RECORDS_A_LEASE):
            lease = self._client.lease(Settings().dedup_window_s)
            for at in range(start, min(start + _RECORDS_A_LEASE, end), _PUTS):
                now = datetime.now(UTC).isoformat(timespec="milliseconds")
                puts = []
                for number in range(at, min(at + _PUTS, start + _RECORDS_A_LEASE, end)):
                    event = decode(history_body(number))
                    token = f"{process}/1/{number + 1}"
                    value = encode(DONE, event.digest, token, now)
                    puts.append(put(prefix + encode_id(event.id), value, lease))
                self._client.transaction(compare=[], success=puts, failure=[])


def history_body(number: int) -> bytes:
    """Return the event of a number: its id looks random, and is the same each time."""
    return body(uuid.uuid5(uuid.NAMESPACE_OID, str(number)))


def gauges_of(page: str) -> Gauges:
    """Read the metrics in Prometheus's text format; the names are those of etcd 3.5."""

    def value(name: str) -> int:
        line = rf"^{re.escape(name)}(?:,[^}}]*)?}}? (\S+)$"
        return sum(int(float(found)) for found in re.findall(line, page, re.MULTILINE))

    return Gauges(
        memory=value("process_resident_memory_bytes"),
        file=value("etcd_mvcc_db_total_size_in_bytes"),
        used=value("etcd_mvcc_db_total_size_in_use_in_bytes"),
        keys=value("etcd_debugging_mvcc_keys_total"),
        granted=value("etcd_debugging_lease_granted_total"),
        revoked=value("etcd_debugging_lease_revoked_total"),
        written=value("etcd_mvcc_put_total"),
        transactions=value('grpc_server_started_total{grpc_method="Txn"'),
    )

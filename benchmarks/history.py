"""The records of a long life, written as the service would have left them, without the service."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from etcd3.etcdrpc import LeaseGrantRequest, TxnRequest

from harness.servers import Servers
from idempotent_consumer import Settings, encode_id
from idempotent_consumer.cli.etcd import Etcd
from idempotent_consumer.etcd import put
from idempotent_consumer.event import decode
from idempotent_consumer.names import record_prefix
from idempotent_consumer.records import DONE, encode

from .loading import body

_RECORDS_A_LEASE = 10_000
"""As many as the library puts under one."""
_PUTS = 1_000
"""In one transaction, which needs no comparison here: nobody else writes."""


class History:
    """A service's records, numbered from 0: number n is that of the event ``_body(n)``."""

    def __init__(self, servers: Servers, service: str) -> None:
        settings = Settings.from_environ(servers.settings())
        self._etcd, self._prefix = Etcd(settings), record_prefix(service)
        self._lease_s = settings.dedup_window_s
        self._process = secrets.token_hex(16)
        self.size = 0

    def grow(self, size: int) -> None:
        """Write the records that are missing to that size; raises EtcdError."""
        for first in range(self.size, size, _RECORDS_A_LEASE):
            lease = self._etcd.ask("LeaseGrant", LeaseGrantRequest(TTL=self._lease_s))
            numbers = range(first, min(first + _RECORDS_A_LEASE, size))
            for start in range(0, len(numbers), _PUTS):
                self._put(numbers[start : start + _PUTS], lease.ID)
        self.size = size

    def sample(self, number: int) -> list[bytes]:
        """Return so many events that have a record, from all over the history."""
        return [_body(n) for n in range(0, self.size, max(1, self.size // number))][:number]

    def close(self) -> None:
        """Close the connection."""
        self._etcd.close()

    def _put(self, numbers: Sequence[int], lease: int) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        value = partial(encode, DONE, time=now)
        request: Any = TxnRequest()
        for number in numbers:
            event = decode(_body(number))
            put(
                request.success,
                (self._prefix + encode_id(event.id)).encode(),
                value(digest=event.digest, token=f"{self._process}/1/{number + 1}"),
                lease,
            )
        self._etcd.ask("Txn", request)


def _body(number: int) -> bytes:
    """Return the event of a number: its id looks random, and is the same each time."""
    return body(uuid.uuid5(uuid.NAMESPACE_OID, str(number)))

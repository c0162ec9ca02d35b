"""What etcd says of itself on its metrics page: its memory, its file, its keys and leases."""

from __future__ import annotations

import re
from typing import NamedTuple

from harness.server import Etcd
from harness.web import open_json


class Gauges(NamedTuple):
    """One reading. Sizes are in bytes; the last four are totals since etcd was started.

    ``memory`` is etcd's resident size, which includes what it has mapped of its file. ``used`` is
    what of the file is not free for new data. Written are keys.
    """

    memory: int
    file: int
    used: int
    keys: int
    granted: int
    revoked: int
    written: int
    transactions: int

    @property
    def leases(self) -> int:
        """How many leases there are."""
        return self.granted - self.revoked


def read_gauges(etcd: Etcd) -> Gauges:
    """Read etcd's metrics page; raises OSError."""
    with open_json("GET", f"http://{etcd.endpoint}/metrics") as page:
        return gauges_of(page.read().decode())


def gauges_of(text: str) -> Gauges:
    """Read the metrics in Prometheus's text format; the names are those of etcd 3.5."""

    def value(name: str) -> int:
        return sum(
            int(float(found))
            for found in re.findall(
                rf"^{re.escape(name)}(?:,[^}}]*)?}}? (\S+)$", text, re.MULTILINE
            )
        )

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

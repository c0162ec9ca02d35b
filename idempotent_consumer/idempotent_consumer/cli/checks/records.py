"""etcd's members: reachable, with room, and with limits that the services' settings keep to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from ...etcd import EtcdError
from ...names import incarnation_key
from .. import etcd as members
from ..context import Context
from ..etcd import Asking, Records
from ..output import counted, size
from ..web import Tls, WebError
from . import versions
from .finding import OK, PROBLEM, UNKNOWN, WARNING, Finding, ok

_MUCH, _TOO_MUCH = 0.7, 0.9
"""Shares of the quota. At all of it etcd takes no writes until somebody has made room."""

_COMPACTED_LATE = 1_000_000
"""Revisions. An etcd that compacts by itself has rarely more history than that."""


@dataclass(frozen=True)
class Pages:
    """What a member shows over HTTP: its metrics, the flags it was started with, and its clock."""

    metrics: str = ""
    variables: str = ""
    date: datetime | None = None

    def metric(self, name: str) -> float | None:
        """Return a metric without labels."""
        found = re.search(rf"^{name} (\S+)$", self.metrics, re.MULTILINE)
        return float(found[1]) if found else None

    def flag(self, name: str) -> str | None:
        """Return a flag of its command line; what it has from its environment is not shown."""
        found = re.search(rf'"--{name}=([^"]*)"', self.variables)
        return found[1] if found else None


def check(context: Context, pages: Pages, address: tuple[str, int]) -> Iterator[Finding]:
    """Check one member."""
    about = f"etcd {address[0]}:{address[1]}"
    try:
        with context.etcd(address) as etcd:
            found = members.member(etcd)
    except EtcdError as error:
        yield Finding(PROBLEM, about, str(error), "start it, or correct ETCD_ENDPOINTS")
        return
    yield versions.check(about, found.version, versions.ETCD)
    if not found.has_leader:
        yield Finding(PROBLEM, about, "it has no leader", "start the other members")
    yield _room(about, found.size_bytes, pages)
    yield _compaction(about, pages)


def check_cluster(context: Context, services: list[str]) -> Iterator[Finding]:
    """Check what all members share. A user may be allowed to see some of it and not the rest."""
    operations = context.settings.etcd_max_txn_ops
    unseen: dict[str, list[str]] = {}
    with context.etcd() as etcd:
        checks: list[tuple[str, Callable[[], Finding]]] = [("alarms", partial(_alarms, etcd))]
        checks += [
            ("limit of operations", partial(_operations, etcd, operations, service))
            for service in services[:1]
        ]
        checks += [
            (f"records of {service}", partial(_incarnation, service, Records(etcd, service)))
            for service in services
        ]
        for what, check in checks:
            try:
                yield check()
            except EtcdError as error:
                unseen.setdefault(str(error), []).append(what)
    for why, parts in unseen.items():
        yield Finding(UNKNOWN, "etcd", f"its {', '.join(parts)} could not be looked at: {why}")


def _alarms(etcd: Asking) -> Finding:
    raised = members.alarms(etcd)
    if not raised:
        return ok("etcd", "no alarm is on")
    return Finding(
        PROBLEM,
        "etcd",
        f"alarm {', '.join(raised)} is on: no record can be written",
        "make room: etcdctl compact, defrag, then alarm disarm",
    )


def pages_of(context: Context, address: tuple[str, int]) -> Pages:
    """Read a member's pages; empty where it shows none."""
    settings = context.settings
    tls = Tls(settings.etcd_ca_cert, settings.etcd_cert, settings.etcd_key)
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"{'https' if settings.etcd_ca_cert else 'http'}://{host}:{address[1]}"
    try:
        metrics = context.fetch(f"{url}/metrics", tls)
        variables = context.fetch(f"{url}/debug/vars", tls)
    except WebError:
        return Pages()
    return Pages(
        metrics.body.decode(errors="replace"), variables.body.decode(errors="replace"), metrics.date
    )


def _room(about: str, size_bytes: int, pages: Pages) -> Finding:
    quota_bytes = pages.metric("etcd_server_quota_backend_bytes")
    if not quota_bytes:
        return Finding(UNKNOWN, about, f"{size(size_bytes)} in use; its quota is not shown")
    share = size_bytes / quota_bytes
    what = f"{size(size_bytes)} of its quota of {size(quota_bytes)} in use"
    if share < _MUCH:
        return ok(about, what)
    return Finding(
        PROBLEM if share > _TOO_MUCH else WARNING,
        about,
        what + ": full, it takes no records",
        "defragment it, raise --quota-backend-bytes, or shorten DEDUP_WINDOW",
    )


def _compaction(about: str, pages: Pages) -> Finding:
    """Check that its history does not grow for ever."""
    retention = pages.flag("auto-compaction-retention")
    if retention and retention != "0":
        return ok(about, f"compacts by itself ({retention})")
    now, compacted = (
        pages.metric(f"etcd_debugging_mvcc_{which}_revision") for which in ("current", "compact")
    )
    if now is None or compacted is None:
        return Finding(UNKNOWN, about, "whether it compacts by itself is not shown")
    revisions = int(now - max(0, compacted))
    do = "start it with --auto-compaction-mode=periodic --auto-compaction-retention=10m"
    if retention == "0" or revisions > _COMPACTED_LATE:
        return Finding(
            WARNING,
            about,
            f"it keeps {counted(revisions, 'revision')} of history, and "
            "seems not to compact by itself",
            do,
        )
    return Finding(
        UNKNOWN,
        about,
        "whether it compacts by itself is not shown; it keeps "
        f"{counted(revisions, 'revision')} of history",
        do,
    )


def _operations(etcd: Asking, operations: int, service: str) -> Finding:
    key = incarnation_key(service).encode()
    if members.takes_operations(etcd, operations, key):
        return ok("etcd", f"takes ETCD_MAX_TXN_OPS ({operations}) operations in a transaction")
    return Finding(
        PROBLEM,
        "etcd",
        f"refuses a transaction of ETCD_MAX_TXN_OPS ({operations}) "
        "operations: nothing is ever recorded under load",
        f"start it with --max-txn-ops={operations}, or lower ETCD_MAX_TXN_OPS",
    )


def _incarnation(service: str, records: Records) -> Finding:
    incarnation = records.incarnation()
    if incarnation is None:
        return Finding(
            WARNING,
            service,
            "etcd does not know it: it has never run with ENABLE_ETCD=true, or this etcd was wiped",
            "start it, and see its log",
        )
    return Finding(OK, service, f"etcd has its history (incarnation {incarnation[:8]})")

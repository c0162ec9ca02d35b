"""Which versions of the servers get no fixes any more, or have faults that were fixed later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .finding import WARNING, Finding, ok


@dataclass(frozen=True)
class Releases:
    """What is known of a server's releases.

    ``oldest`` is the oldest series that gets fixes, or may. ``faults`` has, by series, the first
    release without its known faults, and what those are.
    """

    oldest: str
    faults: Mapping[str, tuple[str, str]]


RABBITMQ = Releases(
    "4.2",
    {
        "4.0": ("4.0.8", "rare ones in the replication of quorum queues"),
        "4.3": ("4.3.5", "Raft leaders could commit too early, and queues be recovered in part"),
    },
)
"""Community support ended in April 2025 for 4.0 and in January 2026 for 4.1 (endoflife.date). The
faults are in the release notes of 4.0.8, 4.3.3 (rabbitmq/ra#637) and 4.3.5 (#17012)."""

ETCD = Releases(
    "3.5",
    {
        "3.5": (
            "3.5.28",
            "reads after a pause can be stale, and before 3.5.17 a transaction be applied in part",
        ),
        "3.6": ("3.6.9", "reads after a pause can be stale"),
    },
)
"""etcd supports the current series and the one before (its page "Versioning"): with 3.6, 3.5. The
faults are in the changelogs of 3.5.17, 3.5.28 and 3.6.9 (etcd-io/etcd#20418)."""


def number(version: str) -> tuple[int, ...]:
    """Read a version as numbers, as far as it has them: ``4.0.8`` or ``3.6.0-rc.1``."""
    parts = version.partition("-")[0].split(".")
    return tuple(int(part) for part in parts if part.isdecimal())


def check(about: str, version: str, releases: Releases) -> Finding:
    """Return whether a server's version is out of support, or has known faults, or neither."""
    series = number(version)[:2]
    amiss, do = [], ""
    for faulty, (fixed_in, what) in releases.faults.items():
        if number(faulty) == series and number(version) < number(fixed_in):
            amiss.append(f"has known faults, fixed in {fixed_in}: {what}")
            do = f"upgrade it to {fixed_in} or newer"
    if series < number(releases.oldest):
        amiss.insert(0, "is out of support")
        do = f"upgrade it to {releases.oldest} or newer"
    if amiss:
        return Finding(WARNING, about, f"version {version} {', and '.join(amiss)}", do)
    return ok(about, f"version {version}")

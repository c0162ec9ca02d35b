"""etcd between two runs: what has been recorded, and a clean start for the next."""

import base64
from typing import Any

from harness.server import Etcd
from harness.web import fetch_json


class Records:
    """Counts and clears what the consumers have written, over etcd's JSON gateway."""

    def __init__(self, etcd: Etcd) -> None:
        self._url = f"http://{etcd.endpoint}/v3/kv"

    def require(self, prefix: str, events: int) -> None:
        """Raise AssertionError unless there is a key for each event, and no more."""
        answer = self._call("range", **_below(prefix), count_only=True)
        if (count := int(answer.get("count", 0))) != events:
            raise AssertionError(f"{prefix}: {count} keys for {events} events")

    def delete(self, prefix: str = "") -> tuple[int, int]:
        """Delete everything below a prefix, not its history; return how many, and the revision."""
        deleted = self._call("deleterange", **_below(prefix))
        return int(deleted.get("deleted", 0)), int(deleted["header"]["revision"])

    def clear(self, prefix: str = "") -> None:
        """Delete everything below a prefix, and the history of all.

        `physical` waits until the space is given back, which would else happen during the next
        run and slow that down.
        """
        deleted, revision = self.delete(prefix)
        if deleted:  # Else nothing is new, and etcd refuses to compact twice.
            self._call("compaction", revision=revision, physical=True)

    def _call(self, method: str, **request: object) -> Any:
        return fetch_json("POST", f"{self._url}/{method}", request, timeout_s=60)


def _below(prefix: str) -> dict[str, str]:
    """Return the range of the keys below a prefix; etcd's sign for "all" is a zero."""
    first = prefix.encode()
    end = first[:-1] + bytes([first[-1] + 1]) if first else b"\0"
    return {"key": _base64(first or b"\0"), "range_end": _base64(end)}


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()

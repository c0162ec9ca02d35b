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
        first = prefix.encode()
        end = first[:-1] + bytes([first[-1] + 1])
        answer = self._call("range", key=_base64(first), range_end=_base64(end), count_only=True)
        if (count := int(answer.get("count", 0))) != events:
            raise AssertionError(f"{prefix}: {count} keys for {events} events")

    def clear(self) -> None:
        """Delete everything and its history.

        `physical` waits until the space is given back, which would else happen during the next
        run and slow that down.
        """
        everything = _base64(b"\0")
        deleted = self._call("deleterange", key=everything, range_end=everything)
        if "deleted" in deleted:  # Else nothing is new, and etcd refuses to compact twice.
            self._call("compaction", revision=deleted["header"]["revision"], physical=True)

    def _call(self, method: str, **request: object) -> Any:
        return fetch_json("POST", f"{self._url}/{method}", request, timeout_s=60)


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()

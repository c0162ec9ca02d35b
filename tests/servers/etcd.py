"""etcd read over its JSON gateway, for checks.

On purpose not the client that the services use: a fault of that client must not hide itself,
and its limit of 4 MiB per answer does not bind a reader of whole histories.
The shapes are those of etcd's page "gRPC gateway": 64-bit numbers are strings, keys and values
are base64, and a field of value zero is absent.
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal
from urllib.error import HTTPError

from servers.login import Login, log_in
from servers.web import fetch_json, open_json

_KEYS_AT_ONCE = 100  # etcd takes 128 operations at once unless told otherwise


@dataclass(frozen=True)
class KeyValue:
    """A key as it is now."""

    key: str
    value: bytes
    version: int
    create_revision: int
    mod_revision: int
    lease: int


@dataclass(frozen=True)
class Change:
    """One step of a key's history; a delete has an empty value."""

    revision: int
    kind: Literal["put", "delete"]
    key: str
    value: bytes


class EtcdClient:
    """Reads and deletes whole prefixes; every call raises OSError when etcd does not answer.

    `login` is asked at each call: etcd may begin to want one, or cease to.
    """

    def __init__(
        self,
        endpoint: str,
        timeout_s: float = 30.0,
        login: Callable[[], Login | None] = lambda: None,
    ) -> None:
        self._url = f"http://{endpoint}/v3"
        self._timeout_s = timeout_s
        self._login = login
        self._logged_in: tuple[Login | None, dict[str, str]] = None, {}

    def get(self, prefix: str = "") -> list[KeyValue]:
        """Return all keys that start with `prefix`, in order, of one revision."""
        answer = self._post("/kv/range", _span(prefix))
        return [_key_value(found) for found in answer.get("kvs", ())]

    def get_all(self, keys: Sequence[str]) -> list[KeyValue]:
        """Return those of these keys that are there, of one revision a hundred keys."""
        found: list[KeyValue] = []
        for first in range(0, len(keys), _KEYS_AT_ONCE):
            reads = [
                {"request_range": {"key": _encode(key.encode())}}
                for key in keys[first : first + _KEYS_AT_ONCE]
            ]
            answer = self._post("/kv/txn", {"success": reads})
            for response in answer.get("responses", ()):
                found += [_key_value(kv) for kv in response["response_range"].get("kvs", ())]
        return found

    def revision(self) -> int:
        """Return the revision of the newest change."""
        answer = self._post("/kv/range", {**_span("\0"), "count_only": True})
        return int(answer["header"]["revision"])

    def put(self, key: str, value: bytes) -> int:
        """Put one key; returns the revision of that."""
        body = {"key": _encode(key.encode()), "value": _encode(value)}
        return int(self._post("/kv/put", body)["header"]["revision"])

    def delete(self, prefix: str = "") -> int:
        """Delete all keys that start with `prefix`; returns the revision after that."""
        return int(self._post("/kv/deleterange", _span(prefix))["header"]["revision"])

    def changes(self, first: int, last: int, timeout_s: float = 30.0) -> Iterator[Change]:
        """Yield every change of every key from revision `first` to `last`, both included.

        All keys, since only then is the end known: each revision belongs to some change, while a
        watch on a prefix falls silent without saying that nothing more comes. `last` must exist.
        Raises RuntimeError if etcd has compacted `first` away, OSError on silence.
        """
        if first > last:
            return
        request = {"create_request": {**_span(""), "start_revision": str(first)}}
        headers = log_in(self._url, self._login(), timeout_s)
        with open_json(
            "POST", f"{self._url}/watch", request, headers=headers, timeout_s=timeout_s
        ) as stream:
            for line in stream:
                answer = json.loads(line)
                if "error" in answer or answer["result"].get("canceled"):
                    raise RuntimeError(f"etcd ended the watch: {answer}")
                for event in answer["result"].get("events", ()):
                    change = _change(event)
                    if change.revision > last:
                        return
                    yield change
                # All changes of one revision come in one answer.
                if answer["result"].get("events") and change.revision == last:
                    return

    def _post(self, path: str, body: Mapping[str, object]) -> Any:
        login, (whose, headers) = self._login(), self._logged_in
        if login and whose == login:
            # The token may have ended meanwhile; then a new one is taken, once.
            with suppress(HTTPError):
                return self._send(path, body, headers)
        headers = log_in(self._url, login, self._timeout_s)
        self._logged_in = login, headers
        return self._send(path, body, headers)

    def _send(self, path: str, body: Mapping[str, object], headers: Mapping[str, str]) -> Any:
        url = self._url + path
        return fetch_json("POST", url, body, headers=headers, timeout_s=self._timeout_s)


def _span(prefix: str) -> dict[str, str]:
    """Return the range of all keys that start with `prefix`; etcd's sign for "all" is a zero."""
    if not prefix:
        return {"key": _encode(b"\0"), "range_end": _encode(b"\0")}
    first = prefix.encode()
    return {"key": _encode(first), "range_end": _encode(first[:-1] + bytes([first[-1] + 1]))}


def _encode(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode(errors="surrogateescape")


def _key_value(found: Mapping[str, str]) -> KeyValue:
    return KeyValue(
        key=_text(found["key"]),
        value=base64.b64decode(found.get("value", "")),
        version=int(found["version"]),
        create_revision=int(found["create_revision"]),
        mod_revision=int(found["mod_revision"]),
        lease=int(found.get("lease", 0)),
    )


def _change(event: Mapping[str, Any]) -> Change:
    kv = event["kv"]
    return Change(
        revision=int(kv["mod_revision"]),
        kind="delete" if event.get("type") == "DELETE" else "put",
        key=_text(kv["key"]),
        value=base64.b64decode(kv.get("value", "")),
    )

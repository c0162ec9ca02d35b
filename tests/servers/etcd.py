"""Reads etcd over its JSON gateway: keys, their history, and what services have written.

The checks do not use the services' own client, since that would hide its faults. Nor does its
limit of 4 MiB per answer apply here. etcd's page "gRPC gateway" describes the messages: 64-bit
numbers are strings, keys and values are base64, and a field that is zero is absent.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.error import HTTPError

from servers.web import fetch_json, open_json

if TYPE_CHECKING:
    from servers.servers import Etcd

_KEYS_AT_ONCE = 100  # etcd takes 128 operations in a transaction by default
_LOGINS = 5  # for a token that is invalid again when it arrives


@dataclass(frozen=True)
class KeyValue:
    """A key and its current value."""

    key: str
    value: bytes
    version: int
    mod_revision: int


@dataclass(frozen=True)
class Change:
    """A change of a key; a delete has an empty value."""

    revision: int
    kind: str  # "put" or "delete"
    key: str
    value: bytes


class Login(NamedTuple):
    """A user of etcd (see its page "Role-based access control")."""

    user: str
    password: str


class EtcdClient:
    """Reads and writes keys and prefixes. Every call raises OSError if etcd does not answer.

    `login` is called each time, since a test may enable or disable authentication. A token is kept
    until etcd refuses it: to check a password costs etcd a tenth of a second of CPU.
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
        self._token: dict[str, str] = {}

    def get(self, prefix: str = "") -> list[KeyValue]:
        """Return all keys that start with `prefix`, in order, at one revision."""
        answer = self.post("/kv/range", _span(prefix))
        return [_key_value(found) for found in answer.get("kvs", ())]

    def get_all(self, keys: Sequence[str]) -> list[KeyValue]:
        """Return those of the keys that exist, each hundred of them at one revision."""
        found: list[KeyValue] = []
        for first in range(0, len(keys), _KEYS_AT_ONCE):
            reads = [
                {"request_range": {"key": _encode(key.encode())}}
                for key in keys[first : first + _KEYS_AT_ONCE]
            ]
            answer = self.post("/kv/txn", {"success": reads})
            for response in answer.get("responses", ()):
                found += [_key_value(kv) for kv in response["response_range"].get("kvs", ())]
        return found

    def count(self, prefix: str) -> int:
        """Return how many keys start with `prefix`."""
        return int(self._counted(prefix).get("count", 0))

    def revision(self) -> int:
        """Return the revision of the newest change."""
        return int(self._counted("\0")["header"]["revision"])

    def put(self, key: str, value: bytes, lease: str = "0") -> int:
        """Put a key, under a lease if one is given; returns the new revision."""
        body = {"key": _encode(key.encode()), "value": _encode(value), "lease": lease}
        return int(self.post("/kv/put", body)["header"]["revision"])

    def delete(self, prefix: str = "") -> int:
        """Delete all keys that start with `prefix`; returns the new revision."""
        return int(self.post("/kv/deleterange", _span(prefix))["header"]["revision"])

    def changes(self, first: int, last: int) -> Iterator[Change]:
        """Yield every change of every key from revision `first` to `last`, both included.

        `last` must exist. Every revision is a change of some key, so a watch on all keys always
        reaches it, while a watch on a prefix may stay silent. Raises RuntimeError if `first` is
        compacted, OSError if nothing comes.
        """
        if first > last:
            return
        with closing(self.watch(first)) as answers:
            for changes in answers:
                yield from (change for change in changes if change.revision <= last)
                # One answer has all changes of a revision.
                if changes and changes[-1].revision >= last:
                    return

    def watch(
        self, first: int, prefix: str = "", timeout_s: float | None = None
    ) -> Generator[list[Change]]:
        """Yield the changes under a prefix from revision `first` on, without end.

        Raises RuntimeError if etcd ends the watch, OSError if nothing comes.
        """
        request = {"create_request": {**_span(prefix), "start_revision": str(first)}}
        url, timeout_s = f"{self._url}/watch", timeout_s or self._timeout_s
        headers = self._headers()
        with open_json("POST", url, request, headers=headers, timeout_s=timeout_s) as stream:
            for line in stream:
                answer = json.loads(line)
                if "error" in answer or answer["result"].get("canceled"):
                    raise RuntimeError(f"etcd ended the watch: {answer}")
                yield [_change(event) for event in answer["result"].get("events", ())]

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        """Call a method of the gateway that this class has no method for."""
        url, timeout_s = self._url + path, self._timeout_s
        logins = 0
        while True:
            try:
                return fetch_json("POST", url, body, headers=self._headers(), timeout_s=timeout_s)
            except HTTPError as error:
                if logins == _LOGINS or not self._token:
                    raise
                error.close()
                logins, self._token = logins + 1, {}

    def _counted(self, prefix: str) -> Any:
        return self.post("/kv/range", {**_span(prefix), "count_only": True})

    def _headers(self) -> dict[str, str]:
        login = self._login()
        if login is None:
            self._token = {}
        elif not self._token:
            body = {"name": login.user, "password": login.password}
            url = f"{self._url}/auth/authenticate"
            answer = fetch_json("POST", url, body, timeout_s=self._timeout_s)
            self._token = {"Authorization": answer["token"]}
        return self._token


def _span(prefix: str) -> dict[str, str]:
    """Return the range of keys that start with `prefix`; a zero byte stands for all keys."""
    if not prefix:
        return {"key": _encode(b"\0"), "range_end": _encode(b"\0")}
    first = prefix.encode()
    return {"key": _encode(first), "range_end": _encode(first[:-1] + bytes([first[-1] + 1]))}


def _encode(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _decoded(kv: Mapping[str, str]) -> tuple[str, bytes]:
    key, value = (base64.b64decode(kv.get(name, "")) for name in ("key", "value"))
    return key.decode(errors="surrogateescape"), value


def _key_value(kv: Mapping[str, str]) -> KeyValue:
    return KeyValue(*_decoded(kv), int(kv["version"]), int(kv["mod_revision"]))


def _change(event: Mapping[str, Any]) -> Change:
    kv, kind = event["kv"], "delete" if event.get("type") == "DELETE" else "put"
    return Change(int(kv["mod_revision"]), kind, *_decoded(kv))


class Store:
    """Reads what services have written. History up to revision `since` is of earlier tests.

    Event ids are read from keys, so they have to be stored unchanged: plain, at most 128 bytes.
    """

    def __init__(self, etcd: Etcd, since: int = 0) -> None:
        self.client = EtcdClient(etcd.endpoint, login=lambda: etcd.login)
        self.since = since

    def clear(self) -> None:
        """Delete every key, and begin history after that. No service may be running."""
        self.since = self.client.delete()

    def records(self, service: str) -> dict[str, str]:
        """Return the states of a service's records by event id."""
        prefix = record_prefix(service)
        found = self.client.get(prefix)
        return {stored.key.removeprefix(prefix): _state(stored.value) for stored in found}

    def in_state(self, service: str, state: str) -> set[str]:
        return {id_ for id_, found in self.records(service).items() if found == state}

    def done(self, service: str) -> set[str]:
        return self.in_state(service, "done")

    def is_done(self, service: str, event_id: str) -> bool:
        """Return whether an event's record is done; reads no other record."""
        found = self.client.get_all([record_prefix(service) + event_id])
        return any(_state(stored.value) == "done" for stored in found)

    def steps(self, service: str) -> dict[str, list[str]]:
        """Return, by event id, the states of its record in turn; `gone` is a delete."""
        prefix = record_prefix(service)
        found: defaultdict[str, list[str]] = defaultdict(list)
        for change in self.history(prefix):
            state = _state(change.value) if change.kind == "put" else "gone"
            found[change.key.removeprefix(prefix)].append(state)
        return found

    def effects(self, prefix: str) -> dict[str, KeyValue]:
        """Return the effects by event id; a `version` above 1 is a double."""
        return {effect.key.removeprefix(prefix): effect for effect in self.client.get(prefix)}

    def history(self, *prefixes: str, first: int | None = None) -> list[Change]:
        """Return every change under the prefixes since the last `clear`, oldest first.

        After `Etcd.wipe` revisions begin again at 1: pass `first=1`. Raises RuntimeError if etcd
        has compacted one of the revisions.
        """
        begin = self.since + 1 if first is None else first
        changes = self.client.changes(begin, self.client.revision())
        return [change for change in changes if not prefixes or change.key.startswith(prefixes)]


def record_prefix(service: str) -> str:
    return f"/service/{service}/"


def _state(value: bytes) -> str:
    return str(json.loads(value)["state"])

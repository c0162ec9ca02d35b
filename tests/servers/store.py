"""What the services have written to etcd: records, orders, and how each came to be."""

import json
from collections import defaultdict
from dataclasses import dataclass

from servers.etcd import Change, EtcdClient, KeyValue
from servers.server import Etcd


@dataclass(frozen=True)
class Record:
    """A record as the contract describes it, with its key as etcd shows it."""

    state: str
    digest: str
    token: str
    time: object
    stored: KeyValue


class Store:
    """Reads etcd. `since` is the revision up to which history belongs to earlier tests.

    Ids are read back from keys, so they must be ones that the services store as they are: plain
    and at most 128 bytes long.
    """

    def __init__(self, etcd: Etcd, since: int = 0) -> None:
        self.client = EtcdClient(etcd.endpoint, login=lambda: etcd.login)
        self.since = since
        self._kept: list[Change] = []
        self._compacted = 0

    def clear(self) -> None:
        """Delete every key, and let history begin after that. No service may be running."""
        self.since = self.client.delete()

    def records(self, service: str) -> dict[str, Record]:
        """Return a service's records by event id, the claimed ones too."""
        prefix = record_prefix(service)
        return {
            stored.key.removeprefix(prefix): _record(stored) for stored in self.client.get(prefix)
        }

    def done(self, service: str) -> set[str]:
        """Return the ids whose record is done."""
        return {id_ for id_, record in self.records(service).items() if record.state == "done"}

    def is_done(self, service: str, event_id: str) -> bool:
        """Return whether this event's record is done, without reading the others."""
        found = self.client.get_all([record_prefix(service) + event_id])
        return any(_record(stored).state == "done" for stored in found)

    def steps(self, service: str) -> dict[str, list[str]]:
        """Return by event id the states that its record has gone through; `gone` is a delete."""
        prefix = record_prefix(service)
        found: defaultdict[str, list[str]] = defaultdict(list)
        for change in self.history(prefix):
            state = json.loads(change.value)["state"] if change.kind == "put" else "gone"
            found[change.key.removeprefix(prefix)].append(state)
        return found

    def effects(self, prefix: str) -> dict[str, KeyValue]:
        """Return effects by event id; a `version` over 1 is a double."""
        return {effect.key.removeprefix(prefix): effect for effect in self.client.get(prefix)}

    def orders(self) -> dict[str, KeyValue]:
        """Return the order documents by event id."""
        return self.effects("/orders/")

    def history(self, *prefixes: str, first: int | None = None) -> list[Change]:
        """Return every change since the last `clear` (or from revision `first`), oldest first.

        With prefixes, only of the keys that start with one of them. After `Etcd.wipe` the
        revisions begin again: pass `first=1`. Raises RuntimeError if etcd has compacted them.
        """
        begin = self.since + 1 if first is None else first
        changes = [change for change in self._kept if change.revision >= begin]
        changes += self.client.changes(max(begin, self._compacted + 1), self.client.revision())
        return [change for change in changes if not prefixes or change.key.startswith(prefixes)]

    def keep_history(self) -> int:
        """Keep all changes so far, so that etcd can be compacted to the revision returned."""
        revision = self.client.revision()
        self._kept += self.client.changes(max(self.since, self._compacted) + 1, revision)
        self._compacted = revision
        return revision


def record_prefix(service: str) -> str:
    """Return the prefix of a service's record keys."""
    return f"/service/{service}/"


def _record(stored: KeyValue) -> Record:
    fields: dict[str, object] = json.loads(stored.value)
    return Record(
        state=str(fields["state"]),
        digest=str(fields["digest"]),
        token=str(fields["token"]),
        time=fields["time"],
        stored=stored,
    )

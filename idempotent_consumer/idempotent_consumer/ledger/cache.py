"""The bounded memory of what is done: saves the question, never answers it with no."""

from __future__ import annotations

from collections.abc import Iterable

MAX_ENTRIES = 1_000_000


def fingerprint(digest: str) -> bytes:
    """Return the 16 bytes that stand for a record that is done: its digest covers the id too."""
    try:
        return bytes.fromhex(digest[2:])
    except ValueError:
        return digest.encode()  # Of a record that nobody here wrote, and no event has it.


class Cache:
    """Fingerprints of done records, in two generations: when one is full the older one goes.

    A fingerprint that has gone costs a question to etcd. One that is there means that a record
    with this digest is done: another body under the same id is no hit.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._generation_size = max(1, max_entries // 2)
        self._young: set[bytes] = set()
        self._old: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def holds(self, digest: str) -> bool:
        """Return whether this record is known to be done."""
        entry = fingerprint(digest)
        return entry in self._young or entry in self._old

    def add(self, digest: str) -> None:
        """Remember a record that is done."""
        self._young.add(fingerprint(digest))
        self._age()

    def add_all(self, fingerprints: Iterable[bytes]) -> None:
        """Remember many."""
        self._young.update(fingerprints)
        self._age()

    def _age(self) -> None:
        if len(self._young) >= self._generation_size:
            self._young, self._old = set(), self._young

    def discard_all(self, fingerprints: Iterable[bytes]) -> None:
        """Forget records that etcd has deleted."""
        for entry in fingerprints:
            self._young.discard(entry)
            self._old.discard(entry)

    def clear(self) -> None:
        """Forget everything."""
        self._young, self._old = set(), set()

"""The bounded memory of what is done: saves the question, never answers it with no."""

from __future__ import annotations

from collections.abc import Iterable

MAX_ENTRIES = 1 << 21

_ENTRY_BYTES = 16
_ENTRIES_A_BLOCK = 32
_MOST_BLOCKS = 1 << 16
"""As many as two bytes can tell apart."""
_NOBODYS = b"no event has it."
"""For the digest of a record that nobody here wrote."""


def fingerprint(digest: str) -> bytes:
    """Return the 16 bytes that stand for a record that is done: its digest covers the id too."""
    try:
        entry = bytes.fromhex(digest[2:])
    except ValueError:
        return _NOBODYS
    return entry if len(entry) == _ENTRY_BYTES else _NOBODYS


class Cache:
    """Fingerprints of done records, ``max_entries`` at the most; the younger ones stay.

    A fingerprint that has gone costs a question to etcd. One that is there means that a record
    with this digest is done: another body under the same id is no hit.

    They stand side by side in blocks of bytes, the oldest first: each in the block that its first
    two bytes name, which are as good as random. A block that is full forgets its oldest, so a
    few are forgotten before all blocks are full. A million take 26 bytes each (measured), where
    they took 114 as the objects of a set.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self.max_entries = max_entries
        blocks = 1 << max(0, (max_entries // _ENTRIES_A_BLOCK).bit_length() - 1)
        self._mask = min(blocks, _MOST_BLOCKS) - 1
        self._block_bytes = _ENTRY_BYTES * max(1, max_entries // (self._mask + 1))
        self.clear()

    def __len__(self) -> int:
        return sum(map(len, self._blocks)) // _ENTRY_BYTES

    def holds(self, digest: str) -> bool:
        """Return whether this record is known to be done."""
        entry = fingerprint(digest)
        block = self._blocks[(entry[0] | entry[1] << 8) & self._mask]
        # Most are new: this stands in the way of each event.
        return block.find(entry) >= 0 and _position(block, entry) >= 0

    def add(self, digest: str) -> None:
        """Remember a record that is done."""
        self._add(fingerprint(digest))

    def add_all(self, fingerprints: Iterable[bytes]) -> None:
        """Remember many."""
        for entry in fingerprints:
            self._add(entry)

    def _add(self, entry: bytes) -> None:
        number = (entry[0] | entry[1] << 8) & self._mask
        block = self._blocks[number]
        if block.find(entry) >= 0 and _position(block, entry) >= 0:
            return
        if len(block) == self._block_bytes:
            block = block[_ENTRY_BYTES:]
        self._blocks[number] = block + entry

    def discard_all(self, fingerprints: Iterable[bytes]) -> None:
        """Forget records that etcd has deleted."""
        for entry in fingerprints:
            number = (entry[0] | entry[1] << 8) & self._mask
            block = self._blocks[number]
            position = _position(block, entry)
            if position >= 0:
                self._blocks[number] = block[:position] + block[position + _ENTRY_BYTES :]

    def clear(self) -> None:
        """Forget everything."""
        self._blocks = [b""] * (self._mask + 1)


def _position(block: bytes, entry: bytes) -> int:
    """Return where in a block an entry stands, or a negative number.

    The end of one and the beginning of the next can look like it too.
    """
    position = block.find(entry)
    while position > 0 and position % _ENTRY_BYTES:
        position = block.find(entry, position + 1)
    return position

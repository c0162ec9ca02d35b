"""A hosts file for one service: names that do not resolve yet, or that move later.

The service's process enters a mount namespace of its own, in which /etc/hosts is the test's file.
Its resolvers (Python's, gRPC's) read that file, and other processes do not.
"""

import os
from pathlib import Path

_PRELUDE = """
import ctypes
import os

NEWNS, NEWUSER, BIND, REC, PRIVATE = 0x20000, 0x10000000, 0x1000, 0x4000, 0x40000
libc = ctypes.CDLL(None, use_errno=True)


def done(result, what):
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


# Other users than root may mount in a user namespace of their own.
done(libc.unshare(NEWNS if os.geteuid() == 0 else NEWNS | NEWUSER), "unshare")
done(libc.mount(b"none", b"/", None, REC | PRIVATE, None), "mount --make-rprivate /")
done(libc.mount({hosts!r}, b"/etc/hosts", None, BIND, None), "mount --bind /etc/hosts")
"""


class Hosts:
    """The hosts file of the services that start with its settings."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / "hosts"
        self._addresses: dict[str, str] = {}
        self._write()

    def settings(self) -> dict[str, str]:
        """Return the environment variable that gives a service this hosts file."""
        return prelude(self._directory, _PRELUDE.format(hosts=str(self._file).encode()))

    def point(self, name: str, address: str) -> None:
        """Let a name resolve to an address from now on."""
        self._addresses[name] = address
        self._write()

    def _write(self) -> None:
        lines = ["127.0.0.1 localhost"]
        lines += [f"{address} {name}" for name, address in self._addresses.items()]
        # In place: the mount shows this inode, not a new file of the same name.
        self._file.write_text("\n".join(lines) + "\n")


def prelude(directory: Path, code: str) -> dict[str, str]:
    """Return the environment variable that makes a service run code first, as `sitecustomize`."""
    (directory / "sitecustomize.py").write_text(code)
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(directory), inherited)))}

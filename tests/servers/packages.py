"""Debian's packages of the servers, for a machine without Docker."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Debian's own rabbitmq-server on the PATH changes to the user rabbitmq, and then cannot write
# into our directory; the script it wraps runs as whoever calls it.
RABBITMQ_BIN = Path("/usr/lib/rabbitmq/bin")

_PROGRAMS = {
    "rabbitmq-server": str(RABBITMQ_BIN / "rabbitmq-server"),
    "etcd-server": "etcd",
    "etcd-client": "etcdctl",
}
_POLICY = Path("/usr/sbin/policy-rc.d")


class ServersUnavailableError(Exception):
    """There are no servers to be had; the message is one line that says what to do about it."""


def ensure_installed() -> None:
    """Install whichever of the packages are missing, if we are root.

    Raises ServersUnavailableError if we may not, or if the installation fails.
    """
    missing = _missing()
    if not missing:
        return
    names = " ".join(missing)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ServersUnavailableError(
            f"Docker does not answer, and these packages are missing: {names}. Start Docker, or "
            f"run `sudo apt-get install {names}` (Debian 13)."
        )
    print(f"installing {names} with apt-get (Docker does not answer)", file=sys.stderr, flush=True)
    with _no_service_start():
        _apt_get("update", "-qq")
        _apt_get("install", "-y", "-qq", "--no-install-recommends", *missing)
    if still := _missing():
        raise ServersUnavailableError(f"apt-get ended well, but {' '.join(still)} is still missing")


def _missing() -> list[str]:
    return [name for name, program in _PROGRAMS.items() if shutil.which(program) is None]


def _apt_get(*arguments: str) -> None:
    result = subprocess.run(
        ["apt-get", *arguments],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
        raise ServersUnavailableError(f"apt-get {arguments[0]} failed: {' '.join(reason)}")


@contextmanager
def _no_service_start() -> Iterator[None]:
    """Keep the packages from starting their servers on the standard ports.

    Debian Policy, "Running initscripts": a policy-rc.d that exits 101 forbids it. One that is
    there already belongs to the administrator and stays.
    """
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)

"""Ports for servers that are stopped and started again under the feet of their clients."""

import random
import socket

# Below the range that Linux gives to outgoing connections (from 32768). A port inside it can be
# lost while its server is down: a client that retries on loopback may be given that very port
# as its source, connects to itself, and the server then finds its address in use.
_LOWEST, _HIGHEST = 20_000, 32_000

_taken: set[int] = set()


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on and that was not given out before.

    Raises RuntimeError when a thousand tries find none.
    """
    for _ in range(1000):
        port = random.randint(_LOWEST, _HIGHEST)
        if port not in _taken and _nothing_listens(port):
            _taken.add(port)
            return port
    raise RuntimeError(f"no free port between {_LOWEST} and {_HIGHEST}")


def _nothing_listens(port: int) -> bool:
    # All addresses, not only loopback: Docker publishes on all of them.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True

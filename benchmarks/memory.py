"""The memory of a process, as the kernel counts it."""

import re
from pathlib import Path


def resident_bytes(pid: int) -> int:
    """Return a process's resident size (proc(5), VmRSS)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise ProcessLookupError(f"process {pid} has no resident size: it has ended")
    return 1024 * int(found[1])

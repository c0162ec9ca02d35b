"""Whether a Docker engine answers."""

import shutil
import subprocess


def docker_available(timeout_s: float = 10.0) -> bool:
    """Return whether `docker info` answers: the command can be there without an engine."""
    if shutil.which("docker") is None:
        return False
    try:
        result = subprocess.run(
            ["docker", "info", "--format", "{{.ServerVersion}}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    # An unreachable engine is an error; older clients print it and exit 0 with an empty version.
    return result.returncode == 0 and bool(result.stdout.strip())

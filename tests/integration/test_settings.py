"""A wrong setting is explained in one line on stderr, with exit code 2 and no traceback."""

import subprocess
import sys

import pytest

from servers.servers import REPOSITORY
from servers.services import environment


def run(name: str, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a project of the repository to its end, with these settings and no others."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY / name,
        env={**environment(), **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_explained(ended: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Raise AssertionError unless it ended with code 2 and one line that holds these parts."""
    assert ended.returncode == 2, ended
    assert ended.stdout == ""
    assert ended.stderr.endswith("\n")
    assert ended.stderr.count("\n") == 1
    for part in parts:
        assert part in ended.stderr


WRONG = [
    ("order", "RABBITMQ_URL", "amqp://guest:hunter2@localhost:notaport/"),
    ("notify", "BATCH_SIZE", "0"),
    ("notify", "NOTIFY_URL", "ftp://localhost/"),
]
"""Those of the library are in its unit tests, each of them."""


@pytest.mark.parametrize(("service", "variable", "value"), WRONG)
def test_a_wrong_setting_is_named(service: str, variable: str, value: str) -> None:
    """The line names the service and the variable, and gives no password away."""
    ended = run(service, "-m", service, **{variable: value})
    assert_explained(ended, f"{service}: ", variable)
    assert "hunter2" not in ended.stderr


@pytest.mark.parametrize(
    "rest", [":x/", "/?ssl_options=[]", "/?ssl_options={", "/?ssl_options={'ca_certs':'/no/such'}"]
)
def test_example1_explains_a_wrong_url(rest: str) -> None:
    """The bare program does as the services do."""
    ended = run("example1", "example1.py", RABBITMQ_URL=f"amqp://guest:hunter2@localhost{rest}")
    assert_explained(ended, "RABBITMQ_URL")
    assert "hunter2" not in ended.stderr

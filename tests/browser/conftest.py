"""The browser, and where pictures go."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

from browser.chromium import Chromium
from servers.servers import REPOSITORY

_ARGUMENTS = [
    "--headless=new",
    "--no-proxy-server",
    "--hide-scrollbars",
    # A page must work without the outside world: no other name resolves.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """Start one browser for the session."""
    driver = shutil.which("chromedriver")
    assert driver, "chromedriver is missing: make browser-test installs it"
    options = ChromeOptions()
    # Chromium refuses to run its sandbox as root.
    for argument in [*_ARGUMENTS, *["--no-sandbox"] * (os.geteuid() == 0)]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options, ChromeService(driver)) as chrome:
        yield Chromium(chrome)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory for pictures: docs with PICTURES=1, else a temporary one."""
    if os.environ.get("BROWSER_PICTURES"):
        return REPOSITORY / "docs"
    return tmp_path_factory.mktemp("pictures")

"""The browser, and where pictures go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser.chromium import Chromium, start_chromium
from servers.servers import REPOSITORY


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """Start one browser for the session."""
    with start_chromium() as running:
        yield running


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the directory for pictures: the pages' own with PICTURES=1, else one to forget."""
    if os.environ.get("BROWSER_PICTURES"):
        return REPOSITORY / "docs"
    return tmp_path_factory.mktemp("pictures")

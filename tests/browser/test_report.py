"""The demo's last report can be read on a phone and on a desk, and needs nothing from outside."""

from pathlib import Path

import pytest

from browser.chromium import Chromium
from servers.servers import REPOSITORY

REPORT = REPOSITORY / "demo-report.html"
PHONE, DESK = (390, 844), (1200, 900)

_DRAWN = """
return Array.from(document.querySelectorAll("svg path.processed:not(.area)"),
                  (line) => line.getBBox().height)
"""


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_it_fits_and_is_whole(chromium: Chromium, size: tuple[int, int]) -> None:
    chromium.open(REPORT.as_uri(), *size)
    assert chromium.errors() == []
    assert chromium.overflow() == 0
    checks = chromium.run("return document.querySelectorAll('.check.passed').length")
    heading = chromium.run("return document.querySelector('h1').textContent")
    assert heading == f"All {checks} checks passed"
    heights = chromium.run(_DRAWN)
    assert len(heights) == 2
    assert min(heights) > 0


def test_its_picture_is_taken(chromium: Chromium, pictures: Path) -> None:
    chromium.open(REPORT.as_uri(), *PHONE, scale=2)
    chromium.picture(pictures / "report.png")

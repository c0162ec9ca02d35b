"""The demo's last report can be read on a phone and on a desk, and needs nothing from outside.

The last test checks that the browser notices the faults of a page.
"""

import struct
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
    width, height = struct.unpack(">II", (pictures / "report.png").read_bytes()[16:24])
    assert (width, height) == (2 * PHONE[0], 2 * PHONE[1])


@pytest.mark.parametrize(
    ("body", "errors", "overflow"),
    [
        ("<p>Hello", 0, 0),
        ('<p style="width: 400px; margin: -8px">Hello', 0, 10),
        ("<script>nowhere.to()</script>", 1, 0),
        ('<img src="gone.png">', 1, 0),
        ('<img src="http://outside.invalid/">', 1, 0),
    ],
)
def test_the_faults_of_a_page_are_noticed(
    chromium: Chromium, tmp_path: Path, body: str, errors: int, overflow: int
) -> None:
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><meta name="viewport" content="width=device-width">{body}')
    chromium.open(page.as_uri(), *PHONE)
    assert chromium.overflow() == overflow
    assert len(chromium.errors()) == errors
    assert chromium.errors() == []

"""The browser says what is wrong with a page, and draws it as large as it is asked to."""

import struct
from pathlib import Path

import pytest

from browser.chromium import Chromium, screenshot

PHONE = (390, 844)


def _page(directory: Path, body: str) -> str:
    page = directory / "page.html"
    page.write_text(f'<!doctype html><meta name="viewport" content="width=device-width">{body}')
    return page.as_uri()


def test_a_page_without_faults_has_none(chromium: Chromium, tmp_path: Path) -> None:
    chromium.open(_page(tmp_path, "<p>Hello"), *PHONE)
    assert chromium.errors() == []
    assert chromium.overflow() == 0


def test_a_page_that_is_too_wide_is_noticed(chromium: Chromium, tmp_path: Path) -> None:
    chromium.open(_page(tmp_path, '<p style="width: 400px; margin: -8px">Hello'), *PHONE)
    assert chromium.overflow() == 10


@pytest.mark.parametrize(
    "fault",
    [
        "<script>nowhere.to()</script>",
        '<img src="gone.png">',
        '<img src="http://outside.invalid/">',
    ],
)
def test_what_a_page_lacks_is_noticed(chromium: Chromium, tmp_path: Path, fault: str) -> None:
    chromium.open(_page(tmp_path, fault), *PHONE)
    assert len(chromium.errors()) == 1
    assert chromium.errors() == []


def test_a_picture_is_as_large_as_asked(tmp_path: Path) -> None:
    screenshot(_page(tmp_path, "<p>Hello"), *PHONE, tmp_path / "page.png", scale=2)
    png = (tmp_path / "page.png").read_bytes()
    assert struct.unpack(">II", png[16:24]) == (780, 1688)

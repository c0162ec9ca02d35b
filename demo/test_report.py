from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from demo.acts import play_all
from demo.chart import Axes, Band, chart
from demo.fake_stage import FakeStage
from demo.play import CheckFailedError, Play
from demo.report import Run, page, run_of, write_report
from demo.screen import Screen
from demo.watch import watch

HOSTILE = """</pre></style><script>alert("1")</script><img src=x onerror='x'>&amp;"""
SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)
NAMESPACE = "{http://www.w3.org/2000/svg}"
VOID = {"meta"}


class Outline(HTMLParser):
    """Collects tags and text, and fails where a tag is not closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run() -> Run:
    return played(FakeStage())


def played(stage: FakeStage) -> Run:
    play = Play(stage, Screen())
    with watch(stage) as watching:
        play_all(play)
    return run_of(play, watching)


def test_the_report_has_every_check_command_and_reason(run: Run) -> None:
    text = Outline(page(run)).text
    assert "All 42 checks passed" in text
    told = [part for entry in run.story for part in (entry.text, entry.more)]
    assert [part for part in told if part not in text] == []
    assert text.count("✓") == 42


def test_a_failed_check_is_in_it_with_the_log() -> None:
    play = Play(FakeStage(miscounts=True), Screen())
    with watch(play.stage) as watching, pytest.raises(CheckFailedError):
        play_all(play)
    play.screen.log("The last lines:", HOSTILE)
    outline = Outline(page(run_of(play, watching)))
    assert "A check failed, after 1 that passed" in outline.text
    assert "orders_processed 0 -> 2, but should be 1" in outline.text
    assert HOSTILE in outline.text
    assert "✗" in outline.text


def test_hostile_text_stays_text() -> None:
    stage = FakeStage()
    stage.place = HOSTILE
    play = Play(stage, Screen())
    with watch(stage) as watching:
        play.screen.heading(HOSTILE, HOSTILE)
        play.screen.say(HOSTILE)
        play.screen.typed(HOSTILE)
        play.screen.check(True, HOSTILE, HOSTILE)
        play.screen.check(False, HOSTILE)
        play.screen.log(HOSTILE, HOSTILE)
    outline = Outline(page(run_of(play, watching)))
    assert outline.text.count(HOSTILE) == 10
    assert not {"script", "img"} & set(outline.tags)


def test_the_report_asks_nobody_for_anything(run: Run) -> None:
    """It can be sent to a phone and read without a network."""
    outline = Outline(page(run))
    assert not {"script", "link", "img", "iframe", "object"} & set(outline.tags)
    assert not {"src", "href", "srcset", "style"} & {name for name, _ in outline.attributes}
    assert not re.search(r"@import|url\(", page(run))


def test_its_graphs_are_well_formed_and_say_what_they_show(run: Run) -> None:
    counted = {"order": "67 processed and 34 skipped", "notify": "68 processed and 33 skipped"}
    pictures = SVG.findall(page(run))
    assert len(pictures) == 2
    for picture, service in zip(pictures, ("order", "notify"), strict=True):
        svg = ET.fromstring(picture)
        assert svg.get("role") == "img"
        labels = [svg.find(f"{NAMESPACE}{name}") for name in ("title", "desc")]
        assert [label.get("id") for label in labels if label is not None] == (
            svg.get("aria-labelledby") or ""
        ).split()
        assert service in (svg.findtext(f"{NAMESPACE}title") or "")
        assert counted[service] in (svg.findtext(f"{NAMESPACE}desc") or "")


def test_a_stage_that_answers_no_more_still_has_its_samples() -> None:
    stage = FakeStage()
    play = Play(stage, Screen())
    with watch(stage) as watching:
        play_all(play)
        watching.look()
        stage.answers = False
    report = page(run_of(play, watching))
    assert "67 processed and 34 skipped" in report
    assert "(they did not tell their versions)" in report


def test_an_open_circuit_breaker_is_shaded_where_there_was_one(run: Run) -> None:
    legend = "circuit breaker open: events are held"
    whole, broken = (
        page(replace(run, samples=[replace(run.samples[-1], breakers={"notify": is_open})]))
        for is_open in (0, 1)
    )
    assert legend not in whole
    assert Outline(broken).text.count(legend) == 1
    assert [SVG.findall(broken)[n].count('class="open area"') for n in (0, 1)] == [0, 1]


def test_a_line_is_drawn_from_its_zero_to_the_end_in_steps() -> None:
    axes = Axes([Band("Act 1", 100.0), Band("Act 2", 105.0)], end=110.0, top=4)
    svg = ET.fromstring(chart("one", "t", "d", axes, {"processed": [(90, 0), (105, 2), (120, 4)]}))
    paths = [
        path.get("d") for path in svg.iter(f"{NAMESPACE}path") if path.get("class") == "processed"
    ]
    assert paths == ["M26 188.0H26.0V188.0H210.0V104.0H394.0V20.0H394.0"]
    assert [text.text for text in svg.iter(f"{NAMESPACE}text")][:2] == ["Act 1", "Act 2"]


def test_an_act_without_room_for_its_name_has_its_number() -> None:
    axes = Axes([Band("Act 1", 0.0), Band("Act 2", 1.0)], end=100.0, top=1)
    svg = ET.fromstring(chart("one", "t", "d", axes, {}))
    assert [text.text for text in svg.iter(f"{NAMESPACE}text")][:2] == ["1", "Act 2"]


def test_where_it_is_or_why_it_is_not_is_one_line(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "demo-report.html"
    assert write_report(run, path) == f"Report: {path}"
    assert path.read_text(encoding="utf-8") == page(run)
    assert write_report(run, tmp_path / "absent" / "x").startswith("The report cannot be written: ")

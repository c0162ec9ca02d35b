import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import cast

import pytest

from demo.fake_stage import FakeStage, played
from demo.play import Play
from demo.report import Axes, page, write_report
from demo.screen import Screen
from demo.steps import PlayFailedError
from demo.watch import Sample, Watch

HOSTILE = """</pre></style><script>alert("1")</script><img src=x onerror='x'>&amp;"""
SVG = "{http://www.w3.org/2000/svg}"


def parsed(report: str) -> tuple[ET.Element, str]:
    """Return the page, which must be well-formed XML, and its text."""
    root = ET.fromstring(report)
    return root, "".join(root.itertext())


def test_the_report_has_every_check_command_and_reason() -> None:
    play, watching = played()
    _, text = parsed(page(play, watching))
    assert "All 42 checks passed" in text
    told = [part for entry in play.screen.story for part in (entry.text, entry.more)]
    assert [part for part in told if part not in text] == []
    assert text.count("✓") == 42


def test_a_failed_check_is_in_it_with_the_log() -> None:
    play = Play(FakeStage(miscounts=True), Screen())
    with pytest.raises(PlayFailedError) as failed:
        played(play)
    play.screen.check(False, str(failed.value))
    play.screen.log("The last lines:", HOSTILE)
    _, text = parsed(page(play, Watch(play.stage)))
    assert "A check failed, after 1 that passed" in text
    assert "orders_processed 0 -> 2, but should be 1" in text
    assert HOSTILE in text
    assert "✗" in text


def test_hostile_text_is_shown_as_text() -> None:
    play = Play(FakeStage(), Screen())
    play.stage.place = HOSTILE
    play.screen.heading(HOSTILE, HOSTILE)
    play.screen.say(HOSTILE)
    play.screen.typed(HOSTILE)
    play.screen.check(True, HOSTILE, HOSTILE)
    play.screen.check(False, HOSTILE)
    play.screen.log(HOSTILE, HOSTILE)
    root, text = parsed(page(play, Watch(play.stage)))
    assert text.count(HOSTILE) == 10
    assert not {"script", "img"} & {element.tag for element in root.iter()}


def test_the_report_can_be_read_without_a_network() -> None:
    report = page(*played())
    elements = list(parsed(report)[0].iter())
    assert not {"script", "link", "img", "iframe", "object"} & {each.tag for each in elements}
    attributes = {name for element in elements for name in element.attrib}
    assert not {"src", "href", "srcset", "style"} & attributes
    assert not re.search(r"@import|url\(", report)


def test_its_graphs_say_what_they_show() -> None:
    counted = {"order": "67 processed and 34 skipped", "notify": "68 processed and 33 skipped"}
    for svg, service in zip(parsed(page(*played()))[0].iter(f"{SVG}svg"), counted, strict=True):
        assert svg.get("role") == "img"
        title, text = svg.find(f"{SVG}title"), svg.find(f"{SVG}desc")
        assert title is not None
        assert text is not None
        assert svg.get("aria-labelledby") == f"{title.get('id')} {text.get('id')}"
        assert service in (title.text or "")
        assert counted[service] in (text.text or "")


def test_the_samples_are_shown_even_if_the_servers_have_gone() -> None:
    play, watching = played()
    cast("FakeStage", play.stage).answers = False
    watching.look()
    report = page(play, watching)
    assert "67 processed and 34 skipped" in report
    assert "(they did not tell their versions)" in report


@pytest.mark.parametrize("is_open", [0, 1])
def test_an_open_circuit_breaker_is_shaded_where_there_was_one(is_open: int) -> None:
    play, watching = played(acts="1")
    at, readings = watching.samples[-1]
    reading = readings["notify"]._replace(open=is_open)
    watching.samples[:] = [Sample(at, {**readings, "notify": reading})]
    root, text = parsed(page(play, watching))
    assert text.count("circuit breaker open: events are held") == is_open
    shaded = [svg.findall(f"{SVG}path[@class='open area']") for svg in root.iter(f"{SVG}svg")]
    assert [len(areas) for areas in shaded] == [0, is_open]


def test_a_line_is_drawn_in_steps_from_zero_to_the_end() -> None:
    axes = Axes([("Act 1", 100.0), ("Act 2", 105.0)], end=110.0, top=4)
    assert axes.path([(90, 0), (105, 2), (120, 4)]) == (
        "M26 188.0H26.0V188.0H210.0V104.0H394.0V20.0H394.0"
    )
    assert [name for name, _, _ in axes.bands()] == ["Act 1", "Act 2"]


def test_an_act_without_room_for_its_name_has_its_number() -> None:
    axes = Axes([("Act 1", 0.0), ("Act 2", 1.0)], end=100.0, top=1)
    assert [name for name, _, _ in axes.bands()] == ["1", "Act 2"]


def test_one_line_says_where_it_is_or_why_it_is_missing(tmp_path: Path) -> None:
    path, run = tmp_path / "demo-report.html", played(acts="1")
    assert write_report(*run, path) == f"Report: {path}"
    assert "All 3 checks passed" in path.read_text(encoding="utf-8")
    assert write_report(*run, tmp_path / "absent" / "x").startswith(
        "The report cannot be written: "
    )

import io
import os
import subprocess
import sys
import termios

import pytest
from rich.console import Console

from demo.fake_stage import FakeStage, played
from demo.panel import panel
from demo.play import Play
from demo.screen import Screen, open_screen
from demo.stage import Setup
from demo.watch import Watch
from servers.wait import eventually

ACT_2 = """
Act 2: notify is down, and nothing is lost
Producer and order do not notice, and nobody has to repair anything afterwards.
  $ ENABLE_ETCD=false up
  ✓ both services are ready, and their counters show as 0
  $ stop notify
  $ curl -i\\
      -d'order-2'
  ✓ order consumes it: orders_processed 0 -> 1
  ✓ the queue notify keeps 1 event for it
  ✓ notify does not: notifications_processed stays at 0
  $ start notify
  ✓ notify is back and consumes it: notifications_processed 0 -> 1
"""


def terminal(width: int = 80, height: int = 24, *, force: bool | None = True) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=force, width=width, height=height, _environ={}
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines_of(play: Play, watch: Watch) -> list[str]:
    """Draw the panel as an 80-column terminal shows it."""
    console = terminal(force=None)
    console.print(panel(play, watch))
    return written(console).splitlines()


def test_off_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    played(Play(FakeStage(), open_screen()), "2")
    assert capsys.readouterr().out == ACT_2


def test_a_live_screen_keeps_the_whole_story_above_its_panel() -> None:
    console = terminal()
    play, _ = played(Play(FakeStage(), Screen(console)))
    shown = written(console)
    told = [entry.text for entry in play.screen.story if entry.kind in {"heading", "passed"}]
    assert len(told) == 5 + 42
    assert [text for text in told if text not in shown] == []
    assert "\033[?1049h" not in shown, "the other screen of a terminal has no history"
    assert shown.rindex("\033[?25h") > shown.rindex("\033[?25l"), "the cursor is hidden"


def test_the_panel_shows_each_service_and_why_copies_are_skipped() -> None:
    lines = lines_of(*played(acts="123"))
    order, notify = (next(line for line in lines if name in line) for name in ("order ", "notify "))
    assert order.split()[1:9:2] == ["order", "6", "3", "0"]
    assert notify.split()[1:9:2] == ["notify", "6", "3", "0"]
    assert any("order-3: etcd holds its record" in line for line in lines)
    assert len(lines) == 8, "it leaves two thirds of a small terminal to the story"
    assert {len(line) for line in lines} == {80}


def test_the_panel_shows_that_a_circuit_breaker_is_open() -> None:
    play = Play(FakeStage(), Screen())
    with Watch(play.stage) as watch:
        play.run_services(Setup(enable_etcd=True, calls=True))
        play.do(play.stage.stop("receiver"))
        play.publish("order-4")
    lines = lines_of(play, watch)
    (notify,) = [line for line in lines if "breaker open" in line]
    assert notify.split()[:4] == ["│", "notify", "breaker", "open"]
    assert any("held" in line and "one at a time is called" in line for line in lines)
    assert {len(line) for line in lines} == {80}


def test_a_number_that_cannot_be_read_is_a_dash() -> None:
    stage = FakeStage()
    stage.answers = False
    play, watch = played(Play(stage, Screen()), acts="")
    assert len(watch.samples) >= 1
    rows = [line for line in lines_of(play, watch) if "not started" in line]
    assert [row.count(" - ") for row in rows] == [3, 3]


def test_before_the_first_sample_there_is_a_panel() -> None:
    play = Play(FakeStage(), Screen())
    assert len(lines_of(play, Watch(play.stage))) == 8


@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 6), (20, 3)])
def test_a_tiny_terminal_is_no_error(width: int, height: int) -> None:
    play, _ = played(Play(FakeStage(), Screen(terminal(width, height))))
    assert play.passed == 42


def test_the_demo_goes_on_when_nobody_reads_its_output() -> None:
    """What it has started must still be taken down."""
    program = (
        "from demo.screen import Screen; screen = Screen()\n"
        "for _ in range(3): screen.say('nobody reads this')\n"
        "print(len(screen.story), file=__import__('sys').stderr)"
    )
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=True)
    assert ended.stderr == b"3\n"


def test_each_command_is_shown_and_held_before_it_is_done() -> None:
    held: list[tuple[str, str]] = []
    screen, stage = Screen(), FakeStage()

    def hold() -> None:
        held.append((screen.story[-1].text, stage.states["notify"]))

    played(Play(stage, screen, hold), "2")
    commands = [entry.text for entry in screen.story if entry.kind == "typed"]
    assert [command for command, _ in held] == commands
    assert ("stop notify", "running") in held


def test_enter_is_read_and_not_shown() -> None:
    ours, terminal = os.openpty()
    before = termios.tcgetattr(terminal)

    def is_silent() -> None:
        assert not termios.tcgetattr(terminal)[3] & termios.ECHO

    command = [sys.executable, "-c", "from demo.screen import wait_for_enter; wait_for_enter()"]
    # A session of its own has no /dev/tty, so that it reads from our terminal.
    with subprocess.Popen(command, stdin=terminal, start_new_session=True) as waiting:
        try:
            eventually(is_silent)
            os.write(ours, b"\n")
            assert waiting.wait(10) == 0
        finally:
            waiting.kill()
    assert termios.tcgetattr(terminal) == before
    os.set_blocking(ours, False)
    with pytest.raises(BlockingIOError):  # Nothing was echoed.
        os.read(ours, 1)
    os.close(ours)
    os.close(terminal)

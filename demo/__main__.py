"""Play the demo. Exit code 0: every check passed, 1: one failed, 2: the demo cannot run."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from demo.acts import ACTS, Act
from demo.compose import compose_stage
from demo.interrupt import run_program
from demo.local import local_stage
from demo.panel import panel
from demo.play import Play
from demo.report import write_report
from demo.screen import Screen, open_screen, wait_for_enter
from demo.stage import Stage
from demo.steps import CannotPlayError, PlayFailedError
from demo.watch import Watch
from servers.servers import docker_available

_LOG_LINES = 15


def main() -> int:
    """Choose the stage, play, and return the exit code: 0 or 1."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--act", choices=ACTS, help="play this act alone")
    parser.add_argument("--step", action="store_true", help="wait for Enter before each command")
    options = parser.parse_args()
    if options.step and not sys.stdin.isatty():
        parser.error("--step waits for Enter, and standard input is no terminal")
    screen = open_screen()
    acts = [ACTS[options.act]] if options.act else list(ACTS.values())
    with compose_stage(screen) if docker_available() else local_stage(screen) as stage:
        code, report = _play(stage, screen, acts, step=options.step)
    screen.say(report)
    return code


def _play(stage: Stage, screen: Screen, acts: Sequence[Act], *, step: bool) -> tuple[int, str]:
    """Play the acts. Return the exit code, and a sentence that says where the report is."""
    play = Play(stage, screen, wait_for_enter) if step else Play(stage, screen)
    if step:
        screen.say("Enter does each command once it is shown.")
    with Watch(stage) as watching, screen.watching(partial(panel, play, watching)):
        failed = _first_failure(play, watching, acts)
    if failed:
        lines = stage.log(failed).rstrip().splitlines()[-_LOG_LINES:]
        screen.log(f"The last lines of {failed}'s log:", "\n".join(lines or ["(nothing)"]))
    report = write_report(play, watching)
    screen.say("")
    if failed:
        screen.check(False, f"a check failed, after {play.passed} that passed")
        return 1, report
    screen.check(True, f"all {play.passed} checks passed")
    screen.say(stage.farewell)
    return 0, report


def _first_failure(play: Play, watching: Watch, acts: Sequence[Act]) -> str:
    """Play until a check fails. Return the service whose log may say why, "" if none failed."""
    try:
        for act in acts:
            act(play)
            watching.look()
    except PlayFailedError as error:
        play.screen.check(False, str(error))
        return error.service
    except (AssertionError, OSError) as error:
        raise CannotPlayError(f"a server does not answer any more: {error}") from error
    return ""


if __name__ == "__main__":
    sys.exit(run_program("demo", main))

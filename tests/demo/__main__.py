"""Play the demo: 0 when every check has passed, 1 when one has failed, 2 when it cannot run."""

import argparse
import sys
from contextlib import AbstractContextManager

from demo.acts import play_all
from demo.compose_stage import compose_stage
from demo.interrupt import interrupt_once
from demo.local import local_stage
from demo.play import CheckFailedError, Play
from demo.screen import Screen
from demo.stage import CannotPlayError, Stage, StepFailedError
from harness.engine import docker_available

_LOG_LINES = 15


def main() -> int:
    """Choose the stage, play, and return the exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the compose stack running")
    keep = parser.parse_args().keep
    interrupt_once()
    screen = Screen()
    try:
        with _stage(screen, keep=keep) as stage:
            return _play(stage, screen)
    except CannotPlayError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130


def _stage(screen: Screen, *, keep: bool) -> AbstractContextManager[Stage]:
    if docker_available():
        return compose_stage(screen, keep=keep)
    if keep:
        raise CannotPlayError("--keep needs Docker, which does not answer")
    return local_stage(screen)


def _play(stage: Stage, screen: Screen) -> int:
    play = Play(stage, screen)
    try:
        play_all(play)
    except StepFailedError as error:
        screen.check(False, str(error))
        return _failed(play, error.service)
    except CheckFailedError as error:
        return _failed(play, error.service)
    except (AssertionError, OSError) as error:
        raise CannotPlayError(f"a server does not answer any more: {error}") from error
    screen.say("")
    screen.check(True, f"all {play.passed} checks passed")
    screen.say(stage.farewell())
    return 0


def _failed(play: Play, service: str) -> int:
    lines = play.stage.log(service).rstrip().splitlines()[-_LOG_LINES:]
    play.screen.log(f"The last lines of {service}'s log:", "\n".join(lines or ["(nothing)"]))
    play.screen.say("")
    play.screen.check(False, f"a check failed, after {play.passed} that passed")
    return 1


if __name__ == "__main__":
    sys.exit(main())

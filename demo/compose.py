"""The compose stack of the demo: a project of its own, built, started and taken down."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from demo.command import run
from demo.interrupt import interrupt_no_more
from demo.ports import Ports
from demo.screen import Screen
from demo.stage import SERVICES, CannotPlayError
from servers.services import environment

PROJECT = "reliable-demo"

FILES = ("docker-compose.yaml", "docker-compose.services.yaml")
_SERVERS = ("rabbitmq", "etcd", "graphite-statsd")
_DOWN_WITHIN_S = 60.0


class Compose:
    """`docker compose` with a project, files and settings of its own."""

    def __init__(
        self,
        repository: Path,
        project: str,
        settings: Mapping[str, str],
        files: Sequence[str] = FILES,
    ) -> None:
        named = [argument for name in files for argument in ("-f", str(repository / name))]
        self._command = ["docker", "compose", "-p", project, *named]
        # The acts rely on the services' defaults, and example1, in a profile, would publish too.
        self._environment = {**environment(), **settings}

    def enable_etcd(self, enabled: bool) -> None:
        """Set ENABLE_ETCD for the commands that follow."""
        self._environment["ENABLE_ETCD"] = "true" if enabled else "false"

    def run(
        self, *arguments: str, timeout_s: float | None = None, show_progress: bool = False
    ) -> str:
        """Run one command and return its output; raises CannotPlayError."""
        command = [*self._command, *arguments]
        return run(command, self._environment, timeout_s=timeout_s, show_progress=show_progress)

    def images_missing(self) -> bool:
        """Return whether an image of the servers has to be downloaded."""
        images = self.run("config", "--images", *_SERVERS).split()
        try:
            run(["docker", "image", "inspect", "--format", ".", *images], self._environment)
        except CannotPlayError:
            return True
        return False

    def containers(self) -> list[str]:
        """Return the ids of the project's containers, stopped ones too."""
        return self.run("ps", "--all", "--quiet").split()

    def down(self) -> None:
        """Remove containers, volumes and network; raises CannotPlayError."""
        # What is removed with its data needs no orderly stop.
        arguments = ("down", "--volumes", "--remove-orphans", "--timeout", "1")
        self.run(*arguments, timeout_s=_DOWN_WITHIN_S)
        if self.containers():
            # One was still being created, by a command that was interrupted.
            self.run(*arguments, timeout_s=_DOWN_WITHIN_S)


@contextmanager
def compose_servers(
    repository: Path, ports: Ports, screen: Screen, *, keep: bool
) -> Iterator[Compose]:
    """Build the images and start the servers; at the end remove it all, unless to be kept.

    Raises CannotPlayError, before anything is started where that is possible.
    """
    _check_plugins()
    compose = Compose(repository, PROJECT, {"LOG_FORMAT": "console"})
    if compose.containers():
        raise CannotPlayError(
            f"the demo's stack is there already: another demo runs, or one was kept. Take it down "
            f"with `docker compose -p {PROJECT} down --volumes`"
        )
    ports.check_free(repository)
    # A demo that was killed while it took its stack down may have left volumes.
    compose.down()
    if compose.images_missing():
        screen.say("Downloading the images of RabbitMQ, etcd and Graphite ...")
        compose.run("pull", *_SERVERS, show_progress=True)
    screen.say("Building the images of order and notify (a minute or two at the first time) ...")
    compose.run("--progress", "plain", "build", *SERVICES)
    try:
        screen.say("Starting RabbitMQ, etcd and Graphite ...")
        compose.run("up", "--detach", "--wait", *_SERVERS)
        yield compose
    finally:
        interrupt_no_more()
        if not keep:
            screen.say("")
            screen.say("Taking down what was started ...")
            compose.down()


def _check_plugins() -> None:
    for plugin, package in (("compose", "docker-compose"), ("buildx", "docker-buildx")):
        try:
            run(["docker", plugin, "version"], os.environ)
        except CannotPlayError:
            raise CannotPlayError(
                f"Docker answers, but `docker {plugin}` does not: install {package} (Debian's "
                f"package) or {package}-plugin (Docker's own)"
            ) from None

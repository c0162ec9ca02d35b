"""Every node is replaced by the guide's own commands for an upgrade, one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from cluster.cluster import Cluster
from cluster.conftest import StartTrial
from cluster.shell import Shell, documented

NODES = 6


@pytest.fixture
def new_images(cluster: Cluster) -> Iterator[set[str]]:
    """Write other names of the same images into .env, and give them: they are the new version."""
    shell, env_file = cluster.shell, cluster.shell.directory / ".env"
    written = env_file.read_text()
    images = re.findall("^IMAGE_(?:RABBITMQ|ETCD)=(.+)$", written, re.MULTILINE)
    named = {image: f"{shell.project}-new:{number}" for number, image in enumerate(images)}
    for image, new in named.items():
        shell.do(f"docker tag {image} {new}")
    env_file.write_text(
        re.sub(
            "(?<==).+$", lambda found: named.get(found[0], found[0]), written, flags=re.MULTILINE
        )
    )
    try:
        yield set(named.values())
    finally:
        env_file.write_text(written)
        shell.do(f"docker rmi --force {' '.join(named.values())}")


@pytest.mark.timeout(400)
def test_every_node_is_upgraded_in_turn(
    trial: StartTrial, cluster: Cluster, new_images: set[str]
) -> None:
    """Nodes keep their data and their places, and the services never wait for long."""
    attempt = trial("every node upgraded in turn")
    with attempt.under_load():
        cluster.shell.do(documented("upgrade.md", "A cluster, node by node"))
        attempt.fired(sum(image in new_images for image in _images(cluster.shell)))
    result = attempt.judge()
    assert result.injected == NODES


def _images(shell: Shell) -> list[str]:
    """Return the image of each container, as it was named when that was made."""
    return shell.do("docker ps --filter name=$COMPOSE_PROJECT_NAME --format '{{.Image}}'").split()

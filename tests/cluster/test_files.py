"""The cluster's compose file keeps the single nodes' flags, and names each node."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.cluster import FILES
from servers.processes import run_tool
from servers.servers import REPOSITORY

pytestmark = pytest.mark.usefixtures("docker")


def read(*files: str) -> Any:
    arguments = [part for file in files for part in ("-f", str(REPOSITORY / file))]
    return json.loads(run_tool(["docker", "compose", *arguments, "config", "--format=json"]))


def test_each_etcd_member_has_the_single_nodes_flags() -> None:
    """Except those that name the node, which are in its environment, and one for followers."""
    single, cluster = read(FILES[0])["services"], read(*FILES)["services"]
    own = ("--name=", "--advertise-client-urls=", "--experimental-snapshot-catchup-entries=")
    shared = [flag for flag in single["etcd"]["command"] if not flag.startswith(own)]
    for name in ("etcd", "etcd2", "etcd3"):
        flags = [flag for flag in cluster[name]["command"] if not flag.startswith(own)]
        assert flags == shared
        assert len(cluster[name]["command"]) == len(shared) + 1
        assert cluster[name]["healthcheck"] == single["etcd"]["healthcheck"]
        environment = cluster[name]["environment"]
        assert single["etcd"]["environment"].items() <= environment.items()
        assert environment["ETCD_NAME"] == name


def test_each_broker_is_configured_like_the_single_one() -> None:
    """Except its name, its volume and the cluster's configuration."""
    single, cluster = read(FILES[0])["services"]["rabbitmq"], read(*FILES)["services"]
    for name in ("rabbitmq", "rabbitmq2", "rabbitmq3"):
        for same in ("image", "healthcheck", "stop_grace_period", "restart"):
            assert cluster[name][same] == single[same]
        assert cluster[name]["hostname"] == name


def test_every_node_is_known_to_the_services() -> None:
    """A service waits for all nodes at its first start, and may use any of them."""
    cluster = read(*FILES)["services"]
    nodes = {"rabbitmq", "rabbitmq2", "rabbitmq3", "etcd", "etcd2", "etcd3"}
    for service in (cluster["order"], cluster["notify"], cluster["gauges"]):
        urls, endpoints = (
            service["environment"][name] for name in ("RABBITMQ_URL", "ETCD_ENDPOINTS")
        )
        hosts = {url.split("@")[1].split(":")[0] for url in urls.split(",")}
        assert hosts | {part.split(":")[0] for part in endpoints.split(",")} == nodes
        assert set(service["depends_on"]) >= nodes


def test_no_two_containers_publish_one_port() -> None:
    """So a service can have replicas, and the three nodes can share a machine."""
    services = read(*FILES)["services"].values()
    published = [port["published"] for service in services for port in service.get("ports", ())]
    assert len(published) == len(set(published))
    assert not any("container_name" in service for service in services)

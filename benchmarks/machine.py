"""What was measured on: the machine, and the version of everything that takes part."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.servers import Servers
from harness.web import fetch_json

_PACKAGES = ("pika", "cslab-etcd3", "grpcio", "protobuf", "orjson")


def describe(servers: Servers) -> str:
    """Return what a reader needs to judge the figures by."""
    overview: Any = servers.rabbitmq.management("GET", "/api/overview")
    etcd = fetch_json("GET", f"http://{servers.etcd.endpoint}/version")
    found = {
        "cores": str(len(os.sched_getaffinity(0))),
        "processor": _processor(),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.release()}",
        "servers": "containers" if servers.kind == "docker" else "processes",
        "rabbitmq": f"{overview['rabbitmq_version']} (Erlang {overview['erlang_version']})",
        "etcd": etcd["etcdserver"],
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

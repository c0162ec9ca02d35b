"""Until its last user imports from where it is."""

from servers.processes import CommandFailedError
from servers.servers import Etcd, RabbitMQ, Server

__all__ = ["CommandFailedError", "Etcd", "RabbitMQ", "Server"]

"""Until its last user makes a container."""

from servers.containers import Container


class Node(Container):
    """A container by a project's name and its own."""

    def __init__(self, project: str, name: str, address: str) -> None:
        super().__init__(f"{project}-{name}-1", address)
        self.container = self.name

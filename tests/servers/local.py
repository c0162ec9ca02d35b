"""RabbitMQ and etcd as child processes, from Debian's packages, in a directory of their own."""

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from servers.packages import RABBITMQ_BIN
from servers.ports import free_port
from servers.process import Child
from servers.server import ETCD_ENVIRONMENT, CommandFailedError, Etcd, RabbitMQ
from servers.wait import eventually

_STOP_TIMEOUT_S = 30.0
_TOOL_TIMEOUT_S = 60.0


class LocalRunner:
    """Runs a server as a child process; a helper process (epmd) may live beside it."""

    def __init__(self, child: Child, data: Path, helper: Child | None = None) -> None:
        self._child = child
        self._data = data
        self._helper = helper

    def start(self) -> None:
        """Start the server."""
        self._child.start()

    def stop(self) -> None:
        """Ask the server to end; raises TimeoutError after 30 s, having killed it."""
        self._child.terminate(_STOP_TIMEOUT_S)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._child.kill()

    def pause(self) -> None:
        """Freeze it with SIGSTOP."""
        self._child.pause()

    def resume(self) -> None:
        """Let it go on."""
        self._child.resume()

    def erase(self) -> None:
        """Remove its data directory."""
        shutil.rmtree(self._data, ignore_errors=True)

    @property
    def workplace(self) -> PurePath:
        """Where tools can leave files."""
        return self._data.parent

    def replace(self, made: PurePath) -> None:
        """Put another directory in place of its data."""
        self.erase()
        Path(made).rename(self._data)

    def run(self, command: Sequence[str]) -> str:
        """Run a tool with the server's own environment; raises CommandFailedError."""
        return run_tool(command, self._child.env)

    def output(self) -> str:
        """Return the server's log."""
        return self._child.output()

    def close(self) -> None:
        """End the server and its helper; the directory belongs to whoever made it."""
        try:
            if self._child.running:
                self._child.terminate(_STOP_TIMEOUT_S)
        finally:
            if self._helper is not None:
                self._helper.kill()


def run_tool(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Run a command and return its output; raises CommandFailedError, also after 60 s."""
    try:
        result = subprocess.run(
            list(command),
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TOOL_TIMEOUT_S,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise CommandFailedError(f"{command[0]}: {error}") from error
    if result.returncode != 0:
        raise CommandFailedError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
    return result.stdout


def local_rabbitmq(directory: Path) -> RabbitMQ:
    """Prepare a broker in `directory`; it is not started yet, but its epmd is."""
    home = directory / "rabbitmq"
    home.mkdir()
    amqp_port, management_port = free_port(), free_port()
    env = _rabbitmq_environment(home, epmd_port=free_port())
    _write_rabbitmq_files(home, amqp_port, management_port)
    epmd = _start_epmd(home, env)
    # rabbitmq-server becomes the Erlang VM itself only when it believes that a shell is wanted;
    # then a signal to our child is a signal to the VM. -noinput takes that shell away again.
    child = Child(
        [str(RABBITMQ_BIN / "rabbitmq-server"), "-noinput"],
        env={**env, "RABBITMQ_ALLOW_INPUT": "true"},
        cwd=home,
        log=home / "rabbitmq.log",
    )
    return RabbitMQ(LocalRunner(child, home / "data", helper=epmd), amqp_port, management_port)


def _rabbitmq_environment(home: Path, epmd_port: int) -> dict[str, str]:
    # Everything has a place of its own: a broker that the machine runs already, and its settings
    # in /etc/rabbitmq, neither disturb this one nor notice it.
    return {
        "PATH": f"{RABBITMQ_BIN}:/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(home),
        "ERL_INETRC": str(home / "inetrc"),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(epmd_port),
        "RABBITMQ_NODENAME": f"harness-{secrets.token_hex(4)}@localhost",
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_CONF_ENV_FILE": str(home / "env.conf"),
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(home / "data"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_PID_FILE": str(home / "pid"),
    }


def _write_rabbitmq_files(home: Path, amqp_port: int, management_port: int) -> None:
    (home / "env.conf").touch()
    # Names from the file alone: the native way starts resolver processes, which a SIGKILL orphans.
    (home / "inetrc").write_text(
        '{host, {127,0,0,1}, ["localhost"]}.\n{lookup, [file]}.\n',
    )
    (home / "enabled_plugins").write_text("[rabbitmq_management].\n")
    (home / "rabbitmq.conf").write_text(
        f"listeners.tcp.1 = 127.0.0.1:{amqp_port}\n"
        "management.tcp.ip = 127.0.0.1\n"
        f"management.tcp.port = {management_port}\n"
    )
    cookie = home / ".erlang.cookie"
    cookie.write_text(secrets.token_hex(16))
    cookie.chmod(0o400)  # Erlang refuses a cookie that others can read


def _start_epmd(home: Path, env: Mapping[str, str]) -> Child:
    """Start the port mapper in the foreground, as our child.

    The Erlang VM would otherwise start one as a daemon, which outlives the VM.
    """
    port = env["ERL_EPMD_PORT"]
    epmd = Child(
        ["epmd", "-port", port, "-address", env["ERL_EPMD_ADDRESS"]],
        env=env,
        cwd=home,
        log=home / "epmd.log",
    )
    epmd.start()
    try:
        eventually(lambda: _connect(int(port)), 10, also=(OSError,))
    except OSError:
        epmd.kill()
        raise
    return epmd


def _connect(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=1).close()


def local_etcd(directory: Path, flags: Sequence[str], max_txn_ops: int) -> Etcd:
    """Prepare an etcd node in `directory` with more `flags`; it is not started yet."""
    home = directory / "etcd"
    home.mkdir()
    port = free_port()
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
    child = Child(
        [
            "etcd",
            "--name=harness",
            f"--data-dir={home / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=harness={peer}",
            *flags,
        ],
        env={
            "PATH": os.environ.get("PATH", os.defpath),
            "ETCDCTL_ENDPOINTS": client,
            **ETCD_ENVIRONMENT,
        },
        cwd=home,
        log=home / "etcd.log",
    )
    return Etcd(LocalRunner(child, home / "data"), port, max_txn_ops)

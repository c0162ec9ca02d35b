"""Child processes, and RabbitMQ and etcd as such, from Debian's packages, without Docker."""

import fcntl
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Literal

from servers.wait import eventually

# More than the 10 s that a service has to end: the test has to see that one takes longer.
_TERMINATE_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 30.0
_INSTALL_TIMEOUT_S = 900.0

# Debian's rabbitmq-server on the PATH changes to the user rabbitmq, who cannot write into our
# directory. The script that it wraps runs as its caller.
RABBITMQ_BIN = Path("/usr/lib/rabbitmq/bin")

_PROGRAMS = {
    "rabbitmq-server": str(RABBITMQ_BIN / "rabbitmq-server"),
    "etcd-server": "etcd",
    "etcd-client": "etcdctl",
}
_INSTALLS = Path(tempfile.gettempdir()) / f"servers-installed-by-{os.getuid()}"
_POLICY = Path("/usr/sbin/policy-rc.d")

ETCD_ENVIRONMENT = {"GOGC": "50"}
"""As in the compose files."""

RABBITMQ_ENVIRONMENT = {"RABBITMQ_CTL_ERL_ARGS": "+S 1:1"}
"""rabbitmqctl on one core takes three quarters of the CPU time that it takes on two."""

# Below Linux's range for outgoing connections (from 32768). A server that is down can lose a port
# in that range: a client that retries on loopback may get that very port as its source and connect
# to itself. The server then finds its address in use.
_LOWEST, _HIGHEST = 20_000, 32_000

# Each process of pytest-xdist has its own ports. Otherwise one could take the port of a server that
# another has stopped for a while.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))

_taken: set[int] = set()

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
"""The unit of CPU time in /proc."""


class ServersUnavailableError(Exception):
    """The servers cannot be started; the message is one line that says what to do."""


class CommandFailedError(Exception):
    """A tool ended with an error; the message has its output."""


def free_port() -> int:
    """Return a TCP port that nothing listens on, and that this has not returned before.

    Raises RuntimeError if a thousand tries find none.
    """
    for _ in range(1000):
        port = random.randrange(_LOWEST + _WORKER, _HIGHEST, _WORKERS)
        if port not in _taken and _nothing_listens(port):
            _taken.add(port)
            return port
    raise RuntimeError(f"no free port between {_LOWEST} and {_HIGHEST}")


def _nothing_listens(port: int) -> bool:
    # All addresses, not only loopback: Docker publishes on all of them.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


class Child:
    """A command that can be started, signalled, and started again.

    The output of every start is appended to `log`. `env` is the whole environment.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        self.command = list(command)
        self.env = dict(env)
        self.cwd = cwd
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id; raises RuntimeError before the first start."""
        return self._started().pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None if it runs or has not been started."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        """Whether the process exists; a frozen one does."""
        return self._process is not None and self.exit_code is None

    def start(self) -> None:
        """Start the command; raises OSError."""
        if self.running:
            raise RuntimeError(f"{self.command[0]} runs already, as process {self.pid}")
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                env=self.env,
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # So that Ctrl-C on the terminal reaches us alone, and we end the child in order.
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """Send a signal; does nothing if the process has ended."""
        self._started().send_signal(number)

    def pause(self) -> None:
        """Freeze the process with SIGSTOP; returns when the kernel has stopped it."""
        self.signal(signal.SIGSTOP)
        # The kernel stops it asynchronously: without this it could still send something.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def terminate(self, timeout_s: float = _TERMINATE_TIMEOUT_S) -> int:
        """End it with SIGTERM and return its exit code.

        After `timeout_s` it is killed, and TimeoutError raised.
        """
        process = self._started()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)  # a frozen process would never see the request
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(
                f"{self.command[0]} had not ended {timeout_s:g} s after SIGTERM"
            ) from None

    def kill(self) -> None:
        """End it with SIGKILL and wait until it has ended."""
        process = self._started()
        process.kill()
        process.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.command[0]} has not been started")
        return self._process


def resident_bytes(pid: int, which: Literal["VmRSS", "VmHWM"] = "VmRSS") -> int:
    """Return a process's resident size (proc(5)), or with VmHWM the largest it ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{which}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise ProcessLookupError(f"process {pid} has no resident size: it has ended")
    return 1024 * int(found[1])


def cpu_s(pid: int) -> float:
    """Return the CPU time of all of a process's threads (proc_pid_stat(5): utime, stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / TICKS_A_SECOND


def run_tool(
    command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> str:
    """Run a command and return its output; raises CommandFailedError, also after `timeout_s`."""
    try:
        result = subprocess.run(
            list(command),
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise CommandFailedError(f"{command[0]}: {error}") from error
    if result.returncode != 0:
        raise CommandFailedError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
    return result.stdout


class PacketFilter:
    """iptables in a network namespace; `enter` is the command that runs another one in it."""

    def __init__(self, *enter: str) -> None:
        self._iptables = (*enter, "iptables")

    def drop(self, *matching: str) -> None:
        """Drop packets that match from now on; raises CommandFailedError."""
        run_tool([*self._iptables, "-A", *matching, "-j", "DROP"])

    def dropped(self) -> int:
        rules = run_tool([*self._iptables, "-L", "-v", "-n", "-x"])
        return sum(map(int, re.findall(r"^\s*(\d+)\s+\d+\s+DROP\s", rules, re.MULTILINE)))

    def clear(self) -> None:
        """Drop no more packets."""
        run_tool([*self._iptables, "-F"])


class ServerProcess(Child):
    """A server as a child process, with all its files in `home`.

    A `helper` process (epmd) may run beside it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        home: Path,
        helper: Child | None = None,
    ) -> None:
        super().__init__(command, env=env, cwd=home, log=home / "server.log")
        self._data, self._helper = home / "data", helper
        self.address, self.workplace = "127.0.0.1", PurePath(home)

    def stop(self) -> None:
        """End the server with SIGTERM; after 30 s it is killed, and TimeoutError raised."""
        self.terminate(_STOP_TIMEOUT_S)

    def erase(self) -> None:
        shutil.rmtree(self._data, ignore_errors=True)

    def replace(self, made: PurePath) -> None:
        """Replace its data by another directory."""
        self.erase()
        Path(made).rename(self._data)

    def run(self, command: Sequence[str]) -> str:
        """Run a tool with the server's own environment; raises CommandFailedError."""
        return run_tool(command, self.env)

    def close(self) -> None:
        """End the server and its helper; the directory stays."""
        try:
            if self.running:
                self.stop()
        finally:
            if self._helper is not None:
                self._helper.kill()


def rabbitmq_process(home: Path, amqp_port: int, management_port: int) -> ServerProcess:
    """Prepare a broker in a directory, and start its epmd."""
    env = _rabbitmq_environment(home)
    _write_rabbitmq_files(home, amqp_port, management_port)
    # With RABBITMQ_ALLOW_INPUT rabbitmq-server becomes the Erlang VM itself, so that signals to our
    # child reach the VM. -noinput then switches off the shell that this would open.
    return ServerProcess(
        [str(RABBITMQ_BIN / "rabbitmq-server"), "-noinput"],
        env={**env, "RABBITMQ_ALLOW_INPUT": "true"},
        home=home,
        helper=_start_epmd(home, env),
    )


def _rabbitmq_environment(home: Path) -> dict[str, str]:
    # Nothing is shared with a broker that this machine runs already, or its files in /etc/rabbitmq.
    return {
        "PATH": f"{RABBITMQ_BIN}:/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(home),
        "ERL_INETRC": str(home / "inetrc"),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(free_port()),
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
        **RABBITMQ_ENVIRONMENT,
    }


def _write_rabbitmq_files(home: Path, amqp_port: int, management_port: int) -> None:
    (home / "env.conf").touch()
    # Names come from a file: Erlang's native way starts resolver processes that outlive a SIGKILL.
    (home / "inetrc").write_text('{host, {127,0,0,1}, ["localhost"]}.\n{lookup, [file]}.\n')
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
    """Start the port mapper as our child. The Erlang VM would start a daemon, which outlives it."""
    address = env["ERL_EPMD_ADDRESS"], int(env["ERL_EPMD_PORT"])
    command = ["epmd", "-address", address[0], "-port", str(address[1])]
    epmd = Child(command, env=env, cwd=home, log=home / "epmd.log")
    epmd.start()
    try:
        connection = eventually(lambda: socket.create_connection(address, 1), 10, also=(OSError,))
        connection.close()
    except OSError:
        epmd.kill()
        raise
    return epmd


def etcd_process(home: Path, port: int, flags: Sequence[str]) -> ServerProcess:
    """Prepare an etcd node in a directory, with more `flags`."""
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
    peers = [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
    own = [f"--listen-client-urls={client}", *peers, f"--initial-cluster=harness={peer}"]
    path = os.environ.get("PATH", os.defpath)
    env = {"PATH": path, "ETCDCTL_ENDPOINTS": client, **ETCD_ENVIRONMENT}
    command = ["etcd", f"--data-dir={home / 'data'}", *own, *flags]
    return ServerProcess(command, env=env, home=home)


def ensure_installed() -> None:
    """Install the packages that are missing, if we are root; raises ServersUnavailableError."""
    # Not "w", which would empty a file that somebody has linked here.
    with _INSTALLS.open("a") as lock:
        # Of the processes that run tests side by side one installs, and the others wait for it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [name for name, program in _PROGRAMS.items() if shutil.which(program) is None]
        if missing:
            _install(missing)


def _install(packages: Sequence[str]) -> None:
    names = " ".join(packages)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ServersUnavailableError(
            f"Docker does not answer, and these packages are missing: {names}. Start Docker, or "
            f"run `sudo apt-get install {names}` (Debian 13)."
        )
    print(f"installing {names} with apt-get (Docker does not answer)", file=sys.stderr, flush=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with _no_service_start():
        for command in ("update -qq", f"install -y -qq --no-install-recommends {names}"):
            try:
                run_tool(["apt-get", *command.split()], env, _INSTALL_TIMEOUT_S)
            except CommandFailedError as error:
                verb, reason = command.split()[0], str(error).splitlines()[-1]
                raise ServersUnavailableError(f"apt-get {verb} failed: {reason}") from None


@contextmanager
def _no_service_start() -> Iterator[None]:
    """Keep the packages from starting their servers on the standard ports.

    A policy-rc.d that exits 101 forbids it (Debian Policy, "Running initscripts"). An existing one
    belongs to the administrator and stays.
    """
    if made := not _POLICY.exists():
        _POLICY.write_text("#!/bin/sh\nexit 101\n")
        _POLICY.chmod(0o755)
    try:
        yield
    finally:
        if made:
            _POLICY.unlink(missing_ok=True)

"""`nbdbackup serve` as a process of its own, for tests that talk to it as users do.

    with Server(sources={"disk": path}) as server:
        subprocess.run([qemu_img, "info", server.uri("disk")])

Every wait has a limit. Leaving the block sends SIGTERM and checks that the server
ended well: exit status 0 in time, and no traceback among what it logged.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

COMMAND = (sys.executable, "-m", "nbdbackup")
READY_PREFIX = "listening on "
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
CLI_TIMEOUT_S = 120.0


class ServerFailed(AssertionError):
    """The server did not start, stop or log as it should; the text has its log."""


class Server:
    """One running server; a context manager that starts and stops it.

    `sources` maps names to paths. It listens on a Unix socket (`unix`), on a free TCP port of the
    loopback (`tcp`), or on both; `options` go to `serve` as they are.

    Set once it runs: `uris` (as announced), `socket_path`, `port`, `control`, `state_dir`, `pid`.
    """

    def __init__(
        self,
        sources: Mapping[str, Path],
        options: Sequence[str] = (),
        unix: bool = True,
        tcp: bool = True,
        state_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        assert unix or tcp
        # A directory of its own under /tmp: a socket's path must fit into 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="nbdbackup-test-"))
        self.sources = dict(sources)
        self.options = list(options)
        self.socket_path = self.directory / "nbd.sock" if unix else None
        self.tcp = tcp
        self.port: int | None = None
        self.control = self.directory / "control.sock"
        self.state_dir = state_dir or self.directory / "state"
        self.log_path = self.directory / "log"
        self.environment = dict(environment or {})
        self.uris: tuple[str, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended_by_test = False

    @property
    def has_started(self) -> bool:
        """Whether there is, or was, a process."""
        return self._process is not None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process, which has been started."""
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def command(self) -> list[str]:
        """What starts it."""
        command = [*COMMAND, "serve", "--control", str(self.control), "--state-dir", str(self.state_dir)]
        if self.socket_path is not None:
            command += ["-k", str(self.socket_path)]
        if self.tcp:
            command += ["-b", "127.0.0.1", "-p", "0"]
        return [*command, *self.options, *(f"{name}={path}" for name, path in self.sources.items())]

    def start(self) -> None:
        """Start it and wait until it listens."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        wanted = (self.socket_path is not None) + self.tcp
        descriptor = self.process.stdout.fileno()
        deadline = time.monotonic() + START_TIMEOUT_S
        text = ""
        while True:
            uris = [
                line.removeprefix(READY_PREFIX)
                for line in text.split("\n")[:-1]
                if line.startswith(READY_PREFIX)
            ]
            if len(uris) >= wanted:
                break
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise ServerFailed(f"not ready after {START_TIMEOUT_S} s, said {text!r}\n{self.log()}")
            received = os.read(descriptor, 65536)
            if not received:
                status = self.process.wait(STOP_TIMEOUT_S)
                raise ServerFailed(f"ended with status {status} instead of serving\n{self.log()}")
            text += received.decode()
        self.uris = tuple(uris)
        for uri in uris:
            scheme, _, place = uri.partition("://")
            if scheme in ("nbd", "nbds"):
                self.port = int(place.split("/")[0].rpartition(":")[2])
        assert not self.tcp or self.port

    def uri(self, export: str = "", transport: str = "", *, certificates: Path | None = None) -> str:
        """The URI of an export; `transport` is "unix" or "tcp", by default the first that is there.

        `certificates`: the client's directory, for a server that requires TLS or offers it.
        """
        name = quote(export, safe="")
        if certificates is not None:
            if transport != "tcp" and self.socket_path is not None:
                return f"nbds+unix:///{name}?socket={self.socket_path}&tls-certificates={certificates}"
            return f"nbds://127.0.0.1:{self.port}/{name}?tls-certificates={certificates}"
        if transport == "tcp" or (not transport and self.socket_path is None):
            return f"nbd://127.0.0.1:{self.port}/{name}"
        return f"nbd+unix:///{name}?socket={self.socket_path}"

    def cli(
        self, *arguments: str, check: bool = True, timeout_s: float = CLI_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run another `nbdbackup` command against this server; with `check` it must succeed."""
        result = subprocess.run(
            self.cli_command(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and result.returncode != 0:
            raise ServerFailed(
                f"nbdbackup {' '.join(arguments)}: status {result.returncode}\n{result.stdout}{result.stderr}"
                f"\n--- server's log\n{self.log()}"
            )
        return result

    def cli_command(self, *arguments: str) -> list[str]:
        """The whole command line of an `nbdbackup` command for this server."""
        verbs = [argument for argument in arguments if not argument.startswith("-")]
        depth = 2 if verbs[0] in {"bitmap", "checkpoint", "job", "node", "snapshot", "state"} else 1
        return [*COMMAND, *arguments[:depth], "--control", str(self.control), *arguments[depth:]]

    def snapshots(self) -> list[str]:
        """The exports `NODE@NAME` that `snapshot list` knows."""
        listed = json.loads(self.cli("snapshot", "list", "--json").stdout)
        return [entry["export"] for entry in listed]

    def log(self) -> str:
        """All that it has written to standard error."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def rss_bytes(self) -> int:
        """Its resident memory."""
        return self._status_kib("VmRSS") * 1024

    def _status_kib(self, field: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise ServerFailed(f"no {field} of process {self.pid}\n{self.log()}")

    def descriptors(self) -> int:
        """How many file descriptors it holds."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def stop(self) -> None:
        """SIGTERM, wait, and check that it ended well."""
        self._ended_by_test = True
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerFailed(f"still there {STOP_TIMEOUT_S} s after SIGTERM\n{self.log()}") from None
        log = self.log()
        if status != 0 or "Traceback" in log:
            raise ServerFailed(f"ended with status {status}\n{log}")

    def kill(self) -> None:
        """`kill -9`, and collect it."""
        self._ended_by_test = True
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    def close(self) -> None:
        """Let go of the pipe and remove the directory; the process has ended."""
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                sys.stderr.write(f"--- log of nbdbackup serve\n{self.log()}")
            if not self._ended_by_test:
                self.stop()
        except ServerFailed:
            # The test's own failure tells more than what followed from it.
            if kind is None:
                raise
        finally:
            self.kill()
            self.close()

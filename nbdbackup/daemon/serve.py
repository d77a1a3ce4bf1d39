"""From options to a running server, and back to nothing."""

import asyncio
import errno
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.block.open import is_remote, open_device
from nbdbackup.daemon.backups import Backups
from nbdbackup.daemon.bitmaps import Bitmaps
from nbdbackup.daemon.checkpoints import Checkpoints
from nbdbackup.daemon.ending import Ending
from nbdbackup.daemon.events import Announcer
from nbdbackup.daemon.exports import Exports
from nbdbackup.daemon.graph import Graph
from nbdbackup.daemon.jobs.kept import KeptJobs
from nbdbackup.daemon.leftovers import Leftovers
from nbdbackup.daemon.nodes.table import NodeWatcher
from nbdbackup.daemon.options import InheritedSocket, ServeOptions, TcpAddress
from nbdbackup.daemon.partials import PartialFiles
from nbdbackup.daemon.snapshots import Snapshots
from nbdbackup.daemon.state_dir import StateDirectory
from nbdbackup.daemon.stored_bitmaps import ReclaimUnheld, StoredBitmaps
from nbdbackup.daemon.stored_snapshots import StoredSnapshots
from nbdbackup.daemon.systemd import keep_notifying, notify
from nbdbackup.daemon.tls import clients_of, server_tls, warn_if_open
from nbdbackup.daemon.transaction import Transactions
from nbdbackup.errors import DeviceError
from nbdbackup.job.events import Event
from nbdbackup.job.failures import failure_in
from nbdbackup.job.registry import JobRegistry
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.server import monitor
from nbdbackup.server.exports import Export, ExportTable
from nbdbackup.server.listener import Listener, adopt, listen_tcp, listen_unix
from nbdbackup.server.server import Server

logger = logging.getLogger(__name__)

DESCRIPTORS_MAX = 65536
"""What the limit on open descriptors is raised to where that is permitted: one for each client."""


class Stop:
    """The request to end. It may come more than once; the first `reason` counts (QMP's ShutdownCause)."""

    def __init__(self, on_request: Callable[[], None]) -> None:
        self._on_request = on_request
        self._requested = asyncio.Event()
        self.reason = "host-ui"

    def request(self, reason: str) -> None:
        """Ask the daemon to end, because of `reason`."""
        if not self._requested.is_set():
            self.reason = reason
            self._requested.set()
            self._on_request()

    def request_by_qmp(self) -> None:
        """Ask the daemon to end, as a monitor's client does."""
        self.request("host-qmp-quit")

    async def wait(self) -> None:
        """Return once the end was asked for."""
        await self._requested.wait()


async def serve(options: ServeOptions) -> int:
    """Serve until SIGTERM, SIGINT, `quit` or the end that `options` ask for; the exit status.

    Prints one line "listening on URI" per listener that it opened, when ready.

    Raises:
        NbdBackupError, OSError: it cannot start; everything is as it was.
    """
    async with AsyncExitStack() as stack:
        state = StateDirectory(options.state_dir)
        state.open()
        stack.callback(state.close)
        tls = server_tls(options)
        exports = ExportTable()
        announcer = Announcer()
        graph = Graph(exports, announcer)
        leftovers = [path for path in (options.control, options.pid_file) if path is not None]
        ending = Ending(options.stop_timeout_s, graph, leftovers)
        stack.callback(ending.close)
        stack.push_async_callback(graph.close)
        await _open_sources(options, graph, exports)
        _raise_descriptor_limit()
        server = Server(
            exports,
            _listen(options, stack),
            options.clients_max,
            options.allowed,
            tls,
            poll_max_s=options.poll_max_us / 1e6,
        )
        warn_if_open(server.listeners, options)
        try:
            return await _run(options, stack, state, graph, server, announcer, ending)
        except ExceptionGroup as group:
            failure = failure_in(group)
            if failure is None:
                raise
            raise failure from None
        finally:
            ending.begin()


async def _run(
    options: ServeOptions,
    stack: AsyncExitStack,
    state: StateDirectory,
    graph: Graph,
    server: Server,
    announcer: Announcer,
    ending: Ending,
) -> int:
    stop = Stop(ending.begin)
    ending.server = server
    bitmaps = await _open_bitmaps(options, stack, state, graph, server.exports)
    snapshots = await _open_snapshots(stack, state, graph, server)
    async with asyncio.TaskGroup() as tasks:
        jobs = ending.jobs = JobRegistry(tasks)
        jobs.subscribe(Backups.log_event)
        partials = PartialFiles(state.partials)
        kept = await _open_jobs(stack, state, graph, jobs, partials, options)
        await _watch_nodes(graph, ReclaimUnheld())
        backups = Backups(
            graph, jobs, state.scratch, _remote_options(options), server.uris, partials.make, kept
        )
        services = Services(
            jobs,
            snapshots,
            backups,
            graph,
            Transactions(),
            stop.request_by_qmp,
            exports=Exports(graph, server, tasks, announcer),
            bitmaps=bitmaps,
            checkpoints=Checkpoints(bitmaps, snapshots),
            state=Leftovers(state.scratch, partials, bitmaps, snapshots.store, kept.store),
        )
        if options.makes_control_directory:
            options.control.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with monitor(options.control, services) as control:
            announcer.subscribe(control.publish)
            with _signals(stop), _pid_file(options.pid_file):
                serving = tasks.create_task(server.run())
                living = [
                    tasks.create_task(forever)
                    for forever in (
                        bitmaps.keep_alive(),
                        snapshots.keep_alive(),
                        snapshots.free_broken(),
                        kept.keep_alive(),
                    )
                ]
                status = await _serve_until(options, server, stop)
                ending.begin()
                notify("STOPPING=1")
                control.publish(Event("SHUTDOWN", {"guest": False, "reason": stop.reason}))
                logger.info("stopping: finishing what is in flight")
                server.stop()
                await jobs.end_all()
                await serving
                for task in living:
                    task.cancel()
    return status


async def _open_bitmaps(
    options: ServeOptions, stack: AsyncExitStack, state: StateDirectory, graph: Graph, exports: ExportTable
) -> Bitmaps:
    """The bitmaps of all nodes, those that are stored included; saved when `stack` ends, before the nodes."""
    stored = StoredBitmaps(state.bitmaps, power=options.bitmap_durability == "power")
    stack.callback(stored.close)
    await stored.open()
    bitmaps = Bitmaps(graph, exports, stored)
    await bitmaps.chains.open()

    async def release() -> None:
        for node in graph:
            await bitmaps.release(graph.entry(node.name))

    stack.push_async_callback(release)
    await _watch_nodes(graph, bitmaps)
    return bitmaps


async def _open_snapshots(
    stack: AsyncExitStack, state: StateDirectory, graph: Graph, server: Server
) -> Snapshots:
    """Those that outlived the last server, in place: no client was accepted yet. Kept when `stack` ends."""
    stored = StoredSnapshots(state.snapshots)
    stack.callback(stored.close)
    await stored.open()
    snapshots = Snapshots(graph, server, state.scratch, stored)
    stack.push_async_callback(snapshots.close)
    await _watch_nodes(graph, snapshots)
    return snapshots


async def _open_jobs(
    stack: AsyncExitStack,
    state: StateDirectory,
    graph: Graph,
    jobs: JobRegistry,
    partials: PartialFiles,
    options: ServeOptions,
) -> KeptJobs:
    """Those that outlived the last server, in place: no client was accepted yet. Kept when `stack` ends."""
    kept = KeptJobs(state.jobs, graph, jobs, partials, _remote_options(options), resumes=options.resume_jobs)
    await kept.open()
    stack.push_async_callback(kept.close)
    await _watch_nodes(graph, kept)
    return kept


async def _watch_nodes(graph: Graph, watcher: NodeWatcher) -> None:
    """Let `watcher` know of the nodes that there are, and of those that come and go."""
    graph.watchers.append(watcher)
    for node in graph:
        await watcher.load(graph.entry(node.name))


async def _serve_until(options: ServeOptions, server: Server, stop: Stop) -> int:
    """Announce readiness and wait for the end; the exit status."""
    for address, uri in zip(options.listeners, server.uris(), strict=True):
        if isinstance(address, InheritedSocket):
            # Whoever opened it knows, and standard output may be theirs.
            logger.info("listening on %s", uri)
        else:
            print(f"listening on {uri}", flush=True)
    notify("READY=1")
    notifying = asyncio.ensure_future(keep_notifying(lambda: _status(server)))
    try:
        if options.run_command is not None:
            return await _run_command(options.run_command, server.uris()[0], stop)
        return await _wait_for_end(options, server, stop)
    finally:
        notifying.cancel()


def _status(server: Server) -> str:
    """How things are, for people who ask the service manager."""
    exports = len(list(server.exports))
    return f"Serving {exports} export{'s'[: exports != 1]} to {server.client_count} clients"


async def _wait_for_end(options: ServeOptions, server: Server, stop: Stop) -> int:
    ends: list[asyncio.Future[object]] = [asyncio.ensure_future(stop.wait())]
    if options.exit_on_last:
        ends.append(asyncio.ensure_future(server.last_client_left.wait()))
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()
    return 0


async def _run_command(command: str, uri: str, stop: Stop) -> int:
    """Run `command` in a shell with $uri set; its exit status, as a shell would give it."""
    process = await asyncio.create_subprocess_shell(command, env={**os.environ, "uri": uri})
    stopped = asyncio.ensure_future(stop.wait())
    ended = asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait([stopped, ended], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            process.terminate()
        status = await ended
    finally:
        stopped.cancel()
    return status if status >= 0 else 128 - status


async def _open_sources(options: ServeOptions, graph: Graph, exports: ExportTable) -> None:
    for source in options.sources:
        read_only = options.read_only or source.read_only
        device = await open_device(
            source.path,
            source.format,
            read_only=read_only,
            discard=options.discard == "unmap",
            remote=_remote_options(options),
        )
        try:
            driver = "nbd" if is_remote(source.path) else "raw"
            node = graph.insert(source.name, device, driver, source.path, read_only)
        except BaseException:
            await device.close()
            raise
        tls_only = source.name in options.tls_only
        authorised = clients_of(source, options.tls)
        exports.add(
            Export(
                source.name,
                node,
                options.description,
                read_only,
                tls_only,
                authorised=authorised,
                all_bitmaps=True,
            )
        )


def _remote_options(options: ServeOptions) -> RemoteOptions:
    return RemoteOptions(reconnect_delay_s=options.reconnect_delay_s)


def _listen(options: ServeOptions, stack: AsyncExitStack) -> list[Listener]:
    listeners: list[Listener] = []
    for address in options.listeners:
        if isinstance(address, TcpAddress):
            listener = listen_tcp(address.host, address.port)
        elif isinstance(address, InheritedSocket):
            listener = adopt(address.descriptor, address.name)
        else:
            listener = listen_unix(address.path)
        stack.callback(listener.close)
        listeners.append(listener)
    return listeners


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(DESCRIPTORS_MAX, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.request, "host-signal")
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@contextmanager
def _pid_file(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    try:
        path.write_text(f"{os.getpid()}\n")
    except OSError as error:
        raise DeviceError(
            error.errno or errno.EIO, f"cannot write the pid file {path}: {error.strerror}"
        ) from error
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()

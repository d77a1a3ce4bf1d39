"""`nbdbackup serve`: its options, spoken as qemu-nbd's, become a ServeOptions."""

import argparse
import asyncio
import os
from pathlib import Path

from msgspec.structs import replace

from nbdbackup import daemon
from nbdbackup.block.open import is_remote
from nbdbackup.cli import logs
from nbdbackup.cli.failures import guarded
from nbdbackup.cli.fork import run_detached
from nbdbackup.cli.parser import (
    Verbs,
    absolute_place,
    control_path,
    is_control_given,
    state_directory,
)
from nbdbackup.cli.serve_arguments import DEFAULT_HOST, DEFAULT_PORT, add_serve
from nbdbackup.daemon import InheritedSocket, ServeOptions, SourceSpec, TcpAddress, TlsOptions, UnixAddress
from nbdbackup.daemon.systemd import take_inherited_sockets
from nbdbackup.errors import NbdBackupError, NotFoundError, UsageError
from nbdbackup.nbd import uri as nbd_uri

NAME_BYTES_MAX = 255
DESCRIPTION_BYTES_MAX = 4096
SOCKET_PATH_BYTES_MAX = 107


def add_parser(verbs: Verbs) -> None:
    """Add `serve`."""
    add_serve(verbs).set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Serve as the command line says."""
    options = serve_options(namespace)
    logs.set_up(namespace.log_format, namespace.verbose)
    if namespace.fork:
        return run_detached(lambda: guarded(lambda: run_server(options), namespace.verbose))
    return run_server(options)


def run_server(options: ServeOptions) -> int:
    """Serve in an event loop, uvloop's if that is installed."""
    loop_factory = None
    try:
        import uvloop

        loop_factory = uvloop.new_event_loop
    except ImportError:
        pass
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(daemon.serve(options))
    except NotFoundError as error:
        # Exit status 10 means that no server was found. Here a source is missing.
        raise NbdBackupError(str(error)) from error


def serve_options(namespace: argparse.Namespace) -> ServeOptions:
    """The options that `namespace` stands for, paths made absolute.

    Raises:
        UsageError: they contradict each other, or a name is not one.
    """
    if not namespace.sources:
        _refuse_nothing_to_serve(namespace)
    if namespace.export_name is not None and len(namespace.sources) > 1:
        raise UsageError("-x/--export-name is for one SOURCE; write NAME=SOURCE for each of several")
    if namespace.persistent and namespace.exit_on_last:
        raise UsageError("-t/--persistent and --exit-on-last contradict each other")
    if namespace.fork and namespace.run_command is not None:
        raise UsageError(
            "--fork and --run contradict each other: --run serves in the foreground until CMD ends"
        )
    if len(namespace.description.encode()) > DESCRIPTION_BYTES_MAX:
        raise UsageError(f"-D/--description has at most {DESCRIPTION_BYTES_MAX} bytes")
    sources = _sources(namespace.sources, namespace.export_name, namespace.format)
    tls = tls_options(namespace)
    return ServeOptions(
        sources=_authorise(_mark_read_only(sources, namespace.read_only_export), namespace.export_authz, tls),
        listeners=_inherited_listeners(namespace)
        or _listeners(namespace.bind, namespace.port, namespace.socket, by_default=bool(sources)),
        allowed=tuple(namespace.allow),
        control=_socket_path("--control", str(control_path(namespace.control))),
        # A mistyped path must fail, and not come into being; the default one is ours to make.
        makes_control_directory=not is_control_given(namespace.control),
        state_dir=state_directory(namespace.state_dir).absolute(),
        read_only=namespace.read_only,
        clients_max=namespace.shared,
        description=namespace.description,
        discard=namespace.discard,
        tls=tls,
        tls_only=_tls_only(namespace.tls_only, sources, tls),
        bitmap_durability=namespace.bitmap_durability,
        resume_jobs=namespace.resume_jobs,
        reconnect_delay_s=namespace.reconnect_delay,
        poll_max_us=namespace.poll_max_us,
        pid_file=namespace.pid_file and namespace.pid_file.absolute(),
        run_command=namespace.run_command,
        exit_on_last=namespace.exit_on_last,
        stop_timeout_s=namespace.stop_timeout,
    )


def tls_options(namespace: argparse.Namespace) -> TlsOptions | None:
    """What `namespace` says about TLS; None: there is none.

    Raises:
        UsageError: it contradicts itself.
    """
    certificates, keys = namespace.tls_creds, namespace.tls_psk
    if certificates is not None and keys is not None:
        raise UsageError("--tls-creds and --tls-psk contradict each other: clients have certificates or keys")
    has_list = bool(namespace.tls_authz) or namespace.tls_authz_file is not None
    wants_names = namespace.tls_verify_peer or has_list
    if keys is not None and wants_names:
        raise UsageError("--tls-verify-peer and --tls-authz are for certificates, --tls-psk goes without")
    if certificates is None and keys is None:
        if namespace.tls in ("on", "require"):
            raise UsageError(f"--tls {namespace.tls} needs --tls-creds DIR or --tls-psk FILE")
        if wants_names:
            raise UsageError("--tls-verify-peer and --tls-authz need --tls-creds DIR")
        return None
    if namespace.tls == "off":
        raise UsageError("--tls off and --tls-creds or --tls-psk contradict each other")
    return TlsOptions(
        required=namespace.tls != "on",
        certificates=certificates and certificates.absolute(),
        keys=keys and keys.absolute(),
        verify_peer=wants_names,
        authorised=tuple(namespace.tls_authz),
        authorised_file=namespace.tls_authz_file and namespace.tls_authz_file.absolute(),
    )


def _tls_only(names: list[str], sources: tuple[SourceSpec, ...], tls: TlsOptions | None) -> frozenset[str]:
    if names and tls is None:
        raise UsageError("--tls-only needs --tls on: without TLS nobody could use that export")
    for name in names:
        if all(source.name != name for source in sources):
            raise UsageError(f"--tls-only {name}: no source is called that")
    return frozenset(names)


def _sources(
    arguments: list[str], export_name: str | None, image_format: str | None
) -> tuple[SourceSpec, ...]:
    sources: list[SourceSpec] = []
    for argument in arguments:
        source = _source(argument, export_name, image_format)
        if any(other.name == source.name for other in sources):
            raise UsageError(f"two sources are called '{source.name}'; name them: NAME=SOURCE")
        sources.append(source)
    return tuple(sources)


def _source(argument: str, export_name: str | None, image_format: str | None) -> SourceSpec:
    name, equals, path = argument.partition("=")
    if not equals or "/" in name:
        name, path = "", argument
    elif not name:
        raise UsageError(f"'{argument}' has an empty NAME before its '='")
    if not path:
        raise UsageError(f"'{argument}' names no file: NAME=SOURCE")
    if name and export_name is not None:
        raise UsageError(f"-x/--export-name and the NAME in '{argument}' contradict each other")
    place = absolute_place(path)
    name = export_name or name or (nbd_uri.parse(place).export if is_remote(place) else Path(path).stem)
    _check_name(name, path)
    return SourceSpec(name, place, image_format)


def _check_name(name: str, path: str) -> None:
    """Refuse names that snapshots (NODE@NAME) or their scratch files could not be named after."""
    if not name or "@" in name or "/" in name or not name.isprintable() or name in (".", ".."):
        raise UsageError(
            f"'{name}' cannot be a NAME: it has no '@', '/' or unprintable character; NAME={path}"
        )
    if len(name.encode(errors="surrogateescape")) > NAME_BYTES_MAX:
        raise UsageError(f"a NAME has at most {NAME_BYTES_MAX} bytes: '{name[:20]}...'")


def _mark_read_only(sources: tuple[SourceSpec, ...], names: list[str]) -> tuple[SourceSpec, ...]:
    known = [source.name for source in sources]
    for name in names:
        if name not in known:
            raise UsageError(f"--read-only-export {name}: no SOURCE is called so, only {', '.join(known)}")
    return tuple(replace(source, read_only=source.name in names) for source in sources)


def _authorise(
    sources: tuple[SourceSpec, ...], arguments: list[str], tls: TlsOptions | None
) -> tuple[SourceSpec, ...]:
    """`sources` with the clients that `arguments`, each EXPORT=NAME, let see them."""
    if arguments and tls is None:
        raise UsageError("--export-authz needs --tls-creds or --tls-psk: TLS tells who a client is")
    names: dict[str, list[str]] = {source.name: [] for source in sources}
    for argument in arguments:
        # Names of exports may have a '=' in them, and those of clients mostly do.
        export = next((name for name in names if argument.startswith(f"{name}=")), None)
        if export is None:
            raise UsageError(
                f"--export-authz {argument}: not EXPORT=NAME with an EXPORT out of {', '.join(names)}"
            )
        name = argument.removeprefix(f"{export}=")
        if not name:
            raise UsageError(f"--export-authz {argument}: names no client")
        names[export].append(name)
    return tuple(replace(source, authorised=tuple(names[source.name])) for source in sources)


def _inherited_listeners(namespace: argparse.Namespace) -> tuple[InheritedSocket, ...]:
    inherited = take_inherited_sockets(os.environ)
    if inherited:
        for option in ("bind", "port", "socket"):
            if getattr(namespace, option) is not None:
                raise UsageError(
                    f"--{option} contradicts LISTEN_FDS: the server was started with sockets to listen on"
                )
        if namespace.fork:
            raise UsageError("--fork contradicts LISTEN_FDS: whoever opened the sockets runs the server")
    return inherited


def _refuse_nothing_to_serve(namespace: argparse.Namespace) -> None:
    """Raise UsageError where there has to be a SOURCE."""
    if namespace.control is None:
        raise UsageError("no SOURCE: name a disk to serve, or give --control PATH and add disks over QMP")
    for option in ("export_name", "run_command", "fork"):
        if getattr(namespace, option):
            name = option.replace("_command", "").replace("_", "-")
            raise UsageError(f"--{name} needs a SOURCE")


def _listeners(
    host: str | None, port: int | None, socket_path: str | None, by_default: bool
) -> tuple[TcpAddress | UnixAddress, ...]:
    """Where to listen; with nothing said, on the loopback or, without `by_default`, nowhere."""
    listeners: list[TcpAddress | UnixAddress] = []
    if socket_path is not None:
        listeners.append(UnixAddress(str(_socket_path("-k/--socket", socket_path))))
    if (by_default and not listeners) or host is not None or port is not None:
        if port is not None and port > 65535:
            raise UsageError(f"-p/--port {port} is not a TCP port")
        listeners.append(TcpAddress(host or DEFAULT_HOST, DEFAULT_PORT if port is None else port))
    return tuple(listeners)


def _socket_path(option: str, path: str) -> Path:
    absolute = os.path.abspath(path)
    if not path or len(os.fsencode(absolute)) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(
            f"{option}: the path of a Unix socket has 1 to {SOCKET_PATH_BYTES_MAX} bytes: '{absolute}'"
        )
    return Path(absolute)

"""The composition root: what `nbdbackup serve` runs.

`serve` puts the rooms together; the services that the monitor's commands act on are here
too, because they span rooms: a snapshot is a filter on a node *and* an export.
"""

from nbdbackup.daemon.options import (
    InheritedSocket,
    ServeOptions,
    SourceSpec,
    TcpAddress,
    TlsOptions,
    UnixAddress,
)
from nbdbackup.daemon.serve import serve

__all__ = [
    "InheritedSocket",
    "ServeOptions",
    "SourceSpec",
    "TcpAddress",
    "TlsOptions",
    "UnixAddress",
    "serve",
]

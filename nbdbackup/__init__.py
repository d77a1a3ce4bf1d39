"""nbdbackup: a pure-Python NBD server with built-in backup fleecing.

A source device is served to NBD clients. A copy-on-write engine sits in front of
it, so that a second export shows the device as it was at one point in time while
the first goes on changing, and a backup job copies that point in time to a target.

The rooms, from the bottom up (each may import those above it in this list, as
`tests/unit/test_layers.py` spells out and checks):

    errors, extents   open to everyone
    nbd               the wire protocol, sans-I/O
    tls               credentials, names, and a stream over a socket
    bitmap            one bit per cluster
    block             devices, the node and its filters
    fleece            copy-before-write, snapshot view, block copy
    job               jobs, and the backup job
    server            listeners and client sessions
    monitor           the QMP control socket
    daemon, cli       composition root; commands
"""

__version__ = "0.1.0"

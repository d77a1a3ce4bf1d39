"""TLS for both roles: credentials from files, names of peers, and a stream over a socket.

Knows neither NBD nor devices. STARTTLS, which decides when TLS begins, is `nbd`'s; whom an export
is for is `server`'s.
"""

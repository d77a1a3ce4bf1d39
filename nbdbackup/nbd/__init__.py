"""The NBD wire protocol, sans-I/O: bytes in, events and bytes out.

Nothing here imports asyncio or socket. The construct definitions in `messages.py` are
the only description of every message, for the server and the client role alike.
"""

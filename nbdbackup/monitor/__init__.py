"""The control socket: QMP framing, commands and events."""

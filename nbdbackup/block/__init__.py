"""Devices, filters and nodes; the contract is in `block/device.py`.

A remote export is a device too, in layers: `nbd` cuts and aligns requests to what the server takes,
`nbd_session` outlives lost connections with the help of `nbd_journal`, `nbd_connection` is one connection.
"""

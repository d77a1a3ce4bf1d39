"""Devices, filters and nodes; the contract is in `block/device.py`."""

"""The copy-on-write engine: request list, block copy, copy-before-write, snapshot view."""

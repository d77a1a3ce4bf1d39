"""Listeners, exports and one client's session. Knows devices, never snapshots or jobs."""

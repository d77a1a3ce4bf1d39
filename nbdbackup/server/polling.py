"""Polling: a look at the socket for some microseconds, before the event loop is asked to wake us.

A client with one request at a time sends the next one some 20 to 40 microseconds after its answer, and to be
put to sleep and woken for it takes as long again. So who was just answered is polled for a moment, with one
turn of the event loop in between: nobody else waits for longer than that moment.

It costs processor time, so it is done only where it pays: while no other client is being served, and as long
as the request is there in at least half of the cases. Otherwise it rests, longer each time.
"""

import os

POLL_MAX_US = 32
"""QEMU's poll-max-ns is as much."""
POLL_LIMIT_US = 1000
"""No more can be asked for: so long, nobody else is served."""
WINDOW = 32
"""So many polls are judged together."""
FOUND_MIN = WINDOW // 2
REST_MIN, REST_MAX = 64, 1 << 14
"""Answers without a poll, after polling did not pay."""


class Poller:
    """Decides for all sessions of a server; `limit_s` seconds is how long one looks at most, 0: never."""

    def __init__(self, limit_s: float = 0.0) -> None:
        self.limit_s = limit_s if len(os.sched_getaffinity(0)) > 1 else 0.0  # or the client could not run
        self._last: object = None
        self._polls = 0
        self._found = 0
        self._rest = 0
        self._next_rest = REST_MIN

    def pays(self, session: object) -> bool:
        """Whether `session`, which was just served, shall look for the next request."""
        is_alone = self._last is session
        self._last = session
        if not is_alone or not self.limit_s:
            return False
        if self._rest:
            self._rest -= 1
            return False
        return True

    def note(self, found: bool) -> None:
        """A session has looked, and there was a request or not."""
        self._polls += 1
        self._found += found
        if self._polls < WINDOW:
            return
        if self._found < FOUND_MIN:
            self._rest = self._next_rest
            self._next_rest = min(2 * self._next_rest, REST_MAX)
        else:
            self._next_rest = REST_MIN
        self._polls = self._found = 0

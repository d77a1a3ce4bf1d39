"""JobTransaction: jobs that succeed together or not at all (completion-mode "grouped").

    waiting    a job's work is done; the others' may not be
    pending    all of them have come to waiting; `job-finalize` of one, where that is needed, is for all
    prepare    each makes its result final; until all have, each can still fail
    commit     all have: none can fail or be cancelled any more

A job that fails, or is cancelled, has all others cancelled. Jobs end one after the other, the newest
first; so come their events, as in QEMU.

A job on its own is a transaction of one: there is one way through all this.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol


class Member(Protocol):
    """What a transaction needs of a job."""

    auto_finalize: bool

    @property
    def is_failing(self) -> bool:
        """Whether it has failed or was cancelled."""

    def enter_pending(self) -> None:
        """All are waiting: become pending."""

    def enter_committing(self) -> None:
        """All are prepared: refuse to be cancelled from now on."""

    def cancel_with_others(self) -> None:
        """Another one failed: be cancelled too, unless it is failing already."""

    async def wait_concluded(self) -> None:
        """Return when it is over."""


class JobTransaction:
    """The members can only be changed before they are started."""

    def __init__(self) -> None:
        self._jobs: list[Member] = []
        # Changing while they run.
        self._waiting: set[Member] = set()
        self._prepared: set[Member] = set()
        self._finalize_asked = asyncio.Event()
        self._all_prepared = asyncio.Event()

    @property
    def jobs(self) -> Sequence[Member]:
        """The members, the newest first."""
        return self._jobs

    def add(self, job: Member) -> None:
        """`job` shares the others' fate."""
        self._jobs.insert(0, job)

    def remove(self, job: Member) -> None:
        """`job` will not be started."""
        self._jobs.remove(job)

    async def wait_finalized(self, job: Member) -> None:
        """`job` is waiting; return when all are pending, and may be finalized."""
        self._waiting.add(job)
        if len(self._waiting) == len(self._jobs):
            for member in self._jobs:
                member.enter_pending()
            if all(member.auto_finalize for member in self._jobs):
                self._finalize_asked.set()
        await self._finalize_asked.wait()

    def finalize(self) -> None:
        """Let all of them, which are pending, go on."""
        self._finalize_asked.set()

    async def wait_prepared(self, job: Member) -> None:
        """`job` is prepared; return when all are, and are committing from then on."""
        self._prepared.add(job)
        if len(self._prepared) == len(self._jobs) and not any(member.is_failing for member in self._jobs):
            for member in self._jobs:
                member.enter_committing()
            self._all_prepared.set()
        await self._all_prepared.wait()

    def fail(self, job: Member) -> None:
        """`job` has failed or was cancelled: so are all others."""
        for member in self._jobs:
            if member is not job:
                member.cancel_with_others()

    async def wait_turn(self, job: Member) -> None:
        """Return when all that are to end before `job` have ended."""
        for member in self._jobs[: self._jobs.index(job)]:
            await member.wait_concluded()

"""A job whose steps happen when the test says so, and a record of its events."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from nbdbackup.job.events import Event
from nbdbackup.job.job import Job
from nbdbackup.job.registry import JobRegistry
from nbdbackup.job.states import JobStatus
from nbdbackup.job.transaction import JobTransaction

WAIT_S_MAX = 10.0


class ScriptedJob(Job):
    """Copies `steps` steps of 100 bytes, each when `step` is called; `failures` maps a hook to its error."""

    def __init__(
        self,
        job_id: str = "job1",
        *,
        steps: int = 1,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        gated_hooks: tuple[str, ...] = (),
        failures: dict[str, Exception] | None = None,
        transaction: JobTransaction | None = None,
    ) -> None:
        super().__init__(
            job_id,
            "disk",
            speed=speed,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
            transaction=transaction,
        )
        self.calls: list[str] = []
        self._steps = steps
        self._allowed = asyncio.Semaphore(0)
        self._failures = failures or {}
        self._gates = {hook: asyncio.Event() for hook in gated_hooks}
        self._reached = {hook: asyncio.Event() for hook in ("run", "prepare", "commit", "abort", "clean")}

    def step(self, count: int = 1) -> None:
        """Let `count` steps more happen."""
        for _ in range(count):
            self._allowed.release()

    def open(self, hook: str) -> None:
        """Let a gated hook end."""
        self._gates[hook].set()

    async def wait_reached(self, hook: str) -> None:
        """Return when `hook` has been called."""
        async with asyncio.timeout(WAIT_S_MAX):
            await self._reached[hook].wait()

    async def run(self) -> None:
        self.progress_set_total(self._steps * 100)
        await self._hook("run")
        for _ in range(self._steps):
            await self.throttle(100)
            await self._allowed.acquire()
            self.progress_add(100)
        await self.pause_point()

    async def prepare(self) -> None:
        await self._hook("prepare")

    async def commit(self) -> None:
        await self._hook("commit")

    async def abort(self) -> None:
        await self._hook("abort")

    async def clean(self) -> None:
        await self._hook("clean")

    async def _hook(self, name: str) -> None:
        self.calls.append(name)
        self._reached[name].set()
        if name in self._gates:
            await self._gates[name].wait()
        # One turn of the loop at least, so that a cancel has somewhere to strike.
        await asyncio.sleep(0)
        if name in self._failures:
            raise self._failures[name]


class EventLog:
    """Every event of a registry, in order, and waits for the next ones."""

    def __init__(self, registry: JobRegistry) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Event()
        registry.subscribe(self._note)

    def _note(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    @property
    def summary(self) -> list[str]:
        """The events as words: a status, or an event's name."""
        return [
            str(event.data["status"]) if event.name == "JOB_STATUS_CHANGE" else event.name
            for event in self.events
        ]

    def find(self, name: str) -> Event:
        """The one event called `name`."""
        (event,) = [event for event in self.events if event.name == name]
        return event

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when `condition()` holds; it is looked at after each event."""
        async with asyncio.timeout(WAIT_S_MAX):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def wait_status(self, job: Job, status: JobStatus) -> None:
        """Return when `job` has come to `status`."""
        await self.wait_until(lambda: job.status is status)


@asynccontextmanager
async def job_registry() -> AsyncIterator[tuple[JobRegistry, EventLog]]:
    """A registry with its task group; jobs that are left at the end are cancelled."""
    async with asyncio.timeout(WAIT_S_MAX * 3), asyncio.TaskGroup() as tasks:
        registry = JobRegistry(tasks)
        log = EventLog(registry)
        try:
            yield registry, log
        finally:
            await registry.cancel_all()


async def settle() -> None:
    """Let every task go as far as it can without I/O or timers."""
    for _ in range(20):
        await asyncio.sleep(0)

"""The steps of a script: each runs on all sides at once and compares what comes of it.

What is merely different is noted and the script goes on, so that one run shows all of it; where the
sides part (one accepts what the other refuses), the script ends there. Everything noted is raised when
the script is over, with the steps that led to it.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from nbdbackup.job.events import Json
from tests.oracle import lives
from tests.oracle.differences import Difference
from tests.oracle.masks import Mask, without
from tests.oracle.reading import bitmaps_of, difference, first_difference, joined, uri, without_times
from tests.oracle.side import WAIT_S, Event, Side, SideFailed
from tests.support.peers import require

T = TypeVar("T")

KIB = 1024
MIB = 1024 * KIB
CLUSTER = 64 * KIB
Fill = tuple[int, int, int]
"""Offset, length, and the byte to fill it with."""
Ranges = list[tuple[int, int]]
"""Offset and length of each."""

STEPS_SHOWN = 15


class Differs(AssertionError):
    """The sides do not say or do the same."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a command came to: a value, or the class and text of an error."""

    value: Json
    error: Json


class Both:
    """All sides of a script, the reference first; with one side alone nothing is compared."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = sides
        self._steps: list[str] = []
        self._noted: list[str] = []
        self._found: dict[tuple[str, str], int] = {}
        self._job_masks: dict[str, tuple[Mask, ...]] = {}
        self._job_differences: dict[str, Difference] = {}
        self._clients: list[asyncio.subprocess.Process] = []
        self._serving = False
        self._parted = False

    async def __aenter__(self) -> Self:
        try:
            await self._everywhere(lambda side: side.__aenter__())
        except BaseException:
            # Those that did start: nobody else will end them.
            await asyncio.gather(*(side.kill() for side in self.sides))
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        if error is None and not self._parted:
            self._compare_events()
            error = self.failure()
        ends = [side.__aexit__(type(error) if error else None, error, None) for side in self.sides]
        results = await asyncio.gather(*ends, return_exceptions=True)
        if kind is not None:
            if self._noted and isinstance(error, AssertionError):
                error.add_note("before that:\n" + "\n".join(self._noted))
            return
        for failure in (error, *results):
            if failure is not None:
                raise failure

    def failure(self) -> Differs | None:
        """What was noted, as an exception; None: nothing was."""
        if not self._noted:
            return None
        return Differs("\n".join([*self._noted, *self._shown()]))

    def forget(self) -> None:
        """What was noted so far was wanted."""
        self._noted.clear()

    async def _everywhere(self, action: Callable[[Side], Awaitable[T]]) -> list[T]:
        """What `action` comes to on each side; all have ended, also when one fails."""
        __tracebackhide__ = True
        results = await asyncio.gather(*(action(side) for side in self.sides), return_exceptions=True)
        good: list[T] = []
        for result in results:
            if isinstance(result, BaseException):
                if self._steps:
                    result.add_note("\n".join(self._shown()))
                raise result
            good.append(result)
        return good

    def _step(self, text: str) -> str:
        self._steps.append(f"  {len(self._steps) + 1}. {text}")
        return text

    def _compare(self, step: str, values: Sequence[Json], differs: Difference | None = None) -> None:
        for side, value in zip(self.sides[1:], values[1:], strict=True):
            if differs is not None:
                if value == values[0]:
                    self._noted.append(f"{step}: {side.name} no longer differs: {differs.why}")
                elif not differs.holds(values[0], value):
                    shown = "\n".join(difference(values[0], value))
                    self._noted.append(f"{step}: differs otherwise than wanted: {differs.ours}\n{shown}")
            elif value != values[0]:
                shown = "\n".join(difference(values[0], value))
                self._noted.append(f"{step}: - {self.sides[0].name}, + {side.name}\n{shown}")

    # Commands.

    async def run(self, command: str, /, **arguments: Json) -> Json:
        """A command that both accept; what it returns."""
        __tracebackhide__ = True
        return await Asking(self).run(command, **arguments)

    async def fail(self, command: str, /, **arguments: Json) -> str:
        """A command that both refuse; the error's text."""
        __tracebackhide__ = True
        return await Asking(self).fail(command, **arguments)

    async def either(self, command: str, /, **arguments: Json) -> Json:
        """A command that both accept or both refuse; the error, None if there is none."""
        answer = await self.ask(command, arguments, (), None, ())
        return answer if isinstance(answer, dict) and "class" in answer else None

    async def part(self, differs: Difference, ours: str, command: str, /, **arguments: Json) -> None:
        """A command that we have "accepted" or "refused", and the reference has not; it parts the sides."""
        theirs = "refused" if ours == "accepted" else "accepted"
        del differs
        await self.ask(command, arguments, (), None, [theirs, *[ours] * (len(self.sides) - 1)])

    def less(self, *masks: Mask) -> "Asking":
        """To run a command without comparing some members of what it returns."""
        return Asking(self, masks)

    def differing(self, differs: Difference) -> "Asking":
        """To run a command of which the sides must say different things."""
        return Asking(self, (), differs)

    async def transaction(
        self, *actions: tuple[str, dict[str, Json]], mode: str | None = None, fails: bool = False
    ) -> Json:
        """The `transaction` of `actions`, with names as QMP writes them."""
        listed: list[Json] = [{"type": name, "data": data} for name, data in actions]
        properties: dict[str, Json] = {} if mode is None else {"properties": {"completion-mode": mode}}
        arguments: dict[str, Json] = {"actions": listed, **properties}
        wanted = ["refused" if fails else "accepted"] * len(self.sides)
        return await self.ask("transaction", arguments, (), None, wanted)

    async def ask(
        self,
        command: str,
        arguments: Mapping[str, Json],
        mask: Sequence[Mask],
        differs: Difference | None,
        wanted: Sequence[str],
    ) -> Json:
        """`wanted`: what the sides have to do with it, "accepted" or "refused"; empty: the same."""
        __tracebackhide__ = True
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        step = self._step(f"{command} {json.dumps(named)}")
        message: dict[str, Json] = {"execute": command, "arguments": named}
        answers = [_answer(answer) for answer in await self._everywhere(lambda side: side.ask(message))]
        outcomes = ["accepted" if answer.error is None else "refused" for answer in answers]
        if outcomes != list(wanted or outcomes[:1] * len(outcomes)):
            told = [f"{side.name}: {answer}" for side, answer in zip(self.sides, answers, strict=True)]
            raise Differs("\n".join([f"{step}: not {wanted or 'the same'}", *told, *self._shown()]))
        if len(set(outcomes)) > 1:
            self._parted = True
            return None
        if outcomes[0] == "refused":
            self._compare(step, [answer.error for answer in answers], differs)
            return answers[0].error
        self._compare(step, [without(answer.value, mask) for answer in answers], differs)
        return answers[0].value

    def _shown(self) -> list[str]:
        return ["the steps:", *self._steps[-STEPS_SHOWN:]]

    async def quit(self) -> int:
        """End the daemons; their exit status, after all they had to say."""
        for side in self.sides:
            side.may_end = True
        await self.run("quit")
        await self._everywhere(lambda side: side.drain_events())
        statuses = await self._everywhere(lambda side: side.wait_exit())
        self._compare("exit status", [*statuses])
        return statuses[0]

    # Jobs and events.

    async def wait(self, job: str, status: str) -> None:
        """Wait until the job has said that it is in `status`, since the last such wait."""
        what = f"status {status} of {job}"
        await self._wait(job, lambda event: lives.job_of(event) == job and _status(event) == status, what)

    async def wait_event(self, name: str, job: str = "") -> None:
        """Wait for an event called `name`, of `job` if it is given, since the last wait."""
        await self._wait(
            job,
            lambda event: event["event"] == name and lives.job_of(event) == (job or None),
            f"{name} {job}",
        )

    async def _wait(self, job: str, is_it: Callable[[Event], bool], what: str) -> None:
        self._step(f"wait for {what}")

        async def wait(side: Side) -> None:
            place = (side.name, job)
            self._found[place] = await side.wait_event(is_it, self._found.get(place, 0), what)

        await self._everywhere(wait)

    async def wait_query(self, job: str, status: str) -> None:
        """Wait until query-jobs has the job in `status`: where it is, unlike `wait`: where it was."""
        self._step(f"wait until {job} is {status}")

        async def wait(side: Side) -> None:
            async with asyncio.timeout(20):
                while True:
                    jobs = await side.listed("query-jobs")
                    if any(info["id"] == job and info["status"] == status for info in jobs):
                        return
                    await asyncio.sleep(0.01)

        try:
            await self._everywhere(wait)
        except TimeoutError:
            raise SideFailed("\n".join(side.name + "\n" + side.transcript() for side in self.sides)) from None

    def events_differ(self, job: str, differs: Difference) -> None:
        """The events of the job, "" for those of none, differ."""
        self._job_differences[job] = differs

    def imprecise(self, job: str, *masks: Mask) -> None:
        """Do not compare these members of the job's events."""
        self._job_masks[job] = masks

    def _compare_events(self) -> None:
        for job in sorted(set().union(*(lives.jobs_in(side.history) for side in self.sides))):
            masks = self._job_masks.get(job, ())
            told = [list(lives.life(side.history, job, masks)) for side in self.sides]
            self._compare(f"events of {job}", told, self._job_differences.get(job))
        told = [list(lives.of_no_job(side.history)) for side in self.sides]
        self._compare("events of no job", told, self._job_differences.get(""))

    # Disks.

    async def file(self, name: str, size: int, *fill: Fill) -> None:
        """Make the file `{dir}/NAME` of zeroes with `fill`."""
        self._step(f"file {name} of {size} bytes {fill or ''}")

        async def make(side: Side) -> None:
            with (side.directory / name).open("wb") as file:
                os.truncate(file.fileno(), size)
                for offset, length, byte in fill:
                    file.seek(offset)
                    file.write(bytes([byte]) * length)

        await self._everywhere(make)

    async def disk(self, name: str, size: int, *fill: Fill, **options: Json) -> None:
        """Make the file `{dir}/NAME.img` and the node NAME of it."""
        await self.file(f"{name}.img", size, *fill)
        child: dict[str, Json] = {"driver": "file", "filename": f"{{dir}}/{name}.img"}
        await self.run("blockdev-add", driver="raw", node_name=name, file=child, **options)

    async def nbdkit(self, name: str, *arguments: str) -> None:
        """Start nbdkit with `arguments` and make the node NAME of it."""
        self._step(f"nbdkit {' '.join(arguments)}")
        await self._everywhere(lambda side: side.nbdkit(name, arguments))
        server: dict[str, Json] = {"type": "unix", "path": f"{{dir}}/{name}.sock"}
        await self.run("blockdev-add", driver="nbd", node_name=name, server=server)

    def touch(self, name: str) -> None:
        """Make the empty file `{dir}/NAME`: nbdkit's filters look at such."""
        self._step(f"touch {name}")
        for side in self.sides:
            (side.directory / name).touch()

    def remove(self, name: str) -> None:
        """Remove the file `{dir}/NAME`."""
        self._step(f"remove {name}")
        for side in self.sides:
            (side.directory / name).unlink()

    def content(self, name: str, length: int | None = None) -> bytes:
        """The bytes of the file `{dir}/NAME`, its first `length`, which are the same on both sides."""
        step = self._step(f"content of {name}")
        contents = [(side.directory / name).read_bytes()[:length] for side in self.sides]
        for side, content in zip(self.sides[1:], contents[1:], strict=True):
            if content != contents[0]:
                self._noted.append(f"{step}: {side.name}: {first_difference(contents[0], content)}")
        return contents[0]

    def content_differs(self, name: str, differs: Difference) -> None:
        """The bytes of the file `{dir}/NAME` are not the same on both sides."""
        step = self._step(f"content of {name}")
        contents = [(side.directory / name).read_bytes() for side in self.sides]
        self._compare(step, [content.hex() for content in contents], differs)

    def expect_content(self, name: str, expected: bytes) -> None:
        """The file begins with these bytes."""
        actual = self.content(name, len(expected))
        if actual != expected:
            raise Differs(f"{name}: {self.sides[0].name}: {first_difference(expected, actual)}")

    # Clients.

    async def serve(
        self,
        node: str,
        *,
        export: str = "",
        writable: bool = True,
        bitmaps: Sequence[Json] = (),
        **options: Json,
    ) -> None:
        """Export the node, as `export` (default: as itself); starts the NBD server if need be."""
        if not self._serving:
            await self.start_nbd()
        name = export or node
        more: dict[str, Json] = {"bitmaps": bitmaps} if bitmaps else {}
        await self.run(
            "block-export-add",
            type="nbd",
            id=f"export-{name}",
            node_name=node,
            name=name,
            writable=writable,
            **more,
            **options,
        )

    async def start_nbd(self, **options: Json) -> None:
        """Start the NBD server on `{dir}/nbd.sock`."""
        address: dict[str, Json] = {"type": "unix", "data": {"path": "{dir}/nbd.sock"}}
        await self.run("nbd-server-start", addr=address, **options)
        self._serving = True

    async def unserve(self, export: str, mode: str | None = None) -> None:
        """End an export and wait until it is gone."""
        more: dict[str, Json] = {} if mode is None else {"mode": mode}
        await self.run("block-export-del", id=f"export-{export}", **more)
        await self.wait_event("BLOCK_EXPORT_DELETED")

    async def io(
        self, export: str, *commands: str, fails: bool = False, differs: Difference | None = None
    ) -> str:
        """qemu-io's `commands` on an export; what it says, less times."""
        step = self._step(f"qemu-io {export}: {'; '.join(commands)}")
        words = [word for command in commands for word in ("-c", command)]
        only_reads = all(command.startswith("read ") for command in commands)
        program = [require("qemu-io"), "-f", "raw", *(["-r"] if only_reads else []), *words, uri(export)]
        results = await self._everywhere(lambda side: side.run_tool(*program))
        outputs = [without_times(output) for _, output in results]
        for side, (status, _), output in zip(self.sides, results, outputs, strict=True):
            failed = status != 0 or "failed" in output
            if failed != fails:
                raise Differs("\n".join([f"{step}: {side.name}: status {status}: {output}", *self._shown()]))
        self._compare(step, outputs, differs)
        return outputs[0]

    async def connect(self, export: str) -> None:
        """A client that stays connected to the export, until `disconnect` or the end."""
        self._step(f"connect to {export}")
        words = (require("qemu-io"), "-f", "raw", "-r", uri(export))

        async def connect(side: Side) -> asyncio.subprocess.Process:
            client = await side.connect(*words)
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write(b"read 0 512\n")
            async with asyncio.timeout(WAIT_S):
                while b"read 512/512" not in (line := await client.stdout.readline()):
                    if not line:
                        raise SideFailed(f"{side.name}: no connection to {export}")
            return client

        self._clients = await self._everywhere(connect)

    async def disconnect(self) -> None:
        """End the client of `connect`."""
        self._step("disconnect")

        async def disconnect(client: asyncio.subprocess.Process) -> None:
            async with asyncio.timeout(WAIT_S):
                await client.communicate(b"quit\n")

        await asyncio.gather(*(disconnect(client) for client in self._clients))

    async def map(self, export: str, context: str) -> list[tuple[int, int, int]]:
        """Offset, length and type of each extent that an export reports in a meta context."""
        step = self._step(f"map of {export} in {context}")
        program = [require("nbdinfo"), "--json", f"--map={context}", uri(export)]
        results = await self._everywhere(lambda side: side.run_tool(*program))
        maps: list[list[tuple[int, int, int]]] = []
        for side, (status, output) in zip(self.sides, results, strict=True):
            if status != 0:
                raise Differs(f"{step}: {side.name}: {output}")
            maps.append(joined(json.loads(output)))
        self._compare(step, [list(extents) for extents in maps])
        return maps[0]

    async def bitmap(self, node: str, name: str) -> Ranges:
        """What is dirty in a bitmap that nobody uses, as a client of an export sees it."""
        export = f"map-{node}-{name}"
        await self.serve(node, export=export, bitmaps=[name])
        try:
            extents = await self.map(export, f"qemu:dirty-bitmap:{name}")
        finally:
            await self.unserve(export)
        return [(offset, length) for offset, length, kind in extents if kind]

    async def bitmaps(self, differs: Difference | None = None) -> dict[str, Json]:
        """What query-named-block-nodes says of the bitmaps with a name, of each node that has any."""
        step = self._step("bitmaps of all nodes")
        found = await self._everywhere(bitmaps_of)
        self._compare(step, found, differs)
        return found[0]


@dataclass(frozen=True, slots=True)
class Asking:
    """Commands of which not everything is compared, or which must differ."""

    both: Both
    masks: Sequence[Mask] = ()
    differs: Difference | None = None

    def differing(self, differs: Difference) -> "Asking":
        """The same, of commands that must differ."""
        return Asking(self.both, self.masks, differs)

    async def run(self, command: str, /, **arguments: Json) -> Json:
        """A command that both accept; what it returns."""
        __tracebackhide__ = True
        wanted = ["accepted"] * len(self.both.sides)
        return await self.both.ask(command, arguments, self.masks, self.differs, wanted)

    async def fail(self, command: str, /, **arguments: Json) -> str:
        """A command that both refuse; the error's text."""
        __tracebackhide__ = True
        wanted = ["refused"] * len(self.both.sides)
        error = await self.both.ask(command, arguments, self.masks, self.differs, wanted)
        assert isinstance(error, dict)
        return str(error["desc"])


def _answer(answer: Mapping[str, Json]) -> _Answer:
    return _Answer(answer.get("return"), answer.get("error"))


def _status(event: Event) -> Json:
    data = event["data"]
    assert isinstance(data, dict)
    return data.get("status")

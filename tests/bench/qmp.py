"""Backup jobs over QMP, ours and qemu-storage-daemon's, as one call that returns when the job is done."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from qemu.qmp import QMPClient, QMPError

from tests.bench.room import MeasureFailed

JOB_LIMIT_S = 900.0

Arguments = Mapping[str, object]
Command = tuple[str, Arguments]


@asynccontextmanager
async def _connected(control: Path) -> AsyncIterator[QMPClient]:
    client = QMPClient("bench")
    await client.connect(str(control))
    try:
        yield client
    finally:
        await client.disconnect()


async def _execute(control: Path, commands: Sequence[Command]) -> None:
    async with _connected(control) as client:
        for command, arguments in commands:
            await client.execute(command, dict(arguments))


async def _run_job(control: Path, job: Command) -> None:
    command, arguments = job
    async with _connected(control) as client:
        with client.listener(names={"BLOCK_JOB_COMPLETED"}) as listener:
            await client.execute(command, dict(arguments))
            event = await asyncio.wait_for(listener.get(), JOB_LIMIT_S)
    data = event["data"]
    if not isinstance(data, dict) or "error" in data:
        raise MeasureFailed(f"{command}: {data}")


def execute(control: Path, commands: Sequence[Command]) -> None:
    """Execute one command after the other.

    Raises:
        MeasureFailed: one of them failed.
    """
    try:
        asyncio.run(_execute(control, commands))
    except QMPError as error:
        raise MeasureFailed(f"{commands}: {error!r}") from error


def run_job(control: Path, job: Command) -> None:
    """Execute the command that starts a job, and wait for its BLOCK_JOB_COMPLETED.

    Raises:
        MeasureFailed: the command or the job failed, or was not done in time.
    """
    try:
        asyncio.run(_run_job(control, job))
    except (QMPError, TimeoutError) as error:
        raise MeasureFailed(f"{job[0]}: {error!r}") from error

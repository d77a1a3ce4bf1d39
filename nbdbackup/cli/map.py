"""`nbdbackup map`: what is data, a hole or zeroes in a file or an export, or what any meta context tells.

Prints what `nbdinfo --map` prints, in the same form, extent by extent as they come: a map may be
longer than memory.
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator

import msgspec

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.nbd import NbdDevice
from nbdbackup.block.nbd_inquiry import list_contexts
from nbdbackup.block.open import is_remote
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.images import add_image_arguments, opened_file, quick_to_fail
from nbdbackup.cli.parser import Verbs, absolute_place
from nbdbackup.errors import ProtocolError, UsageError
from nbdbackup.extents import Extent
from nbdbackup.nbd.constants import BASE_ALLOCATION

TYPES_MAX = 1 << 16
"""Different types in one map."""

DESCRIPTION = """\
Show which parts of a file, or of an export of any NBD server, are data, holes or zeroes:
offset and length in bytes, and type. With --context, show another meta context of an
export, as 'nbdbackup info' lists them. Nothing is written, and nothing is locked."""


class MapOptions(msgspec.Struct, frozen=True):
    """What `map` was told; `image` is absolute, or a URI. `context` None: the usual one, if it is there."""

    image: str
    format: str | None
    json: bool
    context: str | None
    totals: bool


class Run(msgspec.Struct, frozen=True):
    """Neighbouring bytes of one type."""

    area: Extent
    type: int


def add_parser(verbs: Verbs) -> None:
    """Add `map`."""
    parser = verbs.add_parser(
        "map", help="show where a file or an export has data, holes and zeroes", description=DESCRIPTION
    )
    add_image_arguments(parser)
    parser.add_argument(
        "--context",
        metavar="NAME",
        help=f"the meta context to show (default {BASE_ALLOCATION}; without it on the server, all is data)",
    )
    parser.add_argument(
        "--totals", action="store_true", help="only sum up how many bytes there are of each type"
    )
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """`map`."""
    options = MapOptions(
        absolute_place(namespace.image),
        namespace.format,
        namespace.json,
        namespace.context,
        namespace.totals,
    )
    if is_remote(options.image):
        return asyncio.run(_show_export(options))
    if options.context not in (None, BASE_ALLOCATION):
        raise UsageError(f"a file has only {BASE_ALLOCATION}: --context {options.context} needs an export")
    return asyncio.run(_show_file(options))


async def _show_file(options: MapOptions) -> int:
    async with opened_file(options.image, options.format) as device:
        await _show(options, device.size, _allocation_runs(device))
    return ExitStatus.DONE


async def _show_export(options: MapOptions) -> int:
    context = options.context or BASE_ALLOCATION
    device = await NbdDevice.open(options.image, read_only=True, options=quick_to_fail(context))
    try:
        if context in {name for _, name in device.export.contexts}:
            await _show(options, device.size, _context_runs(device, context))
            return ExitStatus.DONE
        if options.context is None:
            await _show(options, device.size, _allocation_runs(device))
            return ExitStatus.DONE
    finally:
        await device.close()
    # Only now: the server may take one client at a time.
    known = await list_contexts(options.image) if device.export.structured_replies else []
    raise UsageError(f"{options.image} has no meta context {context}; it has {', '.join(known) or 'none'}")


async def _allocation_runs(device: BlockDevice) -> AsyncIterator[Run]:
    position = 0
    while position < device.size:
        for extent in await device.block_status(position, device.size - position):
            yield Run(Extent(position, extent.length), int(extent.flags))
            position += extent.length


async def _context_runs(device: NbdDevice, context: str) -> AsyncIterator[Run]:
    position = 0
    while position < device.size:
        for length, kind in await device.context_status(position, device.size - position, context):
            yield Run(Extent(position, length), kind)
            position += length


async def _merged(runs: AsyncIterator[Run]) -> AsyncIterator[Run]:
    last: Run | None = None
    async for found in runs:
        if last is not None and last.type == found.type:
            last = Run(Extent(last.area.offset, last.area.length + found.area.length), last.type)
            continue
        if last is not None:
            yield last
        last = found
    if last is not None:
        yield last


async def _show(options: MapOptions, size: int, runs: AsyncIterator[Run]) -> None:
    context = options.context or BASE_ALLOCATION
    if options.totals:
        _print_totals(options, context, size, await _totals(runs))
        return
    between = "[\n"
    async for found in _merged(runs):
        area, kind = found.area, found.type
        description = describe_type(context, kind)
        if options.json:
            values = {"offset": area.offset, "length": area.length, "type": kind}
            print(between + _json_object(values, description), end="")
            between = ",\n"
        else:
            print(f"{area.offset:10}  {area.length:10}  {kind:3}  {description}".rstrip())
    if options.json:
        print("\n]")


async def _totals(runs: AsyncIterator[Run]) -> dict[int, int]:
    totals: dict[int, int] = {}
    async for found in runs:
        totals[found.type] = totals.get(found.type, 0) + found.area.length
        if len(totals) > TYPES_MAX:
            raise ProtocolError(f"the server tells more than {TYPES_MAX} different types of extents")
    return totals


def _print_totals(options: MapOptions, context: str, size: int, totals: dict[int, int]) -> None:
    lines: list[str] = []
    for kind, length in sorted(totals.items()):
        percent = 100 * length / size
        description = describe_type(context, kind)
        if options.json:
            lines.append(_json_object({"size": length, "percent": percent, "type": kind}, description))
        else:
            lines.append(f"{length:10} {percent:5.1f}% {kind:3} {description}".rstrip())
    print("[\n" + ",\n".join(lines) + "\n]" if options.json else "\n".join(lines))


def _json_object(values: dict[str, int] | dict[str, float], description: str) -> str:
    return json.dumps({**values, "description": description} if description else values)


def describe_type(context: str, kind: int) -> str:
    """What people call type `kind` of `context`; "" if they have no word for it."""
    if context == BASE_ALLOCATION:
        return {0: "data", 1: "hole", 2: "zero", 3: "hole,zero"}.get(kind, "")
    if context.startswith("qemu:dirty-bitmap:"):
        return {0: "clean", 1: "dirty"}.get(kind, "")
    if context == "qemu:allocation-depth":
        return {0: "unallocated", 1: "local"}.get(kind, f"backing depth {kind}")
    return ""

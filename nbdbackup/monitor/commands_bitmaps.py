"""Commands about dirty bitmaps, each an action of `transaction` too; arguments and texts are QEMU's."""

from typing import Annotated

import msgspec

from nbdbackup.job.events import Json
from nbdbackup.monitor.actions import action
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.schema import Arguments, UInt32
from nbdbackup.monitor.services_bitmaps import (
    BitmapAdd,
    BitmapClear,
    BitmapEnable,
    BitmapInfo,
    BitmapMerge,
    BitmapRemove,
)
from nbdbackup.monitor.steps import Step


class BitmapAddArguments(Arguments, frozen=True, kw_only=True):
    node: str
    name: str
    granularity: UInt32 | None = None
    persistent: bool = False
    disabled: bool = False


class BitmapArguments(Arguments, frozen=True, kw_only=True):
    """One bitmap."""

    node: str
    name: str


class BitmapMergeArguments(Arguments, frozen=True, kw_only=True):
    node: str
    target: str
    bitmaps: list[Annotated[str | BitmapArguments, msgspec.Meta(title="BlockDirtyBitmapOrStr")]]


@action("block-dirty-bitmap-add", BitmapAddArguments)
def bitmap_add(services: Services, arguments: BitmapAddArguments) -> Step:
    return services.bitmaps.action(
        BitmapAdd(
            arguments.node,
            arguments.name,
            arguments.granularity,
            arguments.persistent,
            not arguments.disabled,
        )
    )


@action("block-dirty-bitmap-remove", BitmapArguments)
def bitmap_remove(services: Services, arguments: BitmapArguments) -> Step:
    return services.bitmaps.action(BitmapRemove(arguments.node, arguments.name))


@action("block-dirty-bitmap-clear", BitmapArguments)
def bitmap_clear(services: Services, arguments: BitmapArguments) -> Step:
    return services.bitmaps.action(BitmapClear(arguments.node, arguments.name))


@action("block-dirty-bitmap-enable", BitmapArguments)
def bitmap_enable(services: Services, arguments: BitmapArguments) -> Step:
    return services.bitmaps.action(BitmapEnable(arguments.node, arguments.name, enabled=True))


@action("block-dirty-bitmap-disable", BitmapArguments)
def bitmap_disable(services: Services, arguments: BitmapArguments) -> Step:
    return services.bitmaps.action(BitmapEnable(arguments.node, arguments.name, enabled=False))


@action("block-dirty-bitmap-merge", BitmapMergeArguments)
def bitmap_merge(services: Services, arguments: BitmapMergeArguments) -> Step:
    """A source without a node is of the target's."""
    sources = [
        (arguments.node, source) if isinstance(source, str) else (source.node, source.name)
        for source in arguments.bitmaps
    ]
    return services.bitmaps.action(BitmapMerge(arguments.node, arguments.target, sources))


def bitmap_info(info: BitmapInfo) -> dict[str, Json]:
    """A member of a node's `dirty-bitmaps`."""
    members: dict[str, Json] = {
        "recording": info.recording,
        "persistent": info.persistent,
        "busy": info.busy,
        "granularity": info.granularity,
        "count": info.count,
    }
    if info.name is not None:
        members["name"] = info.name
    if info.inconsistent:
        members["inconsistent"] = True
        members["x-nbdbackup-inconsistent-because"] = info.inconsistent
    return members

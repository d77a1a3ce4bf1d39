"""`nbdbackup info`: what a file, or an export of any NBD server, is; without a server of ours.

Of an export it prints what nbdinfo prints, in the same words; of a file what qemu-img info does.
"""

import argparse
import asyncio
import os

import msgspec
from msgspec.structs import replace

from nbdbackup.block.nbd_inquiry import describe, list_contexts, list_exports
from nbdbackup.block.open import is_remote
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.images import add_image_arguments, opened_file
from nbdbackup.cli.output import print_json, printable
from nbdbackup.cli.parser import Verbs, absolute_place
from nbdbackup.cli.sizes import format_size
from nbdbackup.errors import UsageError
from nbdbackup.nbd import uri as nbd_uri
from nbdbackup.nbd.client import RemoteExport
from nbdbackup.nbd.constants import TransmissionFlags

BLOCK_BYTES = 512
"""The unit of `st_blocks`."""

DESCRIPTION = """\
Show the size of a file, or what an NBD server says about an export: its size, what it can
do, its block sizes and its meta contexts. Nothing is written, and nothing is locked.

--list shows every export of a server; the export name in the URI does not matter then."""

_CAN = {
    "is_rotational": TransmissionFlags.ROTATIONAL,
    "is_read_only": TransmissionFlags.READ_ONLY,
    "can_block_status_payload": TransmissionFlags.BLOCK_STATUS_PAYLOAD,
    "can_cache": TransmissionFlags.SEND_CACHE,
    "can_df": TransmissionFlags.SEND_DF,
    "can_fast_zero": TransmissionFlags.SEND_FAST_ZERO,
    "can_flush": TransmissionFlags.SEND_FLUSH,
    "can_fua": TransmissionFlags.SEND_FUA,
    "can_multi_conn": TransmissionFlags.CAN_MULTI_CONN,
    "can_trim": TransmissionFlags.SEND_TRIM,
    "can_zero": TransmissionFlags.SEND_WRITE_ZEROES,
}


class InfoOptions(msgspec.Struct, frozen=True):
    """What `info` was told; `image` is absolute, or a URI."""

    image: str
    format: str | None
    json: bool
    list: bool


class Described(msgspec.Struct, frozen=True):
    """An export of a server, in every respect."""

    uri: str
    export: RemoteExport
    description: str
    contexts: list[str]

    def as_json(self) -> dict[str, object]:
        """nbdinfo's keys."""
        export = self.export
        return {
            "export-name": export.name,
            **({"description": self.description} if self.description else {}),
            "uri": self.uri,
            "contexts": self.contexts,
            **{key: bool(export.flags & flag) for key, flag in _CAN.items()},
            "block_size_minimum": export.block_size_min,
            "block_size_preferred": export.block_size_preferred,
            "block_size_maximum": export.payload_bytes_max,
            "export-size": export.size,
            "export-size-str": format_size(export.size),
        }


def add_parser(verbs: Verbs) -> None:
    """Add `info`."""
    parser = verbs.add_parser(
        "info", help="show what a file, or an export of an NBD server, is", description=DESCRIPTION
    )
    add_image_arguments(parser)
    parser.add_argument("--list", action="store_true", help="show every export of the server at URI")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """`info`."""
    options = InfoOptions(absolute_place(namespace.image), namespace.format, namespace.json, namespace.list)
    if not is_remote(options.image):
        if options.list:
            raise UsageError(f"--list is for the URI of a server, not for a file: {namespace.image}")
        return asyncio.run(_show_file(options))
    return asyncio.run(_show_exports(options))


async def _show_file(options: InfoOptions) -> int:
    async with opened_file(options.image, options.format) as device:
        fd = device.offload_fd()
        allocated = None if fd is None else os.fstat(fd).st_blocks * BLOCK_BYTES
        size = device.size
    if options.json:
        sizes = {"virtual-size": size, "filename": options.image, "format": "raw"}
        print_json(sizes if allocated is None else sizes | {"actual-size": allocated})
        return ExitStatus.DONE
    print(f"image: {options.image}")
    print("file format: raw")
    print(f"virtual size: {format_size(size)} ({size} bytes)")
    if allocated is not None:
        print(f"disk size: {format_size(allocated)}")
    return ExitStatus.DONE


async def _show_exports(options: InfoOptions) -> int:
    here = nbd_uri.parse(options.image)
    if options.list:
        inquiry = await list_exports(options.image)
        found = []
        for name, description in inquiry.descriptions.items():
            uri = str(replace(here, export=name))
            export = await describe(uri)
            contexts = inquiry.contexts.get(name, [])
            found.append(Described(uri, export, export.description or description, contexts))
    else:
        export = await describe(options.image)
        contexts = await list_contexts(options.image) if export.structured_replies else []
        found = [Described(options.image, export, export.description, contexts)]
    structured = all(described.export.structured_replies for described in found)
    extended = bool(found) and all(described.export.extended_headers for described in found)
    if options.json:
        print_json(
            {
                "protocol": "newstyle-fixed",
                "TLS": here.tls,
                "structured": structured,
                "extended": extended,
                "exports": [described.as_json() for described in found],
            }
        )
        return ExitStatus.DONE
    packets = "extended" if extended else "structured" if structured else "simple"
    print(f"protocol: newstyle-fixed {'with' if here.tls else 'without'} TLS, using {packets} packets")
    for described in found:
        _print_export(described)
    return ExitStatus.DONE


def _print_export(described: Described) -> None:
    values = described.as_json()
    size, short = described.export.size, values.pop("export-size-str")
    print(f'export="{printable(described.export.name)}":')
    if described.description:
        print(f"\tdescription: {printable(described.description)}")
    print(f"\texport-size: {size}" + (f" ({short})" if short != str(size) else ""))
    print(f"\turi: {described.uri}")
    if described.contexts:
        print("\tcontexts:")
    for context in described.contexts:
        print(f"\t\t{printable(context)}")
    for key, value in values.items():
        if "_" in key:
            print(f"\t{key}: {str(value).lower()}")

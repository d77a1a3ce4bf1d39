"""`@script`: a test that is a script for all sides.

A script may wait for a feature that we do not have yet: `@script(pending="bitmaps")`. It is run on the
reference alone, where it must pass, and then on both, where it must not: the day it does, it fails until
the word is taken away.
"""

import functools
import inspect
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.oracle.both import Both
from tests.oracle.side import OwnSide, QemuSide

Script = Callable[..., Awaitable[None]]
Test = Callable[..., Awaitable[None]]


def script(*, pending: str = "", reference: type[QemuSide] = QemuSide) -> Callable[[Script], Test]:
    """Make a test of a script, which is given its `Both` first; `reference` is who is right."""

    def decorate(function: Script) -> Test:
        @functools.wraps(function)
        async def test(**parameters: object) -> None:
            __tracebackhide__ = True
            if not pending:
                await _run(function, [reference, OwnSide], parameters)
                return
            await _run(function, [reference], parameters)
            try:
                await _run(function, [reference, OwnSide], parameters)
            except AssertionError:
                pytest.xfail(f"pending: {pending}")
            pytest.fail("passes: take the word `pending` away", pytrace=False)

        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[1:]
        test.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return test

    return decorate


async def _run(
    function: Script, sides: list[type[QemuSide] | type[OwnSide]], parameters: dict[str, object]
) -> None:
    __tracebackhide__ = True
    # Not below pytest's directory: the path of a Unix socket is short.
    directory = Path(tempfile.mkdtemp(prefix="oracle-"))
    try:
        async with Both([side(directory / str(place)) for place, side in enumerate(sides)]) as both:
            await function(both, **parameters)
    finally:
        shutil.rmtree(directory, ignore_errors=True)

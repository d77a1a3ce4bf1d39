"""Fixtures for all tests."""

import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.server import Server

ServeFunction = Callable[..., Server]

# An example that a busy machine slows down is no failure; pytest's own limit bounds the whole test.
settings.register_profile("nbdbackup", deadline=None)
settings.load_profile("nbdbackup")


# A shell that starts this run in the background ignores SIGINT for it, and every program would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _logging_stays_as_it_was() -> Iterator[None]:
    """Undo what a command run inside the test process does to logging: its stream is gone after the test."""
    root, asyncio_logger = logging.getLogger(), logging.getLogger("asyncio")
    levels = (root.level, asyncio_logger.level)
    yield
    root.setLevel(levels[0])
    asyncio_logger.setLevel(levels[1])
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


@pytest.fixture
def serve() -> Iterator[ServeFunction]:
    """Starts `nbdbackup serve`; stops every server at the end of the test and checks that it ended well."""
    with ExitStack() as stack:

        def start(
            sources: Mapping[str, Path] | None = None,
            options: Sequence[str] = (),
            unix: bool = True,
            tcp: bool = True,
            state_dir: Path | None = None,
            environment: Mapping[str, str] | None = None,
            **more: Path,
        ) -> Server:
            server = Server({**(sources or {}), **more}, options, unix, tcp, state_dir, environment)
            return stack.enter_context(server)

        yield start

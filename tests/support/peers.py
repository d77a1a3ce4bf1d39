"""The foreign programs that tests talk to, and what happens when one is missing.

Where a person runs the tests, a test whose peer is missing is skipped. In CI (`CI=true`)
nothing may be skipped for that reason: there a missing peer fails the test, so that a
broken installation cannot pass for a green run. `fixtures/peers` installs them all.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SYSTEM_PYTHON = "/usr/bin/python3"


def in_ci() -> bool:
    """Whether a missing peer is a failure."""
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def unavailable(what: str) -> NoReturn:
    """Skip the test because `what` is missing; fail it in CI."""
    if in_ci():
        pytest.fail(f"{what}; fixtures/peers installs the peers (CI may not skip)", pytrace=False)
    pytest.skip(f"{what}; fixtures/peers installs the peers")


def require(name: str) -> str:
    """The absolute path of the program `name`."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":" + SYSTEM_PATH)
    if path is None:
        unavailable(f"{name} is not installed")
    return path


def require_root(why: str) -> None:
    """The test needs root, `why` says for what."""
    if os.geteuid() != 0:
        unavailable(f"needs root: {why}")


@functools.cache
def _system_python_has_libnbd() -> bool:
    if not Path(SYSTEM_PYTHON).exists():
        return False
    check = subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, timeout=60, check=False)
    return check.returncode == 0


def require_libnbd_python() -> str:
    """A Python that can `import nbd`: the distribution's own, as libnbd's module is built for it."""
    if not _system_python_has_libnbd():
        unavailable(f"{SYSTEM_PYTHON} cannot import nbd (python3-libnbd)")
    return SYSTEM_PYTHON

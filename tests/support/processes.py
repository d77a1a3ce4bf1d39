"""Running foreign programs in tests, with a limit on every wait."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

RUN_TIMEOUT_S = 110.0


def run(*command: str | Path, timeout_s: float = RUN_TIMEOUT_S) -> str:
    """Run a program that must succeed; its standard output."""
    result = attempt(*command, timeout_s=timeout_s)
    assert result.returncode == 0, f"{command}: status {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


def attempt(*command: str | Path, timeout_s: float = RUN_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run a program that may fail."""
    return subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Look again and again until `holds()`, for what another process does without telling; else fail."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)

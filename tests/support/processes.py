"""Running foreign programs in tests, with a limit on every wait."""

import subprocess
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

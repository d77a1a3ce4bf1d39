"""Crash points: a process is killed exactly where it was told to be."""

import os
import signal
import subprocess
import sys

import pytest

from nbdbackup.crash_points import VARIABLE

TIMEOUT_S = 30
PROGRAM = """
from nbdbackup.crash_points import reach
for number in range(1, 4):
    print(number, flush=True)
    reach("here")
    reach("there")
"""


@pytest.mark.parametrize(
    ("value", "seen", "status"),
    [
        ("", "1 2 3", 0),
        ("elsewhere", "1 2 3", 0),
        ("here", "1", -signal.SIGKILL),
        ("there:2", "1 2", -signal.SIGKILL),
        ("there:4", "1 2 3", 0),
    ],
)
def test_a_process_is_killed_at_the_step_it_was_told(value: str, seen: str, status: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, VARIABLE: value},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (result.stdout.split(), result.returncode) == (seen.split(), status)

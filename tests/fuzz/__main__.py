"""`python -m tests.fuzz`: look for new inputs under atheris, and keep those that reach new code."""

import argparse
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.corpus import DIRECTORY, INPUT_BYTES_MAX, directory_of, is_named

_ROOT = DIRECTORY.parents[1]

TARGET_NAMES = ("negotiation", "transmission", "session", "client", "inquiry", "replies", "uri", "framing")
"""Those of `targets.TARGETS`, which nothing may import before atheris looks on."""
HAS_WHEEL = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 15)
"""Whether pip can install atheris here without building it."""
MISSING = "atheris is not installed: " + (
    "pip install -e '.[fuzz]'"
    if HAS_WHEEL
    else "it has wheels for Linux on x86-64 and Python up to 3.14 only"
)

_INPUT_TIMEOUT_S = 20
_MEMORY_MIB_MAX = 1024
_EXIT_SLACK_S = 60
_MERGE_TIMEOUT_S = 600


def is_installed() -> bool:
    """Whether there is an atheris to run under."""
    return importlib.util.find_spec("atheris") is not None


def run_engine(target: str, *arguments: str, timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """Run libFuzzer with `arguments` on `target`; what it says is its output."""
    command = [sys.executable, "-m", "tests.fuzz.engine", target, *arguments]
    return subprocess.run(
        command,
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )


def fuzz(
    target: str, seconds: int, finds: Path, failures: Path, *, seed: int = 0
) -> "subprocess.CompletedProcess[str]":
    """Fuzz for so long, from the kept corpus and `finds` on; what is new goes to the two directories.

    `seed`: where chance begins, 0: anywhere.
    """
    return run_engine(
        target,
        str(finds),
        str(directory_of(target)),
        f"-seed={seed}",
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_BYTES_MAX}",
        "-len_control=10",
        f"-timeout={_INPUT_TIMEOUT_S}",
        f"-rss_limit_mb={_MEMORY_MIB_MAX}",
        f"-artifact_prefix={failures}/",
        timeout_s=seconds + _EXIT_SLACK_S,
    )


def merge(target: str, into: Path, *sources: Path) -> None:
    """Copy from `sources` the fewest inputs that reach what none in `into` reaches."""
    options = ("-set_cover_merge=1", "-use_counters=0", f"-max_len={INPUT_BYTES_MAX}")
    result = run_engine(target, *options, str(into), *map(str, sources), timeout_s=_MERGE_TIMEOUT_S)
    if result.returncode != 0:
        raise SystemExit(f"merging the corpus of {target} failed:\n{result.stdout[-2000:]}")


def minimise(target: str) -> None:
    """Drop what others of the kept corpus reach too, but nothing that somebody named."""
    kept = directory_of(target)
    with tempfile.TemporaryDirectory(prefix="nbdbackup-fuzz-") as directory:
        smaller = Path(directory)
        for path in filter(is_named, kept.iterdir()):
            shutil.copy(path, smaller)
        merge(target, smaller, kept)
        wanted = {path.name for path in smaller.iterdir()}
    for path in kept.iterdir():
        if path.name not in wanted:
            path.unlink()


def _fuzz_and_keep(target: str, seconds: int) -> bool:
    """Whether nothing failed; what failed is kept where the line that is printed says."""
    kept = directory_of(target)
    finds = _ROOT / ".cache" / "fuzz" / target
    finds.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in kept.iterdir()}
    with tempfile.TemporaryDirectory(prefix="nbdbackup-fuzz-") as directory:
        failures = Path(directory)
        result = fuzz(target, seconds, finds, failures)
        if result.returncode != 0:
            print(result.stdout[-6000:])
            for path in failures.iterdir():
                shutil.copy(path, kept)
                print(f"{target}: failed on {kept / path.name}; give it a telling name once it passes")
            return False
    merge(target, kept, finds)
    minimise(target)
    after = {path.name for path in kept.iterdir()}
    last = [line for line in result.stdout.splitlines() if "DONE" in line][-1:]
    print(f"{target}: {len(after - before)} new inputs, {len(after)} kept; {''.join(last)}", flush=True)
    return True


def main() -> int:
    """The exit status: 1 if a target failed, 2 if there is nothing to run it with."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGET_NAMES)}; default all"
    )
    parser.add_argument("--seconds", type=int, default=60, help="for each target; default 60")
    arguments = parser.parse_args()
    for target in arguments.targets:
        if target not in TARGET_NAMES:
            parser.error(f"there is no target {target}; there are {', '.join(TARGET_NAMES)}")
    if not is_installed():
        print(MISSING, file=sys.stderr)
        return 2
    results = [_fuzz_and_keep(target, arguments.seconds) for target in arguments.targets or TARGET_NAMES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

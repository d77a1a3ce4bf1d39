"""`python -m tests.fuzz.engine TARGET LIBFUZZER-ARGUMENTS`: one target under atheris.

Coverage is counted in the modules that are imported while atheris looks on, so everything of the
package is imported there and nowhere before. Ends with the status of libFuzzer.
"""

import shlex
import sys

import atheris

with atheris.instrument_imports(include=["nbdbackup", "construct"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Run until libFuzzer's limits are reached, or the target fails."""
    target = TARGETS[sys.argv[1]]
    # To merge, libFuzzer starts its program again, by way of a shell.
    again = shlex.join([sys.executable, "-m", "tests.fuzz.engine", sys.argv[1]])

    def run(data: bytes) -> None:
        target(data)

    atheris.Setup([again, *sys.argv[2:]], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

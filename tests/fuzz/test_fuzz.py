"""Every target over the kept corpus and what Hypothesis makes of it; the coverage-guided search is slow."""

import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbdbackup
from tests.fuzz import __main__ as command
from tests.fuzz.corpus import DIRECTORY, INPUT_BYTES_MAX, inputs_of
from tests.fuzz.targets import TARGETS
from tests.support.peers import in_ci

PACKAGE = Path(nbdbackup.__file__).parent
EXAMPLES = 60
SEARCH_S = 10
MEMORY_BYTES_MAX = 64 << 20
"""While a target runs: several times what any parser may keep, for the streams and their copies."""

ENDS = {
    "negotiation": {"agreed", "aborted", "broken", "waiting", "waiting with TLS", "bytes before TLS"},
    "transmission": {"closed", "broken", "cut short", "DISC"},
    "session": {"closed", "broken", "cut short", "DISC"},
    "client": {"agreed", "broken", "not found", "waiting", "wants TLS", "bytes before TLS"},
    "inquiry": {"agreed", "broken", "waiting", "wants TLS", "bytes before TLS"},
    "replies": {"all answered", "some answered", "broken", "waiting"},
    "uri": {"refused", "understood"},
    "framing": {"values", "errors", "waiting"},
}
"""All that a target can come to, and the corpus does."""

targets = pytest.mark.parametrize("target", TARGETS)


def _mutated(inputs: list[bytes]) -> st.SearchStrategy[bytes]:
    """Inputs with something in the middle replaced by other bytes, or by a part of another input."""

    @st.composite
    def mutate(draw: st.DrawFn) -> bytes:
        one = draw(st.sampled_from(inputs))
        start = draw(st.integers(0, len(one)))
        end = draw(st.integers(start, len(one)))
        other = draw(st.binary(max_size=40) | st.sampled_from(inputs).map(lambda data: data[-200:]))
        return (one[:start] + other + one[end:])[:INPUT_BYTES_MAX]

    return mutate()


@targets
def test_nothing_in_the_corpus_breaks_a_parser_or_its_bounds(target: str) -> None:
    ends = set()
    for path in inputs_of(target):
        tracemalloc.start()
        try:
            ends.add(TARGETS[target](path.read_bytes()))
            _, peak = tracemalloc.get_traced_memory()
        except BaseException as error:
            error.add_note(f"the input is {path}")
            raise
        finally:
            tracemalloc.stop()
        assert peak <= MEMORY_BYTES_MAX, path
    assert ends == ENDS[target], (
        "the corpus must reach every end, or the targets decode it another way by now"
    )


@targets
def test_no_bytes_break_a_parser_or_its_bounds(target: str) -> None:
    inputs = [path.read_bytes() for path in inputs_of(target)]

    @settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
    @given(st.binary(max_size=200) | _mutated(inputs))
    def check(data: bytes) -> None:
        assert TARGETS[target](data) in ENDS[target]

    check()


def test_every_target_can_be_searched_and_has_a_corpus() -> None:
    assert tuple(TARGETS) == command.TARGET_NAMES
    assert {path.name for path in DIRECTORY.iterdir()} == set(TARGETS)


def _seed_of_the_code() -> int:
    """The same for the same code: to run a test again is not to search elsewhere, to change the code is."""
    crc = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        crc = zlib.crc32(path.read_bytes(), crc)
    return crc & 0x7FFF_FFFF or 1


@pytest.mark.slow
@targets
def test_search_for_new_code_finds_no_breakage(target: str, tmp_path: Path) -> None:
    if not command.is_installed():
        if in_ci() and command.HAS_WHEEL:
            pytest.fail(command.MISSING)
        pytest.skip(command.MISSING)
    finds, failures = tmp_path / "finds", tmp_path / "failures"
    finds.mkdir()
    failures.mkdir()
    result = command.fuzz(target, SEARCH_S, finds, failures, seed=_seed_of_the_code())
    assert result.returncode == 0, result.stdout[-4000:]
    assert "INITED cov:" in result.stdout, "no code was watched"

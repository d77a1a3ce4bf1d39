"""The bench's own arithmetic, tables and pictures; nothing here depends on how fast anything is."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import report
from tests.bench.cases import CASES, Case, select
from tests.bench.contenders import Running
from tests.bench.figures import Figure, Pairs, Row, compare, spread
from tests.bench.fio import Report
from tests.bench.loads import FIO, Values, latencies_ms, moment_p99
from tests.bench.picture import LABELS, VALUES, WIDTH, draw
from tests.bench.room import CLUSTER, MIB, MeasureFailed, Room, room_in
from tests.bench.runner import Results, contenders_here, run, turned
from tests.support.peers import in_ci, require

RATE = Figure("IOPS")
TIME = Figure("ms", "p99", less_is_better=True)
ABOUT = {"kernel": "6.1", "fio": "not here"}
SVG = "{http://www.w3.org/2000/svg}"
LIMIT_S = 100
SLOW_LIMIT_S = 900


def rate_row(ours: Sequence[float], theirs: Sequence[float], expected: float | None = None) -> Row:
    return Row("group", "case", RATE, "ours", ours, "theirs", theirs, expected)


# Figures


def test_ratio_is_that_of_the_medians_and_has_the_spread_of_the_rounds() -> None:
    row = rate_row([100, 300, 200], [50, 100, 400])
    assert row.ratio == 200 / 100
    assert row.ratios == [2, 3, 0.5]
    assert spread([100, 300, 200]) == 1.0


def test_more_than_one_is_better_also_where_less_is() -> None:
    assert Row("group", "case", TIME, "ours", [2], "theirs", [5]).ratio == 2.5


def test_expectation_is_met_from_the_expected_ratio_on() -> None:
    assert rate_row([300], [100], 3.0).met is True
    assert rate_row([299], [100], 3.0).met is False
    assert rate_row([299], [100]).met is None


def test_limit_is_met_up_to_it() -> None:
    assert Row("group", "case", TIME, "ours", [0.1, 9, 0.25], expected=0.25).met is True
    assert Row("group", "case", TIME, "ours", [0.26], expected=0.25).met is False


def test_first_contender_is_compared_with_each_other_one() -> None:
    measured = {name: {"": [value]} for name, value in {"ours": 6.0, "a": 2.0, "b": 3.0}.items()}
    rows = compare("group", "case", [RATE], Pairs(expected={"b": 2.5}, at_most=9), "ours", measured)
    found = [(row.contender, row.peer, row.expected) for row in rows]
    assert found == [("ours", "", 9), ("ours", "a", None), ("ours", "b", 2.5)]


def test_each_contender_is_compared_with_the_base() -> None:
    measured = {name: {"": [value]} for name, value in {"none": 4.0, "kept": 3.0}.items()}
    pairs = Pairs(base="none", expected={"kept": 0.95})
    (row,) = compare("group", "case", [RATE], pairs, "none", measured)
    assert (row.contender, row.peer, row.ratio, row.met) == ("kept", "none", 0.75, False)


def test_expectations_are_about_the_first_figure_alone() -> None:
    measured = {"ours": {"": [1.0], "p99": [1.0]}, "a": {"": [1.0], "p99": [1.0]}}
    rows = compare("group", "case", [RATE, TIME], Pairs(expected={"a": 2}, at_most=3), "ours", measured)
    assert [(row.label, row.peer, row.expected) for row in rows] == [
        ("case", "", 3),
        ("case", "a", 2),
        ("case p99", "a", None),
    ]


def test_nothing_is_compared_with_a_base_or_first_that_was_not_measured() -> None:
    measured = {"a": {"": [1.0]}, "b": {"": [1.0]}}
    assert compare("group", "case", [RATE], Pairs(base="none"), "none", measured) == []
    assert compare("group", "case", [RATE], Pairs(), "ours", measured) == []


# The table of cases


def test_names_of_cases_are_unique_and_none_is_a_group() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert not set(names) & {case.group for case in CASES}


def test_expectations_are_about_contenders_of_the_case() -> None:
    for case in CASES:
        names = [contender.name for contender in case.contenders]
        assert len(set(names)) == len(names), case.name
        assert set(case.pairs.expected or {}) <= set(names), case.name
        assert case.pairs.base in {"", *names}, case.name


def test_cases_are_selected_by_name_group_and_pattern() -> None:
    assert [case.name for case in select(["start"])] == ["start"]
    assert {case.group for case in select(["tls", "pull"])} == {"tls", "pull"}
    assert {case.name for case in select(["bitmap-*-d1"])} == {
        "bitmap-dirty-d1",
        "bitmap-fresh-d1",
        "bitmap-random-d1",
    }
    assert select([]) == list(CASES)


def test_selecting_what_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match="no case and no group is called randraed"):
        select(["start", "randraed"])


# Rounds


@dataclass(frozen=True)
class Fake:
    """A contender whose rate is known."""

    name: str
    rate: int = 1
    needs: tuple[str, ...] = ()
    fails: bool = False

    @contextmanager
    def running(self, room: Room, disk: Path) -> Iterator[Running]:
        if self.fails:
            raise MeasureFailed("no licence")
        yield Running(pid=self.rate)


@dataclass(frozen=True)
class Known:
    """A load whose figure is the contender's rate."""

    figures: Sequence[Figure] = (RATE,)
    needs: tuple[str, ...] = ()

    def __call__(self, running: Running, room: Room) -> Values:
        return {"": running.pid}


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    with room_in(tmp_path, MIB, 0.1, 0, 4096) as room:
        yield room


def test_every_contender_is_the_first_of_a_round_in_turn() -> None:
    contenders = [Fake("a"), Fake("b"), Fake("c")]
    orders = [[one.name for one in turned(contenders, number)] for number in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_rounds_are_interleaved(room: Room) -> None:
    cases = [Case("g", name, "", (Fake("a", 6), Fake("b", 3)), Known()) for name in ("one", "two")]
    said: list[str] = []
    results = Results()
    run(cases, room, 2, results, said.append)
    order = [line.split(": ")[1] for line in said]
    assert order == ["one, a", "one, b", "two, a", "two, b", "one, b", "one, a", "two, b", "two, a"]
    assert results.raw["one"] == {"a": {"": [6, 6]}, "b": {"": [3, 3]}}
    assert [(row.case, row.ratio) for row in results.rows(cases)] == [("one", 2), ("two", 2)]


def test_rows_have_ours_first_whoever_was_measured_first() -> None:
    case = Case("g", "one", "", (Fake("a"), Fake("b")), Known())
    results = Results({"one": {"b": {"": [1.0]}, "a": {"": [2.0]}}})
    assert [row.contender for row in results.rows([case])] == ["a"]


@pytest.mark.parametrize("faulty", [Fake("b", fails=True), Fake("b", rate=0)], ids=["fails", "does nothing"])
def test_contender_that_fails_is_left_out_and_the_others_go_on(room: Room, faulty: Fake) -> None:
    results = Results()
    run([Case("g", "one", "", (Fake("a"), faulty, Fake("c")), Known())], room, 2, results, lambda line: None)
    assert set(results.raw["one"]) == {"a", "c"}
    (left_out,) = results.left_out
    assert left_out.startswith("one, b, from round 1 on: ")


def test_contender_whose_program_is_missing_is_left_out() -> None:
    case = Case("g", "one", "", (Fake("a"), Fake("b", needs=("bee",)), Fake("c")), Known())
    results = Results()
    here = contenders_here(case, lambda needed: needed != "bee", results)
    assert [contender.name for contender in here] == ["a", "c"]
    assert results.left_out == ["one, b: bee is not here"]


def test_case_without_its_load_or_without_any_peer_is_left_out() -> None:
    peer = Fake("b", needs=("bee",))
    results = Results()
    assert not contenders_here(
        Case("g", "one", "", (Fake("a"),), Known(needs=(FIO,))), lambda _: False, results
    )
    assert not contenders_here(Case("g", "two", "", (Fake("a"), peer), Known()), lambda _: False, results)
    assert results.left_out == [
        "one: fio with its nbd engine is not here",
        "two, b: bee is not here",
        "two: nobody is here to compare with",
    ]


def test_case_with_a_limit_needs_no_peer() -> None:
    case = Case("g", "one", "", (Fake("a"),), Known(), Pairs(at_most=1))
    assert contenders_here(case, lambda _: True, Results()) == [Fake("a")]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    size = 1 << 60
    with pytest.raises(SystemExit, match="choose another --directory"), room_in(tmp_path, size, 1, 0, 4096):
        pytest.fail("it began")
    assert list(tmp_path.iterdir()) == []


def test_disk_is_the_same_in_whatever_pieces_it_is_written(tmp_path: Path) -> None:
    disks = []
    for piece in (4096, MIB):
        with room_in(tmp_path, 2 * MIB, 1, 0, piece) as room:
            disks.append(room.disk.read_bytes())
    assert disks[0] == disks[1]
    assert len(disks[0]) == 2 * MIB


def test_fragmented_disk_has_as_many_extents_as_it_says(room: Room) -> None:
    found, offset, wanted = 0, 0, os.SEEK_HOLE
    with room.fragmented.open("rb") as file:
        while offset < room.size:
            try:
                offset = os.lseek(file.fileno(), offset, wanted)
            except OSError:  # ENXIO: a hole up to the end
                offset = room.size
            found += 1
            wanted = os.SEEK_DATA if wanted == os.SEEK_HOLE else os.SEEK_HOLE
    assert found == room.extents


def test_log_writes_to_each_of_its_clusters_once(room: Room) -> None:
    offsets = [
        int(line.split()[2]) for line in room.one_write_in(4).read_text().splitlines() if "write" in line
    ]
    assert sorted(offsets) == list(range(0, room.size, 4 * CLUSTER))
    assert offsets != sorted(offsets)


# What fio says


def test_report_of_fio_is_read_behind_a_note() -> None:
    latency = {"max": 5e6, "percentile": {"50.000000": 1e6, "99.000000": 2e6}}
    job = {
        "read": {"iops": 70, "bw_bytes": 7 * MIB, "clat_ns": latency},
        "write": {"iops": 30, "bw_bytes": 3 * MIB, "clat_ns": {"max": 0}},
    }
    read = Report.parse("fio: a note\n" + json.dumps({"jobs": [job]}))
    assert (read.iops, read.mib_per_s) == (100, 10)
    assert (read.read.p50_ms, read.read.p99_ms, read.read.max_ms) == (1, 2, 5)


def test_only_latencies_of_the_time_asked_for_count(tmp_path: Path) -> None:
    log = tmp_path / "lat.log"
    log.write_text("999, 1000000, 1, 4096, 0\n1000, 2000000, 1, 4096, 0\n2001, 3000000, 1, 4096, 0\n")
    assert latencies_ms(log, 1.0, 2.0) == [2.0]


def test_wait_at_any_moment_is_that_of_the_long_request_that_takes_the_time() -> None:
    # 1,000 ms of 1,999 are the one long request's: 99 of 100 moments are less than 980.01 ms before an end.
    assert moment_p99([1.0] * 999 + [1000.0]) == pytest.approx(1000 - 19.99)
    # Of equal requests, 1 % of the time is the first hundredth of each.
    assert moment_p99([2.0] * 50) == pytest.approx(1.98)
    assert moment_p99([5.0]) == pytest.approx(4.95)


# What is left behind


def rows() -> list[Row]:
    return [
        Row("small", "fast", RATE, "ours", [200, 220], "a<b", [100, 100], 1.5),
        Row("small", "slow", RATE, "ours", [50], "theirs", [100], 0.9),
        Row("start", "start", TIME, "ours", [0.2], expected=0.25),
    ]


def test_table_says_what_is_met_and_what_is_left_out() -> None:
    text = report.table(rows(), ABOUT, Results(left_out=["one: fio is not here"]))
    assert "2 of 3 expectations are met." in text
    assert (
        "| `fast` | IOPS | ours | 210 | 10% | a<b | 100 | 0% | 2.10 | 2.00 to 2.20 | at least 1.5 | yes |"
        in text
    )
    assert "| 0.500 | 0.500 to 0.500 | at least 0.9 | **no** |" in text
    assert "| `start p99` | ms | ours | 0.200 | 0% |  |  |  |  |  | at most 0.25 | yes |" in text
    assert "- one: fio is not here" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_figures_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    results = Results({"one": {"ours": {"p99": [0.1, 2e9]}}}, ["two: fio is not here"])
    report.dump(tmp_path / "results.json", ABOUT, results)
    about, read = report.load(tmp_path / "results.json")
    assert about == ABOUT
    assert read == results


def test_picture_has_a_bar_for_each_ratio_to_the_side_it_belongs() -> None:
    picture = ElementTree.fromstring(draw(rows(), "a & b"))
    fast, slow = picture.iter(f"{SVG}rect")
    (one,) = (line for line in picture.iter(f"{SVG}line") if line.get("class") == "one")
    middle = float(one.get("x1", "0"))
    assert float(fast.get("x", "0")) == middle
    assert float(slow.get("x", "0")) + float(slow.get("width", "0")) == pytest.approx(middle, abs=0.2)
    assert (fast.get("class"), slow.get("class")) == ("met", "missed")
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert "fast: ours / a<b" in texts
    assert "0.500, misses 0.9" in texts
    assert "a & b" in texts


def test_picture_keeps_every_bar_within_its_scale() -> None:
    generator = random.Random(1)
    many = [rate_row([generator.lognormvariate(0, 5)], [1], 1.0) for _ in range(50)]
    picture = ElementTree.fromstring(draw(many, "many"))
    for bar in picture.iter(f"{SVG}rect"):
        start, width = float(bar.get("x", "0")), float(bar.get("width", "0"))
        assert start >= LABELS
        assert start + width <= WIDTH - VALUES + 0.2


# The whole of it


def bench(directory: Path, *arguments: str) -> list[str]:
    place = directory / "disks"
    place.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.bench", "--quick", "--size-mib", "8", "--directory", str(place)]
    return [*command, *arguments]


def test_one_command_leaves_table_picture_and_figures_and_no_disk(tmp_path: Path) -> None:
    require("fio")
    require("qemu-nbd")
    output = tmp_path / "output"
    command = bench(tmp_path, "--only", "start", "--only", "randwrite-4k-d1", "--output", str(output))
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "`randwrite-4k-d1` | IOPS | nbdbackup" in done.stdout
    assert (output / "results.md").read_text() in done.stdout
    assert ElementTree.parse(output / "results.svg").getroot().tag == f"{SVG}svg"
    raw = json.loads((output / "results.json").read_text())["raw"]
    assert raw["randwrite-4k-d1"]["nbdbackup"][""][0] > 0
    assert list((tmp_path / "disks").iterdir()) == []
    redraw = [sys.executable, "-m", "tests.bench", "--redraw", str(output / "results.json")]
    again = subprocess.run(redraw, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert again.stdout == done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_bench_reports_what_it_has_and_leaves_no_disk(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = bench(tmp_path, "--only", "start", "--rounds", "1000")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            while "start, nbdbackup: " not in line:
                assert line, "it ended early"
                line = process.stderr.readline()
            process.send_signal(number)
            output, errors = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "| `start` | s | nbdbackup |" in output
    assert "interrupted: yes" in output
    assert list((tmp_path / "disks").iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(SLOW_LIMIT_S)
def test_every_kind_of_case_can_be_measured(tmp_path: Path) -> None:
    wanted = [
        "randrw-4k-d16",
        "read-1m-d8-c4",
        "randread-4k-d16-tcp",
        "randwrite-4k-d16-tls",
        "snapshot-*-d16",
    ]
    wanted += ["bitmap-*-d16", "pull", "push", "latency", "status", "fairness", "footprint"]
    only = [word for name in wanted for word in ("--only", name)]
    command = bench(tmp_path, *only, "--size-mib", "64", "--output", str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=SLOW_LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    left_out = json.loads((tmp_path / "results.json").read_text())["left out"]
    missing = [line for line in left_out if not line.endswith(("is not here", "to compare with"))]
    assert missing == []
    assert not (in_ci() and left_out), left_out

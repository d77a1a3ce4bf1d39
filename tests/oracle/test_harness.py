"""The oracle itself: what differs is seen, and what is excused is needed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbackup.job.events import Json
from tests.oracle import differences, masks
from tests.oracle.both import MIB, Both, Differs
from tests.oracle.differences import Difference
from tests.oracle.lives import life
from tests.oracle.masks import Mask
from tests.oracle.script import script
from tests.oracle.side import Event, Marker

HERE = Path(__file__).parent


def _words_of(files: list[Path]) -> Iterator[str]:
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                yield node.attr
            elif isinstance(node, ast.Name):
                yield node.id


@pytest.mark.parametrize(("module", "kind"), [(differences, Difference), (masks, Mask)])
def test_every_excuse_is_used_by_a_script(module: object, kind: type) -> None:
    entries = {name for name, value in vars(module).items() if isinstance(value, kind)}
    scripts = [file for file in HERE.glob("*.py") if file.name not in ("differences.py", "masks.py")]
    assert entries - set(_words_of(scripts)) == set()


async def _differs(both: Both, what: str) -> None:
    """What was noted is `what`, and is forgotten, if there is anybody to compare with."""
    if len(both.sides) == 1:
        return
    failure = both.failure()
    assert isinstance(failure, Differs)
    assert what in str(failure)
    both.forget()


@script()
async def test_a_different_value_is_seen(both: Both) -> None:
    await both.run("query-version")
    await _differs(both, '"major"')


@script()
async def test_different_bytes_are_seen(both: Both) -> None:
    await both.file("a", MIB, (0, MIB, 1))
    with (both.sides[-1].directory / "a").open("r+b") as file:
        file.seek(1000)
        file.write(b"\2")
    both.content("a")
    await _differs(both, "1 bytes differ, first at 1000: 0x02 instead of 0x01")


@script()
async def test_a_command_that_one_accepts_and_the_other_refuses_ends_the_script(both: Both) -> None:
    await both.file("a.img", MIB)
    (both.sides[-1].directory / "a.img").unlink()
    with pytest.raises(Differs, match="accepted"):
        await both.run("blockdev-add", driver="file", node_name="a", filename="{dir}/a.img")


@script()
async def test_an_excuse_without_need_is_seen(both: Both) -> None:
    await both.differing(differences.LIST_ORDER).run("query-jobs")
    await _differs(both, "no longer differs")


async def test_a_pending_script_is_noticed_on_the_day_it_passes() -> None:
    @script(pending="a feature")
    async def passes(both: Both) -> None:
        await both.run("query-jobs")

    @script(pending="a feature")
    async def differs(both: Both) -> None:
        await both.run("query-version")

    with pytest.raises(pytest.fail.Exception, match="take the word"):
        await passes()
    with pytest.raises(pytest.xfail.Exception, match="a feature"):
        await differs()


def _change(status: str) -> Event:
    data: Json = {"id": "j", "status": status}
    return {"event": "JOB_STATUS_CHANGE", "data": data}


def test_only_pauses_that_nobody_asked_for_are_left_out() -> None:
    drained: list[Event | Marker] = [
        *map(_change, ("created", "running", "paused", "running", "paused", "running", "waiting"))
    ]
    assert life(drained, "j", ()) == ["status created", "status running", "status waiting"]
    asked: list[Event | Marker] = [
        *map(_change, ("created", "running")),
        Marker("job-pause"),
        _change("paused"),
        Marker("job-resume"),
        _change("running"),
    ]
    assert life(asked, "j", ()) == ["status created", "status running", "status paused", "status running"]

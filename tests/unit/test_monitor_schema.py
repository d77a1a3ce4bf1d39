"""Arguments that do not fit are refused in QEMU's words; those that fit become structs."""

from enum import Enum
from typing import Annotated, cast

import msgspec
import pytest

from nbdbackup.job.events import Json
from nbdbackup.monitor.errors import QmpError
from nbdbackup.monitor.schema import Arguments, convert_arguments


class Colour(Enum):
    RED = "red"
    DARK_BLUE = "dark-blue"


class Inner(Arguments, frozen=True, kw_only=True):
    max_size: int = 7


class Everything(Arguments, frozen=True, kw_only=True):
    node_name: str
    colour: Colour = Colour.RED
    force: bool = False
    speed: int = 0
    timeout: float = 0.0
    names: list[str] | None = None
    inner: Inner | None = None


class Square(Arguments, frozen=True, kw_only=True, tag_field="shape", tag="square"):
    side: int


class Circle(Arguments, frozen=True, kw_only=True, tag_field="shape", tag="circle"):
    radius: int


class Holder(Arguments, frozen=True, kw_only=True):
    shape: Annotated[str | Square, msgspec.Meta(title="ShapeRef")]


AnyShape = cast("type[Square | Circle]", Square | Circle)


def test_arguments_become_a_struct() -> None:
    arguments: dict[str, Json] = {
        "node-name": "n", "colour": "dark-blue", "timeout": 2, "names": ["a"], "inner": {"max-size": 1},
    }  # fmt: skip
    assert convert_arguments(arguments, Everything) == Everything(
        node_name="n", colour=Colour.DARK_BLUE, timeout=2.0, names=["a"], inner=Inner(max_size=1)
    )


def test_union_is_chosen_by_its_tag() -> None:
    assert convert_arguments({"shape": "circle", "radius": 1}, AnyShape) == Circle(radius=1)


def test_alternate_takes_both_forms() -> None:
    assert convert_arguments({"shape": "s1"}, Holder).shape == "s1"
    inline: dict[str, Json] = {"shape": {"shape": "square", "side": 2}}
    assert convert_arguments(inline, Holder).shape == Square(side=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "Parameter 'node-name' is missing"),
        ({"node-name": "n", "x": 1}, "Parameter 'x' is unexpected"),
        ({"node-name": "n", "node_name": "n"}, "Parameter 'node_name' is unexpected"),
        ({"node-name": 1}, "Invalid parameter type for 'node-name', expected: string"),
        ({"node-name": None}, "Invalid parameter type for 'node-name', expected: string"),
        ({"node-name": "n", "colour": "pink"}, "Parameter 'colour' does not accept value 'pink'"),
        ({"node-name": "n", "colour": 1}, "Invalid parameter type for 'colour', expected: string"),
        ({"node-name": "n", "force": 1}, "Invalid parameter type for 'force', expected: boolean"),
        ({"node-name": "n", "speed": 1.0}, "Invalid parameter type for 'speed', expected: integer"),
        ({"node-name": "n", "speed": True}, "Invalid parameter type for 'speed', expected: integer"),
        ({"node-name": "n", "speed": 1 << 63}, "Invalid parameter type for 'speed', expected: integer"),
        ({"node-name": "n", "timeout": "1"}, "Invalid parameter type for 'timeout', expected: number"),
        ({"node-name": "n", "names": "a"}, "Invalid parameter type for 'names', expected: array"),
        ({"node-name": "n", "names": None}, "Invalid parameter type for 'names', expected: array"),
        ({"node-name": "n", "names": ["a", 1]}, "Invalid parameter type for 'names[1]', expected: string"),
        ({"node-name": "n", "inner": 4}, "Invalid parameter type for 'inner', expected: object"),
        ({"node-name": "n", "inner": {"x": 4}}, "Parameter 'inner.x' is unexpected"),
        (
            {"node-name": "n", "inner": {"max-size": ""}},
            "Invalid parameter type for 'inner.max-size', expected: integer",
        ),
    ],
)
def test_misfit_is_named(arguments: dict[str, Json], text: str) -> None:
    with pytest.raises(QmpError) as caught:
        convert_arguments(arguments, Everything)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"radius": 1}, "Parameter 'shape' is missing"),
        ({"shape": "blob"}, "Parameter 'shape' does not accept value 'blob'"),
        ({"shape": "circle", "side": 1}, "Parameter 'radius' is missing"),
        ({"shape": "circle", "radius": 1, "side": 1}, "Parameter 'side' is unexpected"),
    ],
)
def test_misfit_of_a_union_is_named(arguments: dict[str, Json], text: str) -> None:
    with pytest.raises(QmpError) as caught:
        convert_arguments(arguments, AnyShape)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (5, "Invalid parameter type for 'shape', expected: ShapeRef"),
        ({}, "Parameter 'shape.shape' is missing"),
        ({"shape": "square", "side": ""}, "Invalid parameter type for 'shape.side', expected: integer"),
    ],
)
def test_misfit_of_an_alternate_is_named(shape: Json, text: str) -> None:
    with pytest.raises(QmpError) as caught:
        convert_arguments({"shape": shape}, Holder)
    assert str(caught.value) == text

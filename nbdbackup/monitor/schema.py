"""The arguments of commands: `msgspec.Struct`s, and QEMU's words for what does not fit them.

A command's arguments are a subclass of `Arguments`: names with dashes on the wire, nothing
unknown, and `X | None = None` for what can be left out (null is no value in QMP). A union of
structs with a tag is a QAPI flat union: its tag is the discriminator. `str | SomeStruct` is an
alternate; annotate it with a `msgspec.Meta(title=...)` for its name in errors.

`check_arguments` walks the type beside the value, in QEMU's order: members as they are declared,
each missing or of the wrong type, then the first unknown one.
"""

from collections.abc import Mapping
from typing import Annotated, TypeVar, cast

import msgspec
from msgspec import inspect

from nbdbackup.job.events import Json
from nbdbackup.monitor.errors import QmpError

INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1
UINT32_MAX = (1 << 32) - 1

UInt32 = Annotated[int, msgspec.Meta(title="uint32_t")]
"""An integer of 32 bits without a sign."""


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """Base of all arguments."""


class NoArguments(Arguments, frozen=True, kw_only=True):
    """For a command that takes none."""


A = TypeVar("A")

_SCALARS: dict[type[inspect.Type], tuple[tuple[type, ...], str]] = {
    inspect.StrType: ((str,), "string"),
    inspect.IntType: ((int,), "integer"),
    inspect.BoolType: ((bool,), "boolean"),
    inspect.FloatType: ((int, float), "number"),
}


def convert_arguments(arguments: Mapping[str, Json], arguments_type: type[A]) -> A:
    """`arguments` as an `arguments_type`.

    Raises:
        QmpError: they do not fit.
    """
    check_value(arguments_type, arguments, "")
    return msgspec.convert(arguments, arguments_type)


def check_value(expected: type[A], value: Json, path: str) -> None:
    """Raise QmpError if `value`, which the user calls `path`, is no `expected`."""
    _check(inspect.type_info(expected), value, path)


def _check(expected: inspect.Type, value: Json, path: str) -> None:
    """Raise QmpError if `value`, which the user calls `path`, is no `expected`."""
    title = ""
    if isinstance(expected, inspect.Metadata):
        title = str((expected.extra_json_schema or {}).get("title", ""))
        expected = expected.type
    match expected:
        case inspect.IntType() if title == "uint32_t":
            _check_uint32(value, path)
        case inspect.StructType():
            members = _as_object(value, path)
            if expected.tag_field is not None:
                _check_tag([expected], members, path)
            _check_members(expected, members, path)
        case inspect.UnionType():
            _check_union(expected, value, path, title)
        case inspect.ListType():
            if not isinstance(value, list):
                raise _wrong_type(path, "array")
            for index, item in enumerate(value):
                _check(expected.item_type, item, f"{path}[{index}]")
        case inspect.DictType():
            _as_object(value, path)
        case inspect.EnumType():
            _check_word(value, [member.value for member in expected.cls], path)
        case _:
            _check_scalar(expected, value, path)


def _check_members(expected: inspect.StructType, members: Mapping[str, Json], path: str) -> None:
    known = {field.encode_name for field in expected.fields}
    if expected.tag_field is not None:
        known.add(expected.tag_field)
    for field in expected.fields:
        name = field.encode_name
        if name in members:
            _check(field.type, members[name], _join(path, name))
        elif field.required:
            raise QmpError(f"Parameter '{_join(path, name)}' is missing")
    for name in members:
        if name not in known:
            raise QmpError(f"Parameter '{_join(path, name)}' is unexpected")


def _check_union(expected: inspect.UnionType, value: Json, path: str, title: str) -> None:
    alternatives = [kind for kind in expected.types if not isinstance(kind, inspect.NoneType)]
    if len(alternatives) == 1:
        _check(alternatives[0], value, path)
        return
    structs = [kind for kind in alternatives if isinstance(kind, inspect.StructType)]
    if isinstance(value, str) and len(structs) < len(alternatives):
        return
    if len(structs) < len(alternatives) and not isinstance(value, dict):
        # QEMU calls an alternate by its last name, and in a list it has none.
        raise _wrong_type("null" if path.endswith("]") else path.rpartition(".")[2], title)
    members = _as_object(value, path)
    tag_field = structs[0].tag_field
    if tag_field is None:
        _check_members(structs[0], members, path)
        return
    _check_members(_check_tag(structs, members, path), members, path)


def _check_tag(
    structs: list[inspect.StructType], members: Mapping[str, Json], path: str
) -> inspect.StructType:
    """The one of `structs` that the discriminator in `members` names."""
    tag_field = structs[0].tag_field
    assert tag_field is not None
    tag_path = _join(path, tag_field)
    if tag_field not in members:
        raise QmpError(f"Parameter '{tag_path}' is missing")
    tag = members[tag_field]
    _check_word(tag, [struct.tag for struct in structs], tag_path)
    return next(struct for struct in structs if struct.tag == tag)


def _check_word(value: Json, words: list[str | int | None], path: str) -> None:
    if not isinstance(value, str):
        raise _wrong_type(path, "string")
    if value not in words:
        # QEMU calls it by its last name here, and only here.
        raise QmpError(f"Parameter '{path.rpartition('.')[2]}' does not accept value '{value}'")


def _check_scalar(expected: inspect.Type, value: Json, path: str) -> None:
    python_types, name = _SCALARS[type(expected)]
    is_right = isinstance(value, python_types) and (name == "boolean" or not isinstance(value, bool))
    if name == "integer" and is_right:
        is_right = INT_MIN <= cast(int, value) <= INT_MAX
    if not is_right:
        raise _wrong_type(path, name)


def _check_uint32(value: Json, path: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise QmpError(f"Parameter '{path}' expects uint64")
    if not 0 <= value <= UINT32_MAX:
        raise QmpError(f"Parameter '{path}' expects uint32_t")


def _as_object(value: Json, path: str) -> Mapping[str, Json]:
    if not isinstance(value, dict):
        raise _wrong_type(path, "object")
    return value


def _wrong_type(path: str, expected: str) -> QmpError:
    return QmpError(f"Invalid parameter type for '{path}', expected: {expected}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

"""One line that says what is wrong with a value, and what is allowed."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from errors import InputError
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails

Model = TypeVar("Model", bound=BaseModel)


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """Returns "; did you mean NAME?" when one of the allowed names is near, else nothing."""
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Returns the values of a field that has a fixed set of them, else nothing."""
    for kind in kinds_of(field.annotation):
        if get_origin(kind) is Literal:
            return get_args(kind)
    return ()


def kinds_of(annotation: Any) -> list[Any]:
    """Returns the members of a union, without None and Annotated."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [m for a in get_args(annotation) for m in kinds_of(a)]
        return [m for m in members if m is not type(None)]
    if hasattr(annotation, "__metadata__"):
        return kinds_of(annotation.__origin__)
    return [annotation]


def _range(constraints: Iterable[Any]) -> str:
    """Says the range of a number, such as " of at least 1"."""
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    bounds = []
    for constraint in constraints:
        for item in getattr(constraint, "metadata", [constraint]):
            for name, phrase in words.items():
                if getattr(item, name, None) is not None:
                    bound = getattr(item, name)
                    bounds.append(f"{phrase} {bound if isinstance(bound, int) else f'{bound:g}'}")
    return f" of {' and '.join(bounds)}" if bounds else ""


def _number(kind: Any, constraints: Iterable[Any]) -> str:
    return f"{'an integer' if kind is int else 'a number'}{_range(constraints)}"


def _allowed(model: type[BaseModel], name: str, error: Any) -> str:
    """Says what is wrong, with what is allowed."""
    field = model.model_fields[name]
    message = str(error["msg"])
    if message.startswith("is not"):  # the schema's own words
        return message
    allowed = choices(field)
    if allowed:
        hint = suggestion(str(error["input"]), allowed)
        return f"is not allowed{hint}; allowed are {', '.join(allowed)}"
    kinds = kinds_of(field.annotation)
    if error["type"] == "finite_number":
        return "is not a finite number"
    if kinds[0] in (int, float):
        return f"is not {_number(kinds[0], field.metadata)}"
    if kinds[0] in (str, Path):
        return f"is not {'text' if kinds[0] is str else 'a path'}"
    if get_origin(kinds[0]) is dict and error["type"] == "dict_type":
        return "is not a mapping; allowed are lines `key: value` below it"
    if get_origin(kinds[0]) is tuple:
        item = get_args(kinds[0])[0]
        if hasattr(item, "__metadata__"):
            return f"is not {_number(item.__origin__, item.__metadata__)}"
        return "is not a list of rows of a first epoch (from 1), a learning rate and a weight decay"
    if kinds[0] is bool:
        return "is not allowed; allowed are true and false"
    return f"is not valid: {message}"


def _refuse_switches(model: type[BaseModel], values: Mapping[str, Any]) -> None:
    """Raises ValidationError for true and false where numbers are meant: pydantic takes them."""
    problems = [
        InitErrorDetails(type="int_type", loc=(name,), input=value)
        for name, value in values.items()
        if isinstance(value, bool) and bool not in kinds_of(model.model_fields[name].annotation)
    ]
    if problems:
        raise ValidationError.from_exception_data(model.__name__, problems)


def validate(model: type[Model], values: Mapping[str, Any], origins: Mapping[str, str]) -> Model:
    """Returns the checked settings.

    Args:
        model: The schema.
        values: Keys and values.
        origins: What to call a key in an error, such as ``--batchsize`` or ``run.yaml: batchsize``.

    Raises:
        InputError: A value is not allowed, or some exclude each other.
    """
    for name, value in values.items():
        if value == "":  # a variable of a shell that is not set; as a path it would mean here
            raise InputError(f"{origins.get(name, name)}: is empty; give a value or leave it out")
    try:
        _refuse_switches(model, values)
        return model.model_validate(dict(values))
    except ValidationError as e:
        error = e.errors()[0]
    if not error["loc"]:
        raise InputError(str(error["msg"]))
    name = str(error["loc"][0])
    origin = origins.get(name, name)
    value = error["input"]
    shown = repr(value) if isinstance(value, str) else str(value)
    raise InputError(f"{origin}: {shown[:80]} {_allowed(model, name, error)}")

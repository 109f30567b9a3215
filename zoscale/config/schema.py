"""The typed fields that a class offers to a configuration, and values checked against them.

Checks are strict (`true` is not an int, `"8"` is not 8, null is only for `X | None`), so that a configuration
written as YAML is the one that is read back.
"""

import copy
import dataclasses
import functools
import inspect
import json
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from zoscale.config.strict_yaml import Text, plain

MISSING: Any = inspect.Parameter.empty  # the default of a field that must be given


@dataclass(frozen=True)
class Method:
    """A named choice from a table of classes and every configurable argument of that class.

    Args:
        name: Name of the class in its table.
        args: Keyword-only arguments of its constructor.
    """

    name: str
    args: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Field:
    """One configurable value: its name, type and default (`MISSING` if it must be given)."""

    name: str
    hint: Any
    default: Any

    def fresh_default(self) -> Any:
        return copy.deepcopy(self.default)


def is_section(hint: Any) -> bool:
    """Whether a field of this type has fields of its own."""
    return dataclasses.is_dataclass(hint)


@functools.cache
def fields_of(cls: type, keyword_only: bool = False) -> dict[str, Field]:
    """The fields of dataclass `cls`; or, if `keyword_only`, the keyword-only parameters of any constructor.

    A constructor that takes `**options` hands them to the next one among its bases: they are those of that one.

    Raises:
        TypeError: A default is not of its own type, or an argument is called `name`: correct the class.
    """
    found = _dataclass_parameters(cls, keyword_only) if is_section(cls) else _signature_parameters(cls)
    fields = {}
    for name, (default, hint) in found.items():
        try:
            given = default is not MISSING and not is_section(hint)
            value = conform(plain(default, name), hint) if given else default
        except ValueError as error:
            problem = f"the default of {name} is no {type_name(hint)}: {error}"
            raise TypeError(f"{cls.__qualname__}: {problem}") from error
        fields[name] = Field(name, hint, value)
    if keyword_only and "name" in fields:
        raise TypeError(f"{cls.__qualname__}: 'name' picks the class; rename that argument")
    return fields


def _dataclass_parameters(cls: Any, keyword_only: bool) -> dict[str, tuple[Any, Any]]:
    """(default, type) by name."""
    found: dict[str, tuple[Any, Any]] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init and (field.kw_only or not keyword_only):
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            found[field.name] = MISSING if default is dataclasses.MISSING else default, hints[field.name]
    return found


def _signature_parameters(cls: Any) -> dict[str, tuple[Any, Any]]:
    """(default, type) by name; the nearest constructor's that has the name."""
    found: dict[str, tuple[Any, Any]] = {}
    for init in (vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)):
        parameters = inspect.signature(init).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in found}
        hints = _hints(init, own)
        found |= {name: (default, hints.get(name, Any)) for name, default in own.items()}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _hints(init: Any, names: Iterable[str]) -> dict[str, Any]:
    """Types of the named parameters only: the others may be imported for the type checker alone."""
    init = inspect.unwrap(init)
    notes = {name: init.__annotations__[name] for name in names if name in init.__annotations__}
    holder = type("_Holder", (), {"__annotations__": notes})
    return typing.get_type_hints(holder, init.__globals__) if notes else {}


@functools.lru_cache(maxsize=512)
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def conform(value: Any, hint: Any) -> Any:
    """`value` as type `hint`: strict, except that an int is a float, and `Text` is read as the type asks.

    Raises:
        ValueError: It is not of that type.
    """
    if isinstance(value, Text):
        try:
            return _adapter(hint).validate_python(value.parsed, strict=True)
        except ValidationError:
            return _adapter(hint).validate_python(str(value), strict=True)
    if isinstance(value, dict):
        mappings = (h for h in (hint, *typing.get_args(hint)) if typing.get_origin(h) is dict)
        item = next((typing.get_args(h)[1] for h in mappings), Any)
        value = {key: _read(child, item) for key, child in value.items()}
    return _adapter(hint).validate_python(value, strict=True)


def conforms(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a library's type: a list may stand for a tuple, a mapping for a dataclass."""
    try:
        _adapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


def _read(value: Any, hint: Any) -> Any:
    """`value` with the `Text` inside it read; types are checked later, by the whole."""
    if isinstance(value, Text):
        return conform(value, hint)
    return {key: _read(child, Any) for key, child in value.items()} if isinstance(value, dict) else value


def type_name(hint: Any) -> str:
    """`hint` as a person would write it."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    simple = isinstance(hint, type) and not typing.get_args(hint)
    return str(hint.__name__) if simple else str(hint).replace("typing.", "")

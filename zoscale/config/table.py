"""What a configuration can name: a table's own names, and what a module of the user's holds, as `module:name`."""

import importlib
from collections import UserDict
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from zoscale.config.schema import fields_of
from zoscale.config.strict_yaml import ConfigError, show

T = TypeVar("T")
_OTHERS = "module:Class"


def imported(name: str) -> Any:
    """What `module:name` names; None if the module has nothing of that name.

    Raises:
        ConfigError: if the module cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ConfigError("module:name, of a module and of what it holds", show(name), "correct the name")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ConfigError(f"a module {module!r} on the Python path", str(error), "set PYTHONPATH") from error
    except Exception as error:  # whatever the user's module does
        got = f"{type(error).__name__}: {error}"[:200]
        raise ConfigError(f"a module {module!r} that can be imported", got, "mend it") from error


class Table(UserDict[str, type[T]]):
    """Classes by name, and any subclass of one of theirs by `module:Class`; iterated, only those that have a name.

    Args:
        own: the named ones.
        base: what a class of the user's must be derived from.
    """

    def __init__(self, own: Mapping[str, type[T]], base: type) -> None:
        super().__init__(own)
        self._base = base

    def __contains__(self, name: object) -> bool:
        return name in self.data or (isinstance(name, str) and ":" in name)

    def __missing__(self, name: str) -> type[T]:
        """A class of the user's.

        Raises:
            KeyError: if it is no `module:Class`.
            ConfigError: if there is none, or it cannot be configured.
        """
        if name not in self:
            raise KeyError(name)
        found = imported(name)
        _check(name, found, self._base)
        return cast(type[T], found)


def _check(name: str, found: Any, base: type) -> None:
    """Refuse what is no configurable subclass of `base`."""
    wanted = f"{base.__module__}.{base.__qualname__}"
    if not (isinstance(found, type) and issubclass(found, base)):
        got = "nothing of that name" if found is None else show(found)
        raise ConfigError(f"{name} to be a subclass of {wanted}", got, "correct the name or the class")
    if missing := [key for key in dir(found) if getattr(getattr(found, key), "__isabstractmethod__", False)]:
        raise ConfigError(f"{name} to have what {wanted} asks for", f"no {', '.join(missing)}", "add it")
    try:
        fields_of(cast(Any, found), keyword_only=True)
    except TypeError as error:
        raise ConfigError(f"keyword-only options of {name} that can be written", str(error), "mend it") from error


def choices(table: Mapping[str, type]) -> str:
    """The names that a table takes, as a person would list them."""
    return ", ".join([*table, *([_OTHERS] if _OTHERS in table else [])])

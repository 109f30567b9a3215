"""The plain values a configuration may hold, strict YAML for them, and the one error type.

YAML here is the JSON-shaped part of YAML 1.2: `1e-3` is a float, `no` and `2024-01-01` are text, keys are
text and occur once, and there are no aliases. Dumping then loading returns equal values.
"""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

import yaml

MAX_DEPTH = 32  # of nested lists and mappings


class ConfigError(ValueError):
    """A mistake in the user's configuration, told as what was expected, what was got, and the remedy."""

    def __init__(self, expected: str, got: str, remedy: str) -> None:
        super().__init__(expected, got, remedy)

    def __str__(self) -> str:
        return "expected {}, got {}: {}".format(*self.args)


class Text(str):
    """A value as typed on the command line; what it means depends on the type of its field."""

    @property
    def parsed(self) -> Any:
        """The text read as YAML, or the text itself where it is not YAML."""
        try:
            return load_yaml(self, "the command line")
        except ConfigError:
            return str(self)

    @staticmethod
    def as_mapping(value: Any) -> Any:
        """`value`, read as YAML if it is text for a mapping."""
        parsed = value.parsed if isinstance(value, Text) else value
        return parsed if isinstance(parsed, dict) else value


_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"  # with a point
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+$"  # without one
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars, unique text keys, and no aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            problem = "an alias (*name) is not supported; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            problem = None if isinstance(key, str) else f"key {show(key)} is not text; put it in quotes"
            problem = f"duplicate key {show(key)}" if not problem and key in seen else problem
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes shared values out, and quotes text that YAML 1.1 or 1.2 would read otherwise."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
    _class.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_yaml(text: str, source: str) -> Any:
    """The plain value that `text` holds; `source` names it in errors."""
    try:
        value = yaml.load(text, _Loader)
    except Exception as error:  # a bad explicit tag (`!!int x`) makes PyYAML raise any type at all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"valid YAML in {source}", shorten(reason, 300), "correct the file at that place") from error
    return plain(value, source)


def dump_yaml(value: Any) -> str:
    """`value` as YAML text that `load_yaml` reads back as an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=10**9)


def plain(value: Any, key: str, depth: int = 0) -> Any:
    """A copy of `value` if it is plain (JSON, finite, ints of 64 bits); `key` names it in errors."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"at most {MAX_DEPTH} nested levels in {key}", "more", "flatten it")
    if isinstance(value, dict):
        if bad := [name for name in value if not isinstance(name, str)]:
            raise ConfigError(f"text keys in {key}", show(bad[0]), "put the key in quotes")
        return {name: plain(item, key, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, key, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"finite numbers in {key}", str(value), "give a finite number, or null where it is allowed")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"integers of at most 64 bits in {key}", "a larger one", "give a smaller integer")
    if value is None or isinstance(value, Text) or type(value) in (bool, int, float, str):
        return value
    kinds = "null, booleans, numbers, text, lists and mappings"
    raise ConfigError(f"{kinds} in {key}", show(value), "write it as one of them")


def show(value: Any) -> str:
    """`value` for an error message, cut to a readable length."""
    return shorten(repr(str(value) if isinstance(value, Text) else value), 80)


def first_line(error: BaseException) -> str:
    """What an error says, for another one's message; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """All that an error says, which has its point in a later line."""
    return shorten(" ".join(str(error).split()) or type(error).__name__, 300)


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known dotted key that `key` most likely means: same last part first, then similar spelling."""
    keys = list(known)
    last = key.rpartition(".")[2]
    same_last = [k for k in keys if k.rpartition(".")[2] == last]
    lasts = {k.rpartition(".")[2]: k for k in keys}
    close = difflib.get_close_matches(key, same_last or keys, n=1, cutoff=0.0 if same_last else 0.7)
    section = key.removesuffix(last)
    if not same_last and section and any(k.startswith(section) for k in close):  # alike in more than their section?
        within = {k.removeprefix(section): k for k in keys if k.startswith(section)}
        close = [within[name] for name in difflib.get_close_matches(last, within, n=1, cutoff=0.6)]
    if not close and (near := difflib.get_close_matches(last, lasts, n=1, cutoff=0.6)):
        close = [lasts[near[0]]]
    return close[0] if close else None


def did_you_mean(key: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for an unknown `key`."""
    found = nearest(key, known)
    return f"did you mean {found}?" if found else otherwise

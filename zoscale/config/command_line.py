"""The command line and the files it names, as what the user gave; and the text of `--help`."""

import argparse
import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from zoscale.config.merging import Given, Schema
from zoscale.config.schema import MISSING, Field, Method, fields_of, is_section
from zoscale.config.strict_yaml import ConfigError, Text, load_yaml, plain, show
from zoscale.config.table import choices

COMMAND_LINE = "the command line"
_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass
class CommandLine:
    """A command line: files and overrides (dotted key, text), left to right, and what to print instead."""

    files: list[str] = field(default_factory=list)
    overrides: list[tuple[str, str]] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)

    def given(self, base: Mapping[str, Any], whole: Container[str] = ()) -> Given:
        """The files merged left to right over `base`, under the overrides; `whole` is that of the schema."""
        given = Given(whole=whole)
        given.add(plain(dict(base), "the configuration"), "the configuration")
        for name in self.files:
            given.add(read_yaml(name), name)
        for key, text in self.overrides:
            tree: Any = plain(Text(text), key)
            for part in reversed(key.split(".")):
                tree = {part: tree}
            given.add(plain(tree, key[:80]), COMMAND_LINE, key)
        return given


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """`--config FILE`, `key=value`, `--key=value`, `--key value`, `--help`, `--print-config` in any order."""
    line, words = CommandLine(), iter(argv)
    for word in words:
        if word in ("-h", "--help", "--print-config"):
            line.flags.add("--help" if word == "-h" else word)
            continue
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--"):
            text = next(words, "--")
            equals = "" if text.startswith("--") else "="
        if not equals or not all(key.split(".")):
            raise ConfigError("key=value", show(word), "write dotted.key=value, or --config FILE")
        if key == "config" and word.startswith("--"):
            line.files.append(text)
        else:
            line.overrides.append((key, text))
    return line


def at_least(minimum: int) -> Callable[[str], int]:
    """For `argparse`: reads a whole number that is not too small."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return read


def read_yaml(name: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; empty if it holds nothing.

    Raises:
        ConfigError: if it cannot be read, or holds something else.
    """
    name = str(name)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "one that is not UTF-8 text"
        got = f"{show(name)} ({reason})"
        raise ConfigError("a readable YAML file", got, "check the path") from error
    tree = load_yaml(text, name)
    if tree is not None and not isinstance(tree, dict):
        got = f"a {type(tree).__name__}"
        raise ConfigError(f"{name} to hold a mapping (key: value)", got, "start it with a key")
    return tree or {}


def help_text(schema: Schema, usage: str) -> str:
    """Every key of the configuration with its meaning, type and default; every method of every table too."""
    fields = fields_of(schema.root)
    sections = {key: spec.hint for key, spec in fields.items() if is_section(spec.hint)}
    values = [spec for key, spec in fields.items() if key not in sections]
    blocks = [usage, _block(_summary(schema.root), "", schema.root, values)]
    for key, cls in sections.items():
        if cls is not Method:
            blocks.append(_block(f"{key}: {_summary(cls)}", f"{key}.", cls, fields_of(cls).values()))
            continue
        default = schema.defaults.get(key, "none, it must be set") + _goes_with(schema, key)
        blocks.append(f"{key}.name: {choices(schema.tables[key])} (default: {default})\n")
        notes = _other_defaults(schema, key)
        for name, method in schema.tables[key].items():
            arguments = fields_of(method, keyword_only=True).values()
            blocks.append(_block(f"{key}.name={name}: {_summary(method)}", f"{key}.", method, arguments, notes))
    return "\n".join(blocks)


def _goes_with(schema: Schema, section: str) -> str:
    """The defaults of a section that methods of other sections bring along."""
    found: dict[str, list[str]] = {}
    for other, table in schema.tables.items():
        for name, cls in table.items():
            if (default := getattr(getattr(cls, "goes_with", None), section, None)) is not None:
                found.setdefault(default, []).append(f"{other}.name={name}")
    return "".join(f"; {default} with {', '.join(names)}" for default, names in found.items())


def _other_defaults(schema: Schema, section: str) -> dict[str, str]:
    """By option of a section, the defaults that it has with what is chosen elsewhere."""
    brought = [(options, f"unless {key}=null") for key, options in schema.brings.items()]
    for other, table in schema.tables.items():
        for name, cls in table.items():
            options = getattr(getattr(cls, "goes_with", None), "options", {})
            brought.append((options, f"with {other}.name={name}"))
    notes: dict[str, str] = {}
    for options, when in brought:
        for arg, value in options.get(section, {}).items():
            notes[arg] = f"{notes.get(arg, '')} Left out, it is {value} {when}."
    return notes


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").strip().partition("\n")[0]


def _block(title: str, prefix: str, cls: type, fields: Iterable[Field], notes: Mapping[str, str] = _NONE) -> str:
    """The help of some fields of `cls`, with what its docstring says of them and `notes` by name behind it."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter  # here: only --help pays for it

    class Formatter(DefaultHelpFormatter):
        def _format_action_invocation(self, action: argparse.Action) -> str:
            return action.dest  # as in `key=value`, without dashes

    parser = ArgumentParser(usage=argparse.SUPPRESS, description=title, add_help=False, formatter_class=Formatter)
    meanings = _meanings(cls)
    for field_ in fields:
        required = field_.default is MISSING
        default = None if required else field_.default
        parser.add_argument(
            f"--{prefix}{field_.name}", type=field_.hint, default=default, required=required,
            help=meanings.get(field_.name, "") + notes.get(field_.name, "") or None,
        )  # fmt: skip
    return parser.format_help().replace("options:\n", "").lstrip("\n")


def _meanings(cls: type) -> dict[str, str]:
    """What the docstrings of `cls`, its constructor and its bases say of each argument; the nearest wins."""
    from docstring_parser import parse

    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        for documented in (vars(base).get("__init__"), base):
            for param in parse(getattr(documented, "__doc__", None) or "").params:
                meanings[param.arg_name] = " ".join((param.description or "").split())
    return meanings

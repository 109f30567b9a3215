"""From what the user gave and tables of classes to one dataclass of values.

Knows no particular configuration: the root is any dataclass whose fields are values, dataclasses (sections)
or `Method`s (sections whose further keys are the keyword-only arguments of the class that `name` picks).
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoscale.config.schema import MISSING, Field, Method, conform, fields_of, is_section, type_name
from zoscale.config.strict_yaml import ConfigError, Text, did_you_mean, show
from zoscale.config.table import choices

Tables = Mapping[str, Mapping[str, type]]


@dataclass
class Given:
    """What the user gave: nested values, and for every dotted key the place that gave it last.

    Args:
        whole: dotted keys of mappings that are one value; see `Schema`.
        left_out: filled with the keys that were given before another method was chosen, which has none such.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    whole: Container[str] = ()
    left_out: list[str] = field(default_factory=list)
    _order: dict[str, int] = field(default_factory=dict)

    def add(self, tree: Mapping[str, Any], source: str, at: str = "") -> None:
        """Merge `tree` over the values: mappings key by key, anything else, and what is `whole`, as a whole.

        Args:
            tree: nested values.
            source: where they come from.
            at: the dotted key that was named, if one was: a key below one that is `whole` goes into that.
        """
        self._order.setdefault(source, len(self._order))
        self.values = self._merged(self.values, tree, source, "", at)

    def _merged(self, base: Any, tree: Mapping[str, Any], source: str, prefix: str, at: str) -> dict[str, Any]:
        base = Text.as_mapping(base)
        merged = dict(base) if isinstance(base, dict) else {}
        for key, value in tree.items():
            old, dotted = merged.get(key), prefix + key
            self.sources[dotted] = source
            if dotted in self.whole and not at.startswith(f"{dotted}."):
                old = None
            new = Text.as_mapping(value) if isinstance(old, dict) else value
            merged[key] = self._merged(old, new, source, dotted + ".", at) if isinstance(new, dict) else new
        return merged

    def is_before(self, key: str, other: str) -> bool:
        """Whether `other` was given, and by a later place than that which gave `key`."""
        return other in self.sources and self._order[self.source(key)] < self._order[self.sources[other]]

    def source(self, key: str) -> str:
        """Where the value of `key` comes from."""
        while key and key not in self.sources:
            key = key.rpartition(".")[0]
        return self.sources.get(key, "the defaults")


@dataclass(frozen=True)
class Schema:
    """A root dataclass, and for its method sections their tables (name -> class) and default names.

    A class may have `goes_with`, whose attributes are the default names of other sections where it is chosen, and its
    `options` by section the defaults of what these sections' classes have of them. The root's `brings` has such options
    by field: they hold unless the field, which stands before the method sections, is null. A class may have
    `one_value`, the names of its options whose mapping is one value: a later mapping replaces an earlier one.
    """

    root: type
    tables: Tables
    defaults: Mapping[str, str]

    def fill(self, given: Given) -> Any:
        """The root dataclass holding what was given over the defaults.

        Raises:
            ConfigError: An unknown key or method, a value of the wrong type, or a required value missing.
        """
        values: dict[str, Any] = {}
        for key, spec in self._known("", given.values, fields_of(self.root), given).items():
            if spec.hint is Method:
                values[key] = self._method(key, given, values)
            elif is_section(spec.hint):
                values[key] = self._section(key, spec.hint, given)
            else:
                values[key] = _value(key, spec, given.values, given)
        return self.root(**values)

    def _section(self, key: str, cls: Any, given: Given) -> Any:
        tree = _mapping(key, given, f"{key}.{next(iter(fields_of(cls)))}=...")
        fields = self._known(key + ".", tree, fields_of(cls), given)
        return cls(**{name: _value(f"{key}.{name}", spec, tree, given) for name, spec in fields.items()})

    def _method(self, section: str, given: Given, values: Mapping[str, Any]) -> Method:
        tree = dict(_mapping(section, given, f"{section}.name=..."))
        name = self._method_name(section, tree.pop("name", self.default_name(section, given)), given)
        fields = fields_of(self.tables[section][name], keyword_only=True)
        for arg in [arg for arg in tree if arg not in fields]:
            owners = self._owners(section, arg)
            if owners and given.is_before(f"{section}.{arg}", self._chooser(section, given)):
                given.left_out.append(f"{section}.{arg}")
                del tree[arg]
            elif owners:
                raise self._argument_of_others(section, name, arg, owners, given)
        fields = self._known(section + ".", tree, fields, given)
        tree = {**self._default_options(section, fields, given, values), **tree}
        args = {arg: _value(f"{section}.{arg}", spec, tree, given) for arg, spec in fields.items()}
        return Method(name, args)

    def default_name(self, section: str, given: Given) -> Any:
        """The name that a method section takes if none is given, `MISSING` if there is none."""
        names = (getattr(company, section, None) for _, company in self._companies(given))
        return next((name for name in names if name is not None), self.defaults.get(section, MISSING))

    def _default_options(
        self, section: str, fields: Container[str], given: Given, values: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The options of a method section whose defaults are others with what is chosen elsewhere."""
        beside = [options for key, options in self.brings.items() if values[key] is not None]
        beside += [getattr(company, "options", {}) for _, company in self._companies(given)]
        brought = (options.get(section, {}) for options in beside)
        return {arg: value for options in brought for arg, value in options.items() if arg in fields}

    @property
    def whole(self) -> frozenset[str]:
        """Dotted keys of the options that are `one_value` of any class of their section."""
        methods = ((section, cls) for section, table in self.tables.items() for cls in table.values())
        return frozenset(f"{section}.{arg}" for section, cls in methods for arg in getattr(cls, "one_value", ()))

    @property
    def brings(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """That of the root."""
        return getattr(self.root, "brings", {})

    def _companies(self, given: Given) -> Iterator[tuple[str, Any]]:
        """By section, `goes_with` of the classes that are chosen."""
        for other, table in self.tables.items():
            chosen = table.get(_given_name(other, given) or self.defaults.get(other, ""))
            if (company := getattr(chosen, "goes_with", None)) is not None:
                yield other, company

    def _chooser(self, section: str, given: Given) -> str:
        """The key that chooses a section's method: its own name, or that of a method which it goes with."""
        if _given_name(section, given) is None:
            for other, company in self._companies(given):
                if getattr(company, section, None) is not None:
                    return f"{other}.name"
        return f"{section}.name"

    def _owners(self, section: str, arg: str) -> list[str]:
        """The methods of a section that have an argument."""
        return [name for name, cls in self.tables[section].items() if arg in fields_of(cls, keyword_only=True)]

    @staticmethod
    def _argument_of_others(section: str, name: str, arg: str, owners: Sequence[str], given: Given) -> ConfigError:
        key, chosen_by = f"{section}.{arg}", given.source(f"{section}.name")
        return ConfigError(
            f"an argument of {section} {name} (chosen by {chosen_by})",
            f"{key} (from {given.source(key)}), which belongs to {', '.join(owners)}",
            f"remove {key}, or choose {section}.name={owners[0]}",
        )

    def _method_name(self, section: str, name: Any, given: Given) -> str:
        key, table = f"{section}.name", self.tables[section]
        wanted = f"{key} to be one of {choices(table)}"
        if name is MISSING:
            raise ConfigError(wanted, "nothing", f"set {key}")
        if not isinstance(name, str) or name not in table:
            got = f"{show(name)} (from {given.source(key)})"
            raise ConfigError(wanted, got, did_you_mean(str(name), table, "choose one of them"))
        return str(name)

    def _known(self, prefix: str, tree: Mapping[str, Any], fields: dict[str, Field], given: Given) -> dict[str, Field]:
        """`fields`, once every key of `tree` (given below `prefix`) is known to be one of them."""
        for key, value in tree.items():
            if key not in fields:
                dotted, known = prefix + key, list(self.keys(given))
                if isinstance(value, dict) and value:
                    dotted += "." + next(iter(value))
                beside = ", ".join(name for name in known if prefix and name.startswith(prefix))
                remedy = did_you_mean(dotted, known, f"the keys are {beside}" if beside else "see --help for every key")
                if dotted in known:
                    remedy = "write it as nested mappings, section: {key: value}"
                raise ConfigError("a known key", f"{show(dotted)} (from {given.source(dotted)})", remedy)
        return fields

    def keys(self, given: Given) -> Iterator[str]:
        """Every dotted key that the methods named in `given` leave open to be set."""
        for key, spec in fields_of(self.root).items():
            below: dict[str, Field] = {}
            if spec.hint is Method:
                yield f"{key}.name"
                cls = self.tables[key].get(_given_name(key, given) or self.default_name(key, given))
                below = fields_of(cls, keyword_only=True) if cls else {}
            elif is_section(spec.hint):
                below = fields_of(spec.hint)
            else:
                yield key
            yield from (f"{key}.{name}" for name in below)


def _given_name(section: str, given: Given) -> str | None:
    tree = Text.as_mapping(given.values.get(section))
    name = tree.get("name") if isinstance(tree, dict) else None
    return name if isinstance(name, str) else None


def _mapping(key: str, given: Given, example: str) -> Mapping[str, Any]:
    tree = Text.as_mapping(given.values.get(key, {}))
    if not isinstance(tree, dict):
        got = f"{show(tree)} (from {given.source(key)})"
        raise ConfigError(f"{key} to be a section of keys", got, f"set {example}")
    return tree


def _value(key: str, spec: Field, tree: Mapping[str, Any], given: Given) -> Any:
    """The value given for one field, in its type, or its default; a mapping goes over a default mapping."""
    if spec.name not in tree:
        if spec.default is MISSING:
            raise ConfigError(f"{key} ({type_name(spec.hint)})", "nothing", f"set {key}, it has no default")
        return spec.fresh_default()
    value = tree[spec.name]
    try:
        conformed = conform(value, spec.hint)
    except ValueError as error:
        got = f"{show(value)} (from {given.source(key)})"
        remedy = f"give {key} a value of that type (see --help)"
        raise ConfigError(f"{key} to be {type_name(spec.hint)}", got, remedy) from error
    both = isinstance(conformed, dict) and isinstance(spec.default, dict)
    return {**spec.fresh_default(), **conformed} if both else conformed

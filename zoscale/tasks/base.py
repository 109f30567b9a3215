"""Tasks: where the examples come from, how they are put to the model and what counts as better."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zoscale.config import ConfigError
from zoscale.tasks.sources import Source


@dataclass(frozen=True)
class Example:
    """One question to the model.

    Args:
        prompt: text before the answer.
        options: the possible continuations, each with its leading space if it has one.
        gold: number of the right option.
        labels: what each option stands for, where a text is scored; left out: the options.
        accepted: the answers that are right; left out: the right option's label.
        max_new_tokens: most tokens of an answer that is generated; 0 = the options are scored.
        shots: characters of each of the demonstrations that the prompt begins with.
    """

    prompt: str
    options: tuple[str, ...]
    gold: int = 0
    labels: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    max_new_tokens: int = 0
    shots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", self.labels or self.options)
        object.__setattr__(self, "accepted", self.accepted or (self.labels[self.gold],))

    def without_shots(self, count: int) -> "Example":
        """The example after its later demonstrations only, so many of the first left out."""
        return replace(self, prompt=self.prompt[sum(self.shots[:count]) :], shots=self.shots[count:])


class Task(ABC):
    """Examples of the splits `train` and `validation`.

    Args:
        source: where the records lie.
    """

    select_by: str = "accuracy"
    """The dev metric that chooses the best step; a name that ends in `loss` is minimised."""
    metrics: tuple[str, ...] = ("accuracy", "loss", "lm_loss")
    """The evaluation metrics that say something."""
    objectives: tuple[str, ...] = ("classification", "lm")
    """The differentiable training objectives that make sense; the first is the usual one."""
    generates: bool = False
    """Whether answers are generated, not chosen among options."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.num_skipped: dict[str, int] = {}
        """Records of each split read so far that ask nothing."""

    @abstractmethod
    def example(self, record: Mapping[str, Any]) -> Example | None:
        """The question that a record asks; None for a sound one that leaves the task nothing to ask.

        Raises:
            ConfigError: if the record lacks a field, or has one that is malformed.
        """

    def examples(self, split: str) -> list[Example]:
        """All examples of a split, in the order of the source, without the records that ask nothing.

        Raises:
            ConfigError: for a malformed record, with its number; if no example is left.
        """
        records = self.source.records(split)
        asked = [self._numbered_example(record, f"record {n} of {split}") for n, record in enumerate(records, 1)]
        found = [example for example in asked if example is not None]
        if not found:
            got = f"{len(records)} records that ask nothing"
            raise ConfigError(f"an example in split {split!r}", got, "check task.path and the task's fields")
        self.num_skipped[split] = len(records) - len(found)
        return found

    def _numbered_example(self, record: Mapping[str, Any], place: str) -> Example | None:
        try:
            return self.example(record)
        except ConfigError as error:
            expected, got, remedy = error.args
            raise ConfigError(expected, f"{got} ({place})", remedy) from error


def demonstrate(example: Example, shots: Sequence[Example]) -> Example:
    """The example after others with their right answers, a blank line between them."""
    before = [f"{shot.prompt}{shot.options[shot.gold]}".rstrip() + "\n\n" for shot in shots]
    return replace(example, prompt="".join(before) + example.prompt, shots=tuple(map(len, before)))


def field(record: Mapping[str, Any], name: str) -> Any:
    """A field of a record.

    Raises:
        ConfigError: if the record lacks it, or holds null there.
    """
    if name in record and record[name] is None:
        raise _null(name, "correct the data")
    if name not in record:
        raise ConfigError(f"records with a field {name!r}", ", ".join(sorted(map(str, record))), "correct task.path")
    return record[name]


class _Fields(dict[str, Any]):
    """A record whose nulls are no text: where some records lack a field, readers of files fill it with null."""

    def __getitem__(self, name: str) -> Any:
        if (value := super().__getitem__(name)) is None:
            raise _null(name, "correct the data, or leave the field out of the template")
        return value


def _null(name: str, remedy: str) -> ConfigError:
    return ConfigError(f"a value in field {name!r}", "none", remedy)


def render(template: str, record: Mapping[str, Any]) -> str:
    """The template with {field} replaced by the record's fields.

    Raises:
        ConfigError: if the template names a field that the record lacks or that is null, or is malformed.
    """
    try:
        return template.format_map(_Fields(record))
    except ConfigError:
        raise
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        fields = ", ".join(sorted(map(str, record)))
        raise ConfigError(
            f"a template whose {{fields}} are among: {fields}", f"{template!r} ({error})", "correct task.template"
        ) from error

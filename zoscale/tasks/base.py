"""Tasks: where the examples come from, how they are put to the model and what counts as better."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoscale.config import ConfigError
from zoscale.tasks.sources import Source


@dataclass(frozen=True)
class Example:
    """One question to the model.

    Args:
        prompt: text before the answer.
        options: the possible continuations, each with its leading space if it has one.
        gold: number of the right option.
    """

    prompt: str
    options: tuple[str, ...]
    gold: int = 0


class Task(ABC):
    """Examples of the splits `train` and `validation`.

    Args:
        source: where the records lie.
    """

    select_by: ClassVar[str] = "accuracy"
    """The dev metric that chooses the best step; a name that ends in `loss` is minimised."""
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "lm_loss")
    """The evaluation metrics that say something."""
    objectives: ClassVar[tuple[str, ...]] = ("classification", "lm")
    """The training objectives that make sense."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @abstractmethod
    def example(self, record: Mapping[str, Any]) -> Example:
        """The question that a record asks.

        Raises:
            ConfigError: if the record lacks a field.
        """

    def examples(self, split: str) -> list[Example]:
        """All examples of a split, in the order of the source."""
        return [self.example(record) for record in self.source.records(split)]


def render(template: str, record: Mapping[str, Any]) -> str:
    """The template with {field} replaced by the record's fields.

    Raises:
        ConfigError: if the template names a field that the record lacks, or is malformed.
    """
    try:
        return template.format_map(record)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        fields = ", ".join(sorted(map(str, record)))
        raise ConfigError(
            f"a template whose {{fields}} are among: {fields}", f"{template!r} ({error})", "correct task.template"
        ) from error

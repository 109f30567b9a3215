"""Classification by scoring candidate continuations, and SST-2 with MeZO's prompt."""

from collections.abc import Mapping
from typing import Any, ClassVar

from zoscale.config import ConfigError
from zoscale.tasks.base import Example, Task, render
from zoscale.tasks.sources import Source


class Classification(Task):
    """Records with a label; the model scores one candidate text per label.

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.*.
        subset: configuration of a Hugging Face dataset.
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
        template: prompt with {fields} of the record.
        candidates: continuation of each label: a list (label 0, 1, ...) or a mapping from label to text.
        label: field that holds the label.
    """

    metrics: tuple[str, ...] = ("accuracy", "calibrated_accuracy", "loss", "lm_loss")
    one_value: ClassVar[tuple[str, ...]] = ("candidates",)
    """Options whose mapping is given as a whole: labels of two configurations make no set of labels."""

    def __init__(
        self,
        *,
        path: str | None = None,
        subset: str | None = None,
        files: dict[str, str] | None = None,
        template: str,
        candidates: dict[str, str] | list[str],
        label: str = "label",
    ) -> None:
        super().__init__(Source(path, subset, files))
        if "{" not in template:
            raise ConfigError("task.template with {fields} of the record", repr(template), "name one: {sentence}")
        self.template = template
        pairs = (
            candidates.items()
            if isinstance(candidates, dict)
            else ((str(i), text) for i, text in enumerate(candidates))
        )
        self.candidates = dict(pairs)
        self.label = label
        if len(self.candidates) < 2 or len(set(self.candidates.values())) < len(self.candidates):
            raise ConfigError("at least two different task.candidates", repr(candidates), "give one text per label")

    def example(self, record: Mapping[str, Any]) -> Example:
        label = str(record.get(self.label))
        if label not in self.candidates:
            raise ConfigError(
                f"a field {self.label!r} with one of the labels {', '.join(self.candidates)}",
                f"{label} in {dict(record)}"[:200],
                "correct task.label or task.candidates",
            )
        options = tuple(self.candidates.values())
        return Example(render(self.template, record), options, list(self.candidates).index(label))


class SST2(Classification):
    """Sentiment of film reviews (Stanford Sentiment Treebank) with MeZO's prompt.

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields sentence, label).
        files: split to file, e.g. {train: a.tsv, validation: b.tsv}.
    """

    def __init__(self, *, path: str | None = "stanfordnlp/sst2", files: dict[str, str] | None = None) -> None:
        super().__init__(path=path, files=files, template="{sentence} It was", candidates=[" terrible", " great"])

    def example(self, record: Mapping[str, Any]) -> Example:
        stripped = {name: value.strip() if isinstance(value, str) else value for name, value in record.items()}
        return super().example(stripped)

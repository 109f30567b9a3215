"""Text completion: the model learns the text that follows a prompt."""

from collections.abc import Mapping
from typing import Any, ClassVar

from zoscale.tasks.base import Example, Task, render
from zoscale.tasks.sources import Source


class Completion(Task):
    """Records with a prompt and the text that should follow it.

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.*.
        subset: configuration of a Hugging Face dataset.
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
        template: prompt with {fields} of the record.
        answer: the text to learn, with {fields} of the record.
    """

    select_by: ClassVar[str] = "lm_loss"
    metrics: ClassVar[tuple[str, ...]] = ("lm_loss",)
    objectives: ClassVar[tuple[str, ...]] = ("lm",)

    def __init__(
        self,
        *,
        path: str | None = None,
        subset: str | None = None,
        files: dict[str, str] | None = None,
        template: str = "{prompt}",
        answer: str = " {answer}",
    ) -> None:
        super().__init__(Source(path, subset, files))
        self.template = template
        self.answer = answer

    def example(self, record: Mapping[str, Any]) -> Example:
        return Example(render(self.template, record), (render(self.answer, record),))

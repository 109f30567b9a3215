"""Text completion: the model learns the text that follows a prompt, and may be asked to write it."""

from collections.abc import Mapping
from typing import Any

from zoscale.config import ConfigError
from zoscale.tasks.base import Example, Task, render
from zoscale.tasks.sources import Source


class Completion(Task):
    """Records with a prompt and the text that should follow it.

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.*.
        subset: configuration of a Hugging Face dataset.
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
        template: prompt with {fields} of the record.
        answer: the text to learn, with {fields} of the record; end it with a newline to have answers generated.
        max_new_tokens: most tokens of an answer that is generated, up to its first newline, and compared with the
            right one; 0 = none is.
    """

    select_by = "lm_loss"
    metrics: tuple[str, ...] = ("lm_loss",)
    objectives = ("lm",)

    def __init__(
        self,
        *,
        path: str | None = None,
        subset: str | None = None,
        files: dict[str, str] | None = None,
        template: str = "{prompt}",
        answer: str = " {answer}",
        max_new_tokens: int = 0,
    ) -> None:
        super().__init__(Source(path, subset, files))
        if max_new_tokens < 0:
            raise ConfigError("task.max_new_tokens of at least 0", str(max_new_tokens), "raise it")
        if max_new_tokens > 0:
            self.select_by, self.metrics, self.generates = "f1", ("f1", "exact_match", "lm_loss"), True
        self.max_new_tokens = max_new_tokens
        self.template = template
        self.answer = answer

    def example(self, record: Mapping[str, Any]) -> Example:
        prompt, answer = render(self.template, record), render(self.answer, record)
        if not self.generates:
            return Example(prompt, (answer,))
        return Example(prompt, (answer,), accepted=(answer.strip(),), max_new_tokens=self.max_new_tokens)

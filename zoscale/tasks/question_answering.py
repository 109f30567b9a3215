"""Questions whose answers are generated, with MeZO's prompts: an answer ends with its line."""

from collections.abc import Mapping
from typing import Any

from zoscale.config import ConfigError
from zoscale.tasks.base import Example, Task, field, render
from zoscale.tasks.sources import Source


class _Reading(Task):
    select_by = "f1"
    metrics = ("f1", "exact_match", "lm_loss")
    objectives = ("lm",)
    generates = True

    def __init__(self, path: str | None, files: dict[str, str] | None, max_new_tokens: int) -> None:
        super().__init__(Source(path, None, files))
        if max_new_tokens < 1:
            raise ConfigError("task.max_new_tokens of at least 1", str(max_new_tokens), "raise it")
        self.max_new_tokens = max_new_tokens

    def answered(self, prompt: str, accepted: tuple[str, ...]) -> Example:
        """The prompt and the first accepted answer, to the end of its line."""
        if not accepted or not all(isinstance(text, str) and text.strip() for text in accepted):
            raise ConfigError("at least one answer that is a text", repr(accepted)[:80], "correct the data")
        return Example(prompt, (f" {accepted[0]}\n",), accepted=accepted, max_new_tokens=self.max_new_tokens)


class SQuAD(_Reading):
    """Answers that stand in a passage of Wikipedia (SQuAD 1.1); F1 and exact match.

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields title, context, question,
            answers: {text: [...]}).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
        max_new_tokens: Most tokens of a generated answer.
    """

    def __init__(
        self, *, path: str | None = "rajpurkar/squad", files: dict[str, str] | None = None, max_new_tokens: int = 50
    ) -> None:
        super().__init__(path, files, max_new_tokens)

    def example(self, record: Mapping[str, Any]) -> Example:
        prompt = render("Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:", _stripped(record))
        return self.answered(prompt, _inner(record, "answers", "text"))


class DROP(_Reading):
    """Answers that need counting, sorting or adding up over a passage (DROP); F1 and exact match.

    Each span of an answer is accepted; the first is the one to learn.

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields passage, question,
            answers_spans: {spans: [...]}).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
        max_new_tokens: Most tokens of a generated answer.
    """

    def __init__(
        self, *, path: str | None = "ucinlp/drop", files: dict[str, str] | None = None, max_new_tokens: int = 50
    ) -> None:
        super().__init__(path, files, max_new_tokens)

    def example(self, record: Mapping[str, Any]) -> Example:
        prompt = render("Passage: {passage}\nQuestion: {question}\nAnswer:", _stripped(record))
        return self.answered(prompt, _inner(record, "answers_spans", "spans"))


def _stripped(record: Mapping[str, Any]) -> dict[str, Any]:
    """With a question that neither begins nor ends with blanks."""
    return {**record, "question": str(field(record, "question")).strip()}


def _inner(record: Mapping[str, Any], name: str, key: str) -> tuple[str, ...]:
    """The texts `key` of a field that is a mapping of lists, each once."""
    value = field(record, name)
    if not isinstance(value, Mapping) or not isinstance(value.get(key), list):
        raise ConfigError(f"a field {name!r} that is a mapping with a list {key!r}", repr(value)[:80], "correct it")
    return tuple(dict.fromkeys(value[key]))

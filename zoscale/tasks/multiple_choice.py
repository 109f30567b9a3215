"""Choices whose options differ from record to record: each is scored by its mean log-probability per token."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from zoscale.config import ConfigError
from zoscale.tasks.base import Example, Task, field
from zoscale.tasks.sources import Source


class _Choice(Task):
    objectives = ("lm", "classification")
    subset: ClassVar[str]

    def __init__(self, *, path: str | None = "aps/super_glue", files: dict[str, str] | None = None) -> None:
        super().__init__(Source(path, self.subset, files))


class COPA(_Choice):
    """The cause or the effect of an event (COPA of SuperGLUE), with MeZO's prompt.

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields premise, choice1, choice2,
            question: cause or effect, label).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
    """

    subset = "copa"

    def example(self, record: Mapping[str, Any]) -> Example:
        words = {"cause": "because", "effect": "so"}
        premise, asked = str(field(record, "premise")).strip().removesuffix("."), field(record, "question")
        if asked not in words:
            raise ConfigError("a field question that is cause or effect", repr(asked), "correct the data")
        choices = [str(field(record, name)).strip() for name in ("choice1", "choice2")]
        options = tuple(f" {_within_sentence(choice)}" for choice in choices)
        return Example(f"{premise} {words[asked]}", options, _number(record, "label", ("0", "1")))


class ReCoRD(_Choice):
    """The entity of a news story that a query leaves out (ReCoRD of SuperGLUE), with MeZO's prompt.

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields passage, query, entities,
            answers).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
    """

    subset = "record"
    select_by = "f1"
    metrics = ("f1", "exact_match", "lm_loss")

    def example(self, record: Mapping[str, Any]) -> Example:
        entities, answers = (_texts(record, name) for name in ("entities", "answers"))
        right = [number for number, entity in enumerate(entities) if entity in answers]
        query = str(field(record, "query"))
        if len(entities) < 2 or not right or "@placeholder" not in query:
            expected = "two entities, an answer among them and a query with @placeholder"
            raise ConfigError(expected, repr(dict(record))[:200], "correct the data")
        passage = str(field(record, "passage")).replace("@highlight\n", "- ")
        options = tuple(f" {query.replace('@placeholder', entity)}" for entity in entities)
        return Example(f"{passage}\n-", options, right[0], labels=entities, accepted=answers)


class WinoGrande(_Choice):
    """What fills the blank of a sentence: the sentence from the blank on is scored with each option.

    (MeZO scores the whole sentence, whose beginning is the same for both.)

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields sentence with _, option1,
            option2, answer: 1 or 2).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
    """

    subset = "winogrande_xl"

    def __init__(self, *, path: str | None = "allenai/winogrande", files: dict[str, str] | None = None) -> None:
        super().__init__(path=path, files=files)

    def example(self, record: Mapping[str, Any]) -> Example:
        sentence = str(field(record, "sentence"))
        before, blank, after = sentence.partition("_")
        if not blank or not before.strip():
            raise ConfigError("a sentence with _ after its first word", repr(sentence), "correct the data")
        choices = (str(field(record, name)).strip() for name in ("option1", "option2"))
        gold = _number(record, "answer", ("1", "2"))
        return Example(before.rstrip(), tuple(f" {choice}{after}" for choice in choices), gold)


def _within_sentence(text: str) -> str:
    """A sentence as it is written after a conjunction."""
    first = text.split(maxsplit=1)[0] if text else ""
    return text if first == "I" or first.startswith("I'") else text[:1].lower() + text[1:]


def _number(record: Mapping[str, Any], name: str, known: Sequence[str]) -> int:
    """The place of a field's value among the known ones."""
    value = str(field(record, name))
    if value not in known:
        raise ConfigError(f"a field {name!r} that is {' or '.join(known)}", repr(value), "correct the data")
    return known.index(value)


def _texts(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A field that is a list of texts, each once."""
    value = field(record, name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ConfigError(f"a field {name!r} that is a list of texts", repr(value)[:80], "correct the data")
    return tuple(dict.fromkeys(value))

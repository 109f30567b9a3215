"""Choices whose options differ from record to record: each is scored by its mean log-probability per token."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from zoscale.config import ConfigError
from zoscale.tasks.base import Example, Task, field, render
from zoscale.tasks.sources import Source


class _Choice(Task):
    objectives = ("lm", "classification")


class _SuperGlueChoice(_Choice):
    subset: ClassVar[str]

    def __init__(self, *, path: str | None = "aps/super_glue", files: dict[str, str] | None = None) -> None:
        super().__init__(Source(path, self.subset, files))


class COPA(_SuperGlueChoice):
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


class ReCoRD(_SuperGlueChoice):
    """The entity of a news story that a query leaves out (ReCoRD of SuperGLUE), with MeZO's prompt.

    Records with fewer than two entities, or without an answer among them, are left out.

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields passage, query, entities,
            answers).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
    """

    subset = "record"
    select_by = "f1"
    metrics = ("f1", "exact_match", "lm_loss")

    def example(self, record: Mapping[str, Any]) -> Example | None:
        entities, answers = (tuple(dict.fromkeys(_texts(record, name))) for name in ("entities", "answers"))
        right = [number for number, entity in enumerate(entities) if entity in answers]
        query = str(field(record, "query"))
        if "@placeholder" not in query:
            raise ConfigError("a query with @placeholder", repr(query), "correct the data")
        passage = str(field(record, "passage")).replace("@highlight\n", "- ")
        if len(entities) < 2 or not right:
            return None
        options = tuple(f" {query.replace('@placeholder', entity)}" for entity in entities)
        return Example(f"{passage}\n-", options, right[0], labels=entities, accepted=answers)


class WinoGrande(_Choice):
    """What fills the blank of a sentence: the sentence from the blank on is scored with each option.

    Sentences that begin with the blank, or whose options are the same, are left out. (MeZO scores the whole sentence,
    whose beginning is the same for both options.)

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields sentence with _, option1,
            option2, answer: 1 or 2).
        subset: configuration of a Hugging Face dataset; winogrande_xs to winogrande_xl hold more and more records.
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
    """

    def __init__(
        self,
        *,
        path: str | None = "allenai/winogrande",
        subset: str | None = "winogrande_debiased",
        files: dict[str, str] | None = None,
    ) -> None:
        super().__init__(Source(path, subset, files))

    def example(self, record: Mapping[str, Any]) -> Example | None:
        sentence = str(field(record, "sentence"))
        before, blank, after = sentence.partition("_")
        if not blank:
            raise ConfigError("a sentence with _", repr(sentence), "correct the data")
        choices = [str(field(record, name)).strip() for name in ("option1", "option2")]
        gold = _number(record, "answer", ("1", "2"))
        if not before.strip() or choices[0] == choices[1]:
            return None
        return Example(before.rstrip(), tuple(f" {choice}{after}" for choice in choices), gold)


class MultipleChoice(_Choice):
    """Records of your own that bring their options, of which one is right.

    Records with fewer than two different options are left out.

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (not csv or tsv, which hold no lists).
        subset: configuration of a Hugging Face dataset.
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
        template: prompt with {fields} of the record.
        continuation: an option as it follows the prompt, with {option} and {fields} of the record.
        options: field that holds the list of the options.
        answer: field that holds the right one: its text, or its number from 0.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        subset: str | None = None,
        files: dict[str, str] | None = None,
        template: str = "Question: {question}\nAnswer:",
        continuation: str = " {option}",
        options: str = "choices",
        answer: str = "answer",
    ) -> None:
        super().__init__(Source(path, subset, files))
        self.template = template
        self.continuation = continuation
        self.options = options
        self.answer = answer

    def example(self, record: Mapping[str, Any]) -> Example | None:
        listed = _texts(record, self.options)
        texts = tuple(dict.fromkeys(listed))
        prompt = render(self.template, record)
        if len(texts) < 2:
            return None
        answer = field(record, self.answer)
        options = tuple(render(self.continuation, {**record, "option": text}) for text in texts)
        if len(set(options)) < len(options):
            raise ConfigError("a task.continuation with {option} in it", repr(self.continuation), "name it there")
        return Example(prompt, options, texts.index(self._right(answer, listed)), labels=texts)

    def _right(self, value: Any, listed: Sequence[str]) -> str:
        """The option that the answer is or counts to."""
        if value in listed:
            return str(value)
        if not str(value).isdecimal() or int(value) >= len(listed):
            expected = f"a field {self.answer!r} that is an option, or its number from 0 to {len(listed) - 1}"
            got = f"{value!r} ({type(value).__name__})"
            raise ConfigError(expected, got, "correct the data, where all answers have one type, or task.answer")
        return listed[int(value)]


def _within_sentence(text: str) -> str:
    """A sentence after a conjunction, as MeZO writes it: its first word in lower case, except for I."""
    first, space, rest = text.partition(" ")
    return text if first == "I" else f"{first.lower()}{space}{rest}"


def _number(record: Mapping[str, Any], name: str, known: Sequence[str]) -> int:
    """The place of a field's value among the known ones."""
    value = str(field(record, name))
    if value not in known:
        raise ConfigError(f"a field {name!r} that is {' or '.join(known)}", repr(value), "correct the data")
    return known.index(value)


def _texts(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A field that is a list of texts."""
    value = field(record, name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ConfigError(f"a field {name!r} that is a list of texts", repr(value)[:80], "correct the data")
    return tuple(value)

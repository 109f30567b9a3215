"""SuperGLUE's questions of yes and no, with the prompts of MeZO's code (arXiv 2305.17333)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from zoscale.tasks.base import Example, field
from zoscale.tasks.classification import Classification


class _SuperGlue(Classification):
    subset: ClassVar[str]
    prompt: ClassVar[str]
    answers: ClassVar[list[str]] = ["No", "Yes"]

    def __init__(self, *, path: str | None = "aps/super_glue", files: dict[str, str] | None = None) -> None:
        super().__init__(
            path=path, subset=self.subset, files=files, template=self.prompt, candidates=list(self.answers)
        )


class RTE(_SuperGlue):
    """Textual entailment (RTE of SuperGLUE).

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields premise, hypothesis, label).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
    """

    subset = "rte"
    prompt = '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n'
    answers: ClassVar[list[str]] = ["Yes", "No"]


class CB(_SuperGlue):
    """Entailment, contradiction or neither (CommitmentBank of SuperGLUE).

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields premise, hypothesis, label).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
    """

    metrics = ("accuracy", "calibrated_accuracy", "macro_f1", "loss", "lm_loss")
    subset = "cb"
    prompt = 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
    answers: ClassVar[list[str]] = ["Yes", "No", "Maybe"]


class BoolQ(_SuperGlue):
    """Yes or no to a question about a passage (BoolQ of SuperGLUE).

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields passage, question, label).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
    """

    subset = "boolq"
    prompt = "{passage} {question}?\n"

    def example(self, record: Mapping[str, Any]) -> Example:
        question = str(field(record, "question")).rstrip("? ")
        return super().example({**record, "question": question[:1].upper() + question[1:]})


class WSC(_SuperGlue):
    """Whether a pronoun refers to a noun (Winograd schemas of SuperGLUE).

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields text, span1_text, span2_text,
            label).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
    """

    subset = "wsc.fixed"
    prompt = '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n'

    def example(self, record: Mapping[str, Any]) -> Example:
        return super().example({**record, "span2_text": str(field(record, "span2_text")).lower()})


class WIC(_SuperGlue):
    """Whether a word has the same meaning in two sentences (Word in Context of SuperGLUE).

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields word, sentence1, sentence2,
            label).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
    """

    subset = "wic"
    prompt = 'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'


class MultiRC(_SuperGlue):
    """Whether an answer to a question about a paragraph is right (MultiRC of SuperGLUE), each answer by itself.

    Args:
        path: Hugging Face dataset id, or folder with train.* and validation.* (fields paragraph, question, answer,
            label).
        files: split to file, e.g. {train: a.jsonl, validation: b.jsonl}.
    """

    metrics = ("accuracy", "calibrated_accuracy", "f1a", "loss", "lm_loss")
    subset = "multirc"
    prompt = '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'

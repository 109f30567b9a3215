"""`MicroBatch`: the rows that one forward takes, and which outputs answer for what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoscale.data.prefixes import Row, side_by_side
from zoscale.noise.fused import on_device

_TRIED = 32  # tokens of a row at most: no model in use has fewer positions; packed rows may have more than it has
FEW = 8
"""Tokens per answer of a row from which on answers are run alone: what they give lies beside what all tokens take."""
IGNORED = -100
"""Label that Hugging Face gives to tokens without a loss."""


@dataclass(frozen=True)
class Question:
    """The texts of one example, for scores that are taken of texts.

    Args:
        labels: what each option stands for.
        accepted: the answers that are right.
        prompt: token ids from which an answer is generated; empty where the options are scored.
        max_new_tokens: most tokens to generate.
    """

    labels: tuple[str, ...]
    accepted: tuple[str, ...]
    prompt: tuple[int, ...] = ()
    max_new_tokens: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """Rows of fixed content and shape. All tensors are int64 unless said otherwise.

    Args:
        input_ids: [R, T], as a rule padded on the right: in one pass of a causal model real tokens then neither see
            padding nor are moved by it.
        attention_mask: [R, T], 1 for real tokens.
        position_row, position_column: [P], the distinct outputs that the head is computed for.
        answer_position: [A], index into P; the output that predicts the answer token.
        answer_token: [A], the target.
        answer_option: [A], index into S; the option whose score the token belongs to.
        option_example: [S], the example of each option, 0 .. num_examples - 1, ascending.
        option_is_gold: bool [S], whether it is the right option.
        num_examples: examples in the micro-batch.
        num_tokens: real tokens in all rows.
        questions: of each example; empty where the texts are not known.
        position_ids: [R, T], the place of each token in its sequence; None = its column, for rows of one sequence.
        ends: [R, T], the column from which on a token is not seen any more; None as before.
        is_right_padded: whether padding follows the real tokens of each row; else it may be anywhere but before them.
        answer_columns: [R, p], the columns of P in each row, filled up with others to the same number; None = these
            are more than one in `FEW`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_row: Tensor
    position_column: Tensor
    answer_position: Tensor
    answer_token: Tensor
    answer_option: Tensor
    option_example: Tensor
    option_is_gold: Tensor
    num_examples: int
    num_tokens: int
    questions: tuple[Question, ...] = ()
    position_ids: Tensor | None = None
    ends: Tensor | None = None
    is_right_padded: bool = True
    answer_columns: Tensor | None = None

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Row],
        gold: Sequence[Sequence[bool]],
        pad_token: int,
        questions: Sequence[Question] = (),
        width: int = 0,
        *,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> "MicroBatch":
        """Pad rows to the longest, or further.

        Args:
            rows: any number of rows per example; an option's tokens may lie in one row only.
            gold: per example, per option: whether it is right.
            pad_token: token id for padding (masked).
            questions: of each example.
            width: fewest columns.
            groups: rows by their numbers, which are put side by side into one; None = each is one.
        """
        first_option = [0]
        for options in gold:
            first_option.append(first_option[-1] + len(options))
        rows = [_numbered(row, first_option[row.example]) for row in rows]
        if groups is not None:
            rows = [side_by_side([rows[number] for number in group]) for group in groups]
        longest = max(width, *(len(row.tokens) for row in rows))
        positions: dict[tuple[int, int], int] = {}
        answers = []
        for number, row in enumerate(rows):
            for column, token, option in row.answers:
                place = positions.setdefault((number, column), len(positions))
                answers.append((place, token, option))
        padded = [list(row.tokens) + [pad_token] * (longest - len(row.tokens)) for row in rows]
        mask = [[1] * len(row.tokens) + [0] * (longest - len(row.tokens)) for row in rows]
        position_ids, ends = _trees(rows, longest) if any(row.tree for row in rows) else (None, None)
        answer_table = torch.tensor(answers).view(-1, 3)
        position_table = torch.tensor(list(positions)).view(-1, 2)
        return cls(
            torch.tensor(padded),
            torch.tensor(mask),
            position_table[:, 0],
            position_table[:, 1],
            answer_table[:, 0],
            answer_table[:, 1],
            answer_table[:, 2],
            torch.tensor([e for e, options in enumerate(gold) for _ in options]),
            torch.tensor([flag for options in gold for flag in options]),
            len(gold),
            sum(len(row.tokens) for row in rows),
            tuple(questions),
            position_ids,
            ends,
            answer_columns=_answer_columns(position_table[:, 0], position_table[:, 1], len(rows), longest),
        )

    @classmethod
    def from_labels(cls, batch: Mapping[str, Any]) -> "MicroBatch":
        """From Hugging Face tensors: `input_ids`, `labels` ([R, T], -100 = no loss), optionally `attention_mask`.

        Rows padded on the left are moved to the left: models that count positions or carry states would count the
        padding.

        Raises:
            ValueError: if a key is missing, shapes differ or no token has a label.
        """
        if "input_ids" not in batch or "labels" not in batch:
            raise ValueError(f"expected a batch with input_ids and labels, got the keys {sorted(batch)}")
        input_ids, labels = batch["input_ids"], batch["labels"]
        mask = batch.get("attention_mask", torch.ones_like(input_ids))
        if not input_ids.shape == labels.shape == mask.shape or input_ids.dim() != 2:
            raise ValueError(
                f"expected input_ids, labels and attention_mask of one shape [rows, tokens], got "
                f"{tuple(input_ids.shape)}, {tuple(labels.shape)}, {tuple(mask.shape)}"
            )
        if not mask[:, :1].all():
            input_ids, labels, mask = _moved_left(mask, input_ids, labels, mask)
        row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        if row.numel() == 0:
            raise ValueError("expected at least one label that is not -100, got none; the batch has no loss")
        rows = input_ids.shape[0]
        return cls(
            input_ids,
            mask,
            row,
            column,
            torch.arange(row.numel(), device=row.device),
            labels[row, column + 1],
            row,
            torch.arange(rows, device=row.device),
            torch.ones(rows, dtype=torch.bool, device=row.device),
            rows,
            int(mask.sum()),
            is_right_padded=bool((mask[:, :-1] >= mask[:, 1:]).all()),
            answer_columns=_answer_columns(row, column, *input_ids.shape),
        )

    def trial(self) -> "MicroBatch":
        """Two short rows of these tokens, each a sequence without padding, with answers in the middle of each."""
        ids = self.input_ids[:2, :_TRIED].tolist()
        rows = []
        for number, tokens in enumerate((ids * 2)[:2]):
            last = len(tokens) - 1
            columns = {min(max(1, len(tokens) // 3), last), min(len(tokens) // 2 + number, last)}
            rows.append(Row(tuple(tokens), tuple((column, tokens[0], 0) for column in columns), number))
        return MicroBatch.from_rows(rows, [[True]] * 2, pad_token=0)

    def repeat(self, times: int) -> "MicroBatch":
        """The same rows and answers several times over, one copy after the other; for `answer_logprobs` only."""
        device, rows, positions = self.input_ids.device, len(self.input_ids), len(self.position_row)
        copies = torch.arange(times, device=device)
        return replace(
            self,
            input_ids=self.input_ids.repeat(times, 1),
            attention_mask=self.attention_mask.repeat(times, 1),
            position_row=(self.position_row + rows * copies[:, None]).view(-1),
            position_column=self.position_column.repeat(times),
            answer_position=(self.answer_position + positions * copies[:, None]).view(-1),
            answer_token=self.answer_token.repeat(times),
            position_ids=None if self.position_ids is None else self.position_ids.repeat(times, 1),
            ends=None if self.ends is None else self.ends.repeat(times, 1),
            answer_columns=None if self.answer_columns is None else self.answer_columns.repeat(times, 1),
        )

    def model_inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a Hugging Face model is called with; rows of several sequences bring a mask [R, 1, T, T] of `dtype`."""
        if self.ends is None or self.position_ids is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        column = torch.arange(self.input_ids.shape[1], device=self.ends.device)
        seen = (column[:, None] >= column) & (column[:, None] < self.ends[:, None, :])
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        return {"input_ids": self.input_ids, "attention_mask": mask[:, None], "position_ids": self.position_ids}

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on a device."""
        moved: dict[str, Any] = {n: on_device(v, device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def _numbered(row: Row, first: int) -> Row:
    """The row with options that are numbered throughout the micro-batch."""
    return replace(
        row, example=0, answers=tuple((column, token, first + option) for column, token, option in row.answers)
    )


def _moved_left(mask: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Tables [R, T], each row rotated so that its first real token stands first."""
    column = torch.arange(mask.shape[1], device=mask.device)
    order = (column + mask.to(torch.uint8).argmax(dim=1, keepdim=True)) % len(column)
    return tuple(table.gather(1, order) for table in rows)


def _answer_columns(row: Tensor, column: Tensor, num_rows: int, width: int) -> Tensor | None:
    """See `MicroBatch.answer_columns`."""
    table = torch.zeros(num_rows, width, dtype=torch.uint8, device=row.device)
    table[row, column] = 1
    most = int(table.sum(dim=1).max())
    return table.argsort(dim=1, descending=True, stable=True)[:, :most] if FEW * most <= width else None


def _trees(rows: Sequence[Row], width: int) -> tuple[Tensor, Tensor]:
    """(position_ids, ends) of rows of which some hold several sequences; padding sees itself alone."""
    table = [
        [*(row.tree or ((column, len(row.tokens)) for column in range(len(row.tokens))))]
        + [(0, column + 1) for column in range(len(row.tokens), width)]
        for row in rows
    ]
    trees = torch.tensor(table)
    return trees[..., 0], trees[..., 1]

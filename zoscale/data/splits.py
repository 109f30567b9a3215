"""Examples of a run, and how they become micro-batches."""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from zoscale.config import ConfigError, DataConfig, show
from zoscale.data.batch import MicroBatch, Question
from zoscale.data.prefixes import Row, common_prefix, share_prefixes
from zoscale.grouping import balanced
from zoscale.noise.generator import Domain, Key, Noise
from zoscale.tasks import Example, Task, demonstrate

T = TypeVar("T")

_ROOM = 128  # columns up to which rows may become wider than the longest sequence, so that more fit in
_WIDEST = 512  # of packed rows: beyond, their masks are no small part of a pass's memory
_TRIED = 8  # numbers of rows: the fewest that hold all tokens, and more
_AHEAD = 1024  # examples whose texts are made token ids at a time, where all are
_BRANCHES = 4096  # columns up to which options of a prompt part in one row: a mask has their square
_WORTH = 0.95  # of the tokens that are run without, above which rows are not packed
_LONGER = "raise it, or take a model with more positions"

SPLIT, ORDER, STRATA = 0, 1, 2  # second words of the draws in Domain.DATA; strata take all from theirs on


@dataclass(frozen=True)
class Splits:
    """Examples of a run; `dev` is held out of train and chooses the step, `validation` is only reported.

    Demonstrations are held out of both, and stand before every prompt.
    """

    train: list[Example]
    dev: list[Example]
    validation: list[Example]

    @classmethod
    def of(cls, task: Task, config: DataConfig, seed: int) -> "Splits":
        """Cut the task's training split into train and dev at random by the seed.

        Of validation a random part is taken, the same for every seed and in its order: neighbours may share a passage.

        Raises:
            ConfigError: if a split is smaller than asked for.
        """
        everything = task.examples("train")
        order = Noise(seed).permutation(Key(0, SPLIT, Domain.DATA), len(everything)).tolist()
        free = len(everything) - config.num_demonstrations
        wanted = free if config.num_train is None else config.num_train
        num_dev = max(0, free - wanted) if config.num_dev is None else config.num_dev
        num_train = config.num_train if config.num_train is not None else free - num_dev
        if num_train < 1 or num_train + num_dev > free:
            also = f" and data.num_demonstrations={config.num_demonstrations}" if config.num_demonstrations else ""
            raise ConfigError(
                f"at most {len(everything)} examples in the training split",
                f"data.num_train={config.num_train} and data.num_dev={config.num_dev}{also}",
                "lower them, or null for all",
            )
        chosen = [everything[i] for i in order[: num_train + num_dev]]
        shots = [everything[i] for i in order[num_train + num_dev :][: config.num_demonstrations]]
        validation = part(task.examples("validation"), config.num_validation)
        splits = chosen[:num_train], chosen[num_train:], validation
        return cls(*([demonstrate(example, shots) for example in split] for split in splits))


def part(validation: Sequence[T], count: int | None) -> list[T]:
    """So many of the examples at random (None = all), the same in every run, in their order."""
    if count is not None and count > len(validation):
        raise ConfigError(f"data.num_validation up to {len(validation)}", str(count), "lower it")
    order = Noise(0).permutation(Key(1, SPLIT, Domain.DATA), len(validation)).tolist()
    return [validation[i] for i in sorted(order[:count])]


@dataclass(frozen=True)
class Encoded:
    """An example in token ids.

    Args:
        rows: what is run for it.
        gold: per option, whether it is the right one.
        question: its texts.
    """

    rows: tuple[Row, ...]
    gold: tuple[bool, ...]
    question: Question

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.tokens) for row in self.rows)


class Encoder:
    """Examples to micro-batches of token ids.

    The last token of an option is never fed: its log-probability is read one position earlier. Options that share all
    fed tokens (one-token candidates) share one row; so do options that another one continues, and with `branching`
    all options of a prompt, as far as `max_length` tokens go. With `packing`, so do short rows of any examples.

    Args:
        tokenizer: of the model.
        max_length: longest row in tokens; longer prompts lose as many of their first demonstrations as need be, and
            what is longer still loses its middle start (the first token stays).
        branching: whether the model can run options that part in one row.
        packing: whether it can run any sequences in one row, as those of short examples are then.
        vocabulary: tokens that the model has; None = any.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        branching: bool = False,
        packing: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.branching = branching
        self.packing = packing
        self.vocabulary = vocabulary
        self._truncated: set[bytes] = set()  # digests of rows
        self._left_out: dict[Example, int] = {}
        self._ahead: dict[str, list[int]] = {}
        pad = int(tokenizer.pad_token_id or 0)
        self._pad = pad if vocabulary is None or pad < vocabulary else 0  # masked, whatever it is
        special: list[int] = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self._num_appended = special[::-1].index(0) if 0 in special else 0

    @property
    def num_truncated(self) -> int:
        """Distinct rows that were cut so far."""
        return len(self._truncated)

    @property
    def num_short_of_shots(self) -> int:
        """Distinct prompts that lost demonstrations so far."""
        return sum(count > 0 for count in self._left_out.values())

    def fingerprint(self, splits: Splits) -> str:
        """Encode every example once: 16 hex digits that name the token ids of all splits.

        Raises:
            ConfigError: for an answer that is empty or does not fit, so that it is met before training, not within.
        """
        digest = hashlib.sha256()
        for name in ("train", "dev", "validation"):
            between = "["
            for item in self._all_of(name, getattr(splits, name)):
                digest.update(f"{between}{(item.rows, item.gold, item.question)!r}".encode())
                between = ", "
            digest.update(b"]" if between == ", " else b"[]")
        return digest.hexdigest()[:16]

    def _all_of(self, split: str, examples: Sequence[Example]) -> Iterator[Encoded]:
        """Encode them all; an error names the example."""
        for number, example in enumerate(examples):
            if number % _AHEAD == 0:
                self._ahead = self._ids_of(examples[number : number + _AHEAD])
            try:
                yield self.encode(example, gold_only=False)
            except ConfigError as error:
                expected, got, remedy = error.args
                where = f"in example {number + 1} of {split}, {show(example.prompt)}"
                raise ConfigError(f"{expected} {where}", got, remedy) from error
        self._ahead = {}

    def micro_batch(self, examples: Sequence[Example], *, gold_only: bool) -> MicroBatch:
        """One micro-batch of examples, with all their options or only the right one."""
        return self.collate([self.encode(example, gold_only=gold_only) for example in examples])

    def layout(self, lengths: Sequence[int], multiple: int = 1) -> tuple[list[list[int]], int]:
        """How sequences of these lengths lie in rows: their numbers by row, and the columns.

        Args:
            lengths: tokens of each.
            multiple: of columns; where each has a row, as far as `max_length` goes.
        """
        plain = [[number] for number in range(len(lengths))]
        longest = max(*lengths, min(_rounded(max(lengths), multiple), self.max_length))
        if not self.packing or longest > _WIDEST:
            return plain, longest
        room = max(longest, _ROOM)
        fewest = -(-sum(lengths) // room)
        layouts = []
        for count in range(fewest, min(fewest + _TRIED, len(lengths))):
            groups = balanced(lengths, count)
            width = _rounded(max(sum(lengths[number] for number in group) for group in groups), multiple)
            if width <= room:
                layouts.append((groups, width))
        best = min(layouts, key=lambda layout: len(layout[0]) * layout[1], default=(plain, longest))
        saves = len(best[0]) * best[1] < _WORTH * len(lengths) * longest
        return best if saves else (plain, longest)

    def collate(self, encoded: Sequence[Encoded], multiple: int = 1) -> MicroBatch:
        """One micro-batch of encoded examples, padded to a multiple of so many tokens."""
        rows = [replace(row, example=number) for number, example in enumerate(encoded) for row in example.rows]
        groups, width = self.layout([len(row.tokens) for row in rows], multiple)
        gold, questions = [example.gold for example in encoded], [example.question for example in encoded]
        return MicroBatch.from_rows(rows, gold, self._pad, questions, width, groups=groups)

    def encode(self, example: Example, *, gold_only: bool) -> Encoded:
        """Token ids of an example, with all its options or only the right one.

        Raises:
            ConfigError: for an answer that is empty or does not fit, for a right option that has the tokens of another,
                and for a token that the model does not have.
        """
        example = self._with_fitting_shots(example)
        numbers = [example.gold] if gold_only else list(range(len(example.options)))
        answers: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        prompt = self._ids(example.prompt)
        spelled: dict[str, tuple[int, ...]] = {}
        for option, number in enumerate(numbers):
            full = self._ids(example.prompt + example.options[number])
            answer_start = common_prefix(prompt, full)
            if not 0 < answer_start < len(full):
                raise _no_tokens(example.prompt, example.options[number])
            tokens, answer_start = self._cut(full, answer_start)
            spelled[example.options[number]] = tuple(full)
            self._check_known(full)
            targets = [(place - 1, tokens[place], option) for place in range(answer_start, len(tokens))]
            answers.setdefault(tuple(tokens[:-1]), []).extend(targets)
        like_gold = list(spelled.values()).count(spelled[example.options[example.gold]])
        if len(set(spelled.values())) < min(2, len(numbers)) or like_gold > 1:
            remedy = "give texts that the tokenizer tells apart (classification: task.candidates)"
            raise ConfigError("options of different tokens", f"the same for {show(list(example.options))}", remedy)
        rows = [Row(tokens, tuple(targets), 0) for tokens, targets in answers.items()]
        longest = max(len(row.tokens) for row in rows)
        merged = share_prefixes(rows, self.max_length, branching=self.branching and longest <= _BRANCHES)
        gold = tuple(number == example.gold for number in numbers)
        return Encoded(tuple(merged), gold, self._question(example, numbers))

    def _check_known(self, ids: Sequence[int]) -> None:
        """A lookup beyond the embedding would end a run on a GPU with an error that names nothing."""
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            got = f"{max(ids)} ({show(self.tokenizer.convert_ids_to_tokens(max(ids)))})"
            remedy = "choose the model's own tokenizer (model.tokenizer), or a model with all of its tokens"
            raise ConfigError(f"token ids below {self.vocabulary}, of which the model has an embedding", got, remedy)

    def _ids_of(self, examples: Sequence[Example]) -> dict[str, list[int]]:
        """Token ids of their texts: a list of texts is read by as many threads as there are cores."""
        plain = [example for example in examples if not example.shots]  # of which nothing may have to go
        texts = list({text for one in plain for text in (one.prompt, *(one.prompt + end for end in one.options))})
        return dict(zip(texts, self.tokenizer(texts)["input_ids"], strict=True)) if texts else {}

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text that goes on: without the end that some tokenizers (BART's) put behind every text."""
        ids: list[int] = self._ahead[text] if text in self._ahead else self.tokenizer(text)["input_ids"]
        return ids[: len(ids) - self._num_appended]

    def _with_fitting_shots(self, example: Example) -> Example:
        """The example without its first demonstrations, the fewest so that it fits with each option; else without any.

        So that no demonstration is cut within, and the same ones stand before all options.
        """
        if not example.shots:
            return example
        if example not in self._left_out:
            counts = range(len(example.shots))
            self._left_out[example] = bisect_left(counts, True, key=lambda n: self._fits(example.without_shots(n)))
        return example.without_shots(self._left_out[example])

    def _fits(self, example: Example) -> bool:
        """Whether neither the prompt with an option nor that with an answer to generate is longer than a row."""
        fed = [len(self._ids(example.prompt + option)) - 1 for option in example.options]
        if example.max_new_tokens:
            fed.append(len(self._ids(example.prompt)) + example.max_new_tokens - 1)
        return max(fed) <= self.max_length

    def _question(self, example: Example, options: Sequence[int]) -> Question:
        """The example's texts; a prompt to generate from is cut so that the answer fits behind it."""
        question = Question(tuple(example.labels[option] for option in options), example.accepted)
        if example.max_new_tokens == 0:
            return question
        room = self.max_length - example.max_new_tokens + 1
        if room < 2:
            got = f"{self.max_length} and an answer of {example.max_new_tokens} tokens"
            raise ConfigError("data.max_length above the tokens to generate", got, _LONGER)
        tokens = self._ids(example.prompt)
        if len(tokens) > room:
            self._note_cut(tokens)
            tokens = tokens[:1] + tokens[1 - room :]
        return replace(question, prompt=tuple(tokens), max_new_tokens=example.max_new_tokens)

    def _cut(self, tokens: list[int], answer_start: int) -> tuple[list[int], int]:
        """Drop the prompt's earliest tokens but the first, so that at most max_length are fed."""
        surplus = len(tokens) - 1 - self.max_length
        if surplus <= 0:
            return tokens, answer_start
        if surplus > answer_start - 2:
            expected = f"answers that fit into data.max_length={self.max_length}"
            raise ConfigError(expected, f"{len(tokens)} tokens", _LONGER)
        self._note_cut(tokens[:-1])
        return tokens[:1] + tokens[1 + surplus :], answer_start - surplus

    def _note_cut(self, tokens: Sequence[int]) -> None:
        self._truncated.add(hashlib.sha256(repr(tokens).encode()).digest()[:16])


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _no_tokens(prompt: str, answer: str) -> ConfigError:
    """The error for a question without a token, or an answer that adds none to it."""
    got = f"answer {show(answer)} after prompt {show(prompt)}"
    remedy = "correct the task's texts or the record (classification: task.template, task.candidates)"
    return ConfigError("a prompt and an answer of at least one token each", got, remedy)


def evaluation_batches(examples: Sequence[Example], encoder: Encoder, size: int) -> list[MicroBatch]:
    """All examples with all options, those of one length together."""
    return numbered_batches(examples, encoder, size)[0]


def numbered_batches(examples: Sequence[Example], encoder: Encoder, size: int) -> tuple[list[MicroBatch], list[int]]:
    """`evaluation_batches`, and the numbers of the examples in the order in which they lie there."""
    encoded = [encoder.encode(example, gold_only=False) for example in examples]
    order = sorted(range(len(encoded)), key=lambda number: encoded[number].length)
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    return [encoder.collate([encoded[number] for number in part]) for part in parts], order

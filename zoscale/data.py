"""Deterministic batches: which examples a step takes, and how they become micro-batches."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from zoscale.batch import MicroBatch, Question, Row
from zoscale.config import ConfigError, DataConfig
from zoscale.noise import Domain, Key, Noise
from zoscale.tasks import Example, Task, demonstrate

_SPLIT, _ORDER = 0, 1  # step words of the draws in Domain.DATA


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
        """Cut the task's training split into train and dev at random, and take validation in its order.

        Raises:
            ConfigError: if a split is smaller than asked for.
        """
        everything = task.examples("train")
        order = Noise(seed).permutation(Key(0, _SPLIT, Domain.DATA), len(everything)).tolist()
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
        validation = task.examples("validation")
        if config.num_validation is not None and config.num_validation > len(validation):
            raise ConfigError(f"data.num_validation up to {len(validation)}", str(config.num_validation), "lower it")
        splits = chosen[:num_train], chosen[num_train:], validation[: config.num_validation]
        return cls(*([demonstrate(example, shots) for example in split] for split in splits))


class Encoder:
    """Examples to micro-batches of token ids.

    The last token of an option is never fed: its log-probability is read one position earlier. Options that share all
    fed tokens (one-token candidates) share one row.

    Args:
        tokenizer: of the model.
        max_length: longest row in tokens; longer prompts lose their middle start (the first token stays).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._truncated: set[tuple[int, ...]] = set()
        self._pad = int(tokenizer.pad_token_id or 0)  # masked, whatever it is

    @property
    def num_truncated(self) -> int:
        """Distinct rows that were cut so far."""
        return len(self._truncated)

    def fingerprint(self, splits: Splits) -> str:
        """Encode every example once: 16 hex digits that name the token ids of all splits.

        Raises:
            ConfigError: for an answer that is empty or does not fit, so that it is met before training, not within.
        """
        digest = hashlib.sha256()
        for split in (splits.train, splits.dev, splits.validation):
            rows = [
                (self._rows(example, example.options, 0), example.gold, self._question(example, range(0)))
                for example in split
            ]
            digest.update(repr(rows).encode())
        return digest.hexdigest()[:16]

    def micro_batch(self, examples: Sequence[Example], *, gold_only: bool) -> MicroBatch:
        """One micro-batch of examples, with all their options or only the right one."""
        rows: list[Row] = []
        gold: list[list[bool]] = []
        questions: list[Question] = []
        for number, example in enumerate(examples):
            options = [example.gold] if gold_only else list(range(len(example.options)))
            gold.append([option == example.gold for option in options])
            rows += self._rows(example, [example.options[option] for option in options], number)
            questions.append(self._question(example, options))
        return MicroBatch.from_rows(rows, gold, self._pad, questions)

    def _question(self, example: Example, options: Iterable[int]) -> Question:
        """The example's texts; a prompt to generate from is cut so that the answer fits behind it."""
        question = Question(tuple(example.labels[option] for option in options), example.accepted)
        if example.max_new_tokens == 0:
            return question
        room = self.max_length - example.max_new_tokens + 1
        if room < 2:
            got = f"{self.max_length} and an answer of {example.max_new_tokens} tokens"
            raise ConfigError("data.max_length above the tokens to generate", got, "raise it")
        tokens: list[int] = self.tokenizer(example.prompt)["input_ids"]
        if len(tokens) > room:
            self._truncated.add(tuple(tokens))
            tokens = tokens[:1] + tokens[1 - room :]
        return replace(question, prompt=tuple(tokens), max_new_tokens=example.max_new_tokens)

    def _rows(self, example: Example, options: Sequence[str], number: int) -> list[Row]:
        answers: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        prompt: list[int] = self.tokenizer(example.prompt)["input_ids"]
        for option, text in enumerate(options):
            full: list[int] = self.tokenizer(example.prompt + text)["input_ids"]
            tokens, answer_start = self._cut(full, _common_prefix(prompt, full))
            targets = [(place - 1, tokens[place], option) for place in range(answer_start, len(tokens))]
            answers.setdefault(tuple(tokens[:-1]), []).extend(targets)
        return [Row(tokens, tuple(targets), number) for tokens, targets in answers.items()]

    def _cut(self, tokens: list[int], answer_start: int) -> tuple[list[int], int]:
        """Drop the prompt's earliest tokens but the first, so that at most max_length are fed."""
        if not 0 < answer_start < len(tokens):
            raise ConfigError("a prompt and an answer of at least one token each", f"{tokens}", "check task.template")
        surplus = len(tokens) - 1 - self.max_length
        if surplus <= 0:
            return tokens, answer_start
        if surplus > answer_start - 2:
            raise ConfigError(
                f"answers that fit into data.max_length={self.max_length}", f"{len(tokens)} tokens", "raise it"
            )
        self._truncated.add(tuple(tokens[:-1]))
        return tokens[:1] + tokens[1 + surplus :], answer_start - surplus


class TrainBatches:
    """Micro-batches of each step: a pure function of (seed, step), the same on every rank.

    Each epoch visits every example once in an order of its own; a batch may span two epochs.

    Args:
        examples: the training examples.
        encoder: makes micro-batches.
        config: batch and micro-batch size.
        seed: of the orders.
        gold_only: encode the right options only (for objectives that need no others).
    """

    def __init__(
        self, examples: Sequence[Example], encoder: Encoder, config: DataConfig, seed: int, *, gold_only: bool
    ) -> None:
        self.examples = examples
        self.encoder = encoder
        self.batch_size = config.batch_size
        self.micro_batch_size = config.micro_batch_size
        self.gold_only = gold_only
        self._noise = Noise(seed)
        self._epoch: tuple[int, list[int]] = (-1, [])

    def at(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = [self.examples[self._order(place)] for place in places]
        size = self.micro_batch_size
        return [
            self.encoder.micro_batch(chosen[start : start + size], gold_only=self.gold_only)
            for start in range(0, len(chosen), size)
        ]

    def _order(self, place: int) -> int:
        """The example at a place of the endless sequence of epochs."""
        epoch, index = divmod(place, len(self.examples))
        if epoch != self._epoch[0]:
            order = self._noise.permutation(Key(epoch, _ORDER, Domain.DATA), len(self.examples))
            self._epoch = (epoch, order.tolist())
        return self._epoch[1][index]


def evaluation_batches(examples: Sequence[Example], encoder: Encoder, size: int) -> list[MicroBatch]:
    """All examples in order, with all options."""
    return [encoder.micro_batch(examples[i : i + size], gold_only=False) for i in range(0, len(examples), size)]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))

"""`TrainBatches`: which examples a step takes, in which micro-batches, of which shapes."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from zoscale.config import DataConfig
from zoscale.data.batch import MicroBatch
from zoscale.data.splits import ORDER, STRATA, Encoded, Encoder
from zoscale.noise.generator import Domain, Key, Noise
from zoscale.tasks import Example

_KEPT = 1024  # examples that are encoded once, not once per epoch: between two steps a GPU waits for them


class _Outline(NamedTuple):
    """Tokens of an encoded example's rows, and whether one holds several sequences."""

    lengths: tuple[int, ...]
    has_tree: bool

    @property
    def length(self) -> int:
        return max(self.lengths)


class TrainBatches:
    """Micro-batches of each step: a pure function of (seed, step), the same on every rank.

    Each epoch visits every example once in an order of its own; a batch may span two epochs. Within a window of steps
    the examples are sorted by length and cut into micro-batches: every step takes its share of the short ones, of the
    longer ones, and so on; which, is drawn at random.

    Args:
        examples: the training examples.
        encoder: makes micro-batches.
        config: batch and micro-batch size, and the steps of a window.
        seed: of the orders.
        gold_only: encode the right options only (for objectives that need no others).
        multiple: of tokens, that rows are padded to.

    Raises:
        ValueError: if the micro-batch size does not divide the batch size.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoder: Encoder,
        config: DataConfig,
        seed: int,
        *,
        gold_only: bool,
        multiple: int = 1,
    ) -> None:
        if config.batch_size % config.micro_batch_size:
            raise ValueError(
                f"expected a divisor of {config.batch_size}, got micro-batches of {config.micro_batch_size}"
            )
        self.examples = examples
        self.encoder = encoder
        self.batch_size = config.batch_size
        self.micro_batch_size = config.micro_batch_size
        self.window_size = config.length_window
        self.gold_only = gold_only
        self.multiple = multiple
        self._noise = Noise(seed)
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._window: tuple[int, list[list[list[int]]]] = (-1, [])
        self._outlines: dict[int, _Outline] = {}
        self._encoded = lru_cache(_KEPT)(self._encode)

    def at(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, by length."""
        return [self._collated(part) for part in self._parts(step)]

    def one_of_each_shape(self, steps: int) -> list[MicroBatch]:
        """A micro-batch of every shape that so many steps take: rows, columns, and whether rows are trees."""
        found: dict[tuple[int, int, bool], MicroBatch] = {}
        for step in range(steps):
            for part in self._parts(step):
                outlines = [self._outline(number) for number in part]
                lengths = [length for outline in outlines for length in outline.lengths]
                groups, width = self.encoder.layout(lengths, self.multiple)
                has_tree = len(groups) < len(lengths) or any(outline.has_tree for outline in outlines)
                shape = len(groups), width, has_tree
                if shape not in found:
                    found[shape] = self._collated(part)
        return [found[shape] for shape in sorted(found)]

    def _collated(self, part: Sequence[int]) -> MicroBatch:
        return self.encoder.collate([self._encoded(number) for number in part], self.multiple)

    def _encode(self, number: int) -> Encoded:
        return self.encoder.encode(self.examples[number], gold_only=self.gold_only)

    def _outline(self, number: int) -> _Outline:
        if number not in self._outlines:
            encoded = self._encoded(number)
            lengths = tuple(len(row.tokens) for row in encoded.rows)
            self._outlines[number] = _Outline(lengths, any(row.tree for row in encoded.rows))
        return self._outlines[number]

    def _parts(self, step: int) -> list[list[int]]:
        """The examples of a step's micro-batches, by their numbers."""
        number, place = divmod(step, self.window_size)
        if number != self._window[0]:
            self._window = (number, self._steps(number))
        return self._window[1][place]

    def _steps(self, window: int) -> list[list[list[int]]]:
        """By step of a window, its micro-batches: one of each `window_size` that are next to each other by length."""
        num, size = self.window_size * self.batch_size, self.micro_batch_size
        chosen = [self._order(place) for place in range(window * num, (window + 1) * num)]
        chosen.sort(key=lambda number: self._outline(number).length)
        strata = range(self.batch_size // size)
        orders = [
            self._noise.permutation(Key(window, STRATA + stratum, Domain.DATA), self.window_size).tolist()
            for stratum in strata
        ]
        firsts = [
            [(stratum * self.window_size + orders[stratum][step]) * size for stratum in strata]
            for step in range(self.window_size)
        ]
        return [[chosen[first : first + size] for first in row] for row in firsts]

    def _order(self, place: int) -> int:
        """The example at a place of the endless sequence of epochs."""
        epoch, index = divmod(place, len(self.examples))
        if epoch != self._epoch[0]:
            order = self._noise.permutation(Key(epoch, ORDER, Domain.DATA), len(self.examples))
            self._epoch = (epoch, order.tolist())
        return self._epoch[1][index]

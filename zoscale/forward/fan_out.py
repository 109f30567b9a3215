"""`FanOutForward`: the losses of all candidates in one pass; each layer is gathered once per step."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from zoscale.config import ConfigError, first_line
from zoscale.data.batch import MicroBatch
from zoscale.estimators import Candidate
from zoscale.forward.answer_rows import AnswerRows
from zoscale.forward.compilation import CompiledAnswers
from zoscale.forward.division import Division, Item, cut
from zoscale.forward.fan import SEQUENTIAL, Fan, Rows
from zoscale.forward.sequential import Losses, reduce_losses
from zoscale.forward.shared_rows import SharedRows
from zoscale.lanes import Lanes
from zoscale.mesh import Mesh
from zoscale.models.answers import AnswerModel
from zoscale.models.sizes import blocks_of, tokens_per_pass
from zoscale.objectives import Objective

WAITING = 4
"""Times the tokens of a pass: hidden states that may wait between two blocks, a fraction of its activations."""
_OF_SHAPES = re.compile(r"\b(sizes?|shapes?|dimension|same modules)\b", re.IGNORECASE)
"""Found in errors of operations whose operands do not fit; not in those of a lack of memory."""


class FanOutForward:
    """All candidates in one forward of the sharded model per micro-batch; equal to `SequentialForward` to rounding.

    Passes of several micro-batches, or of candidates that do not fit one, go through the model side by side, so that
    a step gathers it once; with very many tokens, once per round of them.

    Args:
        model: answers for micro-batches.
        mesh: the ranks that share the micro-batches.
        fan: gives each candidate its weights.
        max_rows: rows of one pass; more are cut by candidates. None = as `tokens_per_pass` says.
        num_parts: parts of the candidates that are shared out to the ranks, like micro-batches.
    """

    def __init__(
        self, model: AnswerModel, mesh: Mesh, fan: Fan, *, max_rows: int | None = None, num_parts: int = 1
    ) -> None:
        self.model = model
        self.mesh = mesh
        self.fan = fan
        self.max_rows = max_rows
        self.max_tokens = tokens_per_pass(model.model)
        self.num_parts = num_parts
        blocks = blocks_of(model.model)
        self.shared = SharedRows(model.model)
        self.answers = AnswerRows(() if isinstance(model, CompiledAnswers) else blocks)  # a graph holds a whole block
        self.lanes = Lanes(model.module, model.model, blocks, fan.closed)
        self._has_learned = False

    @torch.no_grad()
    def losses(self, batches: Sequence[MicroBatch], candidates: Sequence[Candidate], objective: Objective) -> Losses:
        """See `Forward`.

        Raises:
            ConfigError: if the model's code cannot run the rows of several candidates together.
        """
        division = Division(self.mesh, len(batches), len(candidates), self.num_parts, together=False)
        items = division.items()
        self.learn(batches)
        places = _places(items)
        passing = self.fan.prepare([candidates[number] for number in places])
        num_passes = max(self._num_passes(part, batch) for part in division.parts for batch in batches)
        table = division.new_table(items)
        tokens_of = cache(lambda number: batches[number].input_ids.cpu())  # a wait, where a batch is on a GPU already

        def losses_of(turn: int, item: Item, which: slice) -> None:
            batch = batches[item.batch].to(self.mesh.device)
            shared = self.shared.blocks(candidates[which])
            rows = _rows(batch, which.stop - which.start, shared, partial(tokens_of, item.batch))
            prepared = slice(places[which.start], places[which.start] + rows.copies)
            copies = batch.repeat(rows.copies)
            with self.shared.once(shared, rows), passing(prepared, rows), self.answers.only(copies):
                answers = self.model.answer_logprobs(copies).chunk(rows.copies)
            for row, logprobs in enumerate(answers, start=which.start - item.candidates.start):
                table[row, turn], table[-1, turn] = objective(logprobs, batch)

        passes = [
            partial(losses_of, turn, item, which)
            for turn, item in enumerate(items)
            for which in cut(item.candidates, num_passes)
        ]
        most = max(part.stop - part.start for part in division.parts)
        tokens = len(items) * most * max(batch.input_ids.numel() for batch in batches)
        num_rounds = min(len(passes), -(-tokens // (WAITING * self.max_tokens)))
        for one in cut(slice(0, len(passes)), num_rounds):
            with _fitting():
                self.lanes.run(passes[one])
        return reduce_losses(division.gather(table), items, batches)

    def counts(
        self, batch: MicroBatch, batches: Sequence[MicroBatch], candidates: Sequence[Candidate], num_trials: int
    ) -> list[int]:
        """Numbers of candidates with which `losses` makes every kind of pass that a step makes on a micro-batch.

        Args:
            batch: the only micro-batch that `losses` is given then.
            batches: those that may be together with it in a step.
            candidates: of a step; blocks that they leave as they are see one copy of the rows.
            num_trials: candidates of a step's second round.
        """
        together = set()
        for number in (len(candidates), num_trials) if num_trials else (len(candidates),):
            for part in cut(slice(0, number), min(self.num_parts, number)):
                longest = max(self._num_passes(part, other) for other in batches)
                for num_passes in range(self._num_passes(part, batch), longest + 1):
                    together |= {piece.stop - piece.start for piece in cut(part, num_passes)}
        if self.shared.may_share(candidates):
            together.add(1)
        return [count * self.num_parts for count in sorted(together)]

    @torch.no_grad()
    def learn(self, batches: Sequence[MicroBatch]) -> None:
        """See by passes of the model as it is, once, which rows of a step need not be run; a collective.

        Before the first step, so that a run that is taken up again takes its steps like one that was not stopped.
        """
        if self._has_learned:
            return
        self._has_learned = True
        rows = max(batches, key=lambda batch: batch.input_ids.shape[1]).trial().to(self.mesh.device)
        answer = partial(AnswerModel.answer_logprobs, self.model)  # without a graph
        self.answers.learn(rows, answer, self.shared.learning(len(rows.input_ids)))

    def _num_passes(self, part: slice, batch: MicroBatch) -> int:
        """Passes that a part of the candidates takes on a micro-batch; all ranks do as many as the longest takes."""
        length: int = part.stop - part.start
        rows, tokens = batch.input_ids.shape
        limit = self.max_tokens // tokens if self.max_rows is None else self.max_rows
        return -(-length // max(1, limit // rows))


@contextmanager
def _fitting() -> Iterator[None]:
    """Within, tensors that do not fit one another are an error of the forward that was chosen."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if type(error) not in (RuntimeError, IndexError) or not _OF_SHAPES.search(str(error)):
            raise
        expected = "a model that runs the rows of all candidates together"
        raise ConfigError(expected, first_line(error), SEQUENTIAL) from error


def _places(items: Sequence[Item]) -> dict[int, int]:
    """The numbers of the candidates that the items name, each with its place among them."""
    numbers = sorted({number for item in items for number in range(item.candidates.start, item.candidates.stop)})
    return {number: place for place, number in enumerate(numbers)}


def _rows(batch: MicroBatch, copies: int, shared: Sequence[torch.nn.Module], tokens: Callable[[], Tensor]) -> Rows:
    inside = frozenset(module for block in shared for module in block.modules())
    return Rows(copies, len(batch.input_ids), len(batch.position_row), inside, tokens)

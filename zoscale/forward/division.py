"""`Division`: how the forward passes of a step are shared out to the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from zoscale.mesh import Mesh


@dataclass(frozen=True)
class Item:
    """What a rank computes in one turn.

    Args:
        batch: number of the micro-batch.
        candidates: which ones are evaluated on it.
        is_own: whether no other rank does the same; others repeat work so that all enter the same collectives.
    """

    batch: int
    candidates: slice
    is_own: bool


class Division:
    """The micro-batches of a step for one part of the candidates after the other, shared out to the ranks in turn.

    Args:
        mesh: the ranks.
        num_batches: micro-batches B.
        num_candidates: candidates K.
        num_parts: parts that the candidates are cut into; at most K are made.
        together: whether the ranks of a shard group must evaluate the same candidates at the same time.
    """

    def __init__(self, mesh: Mesh, num_batches: int, num_candidates: int, num_parts: int, *, together: bool) -> None:
        self.mesh = mesh
        self.num_batches = num_batches
        self.parts = cut(slice(0, num_candidates), min(num_parts, num_candidates))
        group = mesh.shard_size if together else 1
        self._width = -(-num_batches // group) * group  # columns of a part; those beyond the micro-batches are repeats
        self._num_columns = len(self.parts) * self._width

    @property
    def num_turns(self) -> int:
        """Items of each rank."""
        return self.mesh.share(self._num_columns)[1]

    @property
    def num_repeats(self) -> int:
        """Items over all ranks that are not their own."""
        return self.num_turns * self.mesh.world_size - len(self.parts) * self.num_batches

    def items(self) -> list[Item]:
        """This rank's, one per turn; all ranks take as many turns."""
        mine, turns = self.mesh.share(self._num_columns)
        items = []
        for turn in range(turns):
            column = self.mesh.rank + turn * self.mesh.world_size
            part, batch = divmod(column % self._num_columns, self._width)
            is_own = turn < len(mine) and batch < self.num_batches
            items.append(Item(batch % self.num_batches, self.parts[part], is_own))
        return items

    def new_table(self, items: Sequence[Item]) -> Tensor:
        """Zeros, float64 [P + 1, turns]: in each turn, the losses of the candidates (at most P), and last a count."""
        most = max(part.stop - part.start for part in self.parts)
        return torch.zeros(most + 1, len(items), dtype=torch.float64, device=self.mesh.device)

    def gather(self, table: Tensor) -> list[list[float]]:
        """All losses by candidate and micro-batch, and last the counts: [K + 1][B], the same on every rank."""
        whole = self.mesh.gather_items(table, self._num_columns)
        rows: list[list[float]] = []
        for number, part in enumerate(self.parts):
            first = number * self._width
            rows += whole[: part.stop - part.start, first : first + self.num_batches].tolist()
        return [*rows, whole[-1, : self.num_batches].tolist()]


def cut(whole: slice, num_parts: int) -> list[slice]:
    """Nearly equal parts in order, none of them empty: with more parts than elements, some elements come twice."""
    length = whole.stop - whole.start
    edges = [whole.start + length * number // num_parts for number in range(num_parts + 1)]
    return [slice(start, max(stop, start + 1)) for start, stop in pairwise(edges)]

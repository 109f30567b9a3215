"""How a module that owns trainable weights runs in one pass for several candidates, each with its own values."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoscale.estimators import Candidate
from zoscale.fan import Rows
from zoscale.fused import on_device
from zoscale.probes import Direction
from zoscale.scratch import Draws
from zoscale.shards import ShardedParam, TensorSpec, chunk

Weights = Mapping[nn.Parameter, TensorSpec]

_ROWS = 64  # matrix products of other heights end in a remainder, which takes up to a fifth of their time


class Unit:
    """A module that runs once per candidate.

    Args:
        module: the module.
        weights: its trainable weights and those of the modules within, each once.
    """

    def __init__(self, module: nn.Module, weights: Weights) -> None:
        self.module = module
        self.weights = weights
        self.outlines = self._outlines()

    def _outlines(self) -> list[ShardedParam]:
        """The slabs whose noise `forward` takes, in its order."""
        return [ShardedParam.outline(spec, 0, spec.numel, param.device) for param, spec in self.weights.items()]

    def forward(self, original: Callable[..., Any], rows: Rows, draws: Draws, *args: Any, **kwargs: Any) -> Any:
        """The module's results for all candidates, one after the other."""
        calls = rows.split_call(args, kwargs)
        gathered = {param: param.data for param in self.weights}
        slabs = [(whole.reshape(-1), draws.of(o)) for whole, o in zip(gathered.values(), self.outlines, strict=True)]
        results: list[Any] = [None] * rows.copies
        try:
            for number, values in draws.values(slabs):
                for (param, whole), value in zip(gathered.items(), values, strict=True):
                    param.data = value.view(whole.shape)
                results[number] = original(*calls[number][0], **calls[number][1])
        finally:
            for param, whole in gathered.items():
                param.data = whole
        return rows.join(results)


class LinearUnit(Unit):
    """A linear layer: rows of the weight give columns of the output, so the scratch copy is of a few rows."""

    def __init__(self, module: nn.Linear, weights: Weights) -> None:
        self.linear = module
        widest = max(spec.numel // module.out_features for spec in weights.values())
        rows = max(1, chunk(module.weight.device) // widest)
        self._height = rows - rows % _ROWS if rows > _ROWS else rows
        super().__init__(module, weights)

    def has_corners(self, directions: Iterable[Direction]) -> bool:
        """Whether `CornerUnit` runs it: in float32, where no perturbed weight is rounded by more than a product is."""
        return all(param.dtype == torch.float32 for param in self.linear.parameters()) and all(
            direction.corner(spec) is not None
            for direction in directions
            for spec in self.weights.values()
            if direction.touches(spec)
        )

    def _outlines(self) -> list[ShardedParam]:
        return [
            ShardedParam.outline(spec, *self._elements(spec, first, last), param.device)
            for first, last in self._spans()
            for param, spec in self.weights.items()
        ]

    def _spans(self) -> Iterator[tuple[int, int]]:
        height = self.linear.out_features
        return ((first, min(first + self._height, height)) for first in range(0, height, self._height))

    def _elements(self, spec: TensorSpec, first: int, last: int) -> tuple[int, int]:
        width = spec.numel // self.linear.out_features
        return first * width, last * width

    def forward(self, original: Callable[..., Any], rows: Rows, draws: Draws, *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        parts = rows.by_candidate(x)
        result = x.new_empty(*parts.shape[:2], self.linear.out_features)
        outlines = iter(self.outlines)
        for first, last in self._spans():
            slabs = {param: (param.data[first:last].reshape(-1), draws.of(next(outlines))) for param in self.weights}
            for number, values in draws.values(list(slabs.values())):
                own = dict(zip(slabs, values, strict=True))
                weight = self._rows(self.linear.weight, own, first, last)
                bias = None if self.linear.bias is None else self._rows(self.linear.bias, own, first, last)
                _multiply(parts[number], weight, bias, out=result[number, :, first:last])
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def _rows(param: Tensor, own: Mapping[Any, Tensor], first: int, last: int) -> Tensor:
        rows = param.data[first:last]
        return own[param].view(rows.shape) if param in own else rows


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    """A linear layer's result [N, rows], put where it belongs: the bits of `functional.linear` without a copy."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


class CornerUnit(Unit):
    """A linear layer whose weights the candidates change in few rows R and columns C, if at all.

    One product of all rows with the weights as they are, and a small one per candidate:
    x (W + r Z)^T = x W^T, plus r x_C Z_RC^T in the columns R.

    Args:
        unit: the layer; `has_corners` of all the candidates' directions.
        candidates: of the pass.
    """

    def __init__(self, unit: LinearUnit, candidates: Sequence[Candidate]) -> None:
        super().__init__(unit.module, unit.weights)
        self._weight = unit.linear.weight
        self._candidates = candidates

    def _outlines(self) -> list[ShardedParam]:
        return []

    def forward(self, original: Callable[..., Any], rows: Rows, draws: Draws, *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        parts, result = rows.by_candidate(x), original(x)
        results = result.view(rows.copies, -1, result.shape[-1])
        corners: dict[tuple[int, nn.Parameter], _Drawn] = {}
        for candidate, part, own in zip(self._candidates, parts, results, strict=True):
            for param, spec in self.weights.items():
                direction = candidate.direction
                if direction is not None and direction.touches(spec):
                    which = id(direction), param
                    drawn = corners[which] = corners.get(which) or _drawn(direction, spec, x.device)
                    drawn.add_to(own, part if param is self._weight else None, candidate.radius)
        return result


class _Drawn(NamedTuple):
    """A direction on its rows and columns of a tensor: int64 on the device or None, and float32 [rows, columns]."""

    rows: Tensor | None
    columns: Tensor | None
    z: Tensor

    def add_to(self, result: Tensor, x: Tensor | None, radius: float) -> None:
        """What z of a weight, or without x of a bias, adds to the result [N, out] of a layer's input [N, in]."""
        if x is None:
            where, change = self.columns, self.z.expand(len(result), -1)
        else:
            x = x if self.columns is None else x.index_select(1, self.columns)
            where, change = self.rows, x @ self.z.t()
        if where is None:
            result.add_(change, alpha=radius)
        else:
            result.index_add_(1, where, change, alpha=radius)


def _drawn(direction: Direction, spec: TensorSpec, device: torch.device) -> _Drawn:
    corner = direction.corner(spec)
    assert corner is not None, "asked before"
    rows, columns = (None if index is None else on_device(index, device) for index in (corner.rows, corner.columns))
    return _Drawn(rows, columns, corner.values(device))


class LookupUnit(Unit):
    """The input embedding: only the rows of the tokens at hand are perturbed; which ones, the host knows."""

    def _outlines(self) -> list[ShardedParam]:
        return []

    def forward(self, original: Callable[..., Any], rows: Rows, draws: Draws, *args: Any, **kwargs: Any) -> Any:
        if rows.tokens is None or args[0].shape != (rows.copies * rows.rows, rows.tokens.shape[1]):
            raise rows.error(args[0])
        ((param, spec),) = self.weights.items()
        used, places = torch.unique(rows.tokens, return_inverse=True)
        outlines = [
            ShardedParam.outline(spec, first * spec.columns, last * spec.columns, param.device)
            for first, last in _runs(used.tolist())
        ]
        used, places = (on_device(index, param.device) for index in (used, places))
        table = param.data[used]
        results: list[Any] = [None] * rows.copies
        for number, (values,) in draws.values([(table.view(-1), draws.at(outlines))]):
            results[number] = functional.embedding(places, values.view(table.shape))
        return rows.join(results)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges [first, last) of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs

"""`Unit`: a module that owns trainable weights runs once per candidate, on that candidate's rows.

The gathered weights are only read: each candidate's values are written to a scratch copy, which is thrown away, so
nothing needs to be restored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoscale.forward.fan import Rows
from zoscale.forward.scratch import Draws
from zoscale.models.wide_head import WideHead, product
from zoscale.noise.fused import on_device
from zoscale.probes import Direction
from zoscale.shards import ShardedParam, TensorSpec, chunk

Weights = Mapping[nn.Parameter, TensorSpec]

_ROWS = 64  # matrix products of other heights end in a remainder, which takes up to a fifth of their time


class Unit:
    """A module that runs once per candidate.

    Args:
        module: the module.
        weights: its trainable weights and those of the modules within, each once.

    Attributes:
        outlines: the slabs whose noise `forward` takes, in its order.
        patched: weights whose noise it takes as patches.
        places: the modules that hold its weights, each with a weight's name there.
    """

    def __init__(self, module: nn.Module, weights: Weights) -> None:
        self.module = module
        self.weights = weights
        self.places = [
            (owner, name)
            for owner in module.modules()
            for name, param in owner.named_parameters(recurse=False)
            if param in weights
        ]
        self.outlines = self._outlines()
        self.patched: list[TensorSpec] = []

    def _outlines(self) -> list[ShardedParam]:
        return [ShardedParam.outline(spec, 0, spec.numel, param.device, param) for param, spec in self.weights.items()]

    def suited(self, directions: Sequence[Direction]) -> "Unit":
        """The cheapest way to run the module for some directions."""
        return self

    def forward(self, original: Callable[..., Any], rows: Rows, draws: Draws, *args: Any, **kwargs: Any) -> Any:
        """The module's results for all candidates, one after the other."""
        calls = rows.split_call(args, kwargs)
        for owner, name in self.places:
            getattr(owner, name)  # what a module without a forward holds (PEFT's dicts), ZeRO-3 gathers when asked for
        gathered = {param: param.data for param in self.weights}
        slabs = [(whole.reshape(-1), outline) for whole, outline in zip(gathered.values(), self.outlines, strict=True)]
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
        self._weight = cast(nn.Parameter, module.weight)  # asked for within another's forward, ZeRO-3 would gather it
        self._outputs = next(iter(weights.values())).shape[0]  # PEFT's tied heads say otherwise in `out_features`
        widest = max(spec.numel // self._outputs for spec in weights.values())
        rows = max(1, chunk(module.weight.device) // widest)
        self._height = rows - rows % _ROWS if rows > _ROWS else rows
        super().__init__(module, weights)

    def suited(self, directions: Sequence[Direction]) -> Unit:
        spec = self.weights.get(self._weight)
        is_cheaper = self._weight.device.type == "cpu"  # on a GPU a kernel copies at the speed of the memory
        if spec is None or not is_cheaper or self._weight.dtype != torch.float32:
            return self
        is_patched = all(direction.is_patch(spec) for direction in directions if direction.touches(spec))
        return PatchedUnit(self.linear, self.weights, spec) if is_patched else self

    def _outlines(self) -> list[ShardedParam]:
        return [
            ShardedParam.outline(spec, *self._elements(spec, first, last), param.device, param)
            for first, last in self._spans()
            for param, spec in self.weights.items()
        ]

    def _spans(self) -> Iterator[tuple[int, int]]:
        return ((first, min(first + self._height, self._outputs)) for first in range(0, self._outputs, self._height))

    def _elements(self, spec: TensorSpec, first: int, last: int) -> tuple[int, int]:
        width = spec.numel // self._outputs
        return first * width, last * width

    def forward(self, original: Callable[..., Any], rows: Rows, draws: Draws, *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        parts = rows.by_candidate(x)
        is_wide = isinstance(self.linear, WideHead) and self.linear.is_wide
        result = x.new_empty(*parts.shape[:2], self._outputs, dtype=torch.float32 if is_wide else None)
        outlines = iter(self.outlines)
        for first, last in self._spans():
            slabs = {param: (param.data[first:last].reshape(-1), next(outlines)) for param in self.weights}
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


class PatchedUnit(Unit):
    """A linear layer whose weight W differs on a few rows and columns: W multiplies the rows of all candidates at once.

    (W + radius z) x = W x + radius z x in float32; in 16 bits W x would be rounded before the small second term came.

    Args:
        linear: the layer.
        weights: see `Unit`; W is among them.
        spec: of W.
    """

    def __init__(self, linear: nn.Linear, weights: Weights, spec: TensorSpec) -> None:
        self.linear = linear
        super().__init__(linear, {param: own for param, own in weights.items() if own is not spec})
        self.patched = [spec]

    def forward(self, original: Callable[..., Any], rows: Rows, draws: Draws, *args: Any, **kwargs: Any) -> Any:
        result = functional.linear(args[0], self.linear.weight, None if self.weights else self.linear.bias)
        inputs, outputs = (rows.by_candidate(x) for x in (args[0], result))
        slabs = [(bias.data, outline) for bias, outline in zip(self.weights, self.outlines, strict=True)]
        for number, biases in draws.values(slabs):
            for bias in biases:
                outputs[number].add_(bias)
        for patch, numbers in draws.patches(self.patched[0]):
            for number, radius in numbers:
                x, own = inputs[number].index_select(1, patch.columns), outputs[number]
                changed = torch.addmm(own.index_select(1, patch.rows), x, patch.values.t(), alpha=radius)
                own.index_copy_(1, patch.rows, changed)
        return result


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    """A linear layer's result [N, rows], put where it belongs: the bits of its own forward without a copy."""
    if out.dtype != x.dtype:
        out.copy_(product(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


class LookupUnit(Unit):
    """The input embedding: only the rows of the tokens at hand are perturbed; which ones, the host knows."""

    def _outlines(self) -> list[ShardedParam]:
        return []

    def forward(self, original: Callable[..., Any], rows: Rows, draws: Draws, *args: Any, **kwargs: Any) -> Any:
        tokens = None if rows.tokens is None else rows.tokens()
        if tokens is None or args[0].shape != (rows.copies * rows.rows, tokens.shape[1]):
            raise rows.error(args[0])
        ((param, spec),) = self.weights.items()
        used, places = torch.unique(tokens, return_inverse=True)
        outlines = [
            ShardedParam.outline(spec, first * spec.columns, last * spec.columns, param.device)
            for first, last in _runs(used.tolist())
        ]
        used, places = (on_device(index, param.device) for index in (used, places))
        table = param.data[used]
        results: list[Any] = [None] * rows.copies
        for number, (values,) in draws.scratch([(table.view(-1), draws.at(outlines))]):
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

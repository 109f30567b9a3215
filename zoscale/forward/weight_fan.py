"""`WeightFan`: any trainable weights; a module that owns some runs once per candidate, on that candidate's rows.

The gathered weights are only read: each candidate's values are written to a scratch copy, which is thrown away, so
nothing needs to be restored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoscale.estimators import Candidate
from zoscale.forward.fan import Rows, replaced_forward
from zoscale.forward.scratch import Draws
from zoscale.models.sizes import is_block
from zoscale.noise.fused import on_device
from zoscale.shards import ShardedParam, TensorSpec, chunk, trainable_specs

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


def find_units(model: nn.Module) -> list[Unit] | None:
    """The smallest modules with a forward of their own that hold all trainable weights, in the model's order.

    None if such a module holds blocks, or runs on other rows than those of the batch in their order: experts that take
    the tokens routed to them, DoRA's magnitudes, virtual tokens, `nn.MultiheadAttention`.
    """
    trainable = {param: spec for spec, param in trainable_specs(model)}
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if any(param in trainable for param in module.parameters(recurse=False)):
            while name and type(modules[name]).forward is nn.Module.forward:
                name = name.rpartition(".")[0]
            found[name] = modules[name]
    if any(_is_out_of_order(model, modules, name) for name in found):
        return None
    outer = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    table = getattr(model, "get_input_embeddings", lambda: None)()
    inputs = set(table.modules()) if isinstance(table, nn.Module) else set()
    return [_unit(found[n], {p: trainable[p] for p in found[n].parameters() if p in trainable}, inputs) for n in outer]


def _is_out_of_order(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> bool:
    path = name.split(".")
    above = [modules[".".join(path[:depth])] for depth in range(len(path) + 1)]
    return (
        not name
        or any(is_block(model, inner) for inner in modules[name].modules())
        or any(isinstance(module, nn.MultiheadAttention) for module in above)
        or not {"experts", "lora_magnitude_vector", "prompt_encoder"}.isdisjoint(path)
    )


def _unit(module: nn.Module, weights: Weights, inputs: Set[nn.Module]) -> Unit:
    """The cheapest way to run a module; `inputs` are those that look up the rows' tokens."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return LinearUnit(module, weights)
    is_table = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    if is_table and module.max_norm is None and module in inputs:
        return LookupUnit(module, weights)
    return Unit(module, weights)


class WeightFan:
    """See `Fan`; for any trainable weights.

    Args:
        units: from `find_units`.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units

    def prepare(self, candidates: Sequence[Candidate]) -> Callable[[slice, Rows], AbstractContextManager[None]]:
        """See `Fan`."""
        return lambda which, rows: self._fanned(candidates[which], rows)

    @contextmanager
    def _fanned(self, candidates: Sequence[Candidate], rows: Rows) -> Iterator[None]:
        """Within, every unit that the candidates touch runs once per candidate.

        Raises:
            ValueError: if the model used the weights of one in another way than by calling it.
        """
        directions = [candidate.direction for candidate in candidates if candidate.direction is not None]
        touched = [u for u in self.units if any(d.touches(s) for s in u.weights.values() for d in directions)]
        draws = Draws(candidates, [outline for unit in touched for outline in unit.outlines])
        idle = {unit.module for unit in touched}
        with ExitStack() as stack:
            for unit in touched:
                stack.enter_context(replaced_forward(unit.module, partial(_fanned_forward, idle, unit, rows, draws)))
            yield
        if idle:
            names = ", ".join(sorted({type(module).__name__ for module in idle}))
            raise ValueError(
                f"expected every trained module to be called, got none of {names}: the model reads their weights in "
                "another way; set forward.name=sequential"
            )


def _fanned_forward(
    idle: set[nn.Module], unit: Unit, rows: Rows, draws: Draws, original: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        idle.discard(unit.module)
        return unit.forward(original, rows, draws, *args, **kwargs)

    return forward

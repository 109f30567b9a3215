"""`LoraFan`: the frozen base multiplies the rows of all candidates together, each adapter acts on its own rows.

Adapters are small: every rank gathers them once, in one collective, and perturbs them for itself, so the shards are
not touched.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from typing import Any, Self

import torch
from torch import Tensor, nn

from zoscale.estimators import Candidate
from zoscale.forward.fan import Rows, replaced_forward
from zoscale.mesh import Mesh
from zoscale.noise.segments import Write, write_all
from zoscale.noise.streams import ALIGNED
from zoscale.probes import pieces
from zoscale.shards import ShardedParam, TensorSpec, not_gathered

_QUANTIZED = ("Linear4bit",)  # PEFT's layers that are `Linear` but for the type of the base layer's weights


@dataclass(frozen=True)
class LoraPair:
    """One adapter of one layer.

    Args:
        layer: the PEFT layer that adds it to its base layer's output.
        a: trainable tensor A [r, in].
        b: trainable tensor B [out, r].
        scaling: factor of B A.
        factor: trainable number [1] that B A is multiplied by too; None = none.
    """

    layer: nn.Module
    a: TensorSpec
    b: TensorSpec
    scaling: float
    factor: TensorSpec | None = None


def find_lora_pairs(model: nn.Module, specs: Sequence[TensorSpec]) -> list[LoraPair] | None:
    """The LoRA matrices and weights of adapters that the trainable tensors are; None if some are anything else.

    Adapters of single experts are: such a layer takes the tokens routed to it, not the rows in their order.
    """
    from peft.tuners.lora import Linear, LoraLayer

    by_name = {spec.name: spec for spec in specs}
    pairs = []
    for prefix, layer in model.named_modules():
        is_linear = isinstance(layer, Linear) or (isinstance(layer, LoraLayer) and type(layer).__name__ in _QUANTIZED)
        if not is_linear or layer.merged or layer.disable_adapters:
            continue
        if "experts" in prefix.split("."):
            return None
        for adapter in (adapter for adapter in layer.active_adapters if adapter in layer.lora_A):
            a, b = (by_name.pop(f"{prefix}.lora_{matrix}.{adapter}.weight", None) for matrix in "AB")
            if a is None or b is None or adapter in layer.lora_variant or layer.lora_B[adapter].bias is not None:
                return None
            factor = by_name.pop(f"{prefix}.lora_B.{adapter}.factor", None)
            pairs.append(LoraPair(layer, a, b, float(layer.scaling[adapter]), factor))
    return pairs if pairs and not by_name else None


class LoraFan:
    """See `Fan`; for LoRA matrices, and weights of adapters, as the only trainable tensors.

    Args:
        shards: this rank's slices of them.
        mesh: the ranks that hold the other slices.
        pairs: from `find_lora_pairs`.

    Attributes:
        in_place: whether passes of as many candidates find their tensors at the same addresses. For CUDA graphs, which
            take what a module holds for weights, and are recorded anew wherever it lies elsewhere.
    """

    def __init__(self, shards: Sequence[ShardedParam], mesh: Mesh, pairs: Sequence[LoraPair]) -> None:
        self.shards = shards
        self.mesh = mesh
        self.pairs = pairs
        self.in_place = False
        self.closed: Sequence[nn.Module] = ()
        self._places: dict[int, tuple[Tensor, ...]] = {}

    def prepare(self, candidates: Sequence[Candidate]) -> Callable[[slice, Rows], AbstractContextManager[None]]:
        """See `Fan`: one gather of all adapters; [K, *shape] of each are held until the step's passes are done."""
        wholes = self._gather()
        stacks = _perturbed(wholes, [shard.live.dtype for shard in self.shards], candidates)
        stacks = stacks.with_memories(memory.to(self.mesh.device) for memory in stacks.memories)

        def passing(which: slice, rows: Rows) -> AbstractContextManager[None]:
            parts = [memory[which] for memory in stacks.memories]
            own = stacks.with_memories(self._put(parts) if self.in_place else parts)
            return self.adapted(own.tensors(), rows)

        return passing

    def _put(self, memories: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Copies where the tensors of as many candidates lie in every pass."""
        count = len(memories[0])
        if count not in self._places:
            self._places[count] = tuple(torch.empty_like(memory) for memory in memories)
        for place, memory in zip(self._places[count], memories, strict=True):
            place.copy_(memory)
        return self._places[count]

    def _gather(self) -> list[ShardedParam]:
        """The whole truth of every trainable tensor, as plain tensors in the order of the shards."""
        wholes = self.mesh.gather_flats([(shard.truth, shard.spec.numel) for shard in self.shards])
        return [
            ShardedParam(nn.Parameter(whole, requires_grad=False), shard.spec, master="none")
            for whole, shard in zip(wholes, self.shards, strict=True)
        ]

    @contextmanager
    def adapted(self, adapters: Mapping[str, Tensor], rows: Rows) -> Iterator[None]:
        """Within, every LoRA layer applies each candidate's matrices to its rows."""
        with ExitStack() as stack:
            for layer, pairs in groupby(self.pairs, key=lambda pair: pair.layer):
                seen = rows.seen_by(layer)
                own = [_Adapter.of(pair, adapters, seen.copies) for pair in pairs]
                stack.enter_context(replaced_forward(layer, partial(_adapted_forward, layer, own, seen)))
            stack.enter_context(not_gathered(self.shards))
            yield


@dataclass(frozen=True)
class _Adapter:
    """An adapter as the candidates have it: A [K, r, in], B [K, out, r], and the factor of B A, [K, 1, 1] or one."""

    a: Tensor
    b: Tensor
    scale: Tensor | float

    @classmethod
    def of(cls, pair: LoraPair, adapters: Mapping[str, Tensor], copies: int) -> Self:
        a, b = (adapters[spec.name][:copies] for spec in (pair.a, pair.b))
        if pair.factor is None:
            return cls(a, b, pair.scaling)
        return cls(a, b, adapters[pair.factor.name][:copies].view(-1, 1, 1) * pair.scaling)


@dataclass(frozen=True)
class _Stacks:
    """Tensors of K candidates.

    Args:
        memories: [K, n], one per dtype.
        places: by name, the number of the memory, the columns in it, and the tensor's shape.
    """

    memories: tuple[Tensor, ...]
    places: Mapping[str, tuple[int, slice, tuple[int, ...]]]

    @classmethod
    def of(cls, wholes: Sequence[ShardedParam], dtypes: Sequence[torch.dtype], count: int) -> Self:
        """`count` copies of each tensor; in a memory whole vectors come first."""
        memories, places = [], {}
        for number, dtype in enumerate(dict.fromkeys(dtypes)):
            some = [whole for whole, own in zip(wholes, dtypes, strict=True) if own == dtype]
            some.sort(key=lambda whole: len(whole) % ALIGNED != 0)
            memories.append(torch.cat([whole.truth for whole in some]).to(dtype).repeat(count, 1))
            ends = accumulate(map(len, some))
            for whole, end in zip(some, ends, strict=True):
                places[whole.spec.name] = number, slice(end - len(whole), end), whole.spec.shape
        return cls(tuple(memories), places)

    def with_memories(self, memories: Iterable[Tensor]) -> Self:
        """The same in other memories."""
        return replace(self, memories=tuple(memories))

    def tensors(self) -> dict[str, Tensor]:
        """By name, [K, *shape]."""
        return {
            name: self.memories[number][:, columns].view(-1, *shape)
            for name, (number, columns, shape) in self.places.items()
        }


def _perturbed(
    wholes: Sequence[ShardedParam], dtypes: Sequence[torch.dtype], candidates: Sequence[Candidate]
) -> _Stacks:
    """Every candidate's tensors, rounded from the truth to the compute dtype.

    Offloaded tensors are perturbed where they lie, as the update will be.
    """
    stacks = _Stacks.of(wholes, dtypes, len(candidates))
    tensors = {name: tensor.view(len(candidates), -1) for name, tensor in stacks.tensors().items()}
    directions = {id(c.direction): c.direction for c in candidates if c.direction is not None}
    for group in pieces(wholes):
        for key, direction in directions.items():
            drawn = zip(group, direction.segments(group), strict=True)
            found = [(piece, segment) for piece, segment in drawn if segment is not None]
            for number, candidate in enumerate(candidates):
                if id(candidate.direction) == key:
                    writes = [
                        Write(segment, tensors[piece.shard.spec.name][number], piece.shard.truth, piece.start)
                        for piece, segment in found
                    ]
                    write_all(writes, candidate.radius)
    return stacks


def _adapted_forward(
    layer: nn.Module, adapters: Sequence[_Adapter], rows: Rows, _: Callable[..., Any]
) -> Callable[..., Tensor]:
    """The layer's forward when its rows are K equal parts, and part k sees A_k and B_k."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: nn.Module = layer.base_layer  # type: ignore[assignment]
        result: Tensor = base(x, *args, **kwargs)
        dtype = result.dtype
        for own in adapters:
            inner = torch.bmm(rows.by_candidate(x.to(own.a.dtype)), own.a.mT)
            if result.dtype == own.b.dtype and not isinstance(own.scale, Tensor):
                whole = torch.baddbmm(rows.by_candidate(result), inner, own.b.mT, alpha=own.scale)
                result = whole.view(result.shape)
            else:
                result = result + (torch.bmm(inner, own.b.mT) * own.scale).view(result.shape)
        return result.to(dtype)

    return forward

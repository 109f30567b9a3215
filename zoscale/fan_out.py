"""`FanOutForward`: the losses of all candidates in one pass, for LoRA: each layer is gathered and read once.

The frozen base multiplies the rows of all candidates together; each candidate's adapter acts on its own rows by batched
matrix products. Adapters are small: every rank gathers them once, in one collective, and perturbs them for itself, so
the shards are not touched.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from zoscale.batch import MicroBatch
from zoscale.estimators import Candidate
from zoscale.forward import Losses, local_batches, reduce_losses
from zoscale.mesh import Mesh
from zoscale.models import AnswerModel
from zoscale.objectives import Objective
from zoscale.probes import pieces
from zoscale.shards import ShardedParam, TensorSpec


@dataclass(frozen=True)
class LoraPair:
    """One adapter of one layer.

    Args:
        layer: the PEFT layer that adds it to its base layer's output.
        a: trainable tensor A [r, in].
        b: trainable tensor B [out, r].
        scaling: factor of B A.
    """

    layer: nn.Module
    a: TensorSpec
    b: TensorSpec
    scaling: float


def find_lora_pairs(model: nn.Module, specs: Sequence[TensorSpec]) -> list[LoraPair] | None:
    """The LoRA matrices that the trainable tensors are; None if some are anything else (a norm, a head, DoRA)."""
    from peft.tuners.lora import Linear

    by_name = {spec.name: spec for spec in specs}
    pairs = []
    for prefix, layer in model.named_modules():
        if not isinstance(layer, Linear) or layer.merged or layer.disable_adapters:
            continue
        for adapter in layer.active_adapters:
            a, b = (by_name.pop(f"{prefix}.lora_{matrix}.{adapter}.weight", None) for matrix in "AB")
            if a is None or b is None or adapter in layer.lora_variant or layer.lora_B[adapter].bias is not None:
                return None
            pairs.append(LoraPair(layer, a, b, float(layer.scaling[adapter])))
    return pairs if pairs and not by_name else None


class FanOutForward:
    """All candidates in one forward of the sharded model per micro-batch; equal to `SequentialForward` to rounding.

    Args:
        model: answers for micro-batches.
        shards: this rank's slices of the trainable tensors: LoRA matrices and nothing else.
        mesh: the ranks that share the micro-batches.
        pairs: from `find_lora_pairs`.
        max_rows: rows of one pass; more are cut by candidates. None = no limit.
    """

    def __init__(
        self,
        model: AnswerModel,
        shards: Sequence[ShardedParam],
        mesh: Mesh,
        pairs: Sequence[LoraPair],
        *,
        max_rows: int | None = None,
    ) -> None:
        self.model = model
        self.shards = shards
        self.mesh = mesh
        self.pairs = pairs
        self.max_rows = max_rows

    @torch.no_grad()
    def losses(self, batches: Sequence[MicroBatch], candidates: Sequence[Candidate], objective: Objective) -> Losses:
        """See `Forward`."""
        own, local = local_batches(self.mesh, batches)
        adapters = _perturbed(self._gather(), [shard.live.dtype for shard in self.shards], candidates, self.mesh.device)
        table = torch.zeros(len(candidates) + 1, len(local), dtype=torch.float64, device=self.mesh.device)
        for turn, batch in enumerate(local):
            for first, last in self._chunks(len(candidates), batch):
                with self._adapted({name: stack[first:last] for name, stack in adapters.items()}):
                    answers = self.model.answer_logprobs(batch.repeat(last - first)).chunk(last - first)
                for number, logprobs in enumerate(answers, start=first):
                    table[number, turn], table[-1, turn] = objective(logprobs, batch)
        return reduce_losses(self.mesh.gather_items(table, len(batches)).tolist(), local[:own])

    def _gather(self) -> list[ShardedParam]:
        """The whole truth of every trainable tensor, as plain tensors in the order of the shards."""
        wholes = self.mesh.gather_flats([(shard.truth, shard.spec.numel) for shard in self.shards])
        return [
            ShardedParam(nn.Parameter(whole, requires_grad=False), shard.spec, master="none")
            for whole, shard in zip(wholes, self.shards, strict=True)
        ]

    def _chunks(self, num_candidates: int, batch: MicroBatch) -> Iterator[tuple[int, int]]:
        rows = len(batch.input_ids)
        size = num_candidates if self.max_rows is None else max(1, self.max_rows // rows)
        for first in range(0, num_candidates, size):
            yield first, min(first + size, num_candidates)

    @contextmanager
    def _adapted(self, adapters: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, every LoRA layer applies each candidate's matrices to its rows."""
        with ExitStack() as stack:
            for layer, pairs in groupby(self.pairs, key=lambda pair: pair.layer):
                stack.enter_context(
                    _fanned(layer, [(adapters[p.a.name], adapters[p.b.name], p.scaling) for p in pairs])
                )
            yield


def _perturbed(
    wholes: Sequence[ShardedParam], dtypes: Sequence[torch.dtype], candidates: Sequence[Candidate], device: torch.device
) -> dict[str, Tensor]:
    """Every candidate's tensors, rounded from the truth to the compute dtype: by name, [K, *shape] on the device.

    Offloaded tensors are perturbed where they lie, as the update will be.
    """
    stacks = {
        whole.spec.name: whole.truth.to(dtype).repeat(len(candidates), 1)
        for whole, dtype in zip(wholes, dtypes, strict=True)
    }
    directions = {id(c.direction): c.direction for c in candidates if c.direction is not None}
    for group in pieces(wholes):
        for key, direction in directions.items():
            for piece, segment in zip(group, direction.segments(group), strict=True):
                if segment is None:
                    continue
                where: Any = slice(piece.start, piece.stop) if segment.index is None else segment.index + piece.start
                base, stack = piece.shard.truth[where].float(), stacks[piece.shard.spec.name]
                for number, candidate in enumerate(candidates):
                    if id(candidate.direction) == key:
                        stack[number, where] = (base + segment.value * candidate.radius).to(stack.dtype)
    return {whole.spec.name: stacks[whole.spec.name].view(-1, *whole.spec.shape).to(device) for whole in wholes}


@contextmanager
def _fanned(layer: nn.Module, adapters: Sequence[tuple[Tensor, Tensor, float]]) -> Iterator[None]:
    """Within, the layer's rows are K equal parts, and part k sees A_k and B_k."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: nn.Module = layer.base_layer  # type: ignore[assignment]
        result: Tensor = base(x, *args, **kwargs)
        dtype = result.dtype
        for a, b, scaling in adapters:
            parts = x.to(a.dtype).reshape(len(a), -1, x.shape[-1])
            update = torch.bmm(torch.bmm(parts, a.mT), b.mT)
            result = result + update.view(*x.shape[:-1], -1) * scaling
        return result.to(dtype)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward

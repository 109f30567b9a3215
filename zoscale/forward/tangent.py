"""`TangentForward`: exact directional derivatives by forward-mode differentiation, for a model that is whole here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoscale.data.batch import MicroBatch
from zoscale.estimators import Candidate
from zoscale.forward.division import Division
from zoscale.forward.sequential import Losses, perturbed, reduce_losses
from zoscale.mesh import Mesh
from zoscale.models.answers import AnswerModel
from zoscale.objectives import Objective
from zoscale.probes import Direction, pieces
from zoscale.shards import ShardedParam


class TangentForward:
    """Losses of points, one after the other, and derivatives of the loss along directions.

    Every weight and activation carries its tangent along: twice the memory of a forward, and no gradient.

    Args:
        model: answers for micro-batches; whole in this process.
        shards: the trainable tensors, whole.
        mesh: the ranks that share the micro-batches.
        num_parts: parts of the candidates that are shared out too.
    """

    def __init__(self, model: AnswerModel, shards: Sequence[ShardedParam], mesh: Mesh, *, num_parts: int = 1) -> None:
        self.model = model
        self.shards = shards
        self.mesh = mesh
        self.num_parts = num_parts

    @torch.no_grad()
    def losses(self, batches: Sequence[MicroBatch], candidates: Sequence[Candidate], objective: Objective) -> Losses:
        """See `Forward`."""
        division = Division(self.mesh, len(batches), len(candidates), self.num_parts, together=False)
        items = division.items()
        table = division.new_table(items)
        for turn, item in enumerate(items):
            batch = batches[item.batch].to(self.mesh.device)
            for row, candidate in enumerate(candidates[item.candidates]):
                with self._model_at(candidate) as model:
                    loss, table[-1, turn] = objective(model.answer_logprobs(batch), batch)
                    table[row, turn] = _tangent(loss) if candidate.is_derivative else loss
        return reduce_losses(division.gather(table), items, batches)

    @contextmanager
    def _model_at(self, candidate: Candidate) -> Iterator[AnswerModel]:
        if candidate.direction is None or not candidate.is_derivative:
            with perturbed(self.shards, candidate):
                yield self.model
            return
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode rule
            yield self._moving(candidate.direction)

    def _moving(self, direction: Direction) -> AnswerModel:
        """The model with z as the tangent of its weights."""
        tangents = {id(shard): torch.zeros_like(shard.truth, dtype=torch.float32) for shard in self.shards}
        for group in pieces(self.shards):
            for piece, segment in zip(group, direction.segments(group), strict=True):
                if segment is not None:
                    segment.add_to(tangents[id(piece.shard)][piece.start : piece.stop], 1.0)
        make_dual: Any = forward_ad.make_dual  # untyped
        duals: dict[Tensor, Tensor] = {
            shard.param: make_dual(
                shard.live.view(shard.spec.shape), tangents[id(shard)].view(shard.spec.shape).to(shard.live.dtype)
            )
            for shard in self.shards
        }
        call = cast(Callable[..., Any], partial(_call, self.model.model, duals))
        return AnswerModel(cast(nn.Module, call), self.model.model, wide_logits=False)


def _tangent(loss: Tensor) -> Tensor:
    unpack_dual: Any = forward_ad.unpack_dual  # untyped
    tangent: Tensor | None = unpack_dual(loss).tangent
    if tangent is None:
        raise ValueError("expected an objective with a derivative for forward gradients, got one without")
    return tangent


def _call(model: nn.Module, duals: Mapping[Tensor, Tensor], **inputs: Any) -> Any:
    with _replaced(model, duals):
        return model(**inputs)


@contextmanager
def _replaced(model: nn.Module, values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within, other tensors stand in for parameters, wherever they are.

    Not `torch.func.functional_call`: where one module is reached by two names (PEFT's trained tokens of a tied head),
    it takes what it has put there for what was there, and leaves it.
    """
    places = [
        (module, name, param)
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False)
        if param in values
    ]
    try:
        for module, name, param in places:
            cast(dict[str, Tensor], module._parameters)[name] = values[param]
        yield
    finally:
        for module, name, param in places:
            module._parameters[name] = param

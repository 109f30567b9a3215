"""What one pass of a model costs, counted by running its code on tensors that have shapes and no memory."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from zoscale.config import ConfigError, ModelConfig
from zoscale.data.batch import MicroBatch
from zoscale.data.prefixes import Row
from zoscale.forward.fan import Rows
from zoscale.forward.lora_fan import LoraFan, find_lora_pairs
from zoscale.forward.weight_fan import find_units
from zoscale.mesh import Mesh
from zoscale.models.answers import AnswerModel
from zoscale.models.loading import add_adapter, new_model
from zoscale.models.quantization import bytes_in_4_bits, layers_in_4_bits
from zoscale.models.sizes import blocks_of
from zoscale.plan.allocations import Allocations
from zoscale.shards import TensorSpec, trainable_specs

FanName = Literal["adapters", "weights"]


@dataclass(frozen=True)
class Footprint:
    """One pass, with the whole weights in place; bytes are those of activations.

    Args:
        blocks: highest while a transformer block runs forward.
        outside: highest otherwise in the forward pass: embeddings, final norm, head on the answer positions, losses.
        backward: highest in the backward pass, a weight's gradient being there until it is complete; 0 without one.
        kept: held at its beginning.
        written: sum over all tensors made, in the backward pass too.
        flops: of matrix products and attention, a multiplication and an addition being two.
    """

    blocks: int
    outside: int
    backward: int
    kept: int
    written: int
    flops: int


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Args:
        numel: elements.
        width: bytes per element that is computed with.
        num_bytes: of the whole, as it lies in memory.
        trainable: whether it is trained.
        block: number of its transformer block; None outside of them.
        is_embedding, is_head: whether it is the input embedding's, the head's; both if they are tied.
    """

    numel: int
    width: int
    num_bytes: int
    trainable: bool
    block: int | None
    is_embedding: bool
    is_head: bool


def example(rows: int, tokens: int) -> MicroBatch:
    """Rows of equal length with one answer token each."""
    made = [Row((0,) * tokens, ((tokens - 1, 0, 0),), number) for number in range(rows)]
    return MicroBatch.from_rows(made, [[True]] * rows, 0)


class ModelShapes:
    """A model, with its adapter, of which only shapes exist.

    Args:
        config: of the model.
        architecture: from `read_model_config`.
        adapter: see `add_adapter`.
        trainable: see `add_adapter`.
    """

    def __init__(
        self,
        config: ModelConfig,
        architecture: Any,
        adapter: Mapping[str, Any] | None,
        trainable: str | None = None,
    ) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)  # PEFT has plain tensors of its own
        with torch.device("meta"):
            base = new_model(config, architecture)
            packed = [base.get_submodule(name) for name in layers_in_4_bits(base)] if config.quantization else []
            self.model = add_adapter(base, adapter, trainable)
        with self._mode:
            _make_fake(self.model)
        self._packed: list[Tensor] = [module.weight for module in packed]  # type: ignore[misc]
        blocks = blocks_of(self.model)
        self.specs: list[TensorSpec] = [spec for spec, _ in trainable_specs(self.model)]
        self.pairs = find_lora_pairs(self.model, self.specs) or []
        self.weights = _weights(self.model, blocks, self._packed)
        self._blocks = blocks

    @property
    def num_blocks(self) -> int:
        """Transformer blocks."""
        return len(self._blocks)

    @property
    def fan(self) -> FanName | None:
        """How candidates can share a pass: by their adapters, by their weights, or not."""
        if self.pairs:
            return "adapters"
        return "weights" if find_units(self.model) is not None else None

    def run(self, rows: int, tokens: int, *, candidates: int | None = None, backward: bool = False) -> Footprint:
        """One pass over rows with one answer token each.

        Args:
            rows: of one candidate.
            tokens: per row.
            candidates: those that share the pass (`FanOutForward`), without the scratch copies of other weights than
                adapters; None = the model as it is.
            backward: keep what a backward pass needs, and take it.

        Raises:
            ConfigError: if the model's code asks for values.
        """
        answers = AnswerModel(self.model, self.model)
        batch = example(rows, tokens)
        tracker = Allocations(self.model.parameters(), self._packed)
        flops = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
        with ExitStack() as stack:
            stack.enter_context(self._mode)
            stack.enter_context(torch.set_grad_enabled(backward))
            batch = _fake(batch, self._mode)
            if candidates is not None:
                fan = LoraFan([], Mesh(ranks=(0, 1)), self.pairs)
                stack.enter_context(fan.adapted(self._stacks(candidates), Rows(candidates, rows, rows)))
                batch = batch.repeat(candidates)
            for block in self._blocks:
                stack.enter_context(block.register_forward_pre_hook(tracker.enter))
                stack.enter_context(block.register_forward_hook(tracker.leave))
            stack.enter_context(flops)
            stack.enter_context(tracker)
            losses = self._losses(answers, batch)
            kept = tracker.begin_backward() if backward else 0
            if backward:
                self._take_back(losses)
        peaks = tracker.peaks
        flop = flops.get_total_flops()
        return Footprint(peaks["blocks"], peaks["outside"], peaks["backward"], kept, tracker.written, flop)

    def _losses(self, answers: AnswerModel, batch: MicroBatch) -> Tensor:
        try:
            return answers.answer_logprobs(batch)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            got = f"{type(answers.model).__name__}, whose code asks for values ({error})"
            remedy = "train it without a plan, with mesh.shard_size a number or null"
            raise ConfigError("a model that runs on tensors without values", got, remedy) from error

    def _take_back(self, losses: Tensor) -> None:
        """The backward pass; gradients are dropped as soon as they are complete, as if they were reduced at once."""
        weights: Iterable[Any] = (param for param in self.model.parameters() if param.requires_grad)
        with ExitStack() as stack:
            for weight in weights:
                stack.enter_context(weight.register_post_accumulate_grad_hook(_drop_gradient))
            losses.sum().backward()  # type: ignore[no-untyped-call]

    def _stacks(self, candidates: int) -> dict[str, Tensor]:
        """Every candidate's adapters: [K, *shape] each."""
        if not self.pairs:
            return {}
        params = dict(self.model.named_parameters())
        return {spec.name: torch.empty(candidates, *spec.shape, dtype=params[spec.name].dtype) for spec in self.specs}


_ATEN = torch.ops.aten


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))  # type: ignore[no-untyped-call]


_ATTENTION = {  # which torch's counter leaves out
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _drop_gradient(param: Tensor) -> None:
    param.grad = None


def _weights(model: nn.Module, blocks: Sequence[nn.Module], packed: Sequence[Tensor]) -> list[Weight]:
    in_4_bits = {id(tensor) for tensor in packed}
    home = {id(param): number for number, block in enumerate(blocks) for param in block.parameters()}
    ends: Any = model
    embedding, head = (id(ends.get_input_embeddings().weight), id(ends.get_output_embeddings().weight))
    return [
        Weight(
            param.numel(),
            param.element_size(),
            bytes_in_4_bits(param.numel()) if id(param) in in_4_bits else param.nbytes,
            param.requires_grad,
            home.get(id(param)),
            id(param) == embedding,
            id(param) == head,
        )
        for param in model.parameters()
    ]


def _make_fake(model: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by such that pass for tensors on the CPU; ties are kept."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                store[name] = made[id(old)]  # type: ignore[assignment]


def _fake(batch: MicroBatch, mode: FakeTensorMode) -> MicroBatch:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    made: dict[str, Any] = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
    return replace(batch, **made)

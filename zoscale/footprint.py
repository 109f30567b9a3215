"""What one pass of a model costs, counted by running its code on tensors that have shapes and no memory."""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from zoscale.batch import MicroBatch
from zoscale.config import ModelConfig
from zoscale.fan import Rows
from zoscale.lora_fan import LoraFan, find_lora_pairs
from zoscale.mesh import Mesh
from zoscale.models import AnswerModel, add_adapter, is_block, load_model
from zoscale.prefixes import Row
from zoscale.shards import TensorSpec, trainable_specs
from zoscale.weight_fan import find_units

FanName = Literal["adapters", "weights"]


@dataclass(frozen=True)
class Footprint:
    """One pass, with the whole weights in place; bytes are those of activations.

    Args:
        blocks: highest while a transformer block runs forward.
        outside: highest otherwise in the forward pass: embeddings, final norm, head on the answer positions, losses.
        kept: held at the end for a backward pass; 0 without one.
        written: sum over all tensors made, in the backward pass too.
        flops: of matrix products and attention, a multiplication and an addition being two.
    """

    blocks: int
    outside: int
    kept: int
    written: int
    flops: int


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Args:
        numel: elements.
        width: bytes per element.
        trainable: whether it is trained.
        block: number of its transformer block; None outside of them.
        is_embedding, is_head: whether it is the input embedding's, the head's; both if they are tied.
    """

    numel: int
    width: int
    trainable: bool
    block: int | None
    is_embedding: bool
    is_head: bool


class ModelShapes:
    """A model, with its adapter, of which only shapes exist.

    Args:
        config: of the model.
        architecture: from `read_model_config`.
        adapter: fields of `peft.LoraConfig`, or None to train all weights.
    """

    def __init__(self, config: ModelConfig, architecture: Any, adapter: Mapping[str, Any] | None) -> None:
        self._mode = FakeTensorMode()
        with torch.device("meta"):
            self.model = add_adapter(load_model(replace(config, id=None, config={}), architecture), adapter)
        with self._mode:
            _make_fake(self.model)
        blocks = [module for module in self.model.modules() if is_block(self.model, module)]
        self.specs: list[TensorSpec] = [spec for spec, _ in trainable_specs(self.model)]
        self.pairs = find_lora_pairs(self.model, self.specs) or []
        self.weights = _weights(self.model, blocks)
        self._blocks = blocks

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
        """
        answers = AnswerModel(self.model, self.model)
        batch = MicroBatch.from_rows(
            [Row((0,) * tokens, ((tokens - 1, 0, 0),), number) for number in range(rows)], [[True]] * rows, 0
        )
        tracker = _Tracker(self.model.parameters())
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
                handles = block.register_forward_pre_hook(tracker.enter), block.register_forward_hook(tracker.leave)
                for handle in handles:
                    stack.callback(handle.remove)
            stack.enter_context(flops)
            stack.enter_context(tracker)
            losses = answers.answer_logprobs(batch)
            kept, peaks = tracker.live if backward else 0, dict(tracker.peaks)
            if backward:
                losses.sum().backward()  # type: ignore[no-untyped-call]
        self.model.zero_grad(set_to_none=True)
        return Footprint(peaks["blocks"], peaks["outside"], kept, tracker.written, flops.get_total_flops())

    def _stacks(self, candidates: int) -> dict[str, Tensor]:
        """Every candidate's adapters: [K, *shape] each."""
        if not self.pairs:
            return {}
        params = dict(self.model.named_parameters())
        return {spec.name: torch.empty(candidates, *spec.shape, dtype=params[spec.name].dtype) for spec in self.specs}


_ATEN = torch.ops.aten


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))  # type: ignore[no-untyped-call]


_ATTENTION = {  # which torch's counter leaves out
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class _Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of live tensors, by whether a block runs.

    Args:
        existing: tensors that do not count.
    """

    def __init__(self, existing: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.written = 0
        self.peaks = {"blocks": 0, "outside": 0}
        self._where = "outside"
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def enter(self, module: nn.Module, args: object) -> None:
        self._where = "blocks"

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        self._where = "outside"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        scratch = args[0].nbytes if func is _ATEN.logsumexp.default else 0  # its differences from the maximum
        self.peaks[self._where] = max(self.peaks[self._where], self.live + scratch)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            self.written += storage.nbytes()
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


def _weights(model: nn.Module, blocks: Sequence[nn.Module]) -> list[Weight]:
    home = {id(param): number for number, block in enumerate(blocks) for param in block.parameters()}
    ends: Any = model
    embedding, head = (id(ends.get_input_embeddings().weight), id(ends.get_output_embeddings().weight))
    return [
        Weight(
            param.numel(),
            param.element_size(),
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

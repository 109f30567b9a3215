"""`ShardedParam`: this rank's live slice of one trainable tensor. The only reader of DeepSpeed's `ds_*` attributes."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from zoscale.config.sections import Master
from zoscale.noise.segments import Segment

CHUNK = 2**20
"""Elements handled at once: bounds the temporaries of perturbing and updating (a few fp32 buffers of this size)."""
_TIMES_ON_A_GPU = 16  # where a pass over fewer elements takes less time than its launch

STREAMED = 2**28
"""Elements handled at once by kernels that make z in registers: there are no temporaries, and positions are int32."""

_NOBODY = -1  # no module of DeepSpeed's has this number


def chunk(device: torch.device) -> int:
    """`CHUNK` for a device."""
    return CHUNK * _TIMES_ON_A_GPU if device.type == "cuda" else CHUNK


@dataclass(frozen=True)
class TensorSpec:
    """One trainable tensor of the whole model.

    Args:
        id: index of the name in the sorted names of the parameters that are trained now; names the tensor's noise.
        name: dotted name in the model.
        shape: true shape, unsharded.
    """

    id: int
    name: str
    shape: tuple[int, ...]

    @cached_property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return torch.Size(self.shape).numel()

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor has rows and columns."""
        return len(self.shape) >= 2

    @cached_property
    def rows(self) -> int:
        """First dimension (1 for a vector)."""
        return self.shape[0] if self.is_matrix else 1

    @cached_property
    def columns(self) -> int:
        """Elements per row; more than two dimensions are viewed as (first, rest)."""
        return self.numel // max(1, self.rows)


class ShardedParam:
    """The local slice [offset, offset + len(self)) of one trainable tensor, without padding.

    `truth` holds the weights: an fp32 master slice, or the live slice itself (`master="none"`, or where that is fp32).
    `live` is the 1-D slice in the compute dtype that the next forward reads, derived from the truth.

    Args:
        param: a parameter of a ZeRO-3 engine's model, or a plain contiguous one.
        spec: its place in the model.
        master: keep a master slice in fp32 of 16-bit weights, or none; or `stochastic`: none, and updates of 16-bit
            weights are rounded stochastically.
    """

    def __init__(self, param: nn.Parameter, spec: TensorSpec, *, master: Master = "fp32") -> None:
        self.spec = spec
        self.param = param
        self.offset, self.live = _local_slice(param, spec)
        self.is_rounded_stochastically = master == "stochastic" and self.live.dtype in (torch.bfloat16, torch.float16)
        self.truth = self.live.float() if master == "fp32" else self.live
        self._undo: list[tuple[slice | Tensor, Tensor]] = []

    @classmethod
    def outline(
        cls, spec: TensorSpec, start: int, stop: int, device: torch.device, param: nn.Parameter | None = None
    ) -> "ShardedParam":
        """Elements [start, stop) of a tensor without their values and without memory: to draw noise for.

        Args:
            param: where `values` are found.
        """
        shard = cls(nn.Parameter(torch.empty(0, device=device), requires_grad=False), spec, master="none")
        shard.offset = start
        shard.truth = shard.live = shard.live.new_empty(1).expand(stop - start)
        shard.param = shard.param if param is None else param
        return shard

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is a plain one, with all elements."""
        return not hasattr(self.param, "ds_id") and self.param.numel() == self.spec.numel

    @property
    def values(self) -> Tensor:
        """Of an outline, its elements of a parameter that is whole."""
        return self.param.data.reshape(-1)[self.offset : self.offset + len(self)]

    def __len__(self) -> int:
        return self.live.numel()

    @property
    def has_master(self) -> bool:
        """Whether the truth is kept apart from the live slice."""
        return self.truth is not self.live

    def perturb(self, start: int, segment: Segment, radius: float) -> None:
        """Write truth + radius * z to the live slice from `start` on; the truth is untouched. Undone by `restore`."""
        where = segment.place(start)
        base = self.truth[where]
        self._undo.append((where, base if self.has_master else base.clone()))
        segment.write(self.live, self.truth, start, radius)

    def restore(self) -> None:
        """Make the live slice what it was before `perturb`, bit for bit."""
        while self._undo:
            where, base = self._undo.pop()
            self.live[where] = base if isinstance(where, slice) else base.to(self.live.dtype)
        self.reach_next_forward()

    def publish(self) -> None:
        """Derive the live slice from a truth that was set."""
        if self.has_master:
            self.live.copy_(self.truth)
        self.reach_next_forward()

    def assign(self, whole: Tensor) -> None:
        """Set the truth to this rank's slice of a whole tensor."""
        self.truth.copy_(whole.reshape(-1)[self.offset : self.offset + len(self)])
        self.publish()

    def release(self) -> None:
        """Give the slice's memory back, whoever still refers to it: the tensor is gone from the model."""
        self.reach_next_forward()
        vars(self.param).pop("_z3_optimizer", None)  # which holds the memory of all others
        storage = self.live.untyped_storage()
        if storage.resizable():
            storage.resize_(0)

    def reach_next_forward(self) -> None:
        """Drop every gathered copy of this tensor, so that the next forward gathers the slices again.

        Without it ZeRO-3 keeps using stale full copies of persistent (small) parameters and of hpZ's secondary shards.
        """
        param = cast(Any, self.param)
        if not hasattr(param, "ds_status"):
            return
        if param.ds_status.name == "AVAILABLE":
            param.partition()  # which makes a secondary shard of the stale copy where there is none
        if getattr(param, "ds_secondary_tensor", None) is not None:
            param.ds_secondary_tensor = None


def trainable_specs(model: nn.Module) -> list[tuple[TensorSpec, nn.Parameter]]:
    """The trainable tensors in the order of their ids. Tied parameters appear once, under their first name.

    Raises:
        ValueError: if nothing is trainable.
    """
    found = sorted((name, param) for name, param in model.named_parameters() if param.requires_grad)
    if not found:
        raise ValueError("expected at least one trainable parameter, got none; unfreeze some or add an adapter")
    return [
        (TensorSpec(index, name, tuple(getattr(param, "ds_shape", param.shape))), param)
        for index, (name, param) in enumerate(found)
    ]


def shard_parameters(model: nn.Module, *, master: Master = "fp32") -> list[ShardedParam]:
    """This rank's slices of all trainable tensors, sorted by id."""
    return [ShardedParam(param, spec, master=master) for spec, param in trainable_specs(model)]


def local_slices(model: nn.Module, *, trainable: bool) -> Iterator[tuple[TensorSpec, int, Tensor]]:
    """(tensor, offset, this rank's live slice) of all trainable or all frozen tensors, sorted by name.

    A slice is there until the next one is asked for: it may have been read from NVMe.
    """
    found = sorted((name, param) for name, param in model.named_parameters() if param.requires_grad == trainable)
    for index, (name, param) in enumerate(found):
        spec = TensorSpec(index, name, tuple(getattr(param, "ds_shape", param.shape)))
        with _in_memory(param):
            yield spec, *_local_slice(param, spec)


@contextmanager
def _in_memory(param: nn.Parameter) -> Iterator[None]:
    """Within, the local slice is in memory."""
    swapper: Any = getattr(param, "nvme_swapper", None)
    if swapper is None or cast(Any, param).ds_tensor.status.name == "AVAILABLE":
        yield
        return
    swapper.swap_in([param], async_op=False)
    try:
        yield
    finally:
        swapper.remove_partition_and_release_buffers([param])


def local_bytes(model: nn.Module) -> int:
    """Bytes of memory that this rank keeps for parameters between forwards, padding and NVMe's buffers included."""
    tensors = [getattr(param, "ds_tensor", param) for param in model.parameters()]
    swappers = {swapper for param in model.parameters() if (swapper := getattr(param, "nvme_swapper", None))}
    tensors += [swapper.buffers for swapper in swappers]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def true_numel(param: nn.Parameter) -> int:
    """Elements of the whole tensor, sharded or not."""
    return int(getattr(param, "ds_numel", param.numel()))


def gathered(*params: nn.Parameter) -> AbstractContextManager[Any]:
    """Within, the parameters are whole on every rank, to be read only. A collective under ZeRO-3."""
    if not any(hasattr(param, "ds_id") for param in params):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(params, modifier_rank=None)
    return context


def copy_values(target: nn.Parameter, source: nn.Parameter) -> None:
    """Give a parameter the values of another one of its shape. A collective under ZeRO-3."""
    written: AbstractContextManager[Any] = nullcontext()
    if hasattr(target, "ds_id"):
        import deepspeed

        written = deepspeed.zero.GatheredParameters([target], modifier_rank=0)
    with torch.no_grad(), gathered(source), written:
        target.copy_(source)


@contextmanager
def not_gathered(shards: Sequence[ShardedParam]) -> Iterator[None]:
    """Within, ZeRO-3 neither gathers nor releases these tensors for the modules that own them: nobody reads them there.

    To ZeRO-3 they look gathered, and in use by a module that does not exist.
    """
    params = [cast(Any, shard.param) for shard in shards if hasattr(shard.param, "ds_status")]
    params = [param for param in params if param.ds_status.name == "NOT_AVAILABLE"]
    for param in params:
        param.ds_status = type(param.ds_status).AVAILABLE
        param.ds_active_sub_modules.add(_NOBODY)
    try:
        yield
    finally:
        for param in params:
            param.ds_active_sub_modules.discard(_NOBODY)
            param.ds_status = type(param.ds_status).NOT_AVAILABLE


def vectors_gathered(model: nn.Module) -> AbstractContextManager[Any]:
    """Within, the model's vectors (norms, biases) are whole on every rank, to be read only. A collective."""
    return gathered(*(param for param in model.parameters() if len(getattr(param, "ds_shape", param.shape)) == 1))


def order_gathers_after_writes(module: nn.Module) -> None:
    """Make ZeRO-3's gather stream wait for the stream that wrote the shards; before every forward. A no-op on the CPU.

    DeepSpeed orders the compute stream after the gathers, but not the gathers after edits of the shards.
    """
    zero = getattr(module, "optimizer", None)
    if zero is not None and torch.cuda.is_available():
        offload: Any = getattr(zero, "parameter_offload", zero)
        offload._DeepSpeedZeRoOffload__allgather_stream.wait_stream(torch.cuda.current_stream())


def end_without_backward(module: nn.Module) -> None:
    """Let go of what ZeRO-3 with an optimizer has gathered ahead for a backward pass that does not come."""
    offload: Any = getattr(getattr(module, "optimizer", None), "parameter_offload", None)
    if offload is not None:
        offload.get_param_coordinator().reset_step()


@contextmanager
def direct_calls(module: nn.Module, inner: nn.Module) -> Iterator[None]:
    """Within, `inner` may be called by itself and not through the sharded `module` that holds it, as generation does.

    ZeRO-3 begins a pass where its outermost module is called. Without that, what it has gathered ahead stays in flight
    at the end, and the next pass may read weights of before an edit. A collective; a no-op for a model that is whole.
    """
    zero: Any = getattr(module, "optimizer", None)
    if zero is None:
        yield
        return
    zero = getattr(zero, "parameter_offload", zero)
    begin = zero.get_param_coordinator().reset_step
    handle = None if inner is zero.module else inner.register_forward_pre_hook(lambda *_: begin(), prepend=True)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
    begin()


def _local_slice(param: nn.Parameter, spec: TensorSpec) -> tuple[int, Tensor]:
    shard = getattr(param, "ds_tensor", None)
    if shard is None:
        if not param.is_contiguous():
            raise ValueError(f"expected {spec.name} to be contiguous; call .contiguous() on it before training")
        return 0, param.detach().view(-1)
    rank = cast(Any, param).ds_zero_partition_rank
    size = shard.numel()
    offset = min(rank * size, spec.numel)
    return offset, shard.detach()[: min(size, spec.numel - offset)]

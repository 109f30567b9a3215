"""Memory and time of one rank's step, by arithmetic on shapes: zero-order, and AdamW under ZeRO-3."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from zoscale.devices import Device
from zoscale.first_order import reduce_bucket
from zoscale.nvme import SMALLEST, Buffers
from zoscale.plan.footprint import FanName, Footprint, ModelShapes, Weight
from zoscale.shards import chunk

_FP32 = 4
_STATES = 4  # hidden states that a pass between two blocks holds: its embeddings, their sum and its own
_ADAM = 3 * _FP32  # master, first and second moment
_UPDATE = 3 * _FP32  # while AdamW steps: the gradient once more, flat, and two temporaries


@dataclass(frozen=True)
class Job:
    """What is trained, and how the work is cut.

    Args:
        ranks: of the job.
        batch: rows of a step, over all ranks.
        micro_batch: rows of one pass of one candidate.
        tokens: per row.
        candidates: points whose losses a step takes (K).
        parts: into which ranks divide the candidates (`mesh.candidates`).
        fan: how candidates share a pass; None if each takes its own.
        max_rows: most rows of such a pass.
        waiting: most tokens of passes that go through the model side by side.
        hidden: bytes of a token between two blocks.
        state: fp32 values that the zero-order optimizer keeps per trainable element.
        master: whether trainable slices have an fp32 master, which those in fp32 never have.
        prefetch: whether ZeRO-3 gathers the next block while one runs.
        copies: whether the gather itself needs its output once more (gloo does).
        bucket: gradients that AdamW's ranks reduce together, in elements; None = as `first_order` chooses.
        sub_group: elements that AdamW updates at once.
        offload: where shards lie between passes: none (on the device), cpu or nvme.
        pinned: whether that is page-locked memory of CUDA's, of which torch takes powers of two.
    """

    ranks: int
    batch: int
    micro_batch: int
    tokens: int
    candidates: int
    parts: int
    fan: FanName | None
    max_rows: int
    waiting: int
    hidden: int
    state: float
    master: bool
    prefetch: bool
    copies: bool
    bucket: int | None
    sub_group: int
    offload: str = "none"
    pinned: bool = False

    @property
    def turns(self) -> int:
        """Micro-batches of the rank that has most, each for one part of the candidates."""
        return -(-self.batch * min(self.parts, self.candidates) // (self.micro_batch * self.ranks))

    @property
    def own(self) -> int:
        """Candidates of a rank."""
        return -(-self.candidates // self.parts)

    @property
    def together(self) -> int:
        """Candidates of one pass."""
        if self.fan is None:
            return 1
        return min(self.own, max(1, self.max_rows // self.micro_batch))

    @property
    def passes(self) -> int:
        """Passes of one rank in a step."""
        return self.turns * -(-self.own // self.together)

    @property
    def rounds(self) -> int:
        """Times that a rank goes through the model in a step, with some passes side by side."""
        tokens = self.turns * self.own * self.micro_batch * self.tokens
        return self.passes if self.fan is None else min(self.passes, -(-tokens // self.waiting))


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the highest point of a step.

    Args:
        parts: by name; they add up.
        phase: in which the highest point lies: embedding, blocks, head, backward or update.
    """

    parts: dict[str, int]
    phase: str

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Work:
    """What one step asks of one rank.

    Args:
        flops: of matrix products.
        traffic: bytes read from and written to the device's memory.
        gathered: bytes of the whole weights that are put together, as `RunMeters` counts them.
        received: bytes that come over the link.
        uploaded: bytes of offloaded shards that come from the host.
    """

    flops: float
    traffic: float
    gathered: int
    received: float
    uploaded: float = 0.0

    def seconds(self, device: Device, dtype: str) -> dict[str, float]:
        """By what bounds the step; if all overlap, the longest is its time at the device's peak rates."""
        return {
            "compute": self.flops / device.flops(dtype),
            "memory": self.traffic / device.bandwidth,
            "link": self.received / device.link,
        }


class Gathers:
    """Bytes that ZeRO-3 puts together where a rank goes through the model once.

    Args:
        weights: of the model.
        shard_size: ranks that share one copy; 1 gathers nothing.
        offload: as of a `Job`; what is offloaded is gathered by one rank too.
    """

    def __init__(self, weights: Sequence[Weight], shard_size: int, offload: str = "none") -> None:
        is_cut = shard_size > 1 or offload != "none"
        padded = [_padded(weight.numel, shard_size) * weight.width * is_cut for weight in weights]
        blocks: dict[int, int] = {}
        for weight, num_bytes in zip(weights, padded, strict=True):
            if weight.block is not None:
                blocks[weight.block] = blocks.get(weight.block, 0) + num_bytes
        self.model = sum(padded)
        self.block = max(blocks.values(), default=self.model)
        self.embedding = sum(size for weight, size in zip(weights, padded, strict=True) if weight.is_embedding)
        self.head = sum(size for weight, size in zip(weights, padded, strict=True) if weight.is_head)
        self.is_tied = any(weight.is_embedding and weight.is_head for weight in weights)

    def phases(self, job: Job, activations: Footprint) -> dict[str, tuple[int, int]]:
        """(gathered, activations) in bytes at the highest point of each phase of a pass.

        A block of several tensors is gathered flat and then cut into its tensors, which takes it twice for a moment;
        with prefetching, the next block lies beside it as well. The host of a GPU is a block ahead: the one before,
        which still runs, is not free. A tied embedding stays for the whole pass. A backward pass begins with the head's
        weights and all activations, and gathers as a forward pass does.
        """
        times = 2 if job.copies else 1
        kept = self.embedding if self.is_tied else 0
        blocks = [(kept + 2 * self.block, activations.blocks if job.prefetch else 0)]
        blocks.append((kept + (1 if job.copies else 3) * self.block, activations.blocks))
        ends = [(kept, activations.outside)] if self.is_tied else [(self.head, activations.outside)]
        ends.append((kept if self.is_tied else self.head * times, 0))
        phases = {"embedding": [(self.embedding * times, 0)], "blocks": blocks, "head": ends}
        if activations.backward:
            gathered = max(kept + (1 + job.prefetch) * self.block, 0 if self.is_tied else self.head)
            phases["backward"] = [(gathered, activations.backward)]
        return {name: max(points, key=sum) for name, points in phases.items()}


def zero_order_memory(shapes: ModelShapes, job: Job, shard_size: int, activations: Footprint) -> Memory:
    """Of one rank in a group of `shard_size`.

    Drawn noise, up to a few bytes for each of `shards.chunk` elements, is left out; so is what is offloaded, see
    `host_memory`.
    """
    trainable = [weight for weight in shapes.weights if weight.trainable]
    adapters = sum(weight.numel * weight.width for weight in trainable) * job.own
    resident = _held(shapes.weights, trainable, job, shard_size) if job.offload == "none" else {}
    resident["candidates' adapters"] = adapters * (job.fan == "adapters")
    is_undone = job.fan is None and not job.master  # a perturbation, by a copy of what it wrote over
    resident["weights to restore"] = sum(_shard(weight, shard_size) for weight in trainable) * is_undone
    behind = (-(-job.passes // job.rounds) - 1) * (shard_size > 1 or job.offload != "none")
    resident["passes side by side"] = behind * job.together * job.micro_batch * job.tokens * job.hidden * _STATES
    phases = Gathers(_gathered(shapes, job), shard_size, job.offload).phases(job, activations)
    points = _passes(phases)
    if job.fan == "weights":
        points["blocks"]["scratch copy"] = _scratch(trainable, job)
    return _highest(resident, points)


def _scratch(trainable: Sequence[Weight], job: Job) -> int:
    """Bytes of the part of a weight in a block that is written for one candidate, or of smaller ones for several."""
    limit = chunk(torch.device("cpu" if job.copies else "cuda"))
    return max((min(limit, weight.numel) * weight.width for weight in trainable if weight.block is not None), default=0)


def host_memory(shapes: ModelShapes, job: Job, shard_size: int, buffers: Buffers) -> dict[str, int]:
    """Bytes in the host's memory of one rank that offloads, by name; empty for others.

    Args:
        shapes: of the model.
        job: of the run.
        shard_size: ranks that share a copy.
        buffers: those through which a frozen base on NVMe is read.
    """
    if job.offload == "none":
        return {}
    trainable = [weight for weight in shapes.weights if weight.trainable]
    if job.offload == "cpu":
        return _held(shapes.weights, trainable, job, shard_size, job.pinned)
    kept = [weight for weight in shapes.weights if weight.trainable or not _is_in_a_file(weight, shard_size, buffers)]
    width = min(weight.width for weight in shapes.weights)
    return {
        **_held(kept, trainable, job, shard_size, job.pinned),
        "buffers of NVMe": _rounded(buffers.number * buffers.elements * width, job.pinned),
    }


def _is_in_a_file(weight: Weight, shard_size: int, buffers: Buffers) -> bool:
    slice_ = -(-weight.numel // shard_size)
    return slice_ * weight.width >= SMALLEST and slice_ <= buffers.elements


def _held(
    weights: Sequence[Weight], trainable: Sequence[Weight], job: Job, shard_size: int, pinned: bool = False
) -> dict[str, int]:
    """What lies there between passes."""
    slices = sum(-(-weight.numel // shard_size) for weight in trainable)
    return {
        "weights": sum(_rounded(_shard(weight, shard_size), pinned) for weight in weights),
        "fp32 master": slices * _FP32 * job.master,
        "optimizer state": round(slices * _FP32 * job.state),
    }


def _rounded(num_bytes: int, pinned: bool) -> int:
    return 1 << (num_bytes - 1).bit_length() if pinned and num_bytes else num_bytes


def first_order_memory(shapes: ModelShapes, job: Job, activations: Footprint) -> Memory:
    """Of one rank under ZeRO-3 over all ranks, without activation checkpointing."""
    trainable = [weight.numel for weight in shapes.weights if weight.trainable]
    slices = sum(-(-numel // job.ranks) for numel in trainable)
    resident = {
        "weights": sum(_shard(weight, job.ranks) for weight in shapes.weights),
        "gradients": slices * _FP32,
        "reduction bucket": (job.bucket or reduce_bucket(trainable)) * _FP32,
        "fp32 master and moments": slices * _ADAM,
    }
    phases = _passes(Gathers(shapes.weights, job.ranks).phases(job, activations))
    phases["update"] = {"copies for the update": min(slices, job.sub_group) * _UPDATE}
    return _highest(resident, phases)


def zero_order_work(shapes: ModelShapes, job: Job, shard_size: int, footprint: Footprint) -> Work:
    """Of one step; `footprint` is that of a pass of `job.together` candidates."""
    gathers = Gathers(_gathered(shapes, job), shard_size, job.offload)
    others = (shard_size - 1) / shard_size
    trainable = [weight for weight in shapes.weights if weight.trainable]
    whole = job.turns * job.own / job.together  # passes, the last one as full as it is
    slices = sum(weight.numel for weight in trainable) / shard_size
    live = sum(w.numel * w.width for w in trainable) / shard_size
    updates = slices * _FP32 * (2 * job.master + 2 * job.state) + live * (1 if job.master else 2)  # read and written
    perturbed = slices if job.fan is None else job.turns * slices * shard_size * (job.fan == "weights")
    perturbations = 3 * _FP32 * perturbed * job.own  # weights and noise read, weights written
    gathered = job.rounds * gathers.model
    if job.fan == "adapters" and shard_size > 1:  # the truth of all of them, once
        gathered += sum(_padded(w.numel, shard_size) * (_FP32 if job.master else w.width) for w in trainable)
    return Work(
        flops=footprint.flops * whole,
        traffic=job.passes * _weight_bytes(shapes) + 2 * footprint.written * whole + updates + perturbations,
        gathered=gathered,
        received=gathered * others,
        uploaded=job.rounds * gathers.model / shard_size * (job.offload != "none"),
    )


def first_order_work(shapes: ModelShapes, job: Job, footprint: Footprint) -> Work:
    """Of one step: weights gathered for the forward and the backward pass, gradients reduced to their shards once."""
    gathers, others = Gathers(shapes.weights, job.ranks), (job.ranks - 1) / job.ranks
    trainable = [weight for weight in shapes.weights if weight.trainable]
    gradients = sum(weight.numel * weight.width for weight in trainable)
    updates = sum(weight.numel for weight in trainable) / job.ranks * 2 * _ADAM
    return Work(
        flops=footprint.flops * job.turns,
        traffic=job.turns * (2 * _weight_bytes(shapes) + 2 * footprint.written) + updates,
        gathered=2 * job.turns * gathers.model,
        received=(2 * job.turns * gathers.model + gradients) * others,
    )


def with_host(memory: Memory, host: Mapping[str, int]) -> Memory:
    """The memory of a rank whose device is the host."""
    return Memory({**memory.parts, **host}, memory.phase)


def _passes(phases: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {name: {"gathered weights": own[0], "activations": own[1]} for name, own in phases.items()}


def _highest(resident: dict[str, int], phases: dict[str, dict[str, int]]) -> Memory:
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return Memory({**resident, **phases[phase]}, phase)


def _gathered(shapes: ModelShapes, job: Job) -> list[Weight]:
    """What ZeRO-3 gathers for the modules: not the adapters, where candidates have their own."""
    return [weight for weight in shapes.weights if not (weight.trainable and job.fan == "adapters")]


def _padded(numel: int, shard_size: int) -> int:
    """Elements of a gather."""
    return -(-numel // shard_size) * shard_size


def _shard(weight: Weight, shard_size: int) -> int:
    return weight.num_bytes if shard_size == 1 else -(-weight.numel // shard_size) * weight.width


def _weight_bytes(shapes: ModelShapes) -> int:
    return sum(weight.num_bytes for weight in shapes.weights)

"""How a run's work is cut, and which shard groups fit the memory of its ranks: the same for a plan and for a run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from zoscale.assembly import longest_row
from zoscale.config import ConfigError, RunConfig, build
from zoscale.estimators import Estimator, GradientEstimate
from zoscale.forward.fan_out import WAITING
from zoscale.methods import TABLES
from zoscale.models.sizes import count_parameters, hidden_size, tokens_per_pass
from zoscale.noise.generator import Noise
from zoscale.nvme import check_offload, offload_device
from zoscale.optim import OPTIMIZERS
from zoscale.optim.first_order import FIRST_ORDER
from zoscale.plan.budget import Job, zero_order_memory
from zoscale.plan.footprint import Footprint, ModelShapes
from zoscale.probes import PROBES
from zoscale.runtime import default_shard_size, fill_deepspeed_config, read_deepspeed_config
from zoscale.shards import ShardedParam, TensorSpec

USABLE = 0.85
"""Share of the memory that is planned with; the rest is for contexts, buffers of collectives and gaps."""

_CGROUPS = {"memory": ("memory", "memory.limit_in_bytes"), "": (".", "memory.max")}
"""Versions 1 and 2: controller as /proc/self/cgroup names it -> folder of the hierarchy, file of the limit."""


def shard_size_of_run(config: RunConfig, architecture: Any) -> int | None:
    """`mesh.shard_size`; "auto" becomes the fewest of the launched ranks that can hold the model together.

    Groups lie within a node or are of whole nodes; it is all ranks if the model fits nowhere, and None, ZeRO-3 over all
    ranks, for weights that it offloads. None becomes what `default_shard_size` says, but for first-order methods, which
    are ZeRO-3's.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.mesh.shard_size is None and config.optimizer.name not in FIRST_ORDER:
        return default_shard_size(ranks, config.runtime.deepspeed)
    if config.mesh.shard_size != "auto":
        return config.mesh.shard_size
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    shapes = ModelShapes(config.model, architecture, config.adapter, config.trainable)
    size = count_parameters(architecture, trust_remote_code=config.model.trust_remote_code)
    job = job_of(config, shapes, ranks, longest_row(config, size), copies=not torch.cuda.is_available())
    if job.offload != "none":
        return None
    footprint = shapes.run(job.micro_batch, job.tokens, candidates=job.together if job.fan else None)
    budget = USABLE * memory_of_a_rank(per_node)
    return smallest_shard(shapes, job, footprint, budget, shard_sizes(ranks, per_node)) or ranks


def job_of(config: RunConfig, shapes: ModelShapes, ranks: int, tokens: int, *, copies: bool) -> Job:
    """What a run asks of its ranks.

    Args:
        config: of the run.
        shapes: of its model.
        ranks: of the job.
        tokens: per row.
        copies: see `Job`.

    Raises:
        ConfigError: for a forward that the model cannot take.
    """
    estimator: Estimator = build(config.estimator, TABLES["estimator"])
    filled = fill_deepspeed_config(read_deepspeed_config(config.runtime.deepspeed), config.model.dtype, None)
    check_offload(config, filled)
    zero = filled["zero_optimization"]
    fan = None if config.forward.name == "sequential" else shapes.fan
    if config.forward.name == "fan_out" and fan is None:
        raise ConfigError("a model whose candidates can share a pass", "another", "set forward.name=auto")
    return Job(
        ranks=ranks,
        batch=config.data.batch_size,
        micro_batch=config.data.micro_batch_size,
        tokens=tokens,
        candidates=estimator.num_candidates,
        parts=config.mesh.candidates,
        fan=fan,
        max_rows=config.forward.max_rows or tokens_per_pass(shapes.model) // tokens,
        waiting=WAITING * tokens_per_pass(shapes.model),
        hidden=hidden_size(shapes.model) * max(weight.width for weight in shapes.weights),
        state=state_per_element(config),
        master=config.master == "fp32" and any(w.trainable and w.width < 4 for w in shapes.weights),
        prefetch=zero.get("stage3_prefetch_bucket_size", 1) > 0,
        copies=copies,
        bucket=zero.get("reduce_bucket_size"),
        sub_group=int(zero.get("sub_group_size", 1e9)),
        offload=offload_device(filled),
        pinned=not copies and bool((zero.get("offload_param") or {}).get("pin_memory")),
    )


def state_per_element(config: RunConfig) -> float:
    """Values that the optimizer keeps per trainable element, by one step on a small matrix; 0 for first-order ones."""
    if config.optimizer.name not in OPTIMIZERS:
        return 0.0
    spec = TensorSpec(0, "example", (8, 8))
    shard = ShardedParam(nn.Parameter(torch.zeros(spec.shape)), spec)
    optimizer = build(config.optimizer, OPTIMIZERS, [shard])
    probe: Any = build(config.probe, PROBES)
    optimizer.step(GradientEstimate((probe.draw(Noise(0), [spec], 0, 0),), (1.0,), 0.0))
    kept = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    return sum(value.numel() for value in kept) / spec.numel


def shard_sizes(ranks: int, ranks_per_node: int) -> list[int]:
    """Sizes of even groups that lie within a node or are of whole nodes, the smallest first."""
    even = [size for size in range(1, ranks + 1) if ranks % size == 0]
    return [s for s in even if ranks_per_node % s == 0 or s % ranks_per_node == 0 or s == ranks]


def smallest_shard(
    shapes: ModelShapes, job: Job, activations: Footprint, budget: float, sizes: Sequence[int]
) -> int | None:
    """The first of the sizes whose groups fit into `budget` bytes per rank; None if none does."""
    return next((d for d in sizes if zero_order_memory(shapes, job, d, activations).total <= budget), None)


def memory_of_a_rank(ranks_per_node: int) -> float:
    """Bytes that a rank may use: of a GPU, or its part of what the node or its container has; in use or not."""
    if torch.cuda.is_available():  # the least of them, so that all ranks come to the same groups
        gpus = range(min(ranks_per_node, torch.cuda.device_count()))
        return float(min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus))
    return min(psutil.virtual_memory().total, container_limit()) / ranks_per_node


def container_limit(listed: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """The least limit of memory, in bytes, of this process's control groups, as containers and SLURM set them.

    Args:
        listed: the groups, a line `number:controllers:path` each.
        root: where their hierarchies are mounted.

    Returns:
        inf without a limit.
    """
    limits = [float("inf")]
    for line in listed.read_text("utf-8").splitlines() if listed.is_file() else ():
        _, controllers, path = line.split(":", 2)
        for folder, file in (_CGROUPS[name] for name in controllers.split(",") if name in _CGROUPS):
            inner = Path(path.lstrip("/"))
            found = (root / folder / place / file for place in (inner, *inner.parents))
            texts = (place.read_text("utf-8").strip() for place in found if place.is_file())
            limits += [float(text) for text in texts if text.isdecimal()]
    return min(limits)

"""Fingerprints of sharded weights: the same on any number of ranks."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoscale.config import ConfigError
from zoscale.mesh import Mesh
from zoscale.shards import CHUNK, ShardedParam, local_slices

_ODD = 0x9E3779B97F4A7C15 - 2**64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MODULUS = 2**64


def checksum(values: Tensor, offset: int) -> int:
    """Sum of bits(x_i) * w_i modulo 2**64, w_i an odd word of the position: slices add up to the whole tensor's.

    Args:
        values: elements [offset, offset + n) of a tensor, of any dtype.
        offset: of the first one.
    """
    total = 0
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK].contiguous()
        bits = part.view(_BITS[part.element_size()]).to(torch.int64)
        position = torch.arange(offset + start, offset + start + len(part), device=values.device)
        total += int((bits * (position * _ODD | 1)).sum())
    return total % _MODULUS


class Diverged(RuntimeError):
    """Replicas hold different weights."""


_FAULTY = "look for faulty memory or mixed hardware; the same command goes on from the last checkpoint and the journal"


def check_replicas(shards: Sequence[ShardedParam], mesh: Mesh, remedy: str = _FAULTY) -> None:
    """Compare the trainable weights of all replicas. A collective; without replicas there is nothing to compare.

    Raises:
        Diverged: on all ranks, naming the first tensor that differs.
    """
    if mesh.num_replicas == 1:
        return
    sums = _by_replica(mesh, [checksum(shard.truth, shard.offset) for shard in shards])
    for shard, *column in zip(shards, *sums, strict=True):
        for replica, total in enumerate(column):
            if total != column[0]:
                raise Diverged(
                    f"expected the same weights in all replicas, got another {shard.spec.name} in replica {replica} "
                    f"(from rank {replica * mesh.shard_size}): {remedy}"
                )


def _by_replica(mesh: Mesh, own: list[int]) -> list[list[int]]:
    """Per replica, the checksums of its whole tensors."""
    rows = mesh.gather_objects(own)
    groups = [rows[start : start + mesh.shard_size] for start in range(0, mesh.world_size, mesh.shard_size)]
    return [[sum(column) % _MODULUS for column in zip(*group, strict=True)] for group in groups]


def of_model(model: nn.Module, mesh: Mesh, *, trainable: bool) -> str:
    """16 hex digits that name all trainable, or all frozen, tensors: names, shapes, dtypes and values. A collective.

    Raises:
        ConfigError: if replicas hold different ones.
    """
    slices = local_slices(model, trainable=trainable)
    own = [((spec.name, spec.shape, str(values.dtype)), checksum(values, offset)) for spec, offset, values in slices]
    sums, *others = _by_replica(mesh, [total for _, total in own])
    for replica, other in enumerate(others, start=1):
        for ((name, *_), _), ours, theirs in zip(own, sums, other, strict=True):
            if ours != theirs:
                got = f"another one from rank {replica * mesh.shard_size} on"
                raise ConfigError(f"the same {name} on all ranks", got, "load the same model on all")
    rows = [(*tensor, total) for (tensor, _), total in zip(own, sums, strict=True)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]

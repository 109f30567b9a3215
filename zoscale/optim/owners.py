"""Work on whole matrices of which every rank holds a slice: each has one owner, which works on it once for all ranks.

Matrices are taken a bucket at a time: their slices travel to the owners in one exchange, and the results travel back to
the slices' ranks in another. The next bucket is on its way while one is worked on. What a rank holds beside its slices
is about ten buffers of `CAPACITY` elements, however large the model is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from zoscale.mesh import Mesh
from zoscale.shards import ShardedParam, TensorSpec

MatrixFunction = Callable[[Tensor], Tensor]
"""Any number of matrices [..., m, n] to as many of the same shape and dtype, each by itself."""

CAPACITY = 2**23
"""Elements that a rank owns at once; a larger matrix is taken alone."""


@dataclass(frozen=True)
class Bucket:
    """Matrices that travel together.

    Args:
        owned: by owner, its matrices; those of one shape next to each other.
    """

    owned: tuple[tuple[TensorSpec, ...], ...]

    @property
    def specs(self) -> list[TensorSpec]:
        """In the order in which their slices are packed."""
        return [spec for specs in self.owned for spec in specs]

    def slice_size(self, spec: TensorSpec) -> int:
        """Elements of each rank's slice, padding included."""
        return -(-spec.numel // len(self.owned))

    @property
    def sizes(self) -> list[int]:
        """By owner, the elements of each rank's slices of its matrices."""
        return [sum(map(self.slice_size, specs)) for specs in self.owned]


def deal(specs: Sequence[TensorSpec], num_ranks: int, capacity: int = CAPACITY) -> list[Bucket]:
    """Share the matrices out: expensive ones first, each to the rank with the least work in its bucket.

    A pure function of its arguments: every rank comes to the same buckets.
    """
    buckets: list[list[list[TensorSpec]]] = []
    loads: list[tuple[int, int, int]] = []  # (cost, rank, elements) in the last bucket
    for spec in sorted(specs, key=lambda spec: (-_cost(spec), spec.shape, spec.id)):
        if not loads or (loads[0][2] > 0 and loads[0][2] + spec.numel > capacity):
            buckets.append([[] for _ in range(num_ranks)])
            loads = [(0, rank, 0) for rank in range(num_ranks)]
            heapify(loads)
        cost, rank, elements = loads[0]
        buckets[-1][rank].append(spec)
        heapreplace(loads, (cost + _cost(spec), rank, elements + spec.numel))
    return [Bucket(tuple(map(tuple, owned))) for owned in buckets]


def on_owners(
    function: MatrixFunction,
    shards: Sequence[ShardedParam],
    local: Callable[[ShardedParam], Tensor],
    mesh: Mesh,
    *,
    dtype: torch.dtype = torch.float32,
    capacity: int = CAPACITY,
) -> Iterator[list[tuple[ShardedParam, Tensor]]]:
    """Apply a function to whole matrices, each once in the shard group. A collective, to be run to its end.

    Args:
        function: what is done; matrices of one shape that have one owner are given to it together.
        shards: this rank's slices of two-dimensional tensors; the same tensors on every rank.
        local: the elements [offset, offset + len(shard)) of the matrix that is put in, flat.
        mesh: the ranks.
        dtype: in which slices travel and the function works.
        capacity: elements that a rank owns at once.

    Yields:
        Bucket by bucket the shards, each once, with the same elements of the result: float32 [len(shard)], on the
        shard's device, to be changed at will.
    """
    by_id = {shard.spec.id: shard for shard in shards}
    buckets = deal([shard.spec for shard in shards], mesh.shard_size, capacity)

    def gather(bucket: Bucket) -> Callable[[], Tensor]:
        packed = torch.zeros(sum(bucket.sizes), dtype=dtype, device=mesh.device)
        for shard, part in _parts(packed, bucket, by_id):
            part.copy_(local(shard))
        return mesh.exchange(packed, bucket.sizes, [bucket.sizes[mesh.shard_rank]] * mesh.shard_size)

    for bucket, returned in _results(function, buckets, gather, mesh):
        yield [(shard, part.to(shard.truth.device)) for shard, part in _parts(returned.float(), bucket, by_id)]
        del returned  # before the next bucket is worked on


def _results(
    function: MatrixFunction, buckets: Sequence[Bucket], gather: Callable[[Bucket], Callable[[], Tensor]], mesh: Mesh
) -> Iterator[tuple[Bucket, Tensor]]:
    """Each bucket with this rank's slices of the results, packed; while one is worked on, two travel.

    Args:
        gather: begins to send a bucket to its owners; what it returns waits for this rank's part.
    """
    coming = [gather(bucket) for bucket in buckets[:1]]
    going: list[tuple[Bucket, Callable[[], Tensor]]] = []
    for number, bucket in enumerate(buckets):
        slices = coming.pop()()
        coming += [gather(bucket) for bucket in buckets[number + 1 : number + 2]]
        _work(function, bucket, mesh.shard_rank, slices)
        going.append((bucket, mesh.exchange(slices, [bucket.sizes[mesh.shard_rank]] * mesh.shard_size, bucket.sizes)))
        if number > 0:
            done, returned = going.pop(0)
            yield done, returned()
    for done, returned in going:
        yield done, returned()


def _work(function: MatrixFunction, bucket: Bucket, rank: int, slices: Tensor) -> None:
    """Replace the slices of a rank's own matrices by those of the results; they lie one source rank after the other."""
    table = slices.view(len(bucket.owned), -1)
    first = 0
    for shape, group in groupby(bucket.owned[rank], key=lambda spec: spec.shape):
        specs = list(group)
        count, size, numel = len(specs), bucket.slice_size(specs[0]), specs[0].numel
        own = table[:, first : first + count * size].view(-1, count, size).transpose(0, 1)
        result = function(own.reshape(count, -1)[:, :numel].view(count, *shape)).flatten(1)
        own.copy_(pad(result, (0, own[0].numel() - numel)).view(own.shape))
        first += count * size


def _parts(packed: Tensor, bucket: Bucket, shards: Mapping[int, ShardedParam]) -> Iterator[tuple[ShardedParam, Tensor]]:
    """This rank's slice of each matrix, without padding, in what it packs or gets back.

    Args:
        shards: by tensor id.
    """
    parts = torch.split(packed, [bucket.slice_size(spec) for spec in bucket.specs])
    for spec, part in zip(bucket.specs, parts, strict=True):
        yield shards[spec.id], part[: len(shards[spec.id])]


def _cost(spec: TensorSpec) -> int:
    """Multiplications of one Newton-Schulz iteration, by which matrices are weighed."""
    short, long = sorted(spec.shape)
    return short * short * (short + 2 * long)

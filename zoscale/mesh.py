"""`Mesh`: the ranks of a run and the few exchanges that zero-order training needs. A no-op at world size 1.

Ranks form shard groups, which hold one copy of the model together; groups are replicas of each other. All ranks share
out the micro-batches, whatever their group.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Mesh:
    """The ranks of the default process group; without one, a mesh of one rank.

    A rank may want all to stop (`stop_wanted`); the wish travels with the next `gather_items`, after which
    `stop_agreed` is the same on every rank. `num_gathers` and `gathered_bytes` (of outputs) count `gather_flats`
    and `exchange`.

    Args:
        device: where this rank computes.
        ranks: (rank, world size) instead of the process group's; (0, 1) is this process alone.
        shard_size: consecutive ranks per shard group: all (None), down to 1, where every rank holds the whole model.
        shard_group: from `new_shard_group`, for sizes between one and all.

    Raises:
        ValueError: for a size that does not divide the number of ranks.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        ranks: tuple[int, int] | None = None,
        shard_size: int | None = None,
        shard_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.device = torch.device(device)
        joined = dist.is_available() and dist.is_initialized()
        group = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.rank, self.world_size = ranks or group
        self.shard_size = self.world_size if shard_size is None else shard_size
        if self.world_size % self.shard_size:
            raise ValueError(f"expected a shard_size that divides {self.world_size} ranks, got {shard_size}")
        self.shard_group = shard_group
        self.stop_wanted = False
        self.stop_agreed = False
        self.num_gathers = 0
        self.gathered_bytes = 0

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @property
    def num_replicas(self) -> int:
        """Copies of the model."""
        return self.world_size // self.shard_size

    @property
    def shard_rank(self) -> int:
        """This rank's number within its shard group."""
        return self.rank % self.shard_size

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank's shard group is the one that writes checkpoints."""
        return self.rank < self.shard_size

    def slice_of(self, numel: int) -> tuple[int, int]:
        """First element, and the one behind the last, of this rank's slice of a tensor, as ZeRO-3 cuts it."""
        size = -(-numel // self.shard_size)
        return min(self.shard_rank * size, numel), min((self.shard_rank + 1) * size, numel)

    def share(self, num_items: int) -> tuple[list[int], int]:
        """The items that this rank takes whole, and the number of turns of every rank.

        Rank r takes items r, r + N, ...; a rank with fewer items than turns repeats work, so that all ranks enter
        the same number of collectives.
        """
        return list(range(self.rank, num_items, self.world_size)), -(-num_items // self.world_size)

    def gather_items(self, local: Tensor, num_items: int) -> Tensor:
        """Assemble per-item columns in item order.

        Args:
            local: [rows, turns], this rank's columns (items rank, rank + N, ...; surplus columns are ignored).
            num_items: number of items over all ranks.

        Returns:
            [rows, num_items] on the CPU, the same on every rank.
        """
        if self.world_size == 1:
            self.stop_agreed = self.stop_wanted
            return local[:, :num_items].cpu()
        sent = torch.cat([local, local.new_full((len(local), 1), float(self.stop_wanted))], dim=1)
        parts = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(parts, sent)
        whole = torch.stack(parts, dim=-1).cpu()
        self.stop_agreed = bool(whole[0, -1].any())
        return whole[:, :-1].flatten(1)[:, :num_items]

    def gather_flats(self, slices: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """Whole flat tensors from the slices of the shard group, in one collective.

        Args:
            slices: per tensor, this rank's elements [rank * size, ...) with size = ceil(numel / shard_size), without
                padding, and the numel of the whole; all of one dtype.

        Returns:
            [numel] each, of the dtype and on the device of the slices.
        """
        if self.shard_size == 1:
            return [local for local, _ in slices]
        sizes = [-(-numel // self.shard_size) for _, numel in slices]
        packed = torch.zeros(sum(sizes), dtype=slices[0][0].dtype, device=self.device)
        for part, (local, _) in zip(torch.split(packed, sizes), slices, strict=True):
            part[: local.numel()] = local
        flat = torch.empty(self.shard_size * packed.numel(), dtype=packed.dtype, device=self.device)
        dist.all_gather_into_tensor(flat, packed, group=self.shard_group)
        self.num_gathers += 1
        self.gathered_bytes += flat.nbytes
        whole = flat.view(self.shard_size, -1)
        return [
            part.reshape(-1)[:numel].to(local.device)
            for part, (local, numel) in zip(torch.split(whole, sizes, dim=1), slices, strict=True)
        ]

    def exchange(self, packed: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        """Start to swap parts of a flat tensor within the shard group: part r goes to its rank r.

        Args:
            packed: on the mesh's device; not to be changed before the exchange has ended.
            sent, received: elements for, and from, each rank of the shard group.

        Returns:
            Waits for the end and gives what was received, in rank order.
        """
        if self.shard_size == 1:
            return lambda: packed
        into = packed.new_empty(sum(received))
        work = dist.all_to_all_single(into, packed, list(received), list(sent), group=self.shard_group, async_op=True)
        self.num_gathers += 1
        self.gathered_bytes += into.nbytes

        def finish() -> Tensor:
            work.wait()
            return into

        return finish

    def spread(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor on the mesh's device with that of the shard group's first rank."""
        if self.shard_size > 1:
            dist.broadcast(tensor.view(-1).view(torch.uint8), group=self.shard_group, group_src=0)

    def spread_object(self, value: Any) -> Any:
        """The small picklable value of the shard group's first rank."""
        values = [value]
        if self.shard_size > 1:
            dist.broadcast_object_list(values, group=self.shard_group, group_src=0)
        return values[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Small picklable values of all ranks, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """Every rank does its own work; the results of all ranks, in rank order.

        Raises:
            OSError, ValueError: what the first rank that failed raised, on every rank, with its number noted.
        """
        result: T | Exception
        try:
            result = work()
        except (OSError, ValueError) as error:
            if self.world_size > 1:
                error.add_note(f"on rank {self.rank}")
            result = error
        results = self.gather_objects(result)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def on_main(self, work: Callable[[], T]) -> T:
        """Rank 0 does the work; its result on every rank, or its OSError or ValueError. All have come here then."""
        results: list[Any] = []
        self.together(lambda: results.append(work()) if self.is_main else None)
        if self.world_size > 1:  # a gather would take room for as many results as there are ranks
            results = results or [None]
            dist.broadcast_object_list(results, src=0)
        return results[0]  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def new_shard_group(size: int, timeout: timedelta) -> dist.ProcessGroup:
    """The process group of this rank's shard group. A collective of all ranks: each makes all groups, in one order.

    Args:
        size: consecutive ranks per group; divides the number of ranks.
        timeout: of its collectives.
    """
    group: dist.ProcessGroup = dist.new_subgroups(size, timeout=timeout)[0]  # type: ignore[no-untyped-call]
    return group

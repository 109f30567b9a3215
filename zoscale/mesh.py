"""`Mesh`: the ranks of a run and the few exchanges that zero-order training needs. A no-op at world size 1."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Mesh:
    """All ranks of the default process group as one shard group.

    Without an initialised process group it is a mesh of one rank.

    Args:
        device: where this rank computes.
        ranks: (rank, world size) instead of the process group's; (0, 1) is this process alone.
    """

    def __init__(self, device: torch.device | str = "cpu", *, ranks: tuple[int, int] | None = None) -> None:
        self.device = torch.device(device)
        joined = dist.is_available() and dist.is_initialized()
        group = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.rank, self.world_size = ranks or group

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

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
            return local[:, :num_items].cpu()
        parts = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(parts, local.contiguous())
        return torch.stack(parts, dim=-1).flatten(1)[:, :num_items].cpu()

    def gather_flat(self, local: Tensor, numel: int) -> Tensor:
        """The whole flat tensor from every rank's slice: [numel], of the dtype and on the device of `local`.

        Args:
            local: this rank's elements [rank * size, ...) with size = ceil(numel / world), without padding.
            numel: elements of the whole.
        """
        if self.world_size == 1:
            return local
        size = -(-numel // self.world_size)
        padded = torch.zeros(size, dtype=local.dtype, device=self.device)
        padded[: local.numel()] = local
        whole = torch.empty(size * self.world_size, dtype=local.dtype, device=self.device)
        dist.all_gather_into_tensor(whole, padded)
        return whole[:numel].to(local.device)

    def gather_objects(self, value: Any) -> list[Any]:
        """Small picklable values of all ranks, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's small value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

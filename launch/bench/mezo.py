"""`Mezo`: the step of MeZO as its paper has it (arXiv 2305.17333, Algorithms 1 and 2), to compare with."""

from collections.abc import Callable, Sequence

import torch

from zoscale.shards import ShardedParam


class Mezo:
    """Zero-order SGD in place: theta + eps z, - 2 eps z, + eps z, then theta - lr rho z.

    z is never kept: before each of the four passes over the weights the generator is set back to the direction's seed
    and draws one tensor after the other, in the tensor's own dtype. With q directions the update is the mean of theirs.
    Under ZeRO-3, which the paper does not treat, each rank does the same to its own slices.

    Args:
        shards: slices of the trainable tensors; their `live` values are changed, a master slice is not kept up.
        loss: of the weights as they are, the same on every rank.
        eps: radius.
        lr: learning rate.
        num_directions: q.
        rank: makes the ranks' draws differ.
    """

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        loss: Callable[[], float],
        *,
        eps: float = 1e-3,
        lr: float = 1e-6,
        num_directions: int = 1,
        rank: int = 0,
    ) -> None:
        self.shards = shards
        self.loss = loss
        self.eps = eps
        self.lr = lr
        self.num_directions = num_directions
        self.rank = rank
        self.generator = torch.Generator(shards[0].live.device)

    @torch.no_grad()
    def step(self, seed: int) -> list[float]:
        """One step.

        Args:
            seed: of the step's directions.

        Returns:
            The q projected gradients rho = (f(theta + eps z) - f(theta - eps z)) / (2 eps).
        """
        rhos = []
        for number in range(self.num_directions):
            self.move(seed, number, self.eps)
            plus = self.loss()
            self.move(seed, number, -2 * self.eps)
            minus = self.loss()
            self.move(seed, number, self.eps)
            rhos.append((plus - minus) / (2 * self.eps))
        for number, rho in enumerate(rhos):
            self.move(seed, number, -self.lr * rho / self.num_directions)
        return rhos

    def move(self, seed: int, number: int, scale: float) -> None:
        """theta += scale z, tensor by tensor."""
        self.generator.manual_seed(seed * 1_000_003 + number * 1_009 + self.rank)
        for shard in self.shards:
            live = shard.live
            z = torch.normal(
                0.0, 1.0, size=live.shape, generator=self.generator, dtype=live.dtype, device=live.device
            )  # fmt: skip
            live.add_(z, alpha=scale)
            shard.reach_next_forward()

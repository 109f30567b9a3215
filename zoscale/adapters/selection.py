"""WeightLoRA's choice of adapters (arXiv 2506.02724): when, how many, and the matrices of twice the rank."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from zoscale.config import ConfigError

_MOST_EXPANSIONS = 3


@dataclass(frozen=True)
class Selection:
    """How many adapters are kept, and from when.

    Args:
        keep: adapters K that are kept after the warm-up.
        warmup_steps: steps T with all adapters.
        expansions: how often (at most 3 times) half of the adapters are kept at twice the rank: WeightLoRA+.
        expand_every: steps before each of these.

    Raises:
        ConfigError: for values that are impossible.
    """

    keep: int = 8
    warmup_steps: int = 100
    expansions: int = 0
    expand_every: int = 100

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "expansions" else 1
            if type(value) is not int or value < least:
                expected = f"adapter.{field.name} to be a whole number of at least {least}"
                raise ConfigError(expected, repr(value), "correct it")
        if self.expansions > _MOST_EXPANSIONS:
            remedy = "lower it, or raise adapter.r"
            raise ConfigError(f"adapter.expansions to be at most {_MOST_EXPANSIONS}", str(self.expansions), remedy)
        if self.kept_at(self.expansions) < 1:
            got = f"{self.keep}, of which {self.expansions} expansions leave none"
            raise ConfigError(f"adapter.keep to be at least {2**self.expansions}", got, "raise it")

    @classmethod
    def take_from(cls, options: dict[str, Any]) -> Self:
        """The selection that an adapter's options describe; its keys are taken out of them."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls) if field.name in options})

    def __str__(self) -> str:
        later = (
            f", {self.kept_at(number)} of twice the rank after {self.warmup_steps + number * self.expand_every}"
            for number in range(1, self.expansions + 1)
        )
        return f"the strongest {self.keep} are kept after {self.warmup_steps} steps{''.join(later)}"

    @property
    def last_step(self) -> int:
        """Steps after which nothing changes any more."""
        return self.warmup_steps + self.expansions * self.expand_every

    def expansions_at(self, step: int) -> int | None:
        """How many expansions have been made once the change after so many steps is done; None if there is none."""
        number, rest = divmod(step - self.warmup_steps, self.expand_every)
        return number if rest == 0 and 0 <= number <= self.expansions else None

    def kept_at(self, expansions: int) -> int:
        """Adapters that are left after so many expansions."""
        return int(self.keep // 2**expansions)


def strongest(weights: Mapping[str, float], count: int) -> list[str]:
    """The names of the largest |w|, in their own order; equal ones are taken in that order."""
    names = list(weights)
    chosen = set(sorted(names, key=lambda name: -abs(weights[name]))[:count])
    return [name for name in names if name in chosen]


def expanded(a: Tensor, b: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices of twice the rank with the same product: A^T = Q R, A' = [Q^T; N (I - Q Q^T)], B' = [B R^T, 0].

    Half of the rows of A' are orthonormal; the others are orthogonal to them, and train from B' = 0 on. In
    float64 on the CPU, whose rounding to float32 hides most of what machines do differently.

    Args:
        a: A [r, n], 2 r <= n.
        b: B [m, r].
        noise: [r, n], standard normal; N is that over sqrt(n), whose rows have norms of about 1.

    Returns:
        A' [2 r, n] and B' [m, 2 r], float32.
    """
    q, upper = torch.linalg.qr(a.double().cpu().mT)
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).double()
    q, upper = q * signs, upper * signs[:, None]
    new = noise.double().cpu() / a.shape[1] ** 0.5
    new = new - (new @ q) @ q.mT
    widened = torch.cat([b.double().cpu() @ upper.mT, torch.zeros(b.shape, dtype=torch.float64)], dim=1)
    return torch.cat([q.mT, new]).float().to(a.device), widened.float().to(b.device)

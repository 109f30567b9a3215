"""Logits in float32 from a head whose weights have 16 bits.

Rounded to 16 bits, logits lie on a grid about as wide as what two points of a step differ by, and a slope is the
difference of two losses. The products are float32 in any case until they are rounded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional

_WIDE: ContextVar[bool] = ContextVar("wide", default=False)
_ROWS = 1024  # of a weight, that are float32 at a time on a CPU


class WideHead(nn.Linear):
    """A linear layer whose result is float32 within `wide_logits`."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_wide:
            return functional.linear(input, self.weight, self.bias)
        return product(input.flatten(0, -2), self.weight, self.bias).view(*input.shape[:-1], -1)

    @property
    def is_wide(self) -> bool:
        """Whether its result is of another type than its weights: float32, and they have 16 bits."""
        return _WIDE.get() and self.weight.dtype in (torch.bfloat16, torch.float16)


@contextmanager
def wide_logits(is_wide: bool) -> Iterator[None]:
    """Within, if `is_wide`, heads that `widen` was called for give float32. Without derivatives."""
    token = _WIDE.set(is_wide)
    try:
        yield
    finally:
        _WIDE.reset(token)


def widen(head: nn.Module) -> None:
    """Make the linear layer of a head, within PEFT's or not, a `WideHead`; other kinds of layers stay as they are."""
    if type(head) is nn.Linear:
        head.__class__ = WideHead
    for name in ("base_layer", "original_module", "modules_to_save"):
        inner = getattr(head, name, None)
        for layer in inner.values() if isinstance(inner, nn.ModuleDict) else [inner]:
            if isinstance(layer, nn.Module):
                widen(layer)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of 16-bit numbers, without rounding to 16 bits.

    Args:
        x: [N, in].
        weight: [M, in].
        bias: [M].

    Returns:
        float32 [N, M].
    """
    if x.is_cuda:
        result = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:  # a CPU's library has no such product
        wide, result = x.float(), x.new_empty(len(x), len(weight), dtype=torch.float32)
        for first in range(0, len(weight), _ROWS):
            rows = slice(first, first + _ROWS)
            torch.mm(wide, weight[rows].float().t(), out=result[:, rows])
    return result if bias is None else result.add_(bias)

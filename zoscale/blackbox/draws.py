"""Draws of successive numbers, made a block at a time: the generator costs the same for one as for hundreds."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from zoscale.noise.generator import Domain, Key, Noise, Range

T = TypeVar("T")
_NUMBERS, _VECTORS = 1024, 64
"""Draws of a block."""


class Draws(Generic[T]):
    """A pure function of a number 0, 1, ..., computed in blocks; cheap where the numbers are asked for in order.

    Args:
        draw: the draws of a block, by its number.
        size: draws of a block.
    """

    def __init__(self, draw: Callable[[int], Sequence[T]], size: int) -> None:
        self._draw = draw
        self._size = size
        self._number = -1
        self._block: Sequence[T] = ()

    def __getitem__(self, number: int) -> T:
        block, place = divmod(number, self._size)
        if block != self._number:
            self._number, self._block = block, self._draw(block)
        return self._block[place]


def coordinates(noise: Noise, dimension: int) -> Draws[int]:
    """Per number a coordinate, uniform on [0, dimension)."""
    lanes = [(lane, dimension) for lane in range(_NUMBERS)]
    return Draws(lambda block: noise.integers(Key(block, domain=Domain.SUPPORT), lanes), _NUMBERS)


def signs(noise: Noise, dimension: int) -> Draws[Tensor]:
    """Per number a vector of random signs: float32 [dimension]."""
    lanes = [Range(lane, 0, dimension) for lane in range(_VECTORS)]
    return Draws(lambda block: noise.rademacher(Key(block), lanes), _VECTORS)


def normals(noise: Noise, dimension: int) -> Draws[Tensor]:
    """Per number a vector of standard normals: float32 [dimension]."""
    lanes = [Range(lane, 0, dimension) for lane in range(_VECTORS)]
    return Draws(lambda block: noise.normal(Key(block), lanes), _VECTORS)


def uniforms(noise: Noise) -> Draws[float]:
    """Per number a float, uniform on [0, 1)."""
    return Draws(lambda block: noise.uniform(Key(block, 1), [Range(0, 0, _NUMBERS)])[0].tolist(), _NUMBERS)


def subsets(noise: Noise, n: int, k: int) -> Draws[Tensor]:
    """Per number k integers uniform on [0, n), with replacement: int64 [k]."""
    lanes = [(lane, n) for lane in range(_VECTORS * k)]

    def draw(block: int) -> Sequence[Tensor]:
        return torch.tensor(noise.integers(Key(block, domain=Domain.DATA), lanes)).view(_VECTORS, k).unbind()

    return Draws(draw, _VECTORS)

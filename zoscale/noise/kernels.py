"""Where Triton's kernels can be used, and the streams that they are given there."""

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch

from zoscale.noise.generator import Key, Noise, Range
from zoscale.noise.streams import MANY, Distribution, Mask, Stream, drawn, perturb_all
from zoscale.noise.sums import Sum


def stream_of(
    noise: Noise,
    key: Key,
    wanted: Range,
    distribution: Distribution,
    device: torch.device,
    mask: Callable[[], Mask | None] = lambda: None,
) -> Stream | None:
    """The stream, or None where it must be drawn to memory; the mask is only asked for with a stream."""
    kernels = kernels_on(device) if noise.compiled else None
    return None if kernels is None else Stream(noise, key, wanted, distribution, device, kernels, mask())


@functools.cache
def kernels_on(device: torch.device) -> Any:
    """`triton_kernels`, where it gives the right numbers on the device; else None, with one warning on a GPU."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from zoscale.noise import triton_kernels

        _check(triton_kernels, device)
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        warnings.warn(f"noise is drawn to memory, slower: Triton's kernels cannot be used: {reason[0]}", stacklevel=3)
        return None
    return triton_kernels


def _check(kernels: Any, device: torch.device) -> None:
    """Compare a few numbers of every kernel and distribution with those of `generator.py`.

    Raises:
        RuntimeError: if they differ.
    """
    for first in (2**33 + 77, 2**33):  # aligned, as most slices are, and not
        _check_range(kernels, device, Range(7, first, first + 304))


def _check_range(kernels: Any, device: torch.device, wanted: Range) -> None:
    noise, key = Noise(2**63 + 5), Key(2**31 + 1, 3)
    normal, signs = (Stream(noise, key, wanted, kind, device, kernels) for kind in get_args(Distribution))
    marks = (torch.arange(20 + 23, device=device) % 3 != 0).to(torch.uint8)
    masked = replace(signs, range=Range(7, 77, 77 + len(signs)), mask=Mask(marks, 20, 23))
    zeros, normals, cut, mean, memory, truth, again, both, *made = torch.zeros(8 + MANY, len(signs), device=device)
    halves = torch.zeros(2, len(signs), device=device, dtype=torch.bfloat16)
    perturb_all([normal], [(normals, zeros)], 1.0)
    perturb_all([signs], [(halves[0], halves[1])], 1.0)
    perturb_all([signs] * MANY, [(out, zeros) for out in made], 1.0)
    perturb_all([masked], [(cut, zeros)], 1.0)
    one = Sum([[signs]], (1.0,))
    mean.copy_(one.mean()[0])
    one.remember([memory], 0.0)
    one.descend([truth], [None], -1.0, 0.0, rounded=False)
    one.remember_and_descend_sign([again], 0.0, [both], [None], -1.0, 0.0, rounded=False)
    if not torch.allclose(normals, drawn([normal])[0], rtol=1e-6, atol=1e-6):
        raise RuntimeError("expected the normals of philox.py, got others")
    found = (halves[0].float(), *made, mean, memory, truth, again, both)
    if not (all(torch.equal(own, drawn([signs])[0]) for own in found) and torch.equal(cut, drawn([masked])[0])):
        raise RuntimeError("expected the signs of philox.py, got others")

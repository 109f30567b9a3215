"""The slow, readable oracle: whole steps on full, unsharded tensors, written from the papers.

It imports nothing of the package it checks. Elementwise maths is NumPy float32, one rounding per operation,
no fused multiply-add; torch only casts weights to the compute dtype and hands them to the loss. Sources:
JAGUAR SignSGD and Muon, arXiv 2506.04430 (Algorithms 1, 2); the overwriting JAGUAR, arXiv 2409.10442; MeZO's
ZO-SGD, arXiv 2305.17333; Philox4x32-10, Salmon et al., SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Arrays = list[Array]
Weights = dict[str, torch.Tensor]
Draw = Callable[[int, int], "Stream"]  # (tensor id, domain) -> its stream, for one direction of one step
Rule = Callable[[Array], Array]
Remember = Callable[[Array, float], Array]
Objective = Callable[[Arrays], float]

VALUE, SUPPORT, SUPPORT2, DATA = range(4)
MASK = 0xFFFFFFFF


def philox(counter: Sequence[npt.ArrayLike], key: tuple[int, int]) -> Arrays:
    """Philox4x32-10: four counter words (scalars or arrays, broadcast) to four uint32 output words."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in np.broadcast_arrays(*counter))
    (k0, k1), mask, half = key, np.uint64(MASK), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & mask
        c2, c3 = (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [word.astype(np.uint32) for word in (c0, c1, c2, c3)]


@dataclass(frozen=True)
class Stream:
    """The random elements of one (seed, step, direction, tensor, domain); `index` holds element indices."""

    seed: int
    step: int
    direction: int
    tensor_id: int
    domain: int = VALUE

    def blocks(self, block: Array) -> Arrays:
        key = (self.seed & MASK, (self.seed >> 32) & MASK)
        return philox((block & MASK, self.tensor_id, self.step, self.direction | (self.domain << 24)), key)

    def words(self, index: npt.ArrayLike) -> Array:
        i = np.asarray(index, np.int64)
        return np.asarray(np.choose(i % 4, self.blocks(i // 4)), np.uint32)

    def uniform(self, index: npt.ArrayLike) -> Array:
        """float32 in [0, 1)."""
        return ((self.words(index) >> 8) * 2.0**-24).astype(np.float32)

    def normal(self, index: npt.ArrayLike) -> Array:
        """Box-Muller in float64, returned in float32: lanes r0 cos t0, r0 sin t0, r1 cos t1, r1 sin t1."""
        i = np.asarray(index, np.int64)
        w, first_pair = self.blocks(i // 4), i % 4 < 2
        radius_word, angle_word = np.where(first_pair, w[0], w[2]), np.where(first_pair, w[1], w[3])
        radius = np.sqrt(-2.0 * np.log(((radius_word >> 8).astype(np.float64) + 1.0) * 2.0**-24))
        angle = (angle_word >> 8).astype(np.float64) * (2.0**-24 * 2.0 * math.pi)
        return (radius * np.where(i % 2 == 0, np.cos(angle), np.sin(angle))).astype(np.float32)

    def rademacher(self, index: npt.ArrayLike) -> Array:
        """float32 signs, 32 to a word: bit 1 is -1, bit 0 is +1."""
        i = np.asarray(index, np.int64)
        bit = (self.words(i // 32) >> (i % 32).astype(np.uint32)) & np.uint32(1)
        return np.where(bit == 1, np.float32(-1.0), np.float32(1.0))

    def permutation(self, num: int) -> Array:
        """Positions 0..num-1 sorted by (word, position)."""
        return np.argsort(self.words(np.arange(num)), kind="stable")

    def choice(self, num: int, count: int) -> Array:
        """`count` of `num` positions without replacement, ascending."""
        return np.sort(self.permutation(num)[:count])

    def big_integer(self, num: int) -> int:
        """An integer in [0, num), in exact integer arithmetic."""
        high, low = (int(word) for word in self.words([0, 1]))
        return num * (high * 2**32 + low) // 2**64


@dataclass(frozen=True)
class Probe:
    """The direction z of one step."""

    kind: str  # "gaussian", or signs on the support that the method of this name gives
    rows: float = 0.5  # the block's fractions
    cols: float = 0.5
    fraction: float = 0.5  # of the tensors
    signs: str = "random"  # or "ones"

    def direction(self, shapes: Sequence[Shape], seed: int, step: int, k: int) -> Arrays:
        """Dense float32 z of every tensor; `shapes` are in tensor id order (sorted names)."""
        draw = partial(Stream, seed, step, k)
        indices = [np.arange(math.prod(shape)).reshape(shape) for shape in shapes]
        if self.kind == "gaussian":
            return [draw(i, VALUE).normal(index) for i, index in enumerate(indices)]
        supports: Arrays = getattr(self, self.kind)(indices, draw)
        signs = [draw(i, VALUE).rademacher(index) for i, index in enumerate(indices)]
        signs = {"random": signs, "ones": [np.abs(z) for z in signs]}[self.signs]
        return [np.where(s, z, np.float32(0)) for s, z in zip(supports, signs, strict=True)]

    def rademacher(self, indices: Arrays, draw: Draw) -> Arrays:
        """Everything."""
        return [index >= 0 for index in indices]

    def coordinate(self, indices: Arrays, draw: Draw) -> Arrays:
        """Algorithm 1: one coordinate of all of x, the tensors concatenated in id order."""
        ends = np.cumsum([index.size for index in indices])
        coordinate = draw(0, SUPPORT).big_integer(int(ends[-1]))
        return [index + end - index.size == coordinate for index, end in zip(indices, ends, strict=True)]

    def entry(self, indices: Arrays, draw: Draw) -> Arrays:
        """Algorithm 2: one entry of every tensor."""
        return [index == draw(i, SUPPORT).big_integer(index.size) for i, index in enumerate(indices)]

    def row(self, indices: Arrays, draw: Draw) -> Arrays:
        """One first-dimension index of every tensor: a row of a matrix, an entry of a vector."""
        nums = [index.shape[0] if index.ndim else 1 for index in indices]
        rows = [draw(i, SUPPORT).choice(num, 1)[0] for i, num in enumerate(nums)]
        return [index // (index.size // m) == r for index, m, r in zip(indices, nums, rows, strict=True)]

    def block(self, indices: Arrays, draw: Draw) -> Arrays:
        """Random rows x random columns of every tensor at once; a vector is one row."""
        supports = []
        for i, index in enumerate(indices):
            m = index.shape[0] if index.ndim > 1 else 1
            n = index.size // m
            rows = draw(i, SUPPORT).choice(m, portion(self.rows, m))
            cols = draw(i, SUPPORT2).choice(n, portion(self.cols, n))
            supports.append(np.isin(index // n, rows) & np.isin(index % n, cols))
        return supports

    def tensors(self, indices: Arrays, draw: Draw) -> Arrays:
        """All entries of a random subset of the tensors."""
        chosen = draw(0, SUPPORT).choice(len(indices), portion(self.fraction, len(indices)))
        return [np.full(index.shape, i in chosen) for i, index in enumerate(indices)]


def portion(share: float, n: int) -> int:
    """The whole numbers up to share * n, at least 1; what is within 1e-9 of a whole number is that number."""
    product = share * n
    nearest = round(product)
    return max(1, nearest if abs(product - nearest) < 1e-9 else math.floor(product))


NEWTON_SCHULZ = {"quintic": ((3.4445, -4.7750, 2.0315), 5), "cubic": ((1.5, -0.5, 0.0), 10)}
SCALES: dict[str, Callable[[int, int], float]] = {
    "none": lambda m, n: 1.0,
    "sqrt_ratio": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),
}


def newton_schulz(matrix: Array, polynomial: str = "quintic", dtype: npt.DTypeLike = np.float32) -> Array:
    """O(matrix), near U V^T of its SVD; a zero matrix gives zero. `matrix` is (m, n); returned in `dtype`."""
    if matrix.shape[0] > matrix.shape[1]:
        return newton_schulz(matrix.T, polynomial, dtype).T
    (a, b, c), num_steps = NEWTON_SCHULZ[polynomial]
    x: Array = matrix.astype(dtype)
    x = x / (np.sqrt(np.sum(x * x)) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def is_vector(name: str, x: Array) -> bool:
    """What no rule decays or orthogonalises: biases, norms, IA3's scales, which are stored as [n, 1] or [1, n]."""
    return x.ndim < 2 or ".ia3_l." in name


@dataclass(frozen=True)
class Optimizer:
    """The update rule; names are matched with shell patterns."""

    name: str  # zo_sgd, jaguar_sign_sgd or jaguar_muon
    lr: float
    weight_decay: float = 0.0
    beta: float = 0.9
    polynomial: str = "quintic"  # a key of NEWTON_SCHULZ
    scale: str = "none"  # a key of SCALES
    sign_names: tuple[str, ...] = ()  # what takes the sign rule in jaguar_muon, besides vectors
    sign_lr_scale: float = 1.0  # multiplies lr there
    newton_schulz_dtype: npt.DTypeLike = np.float32

    def update(self, name: str, x: Array, m: Array, zs: Arrays, rhos: list[float]) -> tuple[Array, Array]:
        """The new (x, m) of one tensor from q directions; each operation rounds to float32, in this order."""
        assert x.dtype == m.dtype == np.float32, f"{name}: x and m are float32"
        total, visits = np.zeros_like(x), np.sum([z != 0 for z in zs], axis=0, dtype=np.float32)
        for z, rho in zip(zs, rhos, strict=True):
            total = total + np.float32(rho) * z
        by_sign = is_vector(name, x) or any(fnmatchcase(name, pattern) for pattern in self.sign_names)
        lr = self.lr * self.sign_lr_scale if self.name == "jaguar_muon" and by_sign else self.lr
        if self.name == "zo_sgd":
            u: Array = total / np.float32(len(rhos))
        else:
            g = total / np.maximum(visits, np.float32(1.0))
            m = np.where(visits > 0, np.float32(self.beta) * m + np.float32(1.0 - self.beta) * g, m)
            u = np.sign(m)
        if self.name == "jaguar_muon" and not by_sign:
            matrix = m.reshape(m.shape[0], -1)
            o = newton_schulz(matrix, self.polynomial, self.newton_schulz_dtype).astype(np.float32)
            u = (np.float32(SCALES[self.scale](*matrix.shape)) * o).reshape(x.shape)
        if self.weight_decay != 0 and not is_vector(name, x):
            u = u + np.float32(self.weight_decay) * x
        return np.asarray(x - np.float32(lr) * u), m


@dataclass
class DenseTrainer:
    """Whole zero-order steps in one process. `params` holds its own fp32 truth, `memory` JAGUAR's m."""

    named_params: InitVar[Weights]
    loss: Callable[[Weights], float]  # gets fresh tensors of `dtype`
    optimizer: Any  # an Optimizer, or whatever has its `name`, `lr` and `update`
    probe: Any  # a Probe, or whatever has its `direction`
    seed: int = 0
    tau: float = 1e-3
    num_directions: int = 1
    estimator: str = "two_point"  # losses f+_0, f-_0, f+_1, ...; or "one_sided" and "fzoo": f(x), f_0, f_1, ...
    dtype: torch.dtype = torch.float32

    def __post_init__(self, named_params: Weights) -> None:
        assert self.estimator in ("two_point", "one_sided", "fzoo"), f"unknown estimator {self.estimator!r}"
        self.params = {n: named_params[n].detach().cpu().float().clone() for n in sorted(named_params)}
        self.memory = {name: np.zeros(tuple(p.shape), np.float32) for name, p in self.params.items()}

    def direction(self, t: int, k: int) -> dict[str, Array]:
        """The dense z_k of step t, by name."""
        shapes = [tuple(p.shape) for p in self.params.values()]
        return dict(zip(self.params, self.probe.direction(shapes, self.seed, t, k), strict=True))

    def loss_at(self, z: dict[str, Array], tau: float) -> float:
        """f(x + tau z): fp32 multiply, fp32 add, then the cast."""
        moved = {name: np.asarray(p.numpy() + np.float32(tau) * z[name]) for name, p in self.params.items()}
        return float(self.loss({name: torch.from_numpy(x).to(self.dtype) for name, x in moved.items()}))

    def step(self, t: int) -> tuple[list[float], list[float]]:
        """One step: (losses, rhos), in float64. A non-finite rho leaves params and memory as they were."""
        zs = [self.direction(t, k) for k in range(self.num_directions)]
        if self.estimator == "two_point":
            losses = [self.loss_at(z, sign * self.tau) for z in zs for sign in (1, -1)]
            rhos = [(f - g) / (2 * self.tau) for f, g in zip(losses[::2], losses[1::2], strict=True)]
        else:
            losses = [self.loss_at(zs[0], 0.0)] + [self.loss_at(z, self.tau) for z in zs]
            rhos = [(f - losses[0]) / self.tau for f in losses[1:]]
        if self.estimator == "fzoo":  # 2506.09034: divided by the standard deviation of the perturbed losses
            rhos = [rho / float(np.std(losses[1:], ddof=1)) for rho in rhos]
        if self.optimizer.name == "zo_sgd_conservative":
            losses, rhos = self.look_around(zs, losses, rhos)
        if all(math.isfinite(rho) for rho in rhos):
            for name, p in self.params.items():
                own, m = [z[name] for z in zs], self.memory[name]
                x, self.memory[name] = self.optimizer.update(name, p.numpy(), m, own, rhos)
                self.params[name] = torch.from_numpy(x)
        return losses, rhos

    def look_around(
        self, zs: list[dict[str, Array]], losses: list[float], rhos: list[float]
    ) -> tuple[list[float], list[float]]:
        """ZO-SGD-Cons (2402.11592): f(x), f(x - lr g), f(x + lr g) follow; the best decides the sign of rho, or 0."""
        step = {name: np.zeros(tuple(p.shape), np.float32) for name, p in self.params.items()}
        for z, rho in zip(zs, rhos, strict=True):
            step = {name: np.asarray(total + np.float32(rho) * z[name]) for name, total in step.items()}
        q, lr = np.float32(len(zs)), np.float32(self.optimizer.lr)
        step = {name: np.asarray(total / q * lr) for name, total in step.items()}
        tried = [self.loss_at(step, sign) for sign in (0.0, -1.0, 1.0)]
        sign = (0.0, 1.0, -1.0)[int(np.argmin(tried))]
        return losses + tried, [sign * rho for rho in rhos]


@dataclass(frozen=True)
class Published:
    """The papers' algorithms as printed, in float64, for given draws; each returns (x, memory)."""

    f: Objective
    start: Arrays
    lr: float
    tau: float

    def run(self, drawn: list[list[int]], remember: Remember, direction: Rule) -> tuple[Arrays, Arrays]:
        """drawn[t]: the coordinates of the concatenated x moved together, by +1 each, at step t."""
        ends = np.cumsum([a.size for a in self.start])[:-1]

        def cut(flat: Array) -> Arrays:
            return [b.reshape(a.shape) for b, a in zip(np.split(flat, ends), self.start, strict=True)]

        x = np.concatenate([a.reshape(-1) for a in self.start]).astype(np.float64)
        m = np.zeros(x.size)
        for at in drawn:
            e = np.isin(np.arange(x.size), at)
            rho = (self.f(cut(x + self.tau * e)) - self.f(cut(x - self.tau * e))) / (2 * self.tau)
            m[at] = remember(m[at], rho)
            x = x - self.lr * np.concatenate([direction(a).reshape(-1) for a in cut(m)])
        return cut(x), cut(m)

    def algorithm1(self, drawn: Sequence[int], beta: float) -> tuple[Arrays, Arrays]:
        """JAGUAR SignSGD, 2506.04430 Algorithm 1: i_t = drawn[t], in the concatenated x."""
        return self.run([[i] for i in drawn], lambda m, rho: beta * m + (1 - beta) * rho, np.sign)

    def algorithm2(self, drawn: Sequence[Sequence[int]], beta: float) -> tuple[Arrays, Arrays]:
        """JAGUAR Muon, 2506.04430 Algorithm 2: drawn[t] has one flat (i_t, j_t) for each matrix."""
        offsets = np.cumsum([0] + [a.size for a in self.start[:-1]])
        at = [(offsets + np.asarray(entries)).tolist() for entries in drawn]
        orthogonal = partial(newton_schulz, dtype=np.float64)
        return self.run(at, lambda m, rho: beta * m + (1 - beta) * rho, orthogonal)

    def jaguar_d_sign(self, drawn: Sequence[int]) -> tuple[Arrays, Arrays]:
        """JAGUAR-d, 2409.10442 (h_0 = 0, h_i overwritten by the difference), with a sign step."""
        return self.run([[i] for i in drawn], lambda h, rho: np.full(h.shape, rho), np.sign)

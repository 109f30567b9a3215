"""The oracle's probes and update rules beside JAGUAR and ZO-SGD: plain NumPy from the papers.

It imports nothing of the package it checks. Every rule has the signature of `reference.Optimizer.update`; `m` starts as
zeros and may become whatever the rule keeps. Sources: ZO-Bench (arXiv 2402.11592) for momentum, sign, conservative;
ZO-AdaMM (1910.06513); Muon with dense directions (2506.04430, Algorithms 3 and 4); subspace ZO-Muon (2602.17155);
power iteration (2605.09034); LeZO (2410.09823).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from reference import SCALES, Array, Arrays, Probe, Shape, Stream, is_vector, newton_schulz, portion

FACTOR, LAYERS = 4, 5
Float = np.float32


def orthonormal(stream: Stream, rows: int, columns: int) -> Array:
    """Gram-Schmidt of a Gaussian [rows, columns], in float64."""
    g = stream.normal(np.arange(rows * columns)).reshape(rows, columns).astype(np.float64)
    q = np.zeros_like(g)
    for j in range(columns):
        v = g[:, j]
        for _ in range(2):  # twice is enough
            v = v - q[:, :j] @ (q[:, :j].T @ v)
        q[:, j] = v / np.linalg.norm(v)
    return q


@dataclass(frozen=True)
class FactoredProbe:
    """z = U V^T (`orthogonal`) or z = P Psi (`subspace`) of every tensor; a vector is one row."""

    kind: str
    rank: int | None = None
    every: int = 1

    def direction(self, shapes: Sequence[Shape], seed: int, step: int, k: int) -> Arrays:
        found = []
        for i, shape in enumerate(shapes):
            m = shape[0] if len(shape) > 1 else 1
            n = math.prod(shape) // m
            if self.kind == "orthogonal":
                r = min(m, n) if self.rank is None else min(m, n, self.rank)
                z = orthonormal(Stream(seed, step, k, i), m, r) @ orthonormal(Stream(seed, step, k, i, FACTOR), n, r).T
            else:
                r = min(m, self.rank or m)
                window = Stream(seed, step - step % self.every, 0, i, FACTOR)
                psi = Stream(seed, step, k, i).normal(np.arange(r * n)).reshape(r, n)
                z = orthonormal(window, m, r) @ psi.astype(np.float64)
            found.append(z.reshape(shape).astype(Float))
        return found


@dataclass(frozen=True)
class LayersProbe:
    """`inner` on a random share of the layers, which the tensors' names give; zero on the other layers."""

    inner: Any
    share: float
    names: tuple[str, ...] = field(default=())

    def direction(self, shapes: Sequence[Shape], seed: int, step: int, k: int) -> Arrays:
        layers = [match.group(0) if (match := re.match(r".*?\d+(?=\.)", name)) else None for name in self.names]
        known = [layer for i, layer in enumerate(layers) if layer is not None and layer not in layers[:i]]
        count = portion(self.share, len(known)) if known else 0
        chosen = [known[i] for i in Stream(seed, step, 0, 0, LAYERS).choice(len(known), count)] if known else []
        return [
            z if layer is None or layer in chosen else np.zeros_like(z)
            for layer, z in zip(layers, self.inner.direction(shapes, seed, step, k), strict=True)
        ]


def power_iteration(matrix: Array, rank: int, num_sweeps: int = 3) -> Array:
    """U V^T: V <- QR(A^T A V) from a fixed Gaussian, U the polar factor of A V; null directions are left out."""
    a = matrix.astype(np.float64)
    k = min(rank, *a.shape)
    v = Stream(0, 0, 0, 0).normal(np.arange(a.shape[1] * k)).reshape(-1, k).astype(np.float64)
    for _ in range(num_sweeps):
        v = np.linalg.qr(a.T @ (a @ v))[0]
    u, s, wt = np.linalg.svd(a @ v, full_matrices=False)
    return np.asarray((u * (s > 1e-5 * s.max())) @ wt @ v.T, Float)


@dataclass(frozen=True)
class Method:
    """An update rule by its name in the tables."""

    name: str
    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.9
    beta: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    polynomial: str = "quintic"
    power_rank: int = 16
    scale: str = "none"
    sign_names: tuple[str, ...] = ()
    sign_lr_scale: float = 1.0

    def update(self, name: str, x: Array, m: Any, zs: Arrays, rhos: list[float]) -> tuple[Array, Any]:
        """The new (x, m) of one tensor from q directions."""
        total = np.zeros_like(x)
        for z, rho in zip(zs, rhos, strict=True):
            used = float(np.sign(rho)) if self.name in ("zo_sign_rho", "zo_muon_orthogonal") else rho
            total = total + Float(used) * z
        u, m = getattr(self, self.name)(name, total / Float(len(rhos)), m)
        lr = self.lr * self.sign_lr_scale if "muon" in self.name and self.by_sign(name, x) else self.lr
        if self.weight_decay != 0 and not is_vector(name, x):
            u = u + Float(self.weight_decay) * x
        return np.asarray(x - Float(lr) * u, Float), m

    def by_sign(self, name: str, x: Array) -> bool:
        spectral = self.name in ("zo_muon", "zo_muon_subspace")
        named = any(fnmatchcase(name, pattern) for pattern in self.sign_names)
        return spectral and (x.ndim != 2 or is_vector(name, x) or named)

    def plain(self, name: str, g: Array, m: Any) -> tuple[Array, Any]:
        return g, m

    fzoo = zo_sgd_conservative = zo_sign_rho = zo_muon_orthogonal = plain

    def zo_sign_sgd(self, name: str, g: Array, m: Any) -> tuple[Array, Any]:
        return np.sign(g), m

    def zo_sgd_momentum(self, name: str, g: Array, m: Array) -> tuple[Array, Any]:
        v = Float(self.momentum) * m + g
        return v, v

    def zo_adam(self, name: str, g: Array, m: Any) -> tuple[Array, Any]:
        """(t, first moment, second moment, its largest value) in float64."""
        t, first, second, largest = m if isinstance(m, tuple) else (0, np.zeros(g.shape), np.zeros(g.shape), 0.0)
        t, (b1, b2), g = t + 1, self.betas, g.astype(np.float64)
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        largest = np.maximum(largest, second)
        root = np.sqrt((largest if self.amsgrad else second) / (1 - b2**t))
        return (first / (1 - b1**t) / (root + self.eps)).astype(Float), (t, first, second, largest)

    def zo_muon(self, name: str, g: Array, m: Array) -> tuple[Array, Any]:
        m = Float(self.beta) * m + Float(1 - self.beta) * g
        if self.by_sign(name, g):
            return np.sign(m), m
        power = self.polynomial == "power"
        o = power_iteration(m, self.power_rank) if power else newton_schulz(m, self.polynomial)
        return Float(SCALES[self.scale](*m.shape)) * o, m

    zo_muon_subspace = zo_muon  # O(P G) = P O(G): the oracle orthogonalises in the whole space


def oracle_probe(kind: str, names: Sequence[str] = (), **options: Any) -> Any:
    """The oracle's probe for a row of the table with these options."""
    if kind == "layers":
        inner = dict(options.get("inner", {"name": "gaussian"}))
        return LayersProbe(oracle_probe(inner.pop("name"), **inner), options.get("share", 0.25), tuple(names))
    if kind in ("orthogonal", "subspace"):
        rank = options.get("rank", 64 if kind == "subspace" else None)
        return FactoredProbe(kind, rank, options.get("resample_every", 100))
    known = {"rows": "rows", "columns": "cols", "share": "fraction"}
    given = {known[key]: value for key, value in options.items() if key in known}
    if kind == "tensors":
        given.setdefault("fraction", 0.25)
    return Probe(kind, signs="ones" if options.get("signs") == "ones" else "random", **given)

"""Low-rank probes: z = left @ right on every tensor, from factors that every rank draws for itself."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from zoscale.noise.generator import Domain, Key, Noise, Range
from zoscale.noise.segments import Segment
from zoscale.probes.base import DrawnDirection, Piece, Probe
from zoscale.shards import TensorSpec

_BLOCK = 2**16  # about as many elements of z are made by one product of matrices,
_ROWS = 64  # in multiples of so many rows


def product_slice(left: Tensor, right: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flat product left @ right.

    Rows are multiplied in blocks at fixed places, so that a slice has the bits of the whole.

    Args:
        left: [m, r].
        right: [r, n].

    Returns:
        [stop - start].
    """
    width = right.shape[1]
    size = max(_ROWS, _BLOCK // width // _ROWS * _ROWS)
    first = start // width // size * size
    rows = range(first, -(-stop // width), size)
    blocks = torch.cat([left[row : row + size] @ right for row in rows])
    return blocks.view(-1)[start - first * width : stop - first * width]


def orthonormal(noise: Noise, key: Key, wanted: Sequence[tuple[int, int, int]], device: torch.device) -> list[Tensor]:
    """For each (tensor id, m, r): a matrix [m, r] with orthonormal columns, uniform among those.

    Q of a Gaussian matrix's QR decomposition with R's diagonal > 0.
    """
    drawn = noise.normal(key, [Range(tensor, 0, m * r) for tensor, m, r in wanted], device)
    found = []
    for values, (_, m, r) in zip(drawn, wanted, strict=True):
        q, upper = torch.linalg.qr(values.view(m, r))
        found.append(q * torch.where(upper.diagonal() < 0, -1.0, 1.0))
    return found


class FactoredDirection(DrawnDirection):
    """z = left @ right on every tensor; a vector is a matrix of one row. One group's factors are kept at a time.

    Args:
        rank: columns of `left`, at most; None = no limit.
    """

    def __init__(self, noise: Noise, step: int, k: int, rank: int | None) -> None:
        super().__init__(noise, step, k)
        self.rank = rank
        self._kept: tuple[list[TensorSpec], torch.device, list[tuple[Tensor, Tensor]]] | None = None

    @abstractmethod
    def draw_factors(self, specs: Sequence[TensorSpec], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """left [m, r] and right [r, n] of some tensors, float32: the same bits on every rank."""

    def factors(self, specs: list[TensorSpec], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """`draw_factors`; the last ones are kept, for a tensor that is asked for piece by piece."""
        if self._kept is None or self._kept[:2] != (specs, device):
            self._kept = (specs, device, self.draw_factors(specs, device))
        return self._kept[2]

    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        specs = list(dict.fromkeys(piece.shard.spec for piece in group))
        found = dict(zip(specs, self.factors(specs, group[0].shard.truth.device), strict=True))
        values = (product_slice(*found[piece.shard.spec], piece.range.start, piece.range.stop) for piece in group)
        return [Segment(value, is_compiled=self.is_compiled) for value in values]

    def _rank(self, limit: int) -> int:
        return limit if self.rank is None else min(self.rank, limit)


class OrthogonalDirection(FactoredDirection):
    """z = U V^T, U [m, r] and V [n, r] with orthonormal columns."""

    def draw_factors(self, specs: Sequence[TensorSpec], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        ranks = [self._rank(min(spec.rows, spec.columns)) for spec in specs]
        lefts = [(spec.id, spec.rows, rank) for spec, rank in zip(specs, ranks, strict=True)]
        rights = [(spec.id, spec.columns, rank) for spec, rank in zip(specs, ranks, strict=True)]
        u = orthonormal(self.noise, self.key, lefts, device)
        v = orthonormal(self.noise, self.key._replace(domain=Domain.FACTOR), rights, device)
        return [(left, right.mT.contiguous()) for left, right in zip(u, v, strict=True)]


class SubspaceDirection(FactoredDirection):
    """z = P Psi: P [m, r] with orthonormal columns, the same for `every` steps, and Psi [r, n] standard normal."""

    def __init__(self, noise: Noise, step: int, k: int, rank: int, every: int, bases: "Bases") -> None:
        super().__init__(noise, step, k, rank)
        self._window = Key(step // every * every, 0, Domain.FACTOR)
        self._bases = bases

    def draw_factors(self, specs: Sequence[TensorSpec], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        sizes = [(spec.id, spec.rows, self._rank(spec.rows)) for spec in specs]
        ranges = [Range(spec.id, 0, rank * spec.columns) for spec, (*_, rank) in zip(specs, sizes, strict=True)]
        bases = self._bases.of(self.noise, self._window, sizes, device)
        psis = self.noise.normal(self.key, ranges, device)
        return [(basis, psi.view(basis.shape[1], -1)) for basis, psi in zip(bases, psis, strict=True)]


class Bases:
    """`orthonormal`, whose last result is kept: the directions of a step ask for the same one after the other."""

    def __init__(self) -> None:
        self._asked: object = None
        self._found: list[Tensor] = []

    def of(self, noise: Noise, key: Key, wanted: list[tuple[int, int, int]], device: torch.device) -> list[Tensor]:
        """See `orthonormal`."""
        if self._asked != (noise.seed, key, wanted, device):
            self._asked, self._found = (noise.seed, key, wanted, device), orthonormal(noise, key, wanted, device)
        return self._found


class Orthogonal(Probe):
    """z = U V^T with random orthonormal factors (arXiv 2506.04430, Algorithm 4); of a vector, a unit vector.

    The Frobenius norm of z is the root of its rank, far below that of a Gaussian: tau may be larger accordingly.

    Args:
        rank: of z; null is the full rank, min(m, n) of each matrix.
    """

    is_elementwise = False

    def __init__(self, *, rank: int | None = None) -> None:
        self.rank = rank if rank is None else _check("rank", rank)

    def draw(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> OrthogonalDirection:
        return OrthogonalDirection(noise, step, k, self.rank)


class Subspace(Probe):
    """z = P Psi, P a random column-orthonormal basis kept for some steps, Psi Gaussian (arXiv 2602.17155).

    Args:
        rank: columns of P; of a tensor with fewer rows, those.
        resample_every: steps that a basis is kept.
    """

    is_elementwise = False

    def __init__(self, *, rank: int = 64, resample_every: int = 100) -> None:
        self.rank = _check("rank", rank)
        self.resample_every = _check("resample_every", resample_every)
        self._bases = Bases()

    def draw(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> SubspaceDirection:
        return SubspaceDirection(noise, step, k, self.rank, self.resample_every, self._bases)


def _check(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"expected {name} >= 1, got {value}")
    return value

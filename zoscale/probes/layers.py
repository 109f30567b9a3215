"""LeZO's probe: any other probe's z on a random subset of the transformer layers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoscale.config import Method, Table, build
from zoscale.config.merging import Given, Schema
from zoscale.noise.generator import Domain, Key, Noise
from zoscale.noise.segments import Segment
from zoscale.noise.streams import Stream
from zoscale.probes.base import Direction, Patch, Piece, Probe
from zoscale.probes.dense import Gaussian, Rademacher
from zoscale.probes.factored import Orthogonal, Subspace
from zoscale.probes.jaguar import Block, Coordinate, Entry, Row, Tensors, check_share, portion
from zoscale.shards import TensorSpec

PROBES_OF_ALL_LAYERS: Table[Probe] = Table(
    {
        "gaussian": Gaussian,
        "rademacher": Rademacher,
        "coordinate": Coordinate,
        "entry": Entry,
        "row": Row,
        "block": Block,
        "tensors": Tensors,
        "orthogonal": Orthogonal,
        "subspace": Subspace,
    },
    Probe,
)

_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")  # up to the first number in the name


def layer_of(spec: TensorSpec) -> str | None:
    """Name of the transformer layer that a tensor belongs to: `model.layers.3`; None outside all layers."""
    found = _LAYER.match(spec.name)
    return found.group() if found else None


class LayersDirection(Direction):
    """Another direction where it is active, zero elsewhere.

    Args:
        inner: z of the active tensors.
        active: their ids.
    """

    def __init__(self, inner: Direction, active: frozenset[int]) -> None:
        self.inner = inner
        self.active = active

    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        active = [piece for piece in group if piece.shard.spec.id in self.active]
        found = dict(zip(active, self.inner.segments(active), strict=True)) if active else {}
        return [found.get(piece) for piece in group]

    def stream(self, piece: Piece) -> Stream | None:
        return self.inner.stream(piece) if piece.shard.spec.id in self.active else None

    def is_bits(self, piece: Piece) -> bool:
        return self.inner.is_bits(piece)

    def is_patch(self, spec: TensorSpec) -> bool:
        return spec.id in self.active and self.inner.is_patch(spec)

    def patches(self, specs: Sequence[TensorSpec], device: torch.device) -> list[Patch]:
        return self.inner.patches(specs, device)

    def touches(self, spec: TensorSpec) -> bool:
        return spec.id in self.active and self.inner.touches(spec)

    @property
    def is_compiled(self) -> bool:
        return self.inner.is_compiled

    def rounding_words(self, piece: Piece) -> Tensor:
        return self.inner.rounding_words(piece)


class Layers(Probe):
    """Another probe on max(1, floor(share * layers)) random transformer layers per step (LeZO, arXiv 2410.09823).

    Embeddings, the head and whatever lies outside the layers are always active. All directions of a step share the
    layers, so that those before the first active one are computed once.

    Args:
        share: share of the layers that are active, in (0, 1].
        inner: name and options of the probe, as in the section `probe`; null is gaussian.
    """

    def __init__(self, *, share: float = 0.25, inner: dict[str, Any] | None = None) -> None:
        self.share = check_share("share", share)
        self.inner = _build({"name": "gaussian"} if inner is None else inner)
        self.is_elementwise = self.inner.is_elementwise

    def draw(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> LayersDirection:
        layers = list(dict.fromkeys(layer for spec in specs if (layer := layer_of(spec)) is not None))
        chosen: set[str | None] = {None}
        if layers:
            wanted = [(0, len(layers), portion(self.share, len(layers)))]
            (numbers,) = noise.choices(Key(step, 0, Domain.LAYERS), wanted)
            chosen |= {layers[number] for number in numbers.tolist()}
        active = [spec for spec in specs if layer_of(spec) in chosen]
        return LayersDirection(self.inner.draw(noise, active, step, k), frozenset(spec.id for spec in active))


@dataclass(frozen=True)
class _Inner:
    inner: Method


def _build(inner: dict[str, Any]) -> Probe:
    given = Given()
    given.add({"inner": inner}, "the options of the probe layers")
    method: Method = Schema(_Inner, {"inner": PROBES_OF_ALL_LAYERS}, {"inner": "gaussian"}).fill(given).inner
    return build(method, PROBES_OF_ALL_LAYERS)

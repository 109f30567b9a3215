"""Probes: what a direction z looks like and where it lives.

A probe draws one `Direction` per (step, k); the direction gives z on any slice of any tensor without ever holding z
whole. Values and supports are pure functions of (seed; step, k, tensor id, element): see `noise/`. Adding one: a
class with `draw`, and a row in the table of `layers.py`.
"""

from zoscale.config import Table
from zoscale.probes.base import Direction, DrawnDirection, Patch, Piece, Probe, pieces
from zoscale.probes.dense import Gaussian, Rademacher
from zoscale.probes.factored import Orthogonal, Subspace, SubspaceDirection, product_slice
from zoscale.probes.jaguar import Block, Coordinate, Entry, JaguarDirection, JaguarProbe, Row, Tensors
from zoscale.probes.layers import PROBES_OF_ALL_LAYERS, Layers, LayersDirection

PROBES: Table[Probe] = Table({**PROBES_OF_ALL_LAYERS, "layers": Layers}, Probe)

__all__ = [
    "PROBES",
    "Block",
    "Coordinate",
    "Direction",
    "DrawnDirection",
    "Entry",
    "Gaussian",
    "JaguarDirection",
    "JaguarProbe",
    "Layers",
    "LayersDirection",
    "Orthogonal",
    "Patch",
    "Piece",
    "Probe",
    "Rademacher",
    "Row",
    "Subspace",
    "SubspaceDirection",
    "Tensors",
    "pieces",
    "product_slice",
]

"""Zero-order fine-tuning of language models on many GPUs: forward-only, sharded by DeepSpeed ZeRO-3."""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoscale.engine import ZeroOrderEngine
    from zoscale.estimators import NormalizedOneSided, OneSided, TwoPoint
    from zoscale.first_order import FirstOrderEngine
    from zoscale.models.sizes import count_parameters
    from zoscale.optim import (
        FZOO,
        ZOSGD,
        JaguarMuon,
        JaguarSignSGD,
        ZOAdam,
        ZOMuon,
        ZOMuonOrthogonal,
        ZOMuonSubspace,
        ZOSGDConservative,
        ZOSGDMomentum,
        ZOSignRho,
        ZOSignSGD,
    )
    from zoscale.probes import (
        Block,
        Coordinate,
        Entry,
        Gaussian,
        Layers,
        Orthogonal,
        Rademacher,
        Row,
        Subspace,
        Tensors,
    )
    from zoscale.release.export import save_trained
    from zoscale.runtime import Runtime, start, stop
    from zoscale.step import StepResult

__version__ = "0.1.0"

if Path("/sys/kernel/mm/transparent_hugepage").is_dir():
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it is imported: CPU tensors in huge pages

_HOMES = {
    "engine": ("ZeroOrderEngine",),
    "estimators": ("NormalizedOneSided", "OneSided", "TwoPoint"),
    "release.export": ("save_trained",),
    "first_order": ("FirstOrderEngine",),
    "models.sizes": ("count_parameters",),
    "optim": (
        "FZOO",
        "ZOSGD",
        "JaguarMuon",
        "JaguarSignSGD",
        "ZOAdam",
        "ZOMuon",
        "ZOMuonOrthogonal",
        "ZOMuonSubspace",
        "ZOSGDConservative",
        "ZOSGDMomentum",
        "ZOSignRho",
        "ZOSignSGD",
    ),
    "probes": (
        "Block",
        "Coordinate",
        "Entry",
        "Gaussian",
        "Layers",
        "Orthogonal",
        "Rademacher",
        "Row",
        "Subspace",
        "Tensors",
    ),
    "runtime": ("Runtime", "start", "stop"),
    "step": ("StepResult",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "FZOO",
    "ZOSGD",
    "Block",
    "Coordinate",
    "Entry",
    "FirstOrderEngine",
    "Gaussian",
    "JaguarMuon",
    "JaguarSignSGD",
    "Layers",
    "NormalizedOneSided",
    "OneSided",
    "Orthogonal",
    "Rademacher",
    "Row",
    "Runtime",
    "StepResult",
    "Subspace",
    "Tensors",
    "TwoPoint",
    "ZOAdam",
    "ZOMuon",
    "ZOMuonOrthogonal",
    "ZOMuonSubspace",
    "ZOSGDConservative",
    "ZOSGDMomentum",
    "ZOSignRho",
    "ZOSignSGD",
    "ZeroOrderEngine",
    "count_parameters",
    "save_trained",
    "start",
    "stop",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `zoscale --help` stays quick."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'zoscale' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zoscale.{_HOME_OF[name]}"), name)

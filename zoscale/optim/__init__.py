"""Update rules. Adding one: a class with `update` (`ElementwiseOptimizer`: `direction`), and a row in the table."""

from zoscale.config import Table
from zoscale.optim.base import ZeroOrderOptimizer
from zoscale.optim.elementwise import ElementwiseOptimizer
from zoscale.optim.jaguar import JaguarMuon, JaguarSignSGD
from zoscale.optim.newton_schulz import orthogonalize
from zoscale.optim.sharded import ShardedOptimizer, Shared
from zoscale.optim.zo_adam import ZOAdam
from zoscale.optim.zo_conservative import ZOSGDConservative
from zoscale.optim.zo_muon import ZOMuon, ZOMuonSubspace
from zoscale.optim.zo_sgd import FZOO, ZOSGD, ZOSGDMomentum
from zoscale.optim.zo_sign import ZOMuonOrthogonal, ZOSignRho, ZOSignSGD

OPTIMIZERS: Table[ZeroOrderOptimizer] = Table(
    {
        "zo_sgd": ZOSGD,
        "zo_sgd_momentum": ZOSGDMomentum,
        "zo_sgd_conservative": ZOSGDConservative,
        "zo_sign_sgd": ZOSignSGD,
        "zo_sign_rho": ZOSignRho,
        "zo_adam": ZOAdam,
        "fzoo": FZOO,
        "zo_muon": ZOMuon,
        "zo_muon_orthogonal": ZOMuonOrthogonal,
        "zo_muon_subspace": ZOMuonSubspace,
        "jaguar_sign_sgd": JaguarSignSGD,
        "jaguar_muon": JaguarMuon,
    },
    ZeroOrderOptimizer,
)

__all__ = [
    "FZOO",
    "OPTIMIZERS",
    "ZOSGD",
    "ElementwiseOptimizer",
    "JaguarMuon",
    "JaguarSignSGD",
    "ShardedOptimizer",
    "Shared",
    "ZOAdam",
    "ZOMuon",
    "ZOMuonOrthogonal",
    "ZOMuonSubspace",
    "ZOSGDConservative",
    "ZOSGDMomentum",
    "ZOSignRho",
    "ZOSignSGD",
    "ZeroOrderOptimizer",
    "orthogonalize",
]

"""Update rules. Adding one: a class with `update`, and a row in the table."""

from zoscale.optim.base import ZeroOrderOptimizer
from zoscale.optim.jaguar import JaguarMuon, JaguarSignSGD
from zoscale.optim.newton_schulz import orthogonalize
from zoscale.optim.zo_sgd import ZOSGD

OPTIMIZERS: dict[str, type[ZeroOrderOptimizer]] = {
    "zo_sgd": ZOSGD,
    "jaguar_sign_sgd": JaguarSignSGD,
    "jaguar_muon": JaguarMuon,
}

__all__ = ["OPTIMIZERS", "ZOSGD", "JaguarMuon", "JaguarSignSGD", "ZeroOrderOptimizer", "orthogonalize"]

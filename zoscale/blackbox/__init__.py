"""JAGUAR for black-box problems (arXiv 2409.10442): minimise any callable from its values, on a convex set or freely.

    from zoscale import blackbox

    oracle = blackbox.Oracle(lambda x: (x - 0.3).square().sum())
    update = blackbox.FrankWolfe(blackbox.Simplex())
    result = blackbox.minimize(oracle, [1.0, 0.0, 0.0], blackbox.JaguarD(), update, max_calls=10_000)
    print(result.x, result.num_calls)

Plain tensors, float64 unless the start is of another floating type; one process, no model. Nothing reads or writes the
global generators: a run is a function of its seeds.
"""

from zoscale.blackbox.descent import FrankWolfe, GradientDescent, Iterate, NotFiniteError, Update, iterate, minimize
from zoscale.blackbox.estimators import (
    SPSA,
    Averaged,
    FullDifferences,
    GradientEstimator,
    JaguarD,
    JaguarS,
    SphereSmoothing,
)
from zoscale.blackbox.oracle import Minibatches, Oracle
from zoscale.blackbox.sets import ConvexSet, L1Ball, L2Ball, Simplex

__all__ = [
    "SPSA",
    "Averaged",
    "ConvexSet",
    "FrankWolfe",
    "FullDifferences",
    "GradientDescent",
    "GradientEstimator",
    "Iterate",
    "JaguarD",
    "JaguarS",
    "L1Ball",
    "L2Ball",
    "Minibatches",
    "NotFiniteError",
    "Oracle",
    "Simplex",
    "SphereSmoothing",
    "Update",
    "iterate",
    "minimize",
]

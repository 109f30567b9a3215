"""The methods that a configuration can name: section -> name -> class."""

from typing import Any

from zoscale.config import Table
from zoscale.estimators import ESTIMATORS, Backpropagation, Estimator
from zoscale.optim import OPTIMIZERS, ZeroOrderOptimizer
from zoscale.optim.first_order import FIRST_ORDER
from zoscale.probes import PROBES, Probe
from zoscale.probes.gradient import Gradient
from zoscale.tasks import TASKS

TABLES: dict[str, Table[Any]] = {
    "task": TASKS,
    "probe": Table({**PROBES, "gradient": Gradient}, Probe),
    "estimator": Table({**ESTIMATORS, "backpropagation": Backpropagation}, Estimator),
    "optimizer": Table({**OPTIMIZERS, **FIRST_ORDER}, ZeroOrderOptimizer),
}
DEFAULTS = {"task": "sst2", "probe": "block", "estimator": "two_point", "optimizer": "jaguar_muon"}

"""The methods that a configuration can name: section -> name -> class."""

from zoscale.estimators import ESTIMATORS, Backpropagation
from zoscale.optim import OPTIMIZERS
from zoscale.optim.first_order import FIRST_ORDER
from zoscale.probes import PROBES
from zoscale.probes.gradient import Gradient
from zoscale.tasks import TASKS

TABLES: dict[str, dict[str, type]] = {
    "task": dict(TASKS),
    "probe": {**PROBES, "gradient": Gradient},
    "estimator": {**ESTIMATORS, "backpropagation": Backpropagation},
    "optimizer": {**OPTIMIZERS, **FIRST_ORDER},
}
DEFAULTS = {"task": "sst2", "probe": "block", "estimator": "two_point", "optimizer": "jaguar_muon"}

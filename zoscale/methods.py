"""The methods that a configuration can name: section -> name -> class."""

from zoscale.estimators import ESTIMATORS
from zoscale.optim import OPTIMIZERS
from zoscale.probes import PROBES
from zoscale.tasks import TASKS

TABLES: dict[str, dict[str, type]] = {
    "task": dict(TASKS),
    "probe": dict(PROBES),
    "estimator": dict(ESTIMATORS),
    "optimizer": dict(OPTIMIZERS),
}
DEFAULTS = {"task": "sst2", "probe": "block", "estimator": "two_point", "optimizer": "jaguar_muon"}

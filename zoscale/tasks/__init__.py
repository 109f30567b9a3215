"""Tasks by name. Adding one: a class with `example`, and a row in the table."""

from zoscale.tasks.base import Example, Task
from zoscale.tasks.classification import SST2, Classification
from zoscale.tasks.completion import Completion

TASKS: dict[str, type[Task]] = {"sst2": SST2, "classification": Classification, "completion": Completion}

__all__ = ["SST2", "TASKS", "Classification", "Completion", "Example", "Task"]

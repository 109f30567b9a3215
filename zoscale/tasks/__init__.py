"""Tasks by name. Adding one: a class with `example`, and a row in the table."""

from zoscale.config import Table
from zoscale.tasks.base import Example, Task, demonstrate
from zoscale.tasks.classification import SST2, Classification
from zoscale.tasks.completion import Completion
from zoscale.tasks.multiple_choice import COPA, MultipleChoice, ReCoRD, WinoGrande
from zoscale.tasks.question_answering import DROP, SQuAD
from zoscale.tasks.superglue import CB, RTE, WIC, WSC, BoolQ, MultiRC

TASKS: Table[Task] = Table(
    {
        "sst2": SST2,
        "rte": RTE,
        "cb": CB,
        "boolq": BoolQ,
        "wsc": WSC,
        "wic": WIC,
        "multirc": MultiRC,
        "copa": COPA,
        "record": ReCoRD,
        "winogrande": WinoGrande,
        "squad": SQuAD,
        "drop": DROP,
        "classification": Classification,
        "multiple_choice": MultipleChoice,
        "completion": Completion,
    },
    Task,
)

__all__ = ["SST2", "TASKS", "Classification", "Completion", "Example", "Task", "demonstrate"]

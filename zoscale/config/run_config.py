"""The configuration of a run: frozen dataclasses filled from defaults < YAML files < command-line overrides.

    config = parse(["--config", "run.yaml", "optimizer.lr=1e-3"], tables, defaults)
    optimizer = build(config.optimizer, OPTIMIZERS, params)

The task, probe, estimator and optimizer are `Method`s: a name in a table that the caller passes in (the
classes live in higher layers), and the keyword-only arguments of that class.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from zoscale.config.command_line import help_text, read_command_line
from zoscale.config.merging import Given, Schema, Tables
from zoscale.config.schema import Method
from zoscale.config.sections import (
    CheckpointConfig,
    DataConfig,
    ForwardConfig,
    Master,
    MeshConfig,
    ModelConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
)
from zoscale.config.strict_yaml import ConfigError, did_you_mean, dump_yaml, plain, show
from zoscale.config.table import choices

T = TypeVar("T")
DEFAULT_ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
    "weight_lora": {
        "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"],
        "keep": 8, "warmup_steps": 100, "expansions": 0, "expand_every": 100,
    },
    "prefix_tuning": {"num_virtual_tokens": 5, "init_weights": "zero"},
    "prompt_tuning": {"num_virtual_tokens": 10, "prompt_tuning_init": "SAMPLE_VOCAB"},
    "ia3": {},
    "ln_tuning": {"target_modules": r".*\.(\w*norm\w*|ln_\w+)"},  # PEFT's own list lacks OPT
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: everything that decides what is computed, and where it goes.

    Args:
        name: Name of the run; the start of its folder's name.
        seed: Seed of every random number, 0 to 2**63 - 1.
        output_dir: Folder of run folders.
        resume: auto continues the run of the same configuration if there is one, never refuses to; or the folder of
            a run, or of one of its checkpoints, to continue.
        overwrite: Delete the folder of an earlier run with the same configuration and start again.
        adapter: What is trained beside the frozen model: peft_type (lora, weight_lora, prefix_tuning, prompt_tuning,
            ia3 or ln_tuning; left out, lora) and fields of its configuration in PEFT, over the default ones of this
            package (lora: r 8, lora_alpha 16, on q_proj and v_proj); weight_lora has those of lora and keep,
            warmup_steps, expansions and expand_every. null trains the model's own weights.
        trainable: Regular expression, searched in names of the model's own weights: those that are trained if adapter
            is null; null is all of them.
        master: Type of the master copy of trainable weights in 16 bits, which updates go to; none keeps no copy;
            stochastic keeps none either, and updates of 16-bit weights are rounded up or down at random, without bias.
        objective: What is minimized: classification, the loss of the answer among the candidates; lm, that of its
            tokens; or 1 - a score of the chosen or generated text: accuracy, f1, exact_match, or module:function, any
            function (answer, accepted answers) -> number. Left out in files and on the command line, it is lm for tasks
            whose options differ from record to record or whose answer is written.
    """

    brings: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {"adapter": {"estimator": {"tau": 1e-2}}}
    """By field, options of method sections whose defaults are others unless it is null."""

    name: str = "run"
    seed: int = 0
    output_dir: str = "runs"
    resume: str = "auto"
    overwrite: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: dict[str, Any] | None = field(default_factory=dict)
    trainable: str | None = None
    master: Master = "fp32"
    objective: str = "classification"
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    task: Method
    probe: Method
    estimator: Method
    optimizer: Method

    def __post_init__(self) -> None:
        if self.adapter is not None:  # so that a partial adapter means the same in Python and in YAML
            defaults = DEFAULT_ADAPTERS.get(str(self.adapter.get("peft_type", "lora")), {})
            object.__setattr__(self, "adapter", plain({**defaults, **self.adapter}, "adapter"))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], tables: Tables, defaults: Mapping[str, str]) -> Self:
        """The configuration that `tree` (the shape of `to_dict`, any part left out) gives; see `parse`."""
        given = Given()
        given.add(plain(dict(tree), "the configuration"), "the configuration")
        config: Self = _filled(Schema(cls, tables, defaults), given)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, complete: `from_dict` of them is equal to this."""
        tree = dataclasses.asdict(self)
        for key, value in tree.items():
            if isinstance(getattr(self, key), Method):
                tree[key] = {"name": value["name"], **value["args"]}
        return tree

    def to_yaml(self) -> str:
        """`to_dict` as YAML."""
        return dump_yaml(self.to_dict())

    @property
    def hash(self) -> str:
        """Ten hex digits that name what is computed.

        Left out, because they change where results go, how long one waits or who computes, not what is computed:
        name, output_dir, resume, overwrite, checkpoint, tracking, train.log_every, of mesh all but candidates, which
        shapes the passes, and of runtime all but deepspeed and noise. Of a model, tokenizer or DeepSpeed file the path
        counts, not its content; of a function or class of the user's its name. Equal numbers count alike: 1 is 1.0.
        """
        text = json.dumps(_canonical(self.identity()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def identity(self) -> dict[str, Any]:
        """The part of `to_dict` that `hash` names."""
        tree = self.to_dict()
        for key in ("name", "output_dir", "resume", "overwrite", "checkpoint", "tracking"):
            del tree[key]
        tree["mesh"] = {"candidates": tree["mesh"]["candidates"]}
        del tree["train"]["log_every"]
        if tree["train"]["select_by"] is None:  # as before there was such a key
            del tree["train"]["select_by"]
        for key in ("timeout_minutes", "stall_seconds", "threads"):
            del tree["runtime"][key]
        return tree

    @property
    def run_dir(self) -> Path:
        """The folder of this run: same configuration, same folder."""
        return Path(self.output_dir) / f"{self.name}-{self.hash}"

    @property
    def modules(self) -> list[str]:
        """Those of the user's that are named, as `module:Class` and `module:function`."""
        named = (value for key, value in self.flatten().items() if key == "objective" or key.endswith(".name"))
        return sorted({value.partition(":")[0] for value in named if isinstance(value, str) and ":" in value})

    def flatten(self) -> dict[str, str | int | float | bool | None]:
        """Dotted keys to scalars, as MLflow parameters are; lists and empty mappings as JSON text."""
        return flatten(self.to_dict())


def flatten(tree: Mapping[str, Any]) -> dict[str, str | int | float | bool | None]:
    """Dotted keys to scalars; lists and empty mappings as JSON text."""
    return dict(_leaves(dict(tree), ""))


def _canonical(value: Any) -> Any:
    """Equal numbers alike: 1.0 becomes 1."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _leaves(value: Any, prefix: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        below = ((f"{prefix}.{key}" if prefix else key, item) for key, item in value.items())
        return [leaf for key, item in below for leaf in _leaves(item, key)]
    return [(prefix, json.dumps(value) if isinstance(value, dict | list | tuple) else value)]


# ------------------------------------------------------------ reading


def parse(
    argv: Sequence[str],
    tables: Tables,
    defaults: Mapping[str, str],
    *,
    command: str = "zoscale train",
    base: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration that a command line gives: defaults < base < --config files, left to right < overrides.

    Args:
        argv: `[--config FILE]... [key=value]...`; --help and --print-config print and exit with status 0.
        tables: For each method section (task, probe, estimator, optimizer), its classes by name.
        defaults: For each method section, the name that is used when none is given.
        command: What the user typed before `argv`, for --help.
        base: A configuration to start from, or any part of one.

    Raises:
        ConfigError: The command line or a file is wrong.
    """
    line = read_command_line(argv)
    schema = Schema(RunConfig, tables, defaults)
    if "--help" in line.flags:
        print(help_text(schema, f"usage: {command} {_USAGE}"))
        raise SystemExit(0)
    given = line.given(base or {}, schema.whole)
    config: RunConfig = _filled(schema, given)
    if given.left_out and os.environ.get("RANK", "0") == "0":
        left_out = ", ".join(f"{key} (from {given.source(key)})" for key in given.left_out)
        print(f"{command}: left out, because what was chosen later has none: {left_out}", file=sys.stderr)
    if "--print-config" in line.flags:
        print(config.to_yaml(), end="")
        raise SystemExit(0)
    return config


def _filled(schema: Schema, given: Given) -> Any:
    """The configuration that was given, checked; an objective that was not is the task's usual one."""
    config = schema.fill(given)
    if "objective" not in given.values:
        usual = getattr(schema.tables["task"][config.task.name], "objectives", ("classification",))
        config = dataclasses.replace(config, objective=usual[0])
    validate(config)
    return config


_USAGE = """[--config FILE]... [key=value]... [--print-config] [--help]

Defaults < --config files, left to right < overrides. An override is key=value, --key=value or --key value.
--config FILE    YAML with the keys below as nested mappings
--print-config   print the resolved configuration as YAML and exit
"""


def build(method: Method, table: Mapping[str, type[T]], *positional: Any) -> T:
    """The object that `method` names: its class in `table`, called with `positional` and its arguments."""
    if method.name not in table:
        remedy = did_you_mean(method.name, table, "choose one of them")
        raise ConfigError(f"one of {choices(table)}", show(method.name), remedy)
    try:
        return table[method.name](*positional, **plain(method.args, method.name))
    except TypeError as error:
        if ":" not in method.name:
            raise
        remedy = "give it an __init__ that does, as the package's own"
        raise ConfigError(
            f"{method.name} to call its base's __init__ with what that takes", str(error), remedy
        ) from error


# ------------------------------------------------------------ checking


_MINIMUM = {
    "seed": 0, "data.batch_size": 1, "data.micro_batch_size": 1, "data.num_train": 1, "data.num_dev": 0,
    "data.num_validation": 1, "data.num_demonstrations": 0, "data.max_length": 1, "data.length_window": 1,
    "train.steps": 0, "train.eval_every": 0,
    "train.log_every": 1, "train.eval_micro_batch_size": 1, "train.max_skipped_in_row": 0,
    "schedule.warmup_steps": 0, "runtime.threads": 1, "checkpoint.every": 0, "checkpoint.keep": 1,
    "checkpoint.journal_sync_every": 1, "mesh.shard_size": 1, "mesh.candidates": 1,
    "forward.max_rows": 1, "data.pad_to_multiple_of": 1, "mesh.check_every": 1,
}  # fmt: skip
_MAXIMUM = {"runtime.threads": 1024, "runtime.timeout_minutes": 1e6, "data.length_window": 10_000}
"""What more would only overflow, or take for ever."""


def validate(config: RunConfig) -> None:
    """Raise `ConfigError` for values that are of the right type and yet impossible, alone or together."""
    values = config.flatten()
    for key, minimum in _MINIMUM.items():
        value = values[key]
        if isinstance(value, int) and value < minimum:
            raise ConfigError(f"{key} to be at least {minimum}", str(value), "raise it")
    for key, maximum in _MAXIMUM.items():
        value = values[key]
        if isinstance(value, int | float) and value > maximum:
            raise ConfigError(f"{key} to be at most {maximum:,.0f}", str(value), "lower it")
    for key in ("output_dir", "tracking.experiment", "tracking.uri"):
        name = values[key]
        if isinstance(name, str) and (not name.strip() or "\0" in name):  # blank, as an unset variable of a shell
            raise ConfigError(f"{key} to be a name", show(name), f"give it, or leave {key} out")
    model, data, schedule = config.model, config.data, config.schedule
    if (model.id is None) == (model.config is None):
        got = "neither" if model.id is None else f"both (model.id={show(model.id)})"
        raise ConfigError("exactly one of model.id and model.config", got, "set one, and the other to null")
    if config.adapter is not None and config.trainable is not None:
        got = f"trainable={show(config.trainable)} and an adapter"
        raise ConfigError("trainable to name weights of a model without an adapter", got, "set adapter=null")
    if data.batch_size % data.micro_batch_size:
        got = f"data.batch_size={data.batch_size} and data.micro_batch_size={data.micro_batch_size}"
        raise ConfigError("a micro-batch size that divides the batch size", got, "change one of them")
    if schedule.warmup_steps > config.train.steps:
        got = f"schedule.warmup_steps={schedule.warmup_steps} and train.steps={config.train.steps}"
        raise ConfigError("a warmup that ends within the run", got, "shorten the warmup")
    if schedule.name == "constant" and schedule.warmup_steps:
        got = f"schedule.warmup_steps={schedule.warmup_steps} with schedule.name=constant"
        raise ConfigError("no warmup", got, "use constant_with_warmup, or schedule.warmup_steps=0")
    for key in ("runtime.timeout_minutes", "runtime.stall_seconds"):
        if not 0 < float(values[key] or 0) < math.inf:
            raise ConfigError(f"{key} above 0", str(values[key]), "raise it")
    if config.forward.max_rows is not None and config.forward.name == "sequential":
        got = f"forward.max_rows={config.forward.max_rows} and forward.name=sequential"
        raise ConfigError("forward.max_rows with a forward that fans out", got, "drop one of them")
    if model.revision is not None and model.config is not None:
        got = f"model.revision={show(model.revision)} and model.config"
        raise ConfigError("model.revision beside model.id", got, "drop model.revision")
    if config.overwrite and config.resume not in ("auto", "never"):
        got = f"overwrite=true and resume={config.resume}"
        raise ConfigError("either a run to continue or one to overwrite", got, "drop one of them")
    if not re.fullmatch(r"[\w.-]+", config.name):
        expected = "name to be letters, digits, '.', '_' or '-'"
        raise ConfigError(expected, show(config.name), "rename the run, it names a folder")

"""One training run: from a configuration to a finished run directory."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from zoscale import runtime
from zoscale.config import ConfigError, RunConfig, build
from zoscale.data import Encoder, Splits
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import ESTIMATORS
from zoscale.export import save_trained
from zoscale.mesh import Mesh
from zoscale.models import (
    ModelSize,
    add_adapter,
    check_model_config,
    count_parameters,
    load_model,
    load_tokenizer,
    read_model_config,
)
from zoscale.objectives import OBJECTIVES
from zoscale.optim import OPTIMIZERS
from zoscale.probes import PROBES
from zoscale.provenance import commit, facts
from zoscale.run_directory import claim, write_json
from zoscale.shards import ShardedParam, TensorSpec, local_bytes
from zoscale.tasks import TASKS, Task
from zoscale.tracking import NullTracker, Tracker
from zoscale.trainer import Log, Trainer


@dataclass(frozen=True)
class Plan:
    """All of a run that can be known, and refused, before any process group starts."""

    task: Task
    encoder: Encoder
    splits: Splits
    architecture: Any
    size: ModelSize
    deepspeed: dict[str, Any]


def plan(config: RunConfig) -> Plan:
    """Check the configuration and read everything but the weights.

    Raises:
        ConfigError: what is wrong, and what to do.
    """
    task = _check_methods(config)
    check_model_config(config.model, config.adapter)
    if config.model.dtype == "float16" and not torch.cuda.is_available():
        raise ConfigError("model.dtype bfloat16 or float32 on a CPU", "float16", "set model.dtype")
    deepspeed = runtime.read_deepspeed_config(config.runtime.deepspeed)
    architecture = read_model_config(config.model)
    encoder = Encoder(load_tokenizer(config.model), config.data.max_length)
    splits = Splits.of(task, config.data, config.seed)
    encoder.check([*splits.train, *splits.dev, *splits.validation])
    size = count_parameters(architecture, trust_remote_code=config.model.trust_remote_code)
    return Plan(task, encoder, splits, architecture, size, deepspeed)


def _check_methods(config: RunConfig) -> Task:
    try:
        task: Task = build(config.task, TASKS)
        build(config.probe, PROBES)
        build(config.estimator, ESTIMATORS)
        for shape in ((1, 1), (1,)):
            example = ShardedParam(nn.Parameter(torch.zeros(shape)), TensorSpec(0, "example", shape))
            build(config.optimizer, OPTIMIZERS, [example])
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError("options that the method takes", str(error), "correct the configuration") from error
    if config.objective not in task.objectives:
        wanted = f"objective {' or '.join(task.objectives)} for task {config.task.name}"
        raise ConfigError(wanted, config.objective, "set objective")
    return task


def run(config: RunConfig) -> dict[str, Any]:
    """Train as configured. Every rank calls it; rank 0 writes `config.run_dir` and prints.

    After an error the process group is left as it is, so that a rank that fails alone ends at once and its launcher
    ends the others.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        ConfigError: if the configuration cannot be run.
        FloatingPointError: if the loss stays not finite.
    """
    made = plan(config)
    accelerator = runtime.start(
        runtime.Runtime(
            dtype=config.model.dtype,
            deepspeed=made.deepspeed,
            timeout_minutes=config.runtime.timeout_minutes,
            threads=config.runtime.threads,
        ),
        size=made.size,
    )
    _claim_together(config, Mesh(accelerator.device))
    engine = _engine(config, made.architecture, accelerator)
    _describe(config, engine, made)
    tracker = _tracker(config, engine)
    status = "FAILED"
    try:
        summary = _train(config, made, engine, tracker)
        status = "FINISHED"
    finally:
        tracker.finish(status)
    runtime.stop()
    return summary


def _train(config: RunConfig, made: Plan, engine: ZeroOrderEngine, tracker: Tracker) -> dict[str, Any]:
    trainer = Trainer(config, engine, made.task, made.splits, made.encoder, tracker, say(engine))
    summary = trainer.run()
    folder = config.run_dir / "adapter"
    save_trained(engine, folder)
    summary |= facts(config)
    if engine.mesh.is_main:
        write_json(config.run_dir / "summary.json", summary)
        tracker.log_artifact(config.run_dir / "summary.json")
        if config.adapter is None:  # a whole model: usable as it lies, and too large to copy unasked
            made.encoder.tokenizer.save_pretrained(folder)
        else:
            tracker.log_artifacts(folder, "adapter")
        _conclude(config, summary, made, tracker)
    return summary


def _engine(config: RunConfig, architecture: Any, accelerator: Accelerator) -> ZeroOrderEngine:
    _seed(config.seed)
    model = add_adapter(load_model(config.model, architecture), config.adapter)
    return ZeroOrderEngine(
        model,
        accelerator=accelerator,
        optimizer=lambda shards, mesh: build(config.optimizer, OPTIMIZERS, shards, mesh),
        probe=build(config.probe, PROBES),
        estimator=build(config.estimator, ESTIMATORS),
        objective=OBJECTIVES[config.objective],
        seed=config.seed,
        master=config.master,
        noise=config.runtime.noise,
    )


def _seed(seed: int) -> None:
    """Seed the generators that initialise weights (random models, LoRA's A); training itself reads none."""
    from accelerate.utils import set_seed

    set_seed(seed % 2**32)


def _claim_together(config: RunConfig, mesh: Mesh) -> None:
    """Rank 0 makes the run directory; a refusal is every rank's."""
    refusal: ConfigError | None = None
    if mesh.is_main:
        try:
            claim(config.run_dir, config.overwrite)
            (config.run_dir / "config.yaml").write_text(config.to_yaml())
        except ConfigError as error:
            refusal = error
        except OSError as error:
            refusal = ConfigError(f"a writable folder {config.run_dir}", str(error), "set output_dir")
    refusal = mesh.broadcast(refusal)
    if refusal is not None:
        raise refusal


def _tracker(config: RunConfig, engine: ZeroOrderEngine) -> Tracker:
    if not engine.mesh.is_main:
        return NullTracker()
    return Tracker.start(
        config.run_dir,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        run_name=config.run_dir.name,
        params=config.flatten(),
        tags={"git_commit": commit(), **config.tracking.tags},
        enabled=config.tracking.mlflow,
    )


def _describe(config: RunConfig, engine: ZeroOrderEngine, made: Plan) -> None:
    """What will be trained, with the memory to expect, before the first step."""
    size, splits = made.size, made.splits
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[config.model.dtype]
    resident = engine.mesh.gather_objects(local_bytes(engine.model))
    slices = engine.mesh.gather_objects(sum(len(shard) for shard in engine.shards))
    masters = max(slices) * 4 if config.master == "fp32" else 0
    largest = max(size.largest_block, size.outside_blocks) * width
    log = say(engine)
    log(f"run directory: {config.run_dir}")
    log(
        f"model: {size.total:,} parameters, {config.model.dtype}; trainable: {engine.num_trainable:,} in "
        f"{len(engine.specs)} tensors; ranks: {engine.mesh.world_size}; slices: {slices}"
    )
    log(
        f"expected memory per rank: {_mb(max(resident))} shard + {_mb(masters)} master + about {_mb(largest)} gathered "
        "+ activations + optimizer state"
    )
    log(
        f"data: {len(splits.train)} train, {len(splits.dev)} dev (held out of train; chooses the step), "
        f"{len(splits.validation)} validation"
    )
    method = f"{config.optimizer.name}, {config.probe.name} probe, {config.estimator.name}"
    log(f"method: {method}, {engine.estimator.num_candidates} forwards per step, {config.train.steps} steps")


def _conclude(config: RunConfig, summary: dict[str, Any], made: Plan, tracker: Tracker) -> None:
    validation, name = summary["validation"], made.task.select_by
    if made.encoder.num_truncated:
        print(f"{made.encoder.num_truncated} rows were cut to data.max_length={config.data.max_length} tokens")
    print(
        f"validation {name}: {validation['before'][name]:.4f} before, {validation['chosen'][name]:.4f} after "
        f"({validation['before']['count']} examples)"
    )
    peaks = [_mb(rank["peak_memory_bytes"]) for rank in summary["ranks"]]
    print(
        f"{summary['steps_per_second']:.2f} steps/s, {summary['tokens_per_second']:.0f} tokens/s; "
        f"peak memory while training: {', '.join(peaks)}"
    )
    print(f"{'adapter' if config.adapter is not None else 'model'}: {config.run_dir / 'adapter'}")
    print(f"summary: {config.run_dir / 'summary.json'}")
    print(f"to compare runs: {tracker.how_to_open()}")


def say(engine: ZeroOrderEngine) -> Log:
    """A print that does not tear the progress bar; silent on other ranks."""
    return tqdm.write if engine.mesh.is_main else lambda _: None


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"

"""One training run: from a configuration to a finished run directory."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
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
from zoscale.shards import ShardedParam, TensorSpec, local_bytes
from zoscale.tasks import TASKS, Task
from zoscale.tracking import NullTracker, Tracker
from zoscale.trainer import Trainer, claim, write_json

_PACKAGES = ("zoscale", "torch", "deepspeed", "accelerate", "transformers", "peft", "datasets", "mlflow")


def check(config: RunConfig) -> Task:
    """Everything that can be refused before any process group starts.

    Raises:
        ConfigError: what is wrong, and what to do.
    """
    try:
        task: Task = build(config.task, TASKS)
        build(config.probe, PROBES)
        build(config.estimator, ESTIMATORS)
        example = ShardedParam(nn.Parameter(torch.zeros(1, 1)), TensorSpec(0, "example", (1, 1)))
        build(config.optimizer, OPTIMIZERS, [example])
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError("options that the method takes", str(error), "correct the configuration") from error
    if config.objective not in task.objectives:
        raise ConfigError(
            f"objective {' or '.join(task.objectives)} for task {config.task.name}", config.objective, "set objective"
        )
    check_model_config(config.model, config.adapter)
    runtime.read_deepspeed_config(config.runtime.deepspeed)
    return task


def run(config: RunConfig) -> dict[str, Any]:
    """Train as configured. Every rank calls it; rank 0 writes `config.run_dir` and prints.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        ConfigError: if the configuration cannot be run.
        FloatingPointError: if the loss stays not finite.
    """
    task = check(config)
    architecture = read_model_config(config.model)
    size = count_parameters(architecture)
    accelerator = runtime.start(
        runtime.Runtime(
            dtype=config.model.dtype,
            deepspeed=runtime.read_deepspeed_config(config.runtime.deepspeed),
            timeout_minutes=config.runtime.timeout_minutes,
            threads=config.runtime.threads,
        ),
        size=size,
    )
    try:
        return _run(config, task, architecture, size, accelerator)
    finally:
        runtime.stop()


def _run(config: RunConfig, task: Task, architecture: Any, size: ModelSize, accelerator: Accelerator) -> dict[str, Any]:
    encoder = Encoder(load_tokenizer(config.model), config.data.max_length)
    splits = Splits.of(task, config.data, config.seed)
    engine = _engine(config, architecture, accelerator)
    _claim_together(config, engine)
    _describe(config, engine, size, splits)
    tracker = _tracker(config, engine)
    status = "FAILED"
    try:
        trainer = Trainer(config, engine, task, splits, encoder, tracker, say(engine))
        summary = trainer.run()
        save_trained(engine, config.run_dir / "adapter")
        summary |= facts(config)
        if engine.mesh.is_main:
            write_json(config.run_dir / "summary.json", summary)
            tracker.log_artifacts(config.run_dir / "adapter", "adapter")
            tracker.log_artifact(config.run_dir / "summary.json")
            _conclude(config, summary, encoder, tracker)
        status = "FINISHED"
        return summary
    finally:
        tracker.finish(status)


def _engine(config: RunConfig, architecture: Any, accelerator: Accelerator) -> ZeroOrderEngine:
    accelerate_seed(config.seed)
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


def accelerate_seed(seed: int) -> None:
    """Seed the generators that initialise weights (random models, LoRA's A); training itself reads none."""
    from accelerate.utils import set_seed

    set_seed(seed % 2**32)


def _claim_together(config: RunConfig, engine: ZeroOrderEngine) -> None:
    """Rank 0 makes the run directory; a refusal is every rank's."""
    refusal: ConfigError | None = None
    if engine.mesh.is_main:
        try:
            claim(config.run_dir, config.overwrite)
            (config.run_dir / "config.yaml").write_text(config.to_yaml())
        except ConfigError as error:
            refusal = error
        except OSError as error:
            refusal = ConfigError(f"a writable folder {config.run_dir}", str(error), "set output_dir")
    refusal = engine.mesh.broadcast(refusal)
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


def _describe(config: RunConfig, engine: ZeroOrderEngine, size: ModelSize, splits: Splits) -> None:
    """What will be trained, with the memory to expect, before the first step."""
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


def _conclude(config: RunConfig, summary: dict[str, Any], encoder: Encoder, tracker: Tracker) -> None:
    validation = summary["validation"]
    if encoder.num_truncated:
        print(f"{encoder.num_truncated} rows were cut to data.max_length={config.data.max_length} tokens")
    print(
        f"validation accuracy: {validation['before']['accuracy']:.4f} before, "
        f"{validation['best_on_dev']['accuracy']:.4f} after ({validation['before']['count']} examples)"
    )
    print(f"{'adapter' if config.adapter is not None else 'model'}: {config.run_dir / 'adapter'}")
    print(f"summary: {config.run_dir / 'summary.json'}")
    print(f"to compare runs: {tracker.how_to_open()}")


def facts(config: RunConfig) -> dict[str, Any]:
    """What a result must carry: configuration, seed, versions, commit, hardware."""
    return {
        "config_hash": config.hash,
        "seed": config.seed,
        "commit": commit(),
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": _gpus()},
    }


def commit() -> str:
    """The commit of the source tree that runs, with `+` if it was changed since; `unknown` outside a checkout."""
    folder = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return out.stdout.strip()


def say(engine: ZeroOrderEngine) -> Any:
    """A print that does not tear the progress bar; silent on other ranks."""
    return tqdm.write if engine.mesh.is_main else lambda _: None


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"

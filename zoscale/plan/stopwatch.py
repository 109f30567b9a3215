"""Seconds of a step on this machine, from models that have a few blocks of the whole: `-m zoscale.plan.stopwatch`.

The blocks of a model take equally long, so what two depths take tells what any depth does.
"""

import copy
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from zoscale.assembly import build_engine, build_model
from zoscale.config import ConfigError, RunConfig
from zoscale.config.sections import NoiseBackend
from zoscale.data.batch import MicroBatch
from zoscale.engine import is_compiled
from zoscale.first_order import FirstOrderEngine, end_engine
from zoscale.local_job import cause_of, run_here
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.loading import read_model_config
from zoscale.models.sizes import blocks_of, count_parameters
from zoscale.phases import PhaseTimer, timed
from zoscale.plan.footprint import example
from zoscale.runtime import Runtime, read_deepspeed_config, start, stop
from zoscale.step import Engine

Method = Literal["zero_order", "first_order"]

_DEPTHS = (2, 8)
_WARM_UP = 2
_REPEATS = 5
_OUT_OF_MEMORY = "OutOfMemoryError"


@dataclass(frozen=True)
class Course:
    """What is timed.

    Args:
        method: the configuration's, or AdamW by backpropagation.
        ranks: that take the steps together.
        shard_size: ranks that hold a copy of the model.
        micro_batches: of a step, which the ranks share out.
        tokens: per row.
        blocks: of the whole model.
        trainable: elements of the whole model.
    """

    method: Method
    ranks: int
    shard_size: int
    micro_batches: int
    tokens: int
    blocks: int
    trainable: int


@dataclass(frozen=True)
class StepSeconds:
    """What a step takes of a rank.

    Args:
        losses: of its candidates, perturbations and gathers included; of AdamW, forward and backward pass.
        update: of its slices of the trainable elements.
    """

    losses: float
    update: float


def time_step(config: RunConfig, course: Course) -> StepSeconds | None:
    """Take steps with random weights in processes of their own, and tell what the whole model's would take.

    Args:
        config: of the run.
        course: how it is timed.

    Returns:
        None if a GPU's memory does not hold what is timed.

    Raises:
        ConfigError: for what cannot be timed here.
    """
    _check(config)
    architecture = read_model_config(config.model)
    model = replace(config.model, id=None, tokenizer=None, revision=None, config=architecture.to_dict())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    noise: NoiseBackend = "compiled" if is_compiled(config.runtime.noise, course.trainable, device) else "eager"
    parts = config.mesh.candidates if course.ranks > 1 else 1
    mesh = replace(config.mesh, shard_size=course.shard_size, candidates=parts)
    config = replace(config, model=model, runtime=replace(config.runtime, noise=noise), mesh=mesh)
    with tempfile.TemporaryDirectory() as folder:
        work, found = Path(folder, "work.json"), Path(folder, "found.json")
        work.write_text(json.dumps({"config": config.to_dict(), "course": asdict(course)}), encoding="utf-8")
        done = run_here(course.ranks, "zoscale.plan.stopwatch", str(work), str(found))
        if done.returncode == 0:
            return StepSeconds(**json.loads(found.read_text(encoding="utf-8")))
    if _OUT_OF_MEMORY in done.stderr:
        return None
    raise ConfigError("a step that can be timed here", cause_of(done), "leave --measure out, or plan fewer rows")


def _check(config: RunConfig) -> None:
    if config.model.quantization is not None:
        remedy = "leave --measure out: weights in 4 bits are made from real ones"
        raise ConfigError("no model.quantization with --measure", config.model.quantization, remedy)
    if config.model.dtype == "float16" and not torch.cuda.is_available():
        raise ConfigError("model.dtype bfloat16 or float32 to time on a CPU", "float16", "set model.dtype")


def extrapolate(steps: Mapping[int, StepSeconds], blocks: int) -> StepSeconds:
    """A step of a model with so many blocks, from steps of two depths."""
    (few, short), (many, long) = sorted(steps.items())

    def at(one: float, other: float) -> float:
        return one + (blocks - few) * max(0.0, other - one) / (many - few)

    return StepSeconds(at(short.losses, long.losses), at(short.update, long.update))


def time_depths(engine_of: Callable[[int], Engine], batch: Sequence[MicroBatch]) -> dict[int, StepSeconds]:
    """Steps of models of each depth, the fastest of a few: the one that was disturbed least."""
    found = {}
    for depth in _DEPTHS:
        engine = engine_of(depth)
        found[depth] = _time(engine, batch)
        if isinstance(engine, FirstOrderEngine):
            end_engine(engine.answers.module)
        del engine
        gc.collect()
    return found


def _time(engine: Engine, batch: Sequence[MicroBatch]) -> StepSeconds:
    timer, device = PhaseTimer(engine.mesh.device), engine.mesh.device
    losses, updates = [], []
    with timed(timer, "update", engine.optimizer, "step"):
        for number in range(_WARM_UP + _REPEATS):
            _wait(device)
            timer.take()
            started = time.perf_counter()
            engine.step(batch)
            _wait(device)
            seconds, update = time.perf_counter() - started, timer.take()["update"]
            if number >= _WARM_UP:
                losses.append(seconds - update)
                updates.append(update)
    return StepSeconds(min(losses), min(updates))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_depth(architecture: Any, depth: int) -> Any:
    """The same architecture with another number of blocks."""
    other = copy.deepcopy(architecture)
    other.num_hidden_layers = depth
    if kinds := getattr(other, "layer_types", None):
        other.layer_types = (kinds * depth)[:depth]
    return other


def _take(config: RunConfig, course: Course) -> StepSeconds:
    """On every rank of the job."""
    architecture = read_model_config(config.model)
    deepspeed = read_deepspeed_config(config.runtime.deepspeed)
    size = count_parameters(with_depth(architecture, max(_DEPTHS)))
    shard_size = course.shard_size if course.method == "zero_order" else None  # AdamW takes ZeRO-3 over all ranks
    accelerator = start(Runtime(config.model.dtype, deepspeed, shard_size), size=size)

    def engine_of(depth: int) -> Engine:
        few = with_depth(architecture, depth)
        if course.method == "zero_order":
            engine = build_engine(config, few, accelerator)
            _check_depth(engine, depth)
            return engine
        model = build_model(config.model, few, config.adapter, accelerator, trainable=config.trainable)
        return FirstOrderEngine(model, accelerator=accelerator)

    batch = [example(config.data.micro_batch_size, course.tokens)] * course.micro_batches
    return extrapolate(time_depths(engine_of, batch), course.blocks)


def _check_depth(engine: Engine, depth: int) -> None:
    found = len(blocks_of(engine.model))
    if found != depth:
        raise ConfigError(f"a model with {depth} blocks to time", str(found), "leave --measure out")


def _main(work: Path, found: Path) -> None:
    order = json.loads(work.read_text(encoding="utf-8"))
    seconds = _take(RunConfig.from_dict(order["config"], TABLES, DEFAULTS), Course(**order["course"]))
    if torch.distributed.get_rank() == 0:
        found.write_text(json.dumps(asdict(seconds)), encoding="utf-8")
    stop()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))

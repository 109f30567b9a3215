"""Seconds of a step on this machine, from models that have a few blocks of the whole: `python -m zoscale.stopwatch`.

The blocks of a model take equally long, so what two depths take tells what any depth does.
"""

import copy
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from zoscale.assembly import build_engine, build_model
from zoscale.config import ConfigError, RunConfig
from zoscale.engine import NoiseBackend, ZeroOrderEngine, is_compiled
from zoscale.first_order import FirstOrderEngine, end_engine
from zoscale.footprint import example
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models import is_block, read_model_config
from zoscale.phases import PhaseTimer, timed
from zoscale.runtime import Runtime, read_deepspeed_config, start, stop

_DEPTHS = (1, 3)
_WARM_UP = 2
_REPEATS = 5
_FLAG = "timed: "
_OF_LAUNCHERS = ("ACCELERATE_", "GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE")


@dataclass(frozen=True)
class StepSeconds:
    """What a step of one micro-batch takes of one rank that holds the whole model.

    Args:
        losses: of all candidates, perturbations included; of a first-order method, forward and backward pass.
        update: of all trainable elements.
    """

    losses: float
    update: float


@dataclass(frozen=True)
class Timing:
    """Steps as they were timed.

    Args:
        device: on which.
        zero_order: of the configuration.
        first_order: of AdamW; None if the device's memory does not hold it.
    """

    device: str
    zero_order: StepSeconds
    first_order: StepSeconds | None


def time_steps(config: RunConfig, tokens: int, *, blocks: int, trainable: int) -> Timing:
    """Take steps with random weights in a process of their own, and tell what the whole model's would take.

    Args:
        config: of the run; one of its micro-batches is taken.
        tokens: per row.
        blocks: of the whole model.
        trainable: elements of the whole model.

    Raises:
        ConfigError: for what cannot be timed here.
    """
    _check(config)
    architecture = read_model_config(config.model)
    model = replace(config.model, id=None, tokenizer=None, revision=None, config=architecture.to_dict())
    noise: NoiseBackend = "compiled" if is_compiled(config.runtime.noise, trainable) else "eager"
    runtime, mesh = replace(config.runtime, noise=noise), replace(config.mesh, candidates=1, shard_size=1)
    config = replace(config, model=model, runtime=runtime, mesh=mesh)
    work = {"config": config.to_dict(), "tokens": tokens, "blocks": blocks}
    command = [sys.executable, "-m", "zoscale.stopwatch"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
    done = subprocess.run(command, input=json.dumps(work), env=alone, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_FLAG)]
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ConfigError("a step that can be timed here", reason[:300], "leave --measure out, or plan fewer rows")
    found = json.loads(lines[-1].removeprefix(_FLAG))
    seconds = {name: value and StepSeconds(**value) for name, value in found.items() if name != "device"}
    return Timing(found["device"], **seconds)


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


def time_depths(engine_of: Callable[[int], ZeroOrderEngine], rows: int, tokens: int) -> dict[int, StepSeconds]:
    """Steps of models of each depth, the fastest of a few: the one that was disturbed least."""
    found = {}
    for depth in _DEPTHS:
        engine = engine_of(depth)
        found[depth] = _time(engine, rows, tokens)
        if isinstance(engine, FirstOrderEngine):
            end_engine(engine.answers.module)
        del engine
        gc.collect()
    return found


def _time(engine: ZeroOrderEngine, rows: int, tokens: int) -> StepSeconds:
    timer, batch, device = PhaseTimer(engine.mesh.device), example(rows, tokens), engine.mesh.device
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


def shortened(architecture: Any, depth: int) -> Any:
    """The same architecture with fewer blocks."""
    short = copy.deepcopy(architecture)
    short.num_hidden_layers = depth
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:depth]
    return short


def _zero_order(config: RunConfig, architecture: Any, tokens: int, blocks: int) -> StepSeconds:
    """Of a model that lies whole on the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def engine_of(depth: int) -> ZeroOrderEngine:
        with torch.device(device):
            engine = build_engine(config, shortened(architecture, depth), None)
        _check_depth(engine, depth)
        return engine

    return extrapolate(time_depths(engine_of, config.data.micro_batch_size, tokens), blocks)


def _first_order(config: RunConfig, architecture: Any, tokens: int, blocks: int) -> StepSeconds | None:
    """Of AdamW, by DeepSpeed's engine, which holds all shards here."""
    accelerator = start(Runtime(config.model.dtype, read_deepspeed_config(config.runtime.deepspeed)))

    def engine_of(depth: int) -> ZeroOrderEngine:
        short = shortened(architecture, depth)
        model = build_model(config.model, short, config.adapter, accelerator, trainable=config.trainable)
        return FirstOrderEngine(model, accelerator=accelerator)

    try:
        return extrapolate(time_depths(engine_of, config.data.micro_batch_size, tokens), blocks)
    except torch.OutOfMemoryError:
        return None
    finally:
        stop()


def _check_depth(engine: ZeroOrderEngine, depth: int) -> None:
    found = sum(is_block(engine.model, module) for module in engine.model.modules())
    if found != depth:
        raise ConfigError(f"a model with {depth} blocks to time", str(found), "leave --measure out")


def _main() -> None:
    work = json.load(sys.stdin)
    config = RunConfig.from_dict(work["config"], TABLES, DEFAULTS)
    architecture = read_model_config(config.model)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    zero_order = _zero_order(config, architecture, work["tokens"], work["blocks"])
    first_order = _first_order(config, architecture, work["tokens"], work["blocks"])
    timing = Timing(name, zero_order, first_order)
    print(_FLAG + json.dumps(asdict(timing)))


if __name__ == "__main__":
    _main()

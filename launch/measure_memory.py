"""Memory and seconds of each rank while training a model of given shapes, against what `zoscale plan` says.

torchrun --nproc_per_node 2 launch/measure_memory.py [--config FILE] [--dtype bfloat16] [--method first_order]

Random weights, LoRA on q_proj and v_proj, 16 x 48 tokens per step in 4 micro-batches. On a GPU the numbers are the
allocator's; on a CPU the resident set, less what the process held before the model was built; there, set
MALLOC_MMAP_THRESHOLD_=131072 so that freed memory goes back to the system and is not counted. `first_order` is AdamW by
backpropagation through DeepSpeed ZeRO-3. `--timed` adds what `zoscale plan --measure` says of the seconds of a step.
`--shard-size 1` puts the whole model on every rank, which `--model ID --quantization nf4` needs.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zoscale  # noqa: F401  before torch, for huge pages

# isort: split
import torch

from zoscale.assembly import build_model
from zoscale.cli import guarded
from zoscale.config import ConfigError, ModelConfig, RunConfig, at_least, read_yaml
from zoscale.devices import DEVICES
from zoscale.engine import ZeroOrderEngine
from zoscale.first_order import FirstOrderEngine
from zoscale.meters import CommMeter, MemoryMeter, count_allgathers
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.loading import read_model_config
from zoscale.models.quantization import bytes_of_constants
from zoscale.models.sizes import count_parameters
from zoscale.plan.report import make_plan
from zoscale.plan.stopwatch import Method
from zoscale.runtime import Runtime, read_deepspeed_config, start, stop
from zoscale.shards import local_bytes
from zoscale.step import Engine

OPT_125M: dict[str, Any] = {"model_type": "opt", "dropout": 0.0}
"""The defaults of `OPTConfig` are OPT-125M's shapes."""
METHODS: dict[Method, type[ZeroOrderEngine] | type[FirstOrderEngine]] = {
    "zero_order": ZeroOrderEngine,
    "first_order": FirstOrderEngine,
}
Adapter = dict[str, Any] | None
ADAPTER: Adapter = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Data:
    """Rows of a step, tokens per row, and into how many micro-batches the rows are cut."""

    rows: int
    tokens: int
    micro_batches: int


def batch(vocabulary: int, data: Data) -> list[dict[str, torch.Tensor]]:
    """Random tokens with a label on the last one of each row."""
    ids = torch.randint(4, vocabulary, (data.rows, data.tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return [
        {"input_ids": part, "labels": wanted}
        for part, wanted in zip(ids.chunk(data.micro_batches), labels.chunk(data.micro_batches), strict=True)
    ]  # fmt: skip


def planned(
    config: ModelConfig,
    adapter: Adapter,
    data: Data,
    shard_size: int | None,
    deepspeed: Path | None,
    timed: Collection[Method],
) -> dict[str, Any]:
    """What `zoscale plan` says of the same run; before ZeRO-3 is there, which would shard its model of shapes."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    tree = {
        "model": asdict(config),
        "adapter": adapter,
        "optimizer": {"name": "jaguar_sign_sgd"},
        "data": {"batch_size": data.rows, "micro_batch_size": data.rows // data.micro_batches},
        "mesh": {"shard_size": shard_size or ranks},
        "runtime": {"deepspeed": deepspeed and str(deepspeed)},
    }
    device = DEVICES["h100" if torch.cuda.is_available() else "cpu"]
    run_config = RunConfig.from_dict(tree, TABLES, DEFAULTS)
    return make_plan(run_config, ranks, device, tokens=data.tokens, reserve=0.0, measure=timed)


def time_of(engine: Engine, rows: list[dict[str, torch.Tensor]]) -> float:
    """Seconds of a step."""
    started = time.perf_counter()
    engine.step(rows)
    if engine.mesh.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(
    config: ModelConfig, adapter: Adapter, data: Data, steps: int, runtime: Runtime, method: Method
) -> dict[str, Any]:
    """Train a few steps; all ranks' numbers in bytes."""
    architecture = read_model_config(config)
    size = count_parameters(architecture)
    accelerator = start(runtime, size=size)
    meter = MemoryMeter(accelerator.device)
    before = meter.read().current
    engine = METHODS[method](build_model(config, architecture, adapter, accelerator), accelerator=accelerator)
    built = meter.read()
    engine.step(batch(architecture.vocab_size, data))  # the first one makes what later ones keep
    meter.reset()
    between, exchanged = meter.read().current, engine.mesh.gathered_bytes
    with count_allgathers(CommMeter()) as comm:
        seconds = [time_of(engine, batch(architecture.vocab_size, data)) for _ in range(steps)]
    width = torch.empty(0, dtype=getattr(torch, config.dtype)).element_size()
    own = {
        "loading_peak": built.peak - before,
        "resident_after_loading": built.current - before,
        "training_peak": meter.read().peak - before,
        "step_extra": meter.read().peak - between,
        "gathered_per_step": (comm.totals.num_bytes + engine.mesh.gathered_bytes - exchanged) // steps,
        "seconds": min(seconds),
        "shard": local_bytes(engine.model) + bytes_of_constants(engine.model),
    }
    report = {
        "ranks": engine.mesh.gather_objects(own),
        "model_bytes": size.total * width,
        "largest_gather": max(size.largest_block, size.outside_blocks) * width,
        "dtype": config.dtype,
        "world_size": engine.mesh.world_size,
    }
    stop()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", type=Path, help="YAML of an architecture, as model.config; default OPT-125M")
    which.add_argument("--model", help="Hugging Face id or folder")
    parser.add_argument("--quantization", choices=["nf4", "fp4"], help="of the model's linear layers")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--method", default="zero_order", choices=METHODS)
    parser.add_argument("--timed", action="store_true", help="compare seconds too")
    parser.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--deepspeed", type=Path, help="DeepSpeed JSON; default: zoscale's ZeRO-3")
    parser.add_argument("--shard-size", type=at_least(1), help="ranks that hold one copy of the model; default: all")
    parser.add_argument("--steps", type=at_least(1), default=4)
    parser.add_argument("--rows", type=at_least(1), default=16, help="per step")
    parser.add_argument("--tokens", type=at_least(2), default=48, help="per row")
    parser.add_argument("--micro-batches", type=at_least(1), default=4)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    shapes = read_yaml(arguments.config) if arguments.config else OPT_125M
    data = Data(arguments.rows, arguments.tokens, arguments.micro_batches)
    if data.rows % data.micro_batches:
        got = f"{data.micro_batches} for {data.rows} rows"
        raise ConfigError("--micro-batches that divide --rows", got, "change one of them")
    which = {"config": shapes} if arguments.model is None else {"id": arguments.model}
    config = ModelConfig(**which, dtype=arguments.dtype, quantization=arguments.quantization)
    adapter = None if arguments.full else ADAPTER
    runtime = Runtime(config.dtype, read_deepspeed_config(arguments.deepspeed), arguments.shard_size)
    is_timed = arguments.timed and int(os.environ.get("RANK", "0")) == 0  # the other ranks wait at the start
    timed = (arguments.method,) if is_timed else ()
    plan = planned(config, adapter, data, arguments.shard_size, arguments.deepspeed, timed)
    said = {"planned": plan[arguments.method]}
    if is_timed:
        said["timed"] = plan["timed"][arguments.method]
    report = measure(config, adapter, data, arguments.steps, runtime, arguments.method) | said
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(report, indent=2))
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(guarded("launch/measure_memory.py", main, sys.argv[1:]))

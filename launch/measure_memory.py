"""Memory of each rank while training a model of given shapes, against what its parts should take.

torchrun --nproc_per_node 2 launch/measure_memory.py [--config FILE] [--dtype bfloat16] [--steps 4] [--json FILE]

Random weights, LoRA on q_proj and v_proj, 16 x 48 tokens per step. On a GPU the numbers are the allocator's; on a CPU
the resident set, less what the process held before the model was built; there, set MALLOC_MMAP_THRESHOLD_=131072 so
that freed memory goes back to the system and is not counted.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml

from zoscale.config import ModelConfig
from zoscale.engine import ZeroOrderEngine
from zoscale.meters import MemoryMeter
from zoscale.models import add_adapter, count_parameters, load_model, read_model_config
from zoscale.runtime import Runtime, read_deepspeed_config, start, stop
from zoscale.shards import local_bytes

OPT_125M: dict[str, Any] = {"model_type": "opt", "dropout": 0.0}
"""The defaults of `OPTConfig` are OPT-125M's shapes."""
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def batch(vocabulary: int, rows: int = 16, tokens: int = 48) -> list[dict[str, torch.Tensor]]:
    """Four micro-batches of random tokens with a label on the last one of each row."""
    ids = torch.randint(4, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return [
        {"input_ids": part, "labels": wanted}
        for part, wanted in zip(ids.chunk(4), labels.chunk(4), strict=True)
    ]  # fmt: skip


def measure(config: ModelConfig, steps: int, deepspeed: Path | None = None) -> dict[str, Any]:
    """Train a few steps; all ranks' numbers in bytes."""
    architecture = read_model_config(config)
    size = count_parameters(architecture)
    accelerator = start(Runtime(dtype=config.dtype, deepspeed=read_deepspeed_config(deepspeed)), size=size)
    meter = MemoryMeter(accelerator.device)
    before = meter.read().current
    engine = ZeroOrderEngine(add_adapter(load_model(config, architecture), ADAPTER), accelerator=accelerator)
    built = meter.read()
    meter.reset()
    for _ in range(steps):
        engine.step(batch(architecture.vocab_size))
    width = torch.empty(0, dtype=getattr(torch, config.dtype)).element_size()
    own = {
        "loading_peak": built.peak - before,
        "resident_after_loading": built.current - before,
        "training_peak": meter.read().peak - before,
        "shard": local_bytes(engine.model),
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
    parser.add_argument("--config", type=Path, help="YAML of an architecture, as model.config; default OPT-125M")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--deepspeed", type=Path, help="DeepSpeed JSON; default: zoscale's ZeRO-3")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    shapes = yaml.safe_load(arguments.config.read_text()) if arguments.config else OPT_125M
    report = measure(ModelConfig(config=shapes, dtype=arguments.dtype), arguments.steps, arguments.deepspeed)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(report, indent=2))
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

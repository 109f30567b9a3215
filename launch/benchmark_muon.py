"""Orthogonalisation by owners against every rank doing all matrices, as a ratio measured in one run.

torchrun --nproc_per_node 2 launch/benchmark_muon.py [--config FILE] [--full] [--repeats R] [--json FILE]

OPT-125M shapes with LoRA r 8 on q_proj and v_proj, or all weights. Both sides read the same momentum and give every
rank its slices of the directions.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoscale.cli import guarded
from zoscale.config import ModelConfig, at_least, read_yaml
from zoscale.engine import ZeroOrderEngine
from zoscale.models.loading import add_adapter, load_model, read_model_config
from zoscale.models.sizes import count_parameters
from zoscale.optim import JaguarMuon, orthogonalize
from zoscale.optim.owners import CAPACITY, on_owners
from zoscale.runtime import Runtime, start, stop
from zoscale.shards import ShardedParam

OPT_125M: dict[str, Any] = {"model_type": "opt"}
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def measure(config: ModelConfig, adapter: dict[str, Any] | None, repeats: int, capacity: int) -> dict[str, Any]:
    """Median seconds of both over alternating repetitions, and what one of each sends."""
    architecture = read_model_config(config)
    accelerator = start(Runtime(dtype=config.dtype, threads=1), size=count_parameters(architecture))
    engine = ZeroOrderEngine(
        add_adapter(load_model(config, architecture), adapter), accelerator=accelerator, optimizer=JaguarMuon
    )
    mesh = engine.mesh
    (shards,) = (
        [shard for shard in engine.shards if any(shard.truth is param for param in group["params"])]
        for group in engine.optimizer.param_groups
        if group["rule"] == "muon"
    )
    generator = torch.Generator(mesh.device).manual_seed(mesh.rank)
    momenta = {s.spec.id: torch.randn(len(s), generator=generator, device=mesh.device) for s in shards}
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32

    def owned() -> list[Tensor]:
        momentum = lambda shard: momenta[shard.spec.id]  # noqa: E731
        parts = on_owners(orthogonalize, shards, momentum, mesh, dtype=dtype, capacity=capacity)
        return [part for bucket in parts for _, part in bucket]

    def redundant() -> list[Tensor]:
        return [on_every_rank(shard) for shard in shards]

    def on_every_rank(shard: ShardedParam) -> Tensor:
        (whole,) = mesh.gather_flats([(momenta[shard.spec.id].to(dtype), shard.spec.numel)])
        return orthogonalize(whole.view(shard.spec.shape)).reshape(-1)[shard.offset : shard.offset + len(shard)]

    report: dict[str, Any] = {"world_size": mesh.world_size, "matrices": len(shards)}
    times: dict[str, list[float]] = {"owners": [], "redundant": []}
    for repeat in range(repeats + 1):
        for name, work in {"owners": owned, "redundant": redundant}.items():
            before = mesh.num_gathers, mesh.gathered_bytes
            mesh.barrier()
            started = time.perf_counter()
            work()
            if mesh.device.type == "cuda":
                torch.cuda.synchronize()
            mesh.barrier()
            if repeat > 0:  # the first one warms up
                times[name].append(time.perf_counter() - started)
            report[name] = {"collectives": mesh.num_gathers - before[0], "bytes": mesh.gathered_bytes - before[1]}
    for name, taken in times.items():
        report[name]["seconds"] = statistics.median(taken)
    report["ratio"] = report["owners"]["seconds"] / report["redundant"]["seconds"]
    stop()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, help="YAML of an architecture, as model.config; default OPT-125M")
    parser.add_argument("--full", action="store_true", help="all weights instead of LoRA")
    parser.add_argument("--capacity", type=at_least(1), default=CAPACITY, help="elements that a rank owns at once")
    parser.add_argument("--repeats", type=at_least(1), default=10, help="timed updates of each")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    shapes = read_yaml(arguments.config) if arguments.config else OPT_125M
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    adapter = None if arguments.full else ADAPTER
    report = measure(ModelConfig(config=shapes, dtype=dtype), adapter, arguments.repeats, arguments.capacity)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(report, indent=2))
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(guarded("launch/benchmark_muon.py", main, sys.argv[1:]))

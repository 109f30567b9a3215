"""`zoscale plan`: what a run will take of each GPU, and the shard size to use, before anything is started."""

import argparse
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from zoscale.assembly import longest_row
from zoscale.config import ConfigError, RunConfig, at_least, parse, read_yaml
from zoscale.devices import DEVICES, GIB, Device
from zoscale.estimators import ESTIMATORS
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.loading import read_model_config
from zoscale.models.quantization import check_quantization
from zoscale.models.sizes import ModelSize, count_parameters
from zoscale.nvme import Buffers
from zoscale.optim.first_order import FIRST_ORDER
from zoscale.plan.budget import (
    Job,
    Memory,
    Work,
    first_order_memory,
    first_order_work,
    host_memory,
    with_host,
    zero_order_memory,
    zero_order_work,
)
from zoscale.plan.fit import USABLE, job_of, shard_sizes, smallest_shard
from zoscale.plan.footprint import ModelShapes
from zoscale.plan.stopwatch import Method
from zoscale.plan.table import table
from zoscale.plan.timing import timed
from zoscale.runtime import whole_groups


def plan_command(argv: Sequence[str]) -> int:
    """Print the plan.

    Returns:
        0, or 1 if the run does not fit at any shard size.

    Raises:
        ConfigError: for a mistake of the user.
    """
    arguments = _parser().parse_intermixed_args(argv)
    _check_numbers(arguments)
    config = _configuration(arguments)
    report = make_plan(
        config, arguments.gpus, _device(arguments), tokens=arguments.tokens, reserve=arguments.reserve,
        measure=("zero_order", "first_order") if arguments.measure else (),
    )  # fmt: skip
    print(json.dumps(report, indent=2) if arguments.json else table(report))
    return 0 if report["zero_order"]["fits"] else 1


def make_plan(
    config: RunConfig,
    ranks: int,
    device: Device,
    *,
    tokens: int | None,
    reserve: float | None,
    measure: Collection[Method] = (),
) -> dict[str, Any]:
    """The plan as plain values; bytes and seconds.

    Args:
        config: of the run.
        ranks: of the job.
        device: of each rank.
        tokens: per row; None = as many as a row of the run may have.
        reserve: GiB of the device that are not for tensors; None = as `mesh.shard_size=auto` has it.
        measure: of which methods steps are timed on this machine too.

    Raises:
        ConfigError: for a shard size that does not divide the ranks, or what cannot be planned.
    """
    architecture = read_model_config(config.model)
    shapes = ModelShapes(config.model, architecture, config.adapter, config.trainable)
    size = count_parameters(architecture, trust_remote_code=config.model.trust_remote_code)
    if tokens is not None and size.positions is not None and tokens > size.positions:
        raise ConfigError(f"--tokens up to {size.positions}, the model's positions", str(tokens), "lower it")
    job = job_of(config, shapes, ranks, tokens or longest_row(config, size), copies=device.copies)
    budget = device.memory * USABLE if reserve is None else device.memory - reserve * GIB
    if budget <= 0:
        raise ConfigError(f"--reserve below the device's {device.memory / GIB:.0f} GiB", str(reserve), "lower it")
    report = {
        "model": config.model.id or architecture.model_type,
        "parameters": size.total,
        "trainable": sum(weight.numel for weight in shapes.weights if weight.trainable),
        "dtype": config.model.dtype,
        "quantization": config.model.quantization,
        "budget": budget,
        "job": {
            **asdict(job),
            "turns": job.turns,
            "together": job.together,
            "passes": job.passes,
            "rounds": job.rounds,
        },
        **_zero_order(config, shapes, size, job, device, budget),
        "first_order": _first_order(config, architecture, job, device, budget),
    }
    return {**report, "timed": timed(config, job, shapes.num_blocks, report, measure)} if measure else report


def _zero_order(
    config: RunConfig, shapes: ModelShapes, size: ModelSize, job: Job, device: Device, budget: float
) -> dict[str, Any]:
    footprint = shapes.run(job.micro_batch, job.tokens, candidates=job.together if job.fan else None)
    sizes = _shard_sizes(config, job)
    shard_size = smallest_shard(shapes, job, footprint, budget, sizes) or sizes[-1]
    host = host_memory(shapes, job, shard_size, Buffers.of(size, shard_size))
    memory = with_host(zero_order_memory(shapes, job, shard_size, footprint), host if job.copies else {})
    work = zero_order_work(shapes, job, shard_size, footprint)
    column = _column(memory, work, shard_size, budget, device, config.model.dtype)
    return {"zero_order": column, "host": {} if job.copies else host}


def _shard_sizes(config: RunConfig, job: Job) -> list[int]:
    """Those to choose from, the smallest first."""
    wanted = config.mesh.shard_size
    if config.model.quantization:
        return [1]
    if isinstance(wanted, int):
        return [whole_groups(wanted, job.ranks)]
    if job.offload != "none":  # by ZeRO-3 over all ranks
        return [job.ranks]
    return shard_sizes(job.ranks, job.ranks)


def _first_order(config: RunConfig, architecture: Any, job: Job, device: Device, budget: float) -> dict[str, Any]:
    """AdamW under ZeRO-3, which cannot cut up weights in 4 bits: they are as they were before."""
    model, job = replace(config.model, quantization=None), replace(job, candidates=1)
    shapes = ModelShapes(model, architecture, config.adapter, config.trainable)
    footprint = shapes.run(job.micro_batch, job.tokens, backward=True)
    memory, work = first_order_memory(shapes, job, footprint), first_order_work(shapes, job, footprint)
    return _column(memory, work, job.ranks, budget, device, config.model.dtype)


def _column(memory: Memory, work: Work, shard_size: int, budget: float, device: Device, dtype: str) -> dict[str, Any]:
    seconds = work.seconds(device, dtype)
    return {
        "shard_size": shard_size,
        "memory": memory.parts,
        "phase": memory.phase,
        "total": memory.total,
        "fits": memory.total <= budget,
        "work": asdict(work),
        "seconds": seconds,
        "bound": max(seconds, key=lambda name: seconds[name]),
    }


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse numbers that no job and no device has."""
    for name in ("gpu_memory", "link", "flops", "bandwidth", "reserve"):
        value, zero = getattr(arguments, name), name == "reserve"
        if value is not None and not (0 < value < math.inf or (zero and value == 0)):
            bound = "of at least" if zero else "above"
            raise ConfigError(f"--{name.replace('_', '-')} {bound} 0, and finite", str(value), "correct it")


def _configuration(arguments: argparse.Namespace) -> RunConfig:
    words = [word for file in arguments.config for word in ("--config", file)] + list(arguments.words)
    base: dict[str, Any] = {}
    own: list[str] = []
    if arguments.model is None and not arguments.config and not any(w.startswith("model.") for w in arguments.words):
        raise ConfigError("--model, --config or model.id", "none", "name an id, a folder or a YAML of shapes")
    if arguments.model is not None:
        shapes = Path(arguments.model)
        is_file = shapes.suffix in (".yaml", ".yml", ".json") and shapes.is_file()
        if is_file:
            base = {"model": {"config": read_yaml(shapes) or None}}
            own.append("model.id=null")
        else:
            own += [f"model.id={arguments.model}", "model.config=null"]
    if arguments.batch is not None:
        own.append(f"data.batch_size={arguments.batch}")
        micro = min(arguments.batch, 4)
        base["data"] = {"micro_batch_size": micro if arguments.batch % micro == 0 else 1}
    for key in (word.partition("=")[0] for word in own):
        if twice := [word for word in arguments.words if word.startswith(f"{key}=")]:
            raise ConfigError(f"{key} once", f"an option for it and {twice[0]}", "leave one of them out")
    config = parse([*words, *own], TABLES, DEFAULTS, command="zoscale plan", base=base)
    _check(config)
    return config


def _check(config: RunConfig) -> None:
    """Refuse what the plan knows nothing of, and what no run could do."""
    if config.optimizer.name in FIRST_ORDER:
        remedy = "leave optimizer out: AdamW under ZeRO-3 has a column of its own"
        raise ConfigError("a zero-order optimizer to plan", config.optimizer.name, remedy)
    estimator = ESTIMATORS.get(config.estimator.name)
    if estimator is None or estimator.takes_derivatives:
        raise ConfigError("an estimator from losses to plan", config.estimator.name, "plan another one")
    model = replace(config.model, id=config.model.id or "any")  # shapes may stand for a model
    asked = config.mesh.shard_size if isinstance(config.mesh.shard_size, int) else 1  # which the plan is to answer
    check_quantization(replace(config, model=model, mesh=replace(config.mesh, shard_size=asked)))


def _device(arguments: argparse.Namespace) -> Device:
    device = DEVICES[arguments.device]
    given = {
        "flops_16": arguments.flops and arguments.flops * 1e12,
        "flops_32": arguments.flops and arguments.flops * 1e12,
        "bandwidth": arguments.bandwidth and arguments.bandwidth * 1e9,
        "link": arguments.link and arguments.link * 1e9,
        "memory": arguments.gpu_memory and arguments.gpu_memory * GIB,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    return replace(device, **changed) if changed else device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoscale plan", description=__doc__)
    parser.add_argument("--model", metavar="ID|FILE", help="Hugging Face id, folder, or YAML as model.config")
    parser.add_argument("--gpus", type=at_least(1), required=True, metavar="N", help="ranks of the job")
    parser.add_argument("--device", choices=DEVICES, default="h100", help="published peak rates (default: h100)")
    parser.add_argument("--gpu-memory", type=float, metavar="GiB", help="of each GPU (default: the device's)")
    parser.add_argument(
        "--link", type=float, metavar="GB/s", help="between GPUs, one direction (default: the device's)"
    )
    parser.add_argument("--flops", type=float, metavar="TFLOP/s", help="instead of the device's")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of the memory, instead of the device's")
    parser.add_argument("--reserve", type=float, metavar="GiB",
                        help="kept free for the CUDA context, NCCL and gaps of the allocator (default: 15 %% of the "
                        "memory, as mesh.shard_size=auto)")  # fmt: skip
    parser.add_argument("--batch", type=at_least(1), metavar="B", help="rows of a step (default: data.batch_size)")
    parser.add_argument(
        "--tokens", type=at_least(1), metavar="T", help="per row (default: the most of a row of the run)"
    )
    parser.add_argument("--measure", action="store_true",
                        help="also time steps on this machine, with random weights and a few of the blocks, on all "
                        "ranks if it has a GPU (without any, a core) for each; a minute or two")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, in bytes and seconds")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML as for zoscale train")
    parser.add_argument("words", nargs="*", metavar="key=value", help="options as for zoscale train: adapter=null")
    return parser

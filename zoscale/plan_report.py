"""`zoscale plan`: what a run will take of each GPU, and the shard size to use, before anything is started."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoscale.budget import (
    Job,
    Memory,
    Work,
    first_order_memory,
    first_order_work,
    host_memory,
    smallest_shard,
    with_host,
    zero_order_memory,
    zero_order_work,
)
from zoscale.config import ConfigError, RunConfig, build, load_yaml, parse
from zoscale.devices import DEVICES, GIB, Device
from zoscale.estimators import ESTIMATORS, Estimator, GradientEstimate
from zoscale.footprint import ModelShapes
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models import count_parameters, read_model_config, tokens_per_pass
from zoscale.noise import Noise
from zoscale.nvme import buffer_elements, check_offload, offload_device
from zoscale.optim import OPTIMIZERS
from zoscale.optim.first_order import FIRST_ORDER
from zoscale.probes import PROBES
from zoscale.runtime import fill_deepspeed_config, read_deepspeed_config
from zoscale.shards import ShardedParam, TensorSpec


def plan_command(argv: Sequence[str]) -> int:
    """Print the plan.

    Returns:
        0, or 1 if the run does not fit at any shard size.

    Raises:
        ConfigError: for a mistake of the user.
    """
    arguments = _parser().parse_args(argv)
    config = _configuration(arguments)
    report = make_plan(config, arguments.gpus, _device(arguments), tokens=arguments.tokens, reserve=arguments.reserve)
    print(json.dumps(report, indent=2) if arguments.json else _table(report))
    return 0 if report["zero_order"]["fits"] else 1


def make_plan(config: RunConfig, ranks: int, device: Device, *, tokens: int | None, reserve: float) -> dict[str, Any]:
    """The plan as plain values; bytes and seconds.

    Args:
        config: of the run.
        ranks: of the job.
        device: of each rank.
        tokens: per row; None = data.max_length.
        reserve: GiB of the device that are not for tensors.
    """
    architecture = read_model_config(config.model)
    shapes = ModelShapes(config.model, architecture, config.adapter)
    job = _job(config, shapes, ranks, tokens or config.data.max_length, copies=device is DEVICES["cpu"])
    zo = shapes.run(job.micro_batch, job.tokens, candidates=job.together if job.fan else None)
    fo_job = dataclasses.replace(job, candidates=1, parts=1)
    fo = shapes.run(job.micro_batch, job.tokens, backward=True)
    budget = device.memory - reserve * GIB
    fitting = smallest_shard(shapes, job, zo, budget)
    wanted = config.mesh.shard_size
    shard_size = wanted if isinstance(wanted, int) else fitting or ranks
    if job.offload != "none" and not isinstance(wanted, int):
        shard_size = ranks  # ZeRO-3, which offloads, over all of them
    size = count_parameters(architecture, trust_remote_code=config.model.trust_remote_code)
    host = host_memory(shapes, job, shard_size, buffer_elements(size, shard_size))
    return {
        "model": config.model.id or architecture.model_type,
        "parameters": size.total,
        "trainable": sum(weight.numel for weight in shapes.weights if weight.trainable),
        "dtype": config.model.dtype,
        "budget": budget,
        "job": {**dataclasses.asdict(job), "turns": job.turns, "together": job.together, "passes": job.passes},
        "zero_order": _column(
            with_host(zero_order_memory(shapes, job, shard_size, zo), host if job.copies else {}),
            zero_order_work(shapes, job, shard_size, zo),
            shard_size, budget, device, config.model.dtype,
        ),
        "first_order": _column(
            first_order_memory(shapes, fo_job, fo),
            first_order_work(shapes, fo_job, fo),
            ranks, budget, device, config.model.dtype,
        ),
        "host": {} if job.copies else host,
    }  # fmt: skip


def _column(memory: Memory, work: Work, shard_size: int, budget: float, device: Device, dtype: str) -> dict[str, Any]:
    seconds = work.seconds(device, dtype)
    return {
        "shard_size": shard_size,
        "memory": memory.parts,
        "phase": memory.phase,
        "total": memory.total,
        "fits": memory.total <= budget,
        "work": dataclasses.asdict(work),
        "seconds": seconds,
        "bound": max(seconds, key=lambda name: seconds[name]),
    }


def _job(config: RunConfig, shapes: ModelShapes, ranks: int, tokens: int, *, copies: bool) -> Job:
    estimator: Estimator = build(config.estimator, ESTIMATORS)
    filled = fill_deepspeed_config(read_deepspeed_config(config.runtime.deepspeed), config.model.dtype, None)
    check_offload(config, filled)
    fan = None if config.forward.name == "sequential" else shapes.fan
    if config.forward.name == "fan_out" and fan is None:
        raise ConfigError("a model whose candidates can share a pass", "another", "set forward.name=auto")
    return Job(
        ranks=ranks,
        batch=config.data.batch_size,
        micro_batch=config.data.micro_batch_size,
        tokens=tokens,
        candidates=estimator.num_candidates,
        parts=config.mesh.candidates,
        fan=fan,
        max_rows=config.forward.max_rows or tokens_per_pass(shapes.model) // tokens,
        state=state_per_element(config),
        master=config.master == "fp32",
        prefetch=filled["zero_optimization"].get("stage3_prefetch_bucket_size", 1) > 0,
        copies=copies,
        offload=offload_device(filled),
    )


def state_per_element(config: RunConfig) -> float:
    """Values that the optimizer keeps per trainable element, by one step on a small matrix."""
    spec = TensorSpec(0, "example", (8, 8))
    shard = ShardedParam(nn.Parameter(torch.zeros(spec.shape)), spec)
    optimizer = build(config.optimizer, OPTIMIZERS, [shard])
    probe: Any = build(config.probe, PROBES)
    optimizer.step(GradientEstimate((probe.draw(Noise(0), [spec], 0, 0),), (1.0,), 0.0))
    kept = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    return sum(value.numel() for value in kept) / spec.numel


def _configuration(arguments: argparse.Namespace) -> RunConfig:
    words = [word for file in arguments.config for word in ("--config", file)] + list(arguments.words)
    base: dict[str, Any] = {}
    if arguments.model is not None:
        shapes = Path(arguments.model)
        is_file = shapes.suffix in (".yaml", ".yml", ".json") and shapes.is_file()
        tree = load_yaml(shapes.read_text(encoding="utf-8"), str(shapes)) if is_file else None
        base = {"model": {"config": tree} if is_file else {"id": arguments.model}}
    if arguments.batch is not None:
        words += [f"data.batch_size={arguments.batch}"]
        micro = min(arguments.batch, 4)
        base["data"] = {"micro_batch_size": micro if arguments.batch % micro == 0 else 1}
    config = parse(words, TABLES, DEFAULTS, command="zoscale plan", base=base)
    if config.optimizer.name in FIRST_ORDER:
        remedy = "leave optimizer out: AdamW under ZeRO-3 has a column of its own"
        raise ConfigError("a zero-order optimizer to plan", config.optimizer.name, remedy)
    if config.model.quantization is not None:
        remedy = "plan it in 16 bits, of which the linear layers then take little more than a quarter"
        raise ConfigError("no model.quantization to plan", config.model.quantization, remedy)
    return config


def _device(arguments: argparse.Namespace) -> Device:
    device = DEVICES[arguments.device]
    if arguments.gpus < 1:
        raise ConfigError("--gpus of at least 1", str(arguments.gpus), "raise it")
    given = {
        "flops_16": arguments.flops and arguments.flops * 1e12,
        "flops_32": arguments.flops and arguments.flops * 1e12,
        "bandwidth": arguments.bandwidth and arguments.bandwidth * 1e9,
        "link": arguments.link and arguments.link * 1e9,
        "memory": arguments.gpu_memory and arguments.gpu_memory * GIB,
    }
    for name, value in given.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name} above 0", str(value), "raise it")
    changed = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(device, **changed) if changed else device


def _table(report: dict[str, Any]) -> str:
    job, columns = report["job"], (report["zero_order"], report["first_order"])
    names = list(dict.fromkeys(name for column in columns for name in column["memory"]))
    rows = [["memory of a rank, GiB", "zero-order", "AdamW, ZeRO-3"]]
    rows.append(["  ranks per copy of the model", *(str(column["shard_size"]) for column in columns)])
    for name in names:
        rows.append([f"  {name}", *(_gib(column["memory"].get(name)) for column in columns)])
    if report["host"]:
        host = sum(report["host"].values())
        rows.append([f"  (offloaded to {job['offload']}; in the host's memory)", _gib(host), "-"])
    rows.append([f"  in all, of {report['budget'] / GIB:.1f}", *(_gib(column["total"]) for column in columns)])
    rows.append(["  highest in", *(column["phase"] for column in columns)])
    rows.append(["  fits", *("yes" if column["fits"] else "NO" for column in columns)])
    rows.append(["one step of a rank, at peak rates", "", ""])
    rows.append(["  gathered, GB", *(f"{column['work']['gathered'] / 1e9:.3f}" for column in columns)])
    rows.append(["  over the link, GB", *(f"{column['work']['received'] / 1e9:.3f}" for column in columns)])
    if job["offload"] != "none":
        rows.append(["  uploaded, GB", *(f"{column['work']['uploaded'] / 1e9:.3f}" for column in columns)])
    rows.append(["  TFLOP", *(f"{column['work']['flops'] / 1e12:.3f}" for column in columns)])
    for name in ("compute", "memory", "link"):
        rows.append([f"  {name}, ms", *(f"{column['seconds'][name] * 1e3:.3f}" for column in columns)])
    rows.append(["  bound by", *(column["bound"] for column in columns)])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    body = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() for row in rows]
    way = f"{job['together']} in a pass"
    head = (
        f"{report['model']}: {report['parameters']:,} parameters, {report['dtype']}; trainable: "
        f"{report['trainable']:,}; {job['ranks']} ranks, batch {job['batch']} x {job['tokens']} tokens, "
        f"{job['candidates']} candidates, {way}"
    )
    advice = _advice(report)
    return "\n".join([head, "", *body, "", advice])


def _advice(report: dict[str, Any]) -> str:
    zero_order = report["zero_order"]
    if not zero_order["fits"]:
        return "does not fit: more GPUs, fewer rows (forward.max_rows, data.micro_batch_size) or a smaller model"
    ranks, size = report["job"]["ranks"], zero_order["shard_size"]
    if report["job"]["offload"] != "none":
        return f"leave mesh.shard_size as it is: {size} of {ranks} ranks share a copy, offloaded"
    if size == ranks:
        return f"set mesh.shard_size={size} (or leave it: all ranks hold the model together)"
    return f"set mesh.shard_size={size}: {ranks // size} replicas, which exchange scalars only"


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIB:.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoscale plan", description=__doc__)
    parser.add_argument("--model", metavar="ID|FILE", help="Hugging Face id, folder, or YAML as model.config")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the job")
    parser.add_argument("--device", choices=DEVICES, default="h100", help="published peak rates (default: h100)")
    parser.add_argument("--gpu-memory", type=float, metavar="GiB", help="of each GPU (default: the device's)")
    parser.add_argument(
        "--link", type=float, metavar="GB/s", help="between GPUs, one direction (default: the device's)"
    )
    parser.add_argument("--flops", type=float, metavar="TFLOP/s", help="instead of the device's")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of the memory, instead of the device's")
    parser.add_argument("--reserve", type=float, default=2.0, metavar="GiB",
                        help="kept free for the CUDA context, NCCL and gaps of the allocator (default: 2)")  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="B", help="rows of a step (default: data.batch_size)")
    parser.add_argument("--tokens", type=int, metavar="T", help="per row (default: data.max_length)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, in bytes and seconds")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML as for zoscale train")
    parser.add_argument("words", nargs="*", metavar="key=value", help="options as for zoscale train: adapter=null")
    return parser

"""Starting the processes: DeepSpeed ZeRO-3 without an optimizer, through Accelerate, on GPUs or CPUs."""

import copy
import ctypes
import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _world

from zoscale.config import ConfigError, one_line
from zoscale.launcher import obey
from zoscale.models.sizes import ModelSize
from zoscale.nvme import fill_offload, offload_device, ready_nvme
from zoscale.placement import WholeAccelerator
from zoscale.shard_groups import GroupedAccelerator

ZERO3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "memory_efficient_linear": False,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_max_live_parameters": "auto",
        "stage3_max_reuse_distance": "auto",
    },
}
"""Forward-only ZeRO-3 (`ds_configs/zero3.json` is the same). "auto" is filled in from the model's size."""

_DTYPE_SECTIONS = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Runtime:
    """How processes run.

    Args:
        dtype: of the frozen weights, which is computed in: float32, bfloat16 or float16. ZeRO-3 casts a model when it
            is built; one that is whole on each rank has to be loaded so.
        deepspeed: DeepSpeed configuration (ZeRO-3, no optimizer); None = what the launcher names, or `ZERO3`.
        shard_size: consecutive ranks that hold one copy of the model together: all of them, fewer, or 1, where each
            holds it whole and nothing is gathered. None = as `default_shard_size` says.
        timeout_minutes: of collectives; a rank that waits longer takes the job down.
        threads: torch CPU threads per rank; None = torch's default.
    """

    dtype: str = "float32"
    deepspeed: Mapping[str, Any] | None = None
    shard_size: int | None = None
    timeout_minutes: float = 30.0
    threads: int | None = None


def read_deepspeed_config(path: str | Path | None) -> dict[str, Any]:
    """A DeepSpeed JSON file fit for forward-only training, or the default without one.

    Raises:
        ConfigError: if the file is missing or malformed, is not ZeRO-3, or brings an optimizer.
    """
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") if path is None else path
    if str(path) == "none":
        default = copy.deepcopy(ZERO3)
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
        if offload != "none":  # `accelerate launch --offload_param_device cpu`
            options = {"device": offload, "pin_memory": True}
            if offload == "nvme":
                options["nvme_path"] = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH", "auto")
            default["zero_optimization"]["offload_param"] = options
        return default
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"a DeepSpeed JSON file at {path}", str(error), "correct runtime.deepspeed") from error
    config = config if isinstance(config, dict) else {}
    for section in ("zero_optimization", *_DTYPE_SECTIONS.values()):
        if not isinstance(config.get(section, {}), dict):
            raise ConfigError(f"{section} in {path} to be a section of keys", repr(config[section])[:80], "correct it")
    offload = config.get("zero_optimization", {}).get("offload_param")
    if not isinstance(offload, dict | None) or (offload or {}).get("device", "none") not in ("none", "cpu", "nvme"):
        remedy = "start from ds_configs/zero3_offload.json"
        raise ConfigError(f"offload_param in {path} with device none, cpu or nvme", repr(offload)[:80], remedy)
    stage = config.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise ConfigError(f"zero_optimization.stage 3 in {path}", repr(stage)[:80], "start from ds_configs/zero3.json")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ConfigError(
                f"no {section!r} section in {path}", "one", "remove it: zoscale updates the shards itself"
            )
    return dict(config)


def fill_deepspeed_config(
    config: Mapping[str, Any], dtype: str, size: ModelSize | None, shard_size: int = 1
) -> dict[str, Any]:
    """Replace "auto" by numbers from the model's size, and switch the compute dtype on.

    Prefetching and live parameters are bounded by one and two blocks, the reuse distance lets a tied embedding stay
    gathered through one forward. Without a size, DeepSpeed's own defaults apply.

    Raises:
        ConfigError: if the file switches on another dtype than the run's.
    """
    own = {key: copy.deepcopy(value) for key, value in config.items() if value != "auto"}
    filled: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, **own}
    for name, section in _DTYPE_SECTIONS.items():
        enabled = filled.get(section, {}).get("enabled", "auto")
        if enabled not in ("auto", name == dtype):
            raise ConfigError(f"{section}.enabled to agree with dtype {dtype}", str(enabled), "change one of them")
        filled[section] = {**filled.get(section, {}), "enabled": name == dtype}
    bounds = {}
    if size is not None:
        bounds = {
            "stage3_prefetch_bucket_size": size.largest_block,
            "stage3_max_live_parameters": 2 * size.largest_block + size.outside_blocks,
            "stage3_max_reuse_distance": size.total,
        }
    zero = filled["zero_optimization"]
    for key in [key for key, value in zero.items() if value == "auto"]:
        if key in bounds:
            zero[key] = bounds[key]
        else:
            del zero[key]
    fill_offload(filled, size, shard_size)
    return filled


def start(runtime: Runtime | None = None, *, size: ModelSize | None = None) -> Accelerator:
    """Join the processes that the launcher started, or be the only one. Call it before the model is built.

    Models built afterwards with `from_pretrained` or `from_config` are sharded at once.

    Args:
        runtime: how to run.
        size: of the model to come, for the bounds on memory.

    Raises:
        ConfigError: for a DeepSpeed configuration that cannot train forward-only, a launcher that was told something
            else than the run, a shard size that does not divide the number of processes, or processes that did not
            join.
    """
    runtime = runtime or Runtime()
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    obey(runtime.dtype)
    _import_deepspeed()
    for name in ("all_gather_into", "reduce_scatter"):
        warnings.filterwarnings("ignore", message=f".*{name}_tensor.*deprecated", category=FutureWarning)
    launched = int(os.environ["WORLD_SIZE"])
    if runtime.shard_size is None:
        runtime = replace(runtime, shard_size=default_shard_size(launched, runtime.deepspeed))
    timeout = timedelta(minutes=runtime.timeout_minutes)
    accelerator = _accelerator(runtime, size, whole_groups(runtime.shard_size, launched), timeout)
    if accelerator.num_processes != launched:
        raise ConfigError(f"{launched} processes", str(accelerator.num_processes), "check the launcher")
    return accelerator


def default_shard_size(ranks: int, deepspeed: Mapping[str, Any] | str | None) -> int | None:
    """None, ZeRO-3 over all ranks; but 1 for a single rank, which ZeRO-3 would only make wait for its own weights.

    Args:
        ranks: that were launched.
        deepspeed: what a run names of its own, which asks for ZeRO-3. A launcher's configuration does so only if it
            offloads the weights.
    """
    is_alone = ranks == 1 and deepspeed is None and offload_device(read_deepspeed_config(None)) == "none"
    return 1 if is_alone else None


def whole_groups(shard_size: int | None, ranks: int) -> int:
    """The size of the shard groups; None is all ranks.

    Raises:
        ConfigError: if they do not come out even.
    """
    size = ranks if shard_size is None else shard_size
    if size < 1 or ranks % size:
        sizes = ", ".join(str(even) for even in range(1, ranks + 1) if ranks % even == 0)
        remedy = f"set mesh.shard_size to one of {sizes}, or start another number of ranks"
        raise ConfigError(f"mesh.shard_size to divide the number of ranks ({ranks})", str(size), remedy)
    return size


def _accelerator(runtime: Runtime, size: ModelSize | None, shard_size: int, timeout: timedelta) -> Accelerator:
    """ZeRO-3 over all ranks or within groups, or no DeepSpeed at all, whatever the launcher was told."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    options: dict[str, Any] = {"kwargs_handlers": [InitProcessGroupKwargs(backend=backend, timeout=timeout)]}
    is_one_group = shard_size == int(os.environ["WORLD_SIZE"])
    is_whole = shard_size == 1 and runtime.shard_size is not None
    if is_whole or not is_one_group:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    if is_whole:
        if runtime.deepspeed is not None and not is_one_group:
            _check_hpz(runtime.deepspeed, int(os.environ["WORLD_SIZE"]), is_one_group=False)
        return WholeAccelerator(dtype=runtime.dtype, **options)
    config = dict(runtime.deepspeed) if runtime.deepspeed is not None else read_deepspeed_config(None)
    filled = fill_deepspeed_config(config, runtime.dtype, size, shard_size)
    _check_deepspeed(filled)
    _check_hpz(filled, int(os.environ["WORLD_SIZE"]), is_one_group=is_one_group)
    ready_nvme(filled)
    if not is_one_group:
        return GroupedAccelerator(shard_size=shard_size, deepspeed=filled, timeout=timeout, **options)
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=filled, zero3_init_flag=True), **options)


def _check_deepspeed(config: Mapping[str, Any]) -> None:
    """Refuse values that DeepSpeed would only refuse when the model is built.

    Raises:
        ConfigError: for options of ZeRO that it does not know, or their values; for batches other than of one.
    """
    from deepspeed.runtime.zero.config import get_zero_config

    remedy = "correct the file of runtime.deepspeed"
    try:
        get_zero_config(dict(config))
    except ValueError as error:
        raise ConfigError("a zero_optimization that DeepSpeed takes", one_line(error), remedy) from error
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"):
        if config.get(key, 1) != 1:
            remedy = "remove it: data.batch_size and data.micro_batch_size say what a step takes"
            raise ConfigError(f"no {key} in the DeepSpeed configuration", repr(config[key])[:80], remedy)


def _check_hpz(config: Mapping[str, Any], ranks: int, *, is_one_group: bool) -> None:
    """Refuse secondary shards that do not come out even, and beside shard groups: theirs are made over all ranks.

    Of fewer ranks than one of their groups, DeepSpeed makes a single group.
    """
    size = config["zero_optimization"].get("zero_hpz_partition_size", 1)
    size = size if isinstance(size, int) else 1  # "auto"
    if size > 1 and not is_one_group:
        remedy = "remove it, or set mesh.shard_size to null"
        raise ConfigError("no zero_hpz_partition_size beside mesh.shard_size", "one", remedy)
    if size > 1 and ranks % min(size, ranks):
        remedy = "change it, or start another number of ranks"
        raise ConfigError(f"zero_hpz_partition_size to divide the number of ranks ({ranks})", str(size), remedy)


def stop() -> None:
    """Leave the process group, all ranks together. Not after an error: a rank that fails alone would wait here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        for group, (backend, _) in sorted(_world.pg_map.items(), key=lambda item: item[0].group_name):
            if backend == "gloo":
                _keep_last_work(group)
        torch.distributed.destroy_process_group()


def _keep_last_work(group: ProcessGroup) -> None:
    """Let no thread of gloo be the last to hold a tensor: it would need Python's lock, and abort the end of Python.

    Such a thread may still be about to drop its last work. A barrier keeps the works that are not dropped yet, and is
    itself kept to the end of the process.
    """
    barrier = torch.distributed.barrier(group, async_op=True)
    barrier.wait()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(barrier))


def _import_deepspeed() -> None:
    """Import DeepSpeed without what is not used here.

    Its autotuner would import MLflow: two seconds of processor time in every rank. On a CPU its first use would compile
    shared-memory collectives.
    """
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # None: an import of it fails
    is_hidden = modules.setdefault("mlflow", None) is None
    try:
        import deepspeed
    finally:
        if is_hidden:
            del modules["mlflow"]
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

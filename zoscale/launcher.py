"""What a launcher says through the environment: what contradicts the run is refused, the rest is left out."""

import os

import torch

from zoscale.config import ConfigError

_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
_OTHERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_AS_SHIPPED = "as in launch/accelerate"


def obey(dtype: str) -> None:
    """Check what the launcher was told, and make this process one of its ranks, or the only one.

    Accelerate's default configuration, without a word of DeepSpeed, is fine: what is sharded, how and in which
    precision is not read from it.

    Args:
        dtype: of the run: float32, bfloat16 or float16.

    Raises:
        ConfigError: naming both sides of a contradiction.
    """
    if "WORLD_SIZE" not in os.environ:
        _stand_alone()
    _check_precision(dtype)
    _check_sharding()
    _check_device()


def _check_precision(dtype: str) -> None:
    """`mixed_precision: no` is what Accelerate writes where nothing was chosen."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told != "no" and _DTYPES.get(told) != dtype:
        remedy = f"set model.dtype={_DTYPES[told]}, or leave mixed_precision out" if told in _DTYPES else "leave it out"
        raise ConfigError("mixed_precision of the launcher to agree with model.dtype", f"{told} and {dtype}", remedy)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # the model is in that type: no autocast


def _check_sharding() -> None:
    for name, what in _OTHERS.items():
        if _is_true(name):
            raise ConfigError("DeepSpeed ZeRO-3", f"{what} from the launcher", f"launch with DeepSpeed, {_AS_SHIPPED}")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    if stage != "3":
        raise ConfigError(
            "zero_stage 3 or none from the launcher", stage, f"set zero_stage: 3, or a file {_AS_SHIPPED}"
        )


def _check_device() -> None:
    if _is_true("ACCELERATE_USE_CPU") and torch.cuda.is_available():
        raise ConfigError(
            "GPUs, which are there", "use_cpu from the launcher", "set CUDA_VISIBLE_DEVICES= to hide them"
        )
    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if torch.cuda.is_available() and rank >= gpus:
        remedy = (
            "start as many ranks as a node has GPUs; set LOCAL_RANK=0 where each rank sees its own alone, or "
            "CUDA_VISIBLE_DEVICES= to hide them"
        )
        raise ConfigError("a GPU for each rank of a node", f"{gpus} for LOCAL_RANK {rank}", remedy)
    os.environ["ACCELERATE_USE_CPU"] = "false"  # it would switch DeepSpeed off; without GPUs it is a CPU anyway


def _is_true(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _stand_alone() -> None:
    """Without a launcher: a group of one process on this machine.

    Raises:
        ConfigError: if `accelerate launch` was asked for more and started only this one.
    """
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys():
        remedy = "use --config_file launch/accelerate/cpu.yaml or --use_deepspeed; or, for one, unset MASTER_PORT"
        raise ConfigError("the processes that `accelerate launch` was asked for", "only one", remedy)
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):  # port 0: one that is free when the group is made
        os.environ[name] = "0"
    os.environ["WORLD_SIZE"] = "1"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")

"""A frozen base on NVMe: what DeepSpeed's parameter offload needs, and a folder of this process for its files."""

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zoscale.config import ConfigError, RunConfig, first_line
from zoscale.models.sizes import ModelSize
from zoscale.optim.first_order import FIRST_ORDER

SMALLEST = 2**20
"""Bytes of a slice from which DeepSpeed keeps it in a file."""
_PREFIX = "zoscale-"
_REMEDY = "or set zero_optimization.offload_param.device to cpu"


def offload_device(deepspeed: Mapping[str, Any]) -> str:
    """Where a DeepSpeed configuration keeps the shards: none (where they are computed with), cpu or nvme."""
    return str((deepspeed["zero_optimization"].get("offload_param") or {}).get("device", "none"))


class Buffers(NamedTuple):
    """Where slices lie between their file and their gather.

    Args:
        number: of buffers.
        elements: of each. Slices that are larger stay in the host's memory.
    """

    number: int
    elements: int

    @classmethod
    def of(cls, size: ModelSize, shard_size: int) -> "Buffers":
        """For two blocks and what lies outside of them, but for what is larger than all in a block: an embedding of
        128,000 words would make each buffer nine times as large as a block of 4,096 features needs."""
        return cls(2 * size.matrices_in_block + size.matrices_outside, -(-size.largest_in_block // shard_size))


def check_offload(config: RunConfig, deepspeed: Mapping[str, Any]) -> None:
    """Refuse what parameter offload cannot be combined with.

    Raises:
        ConfigError: what was expected, and why.
    """
    device = offload_device(deepspeed)
    beside = f"beside offload_param.device {device}"
    if device != "none" and config.mesh.shard_size == 1:
        remedy = "set it to null: with 1 the whole model lies on every rank, and ZeRO-3, which offloads, takes no part"
        raise ConfigError(f"another mesh.shard_size {beside}", "1", remedy)
    if device != "nvme":
        return
    if config.adapter is None:
        remedy = f"set adapter: weights on NVMe cannot be edited in place; {_REMEDY}"
        raise ConfigError(f"an adapter {beside}", "none", remedy)
    if config.optimizer.name in FIRST_ORDER:
        raise ConfigError(f"a zero-order optimizer {beside}", config.optimizer.name, f"change it, {_REMEDY}")
    if deepspeed["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
        raise ConfigError(f"no zero_hpz_partition_size {beside}", "one", f"remove it, {_REMEDY}")


def fill_offload(deepspeed: dict[str, Any], size: ModelSize | None, shard_size: int) -> None:
    """Replace "auto" in the options of an offload to NVMe by `Buffers` and the folder for temporary files.

    Args:
        deepspeed: is changed.
        size: of the model; None = DeepSpeed's own buffers.
        shard_size: ranks that share a copy.
    """
    if offload_device(deepspeed) != "nvme":
        return
    options = deepspeed["zero_optimization"]["offload_param"]
    found: dict[str, Any] = {"nvme_path": tempfile.gettempdir()}
    if size is not None:
        buffers = Buffers.of(size, shard_size)
        found |= {"buffer_count": buffers.number, "buffer_size": buffers.elements}
    for key in ("nvme_path", "buffer_count", "buffer_size"):
        if options.get(key, "auto") == "auto":
            options.pop(key, None)
            options |= {key: found[key]} if key in found else {}


def ready_nvme(deepspeed: dict[str, Any]) -> None:
    """Make a complete DeepSpeed configuration fit to be used, if it offloads to NVMe.

    `nvme_path` becomes a folder of this process within it, which goes with the process; what a killed one has left
    behind is removed here.

    Args:
        deepspeed: is changed.

    Raises:
        ConfigError: if files cannot be written there as DeepSpeed does, or libaio is not there.
    """
    if offload_device(deepspeed) == "nvme":
        options = deepspeed["zero_optimization"]["offload_param"]
        options["nvme_path"] = str(_own_folder(Path(str(options["nvme_path"]))))
        _build_reader()
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

        AsyncPartitionedParameterSwapper.swappable_tensor = _is_swappable


def _is_swappable(swapper: Any, *, numel: int) -> bool:
    """DeepSpeed's rule for a slice; but what no buffer can hold stays in memory, where DeepSpeed would fail."""
    is_large_enough: bool = numel * swapper.swap_element_size >= swapper.min_aio_bytes
    return is_large_enough and numel <= swapper.elements_per_buffer


def _own_folder(place: Path) -> Path:
    """A new folder, held by a lock until the process ends."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        for lock in place.glob(f"{_PREFIX}*.lock"):
            _remove_if_left(lock)
        own = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        atexit.register(_remove, own)
        held = os.open(own / "held", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(held, fcntl.LOCK_EX)
        (own / "held").rename(own.with_suffix(".lock"))  # from here on others find it, and find it held
        os.close(os.open(own / "direct", os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError as error:
        got = f"{place} ({error.strerror})"
        remedy = f"name a folder on a disk of the node itself, {_REMEDY}"
        raise ConfigError("an nvme_path that takes files past the page cache (O_DIRECT)", got, remedy) from error
    return own


def _remove_if_left(lock: Path) -> None:
    """Remove the folder of a lock that no process holds, unless a neighbour does or it is another user's."""
    with suppress(BlockingIOError, FileNotFoundError, PermissionError), open(lock, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(lock.with_suffix(""))


def _remove(own: Path) -> None:
    shutil.rmtree(own, ignore_errors=True)
    own.with_suffix(".lock").unlink(missing_ok=True)


def _build_reader() -> None:
    """Compile DeepSpeed's asynchronous reader, which takes minutes the first time on a machine, or load it."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        remedy = f"install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora, RHEL), {_REMEDY}"
        raise ConfigError("libaio and its header for offload_param.device nvme", "none", remedy)
    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # of any type: on a machine with a GPU but without a CUDA toolkit a TypeError
        got = first_line(error)
        needed = "a C++ compiler" + " and a CUDA toolkit (CUDA_HOME) of torch's version" * torch.cuda.is_available()
        raise ConfigError(f"{needed} to build DeepSpeed's async_io", got, f"run ds_report, {_REMEDY}") from error

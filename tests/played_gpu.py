"""GPUs that are played: what can be told of GPUs without one, which is where tensors are and where a host waits.

A library (`played_gpu.cpp`) gives torch a device `cuda` whose memory is the host's and whose operators are those of the
CPU. Tensors of both devices in one operator are refused, and so is each wait, while `torch.cuda.set_sync_debug_mode`
asks for it. Here torch's Python side is told, and gloo plays NCCL. Not played: streams that run side by side, CUDA's
own kernels, Triton, and generated code (`torch.compile` traces, and runs eagerly).
"""

import contextlib
import ctypes
import importlib.util
import os
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIBRARY = "libplayed_gpu.so"
MEMORY = 80 << 30
COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all_single", "broadcast", "gather", "reduce",
    "reduce_scatter_tensor", "scatter",
)  # fmt: skip


def build(folder: Path) -> dict[str, str]:
    """Compile the library into a folder; what a process needs in its environment to see two GPUs."""
    torch = Path(str(importlib.util.find_spec("torch").origin)).parent  # type: ignore[union-attr]
    include = torch / "include"
    options = ["-shared", "-fPIC", "-O1", "-std=c++20", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    options += [f"-I{sysconfig.get_path('include')}", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"]
    source, library = Path(__file__).with_suffix(".cpp"), folder / LIBRARY
    subprocess.run(["g++", *options, source, "-o", library, "-lc10", "-ltorch_cpu"], check=True)
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(source.parent)!r})\nimport played_gpu\nplayed_gpu.play({str(library)!r})\n"
    )
    return {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "0,1"}


def play(library: str) -> None:
    """To be called before torch is imported; `CUDA_VISIBLE_DEVICES` says how many GPUs there are."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        _play_devices(len(visible.split(",")))
        _play_storages()
        _play_compiler()
        _play_collectives()


def _answer(value: Any = None) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _take(owner: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


def _play_devices(number: int) -> None:
    import torch
    import torch._dynamo  # as it is without CUDA

    played, stream = torch.ops.played, Stream()
    properties = SimpleNamespace(
        name="a GPU that is played", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132, warp_size=32
    )

    def set_device(device: Any) -> None:
        played.set_device(device if isinstance(device, int) else torch.device(device).index or 0)

    _take(
        torch.cuda, is_available=_answer(True), is_initialized=_answer(True), init=_answer(), _lazy_init=_answer(),
        device_count=_answer(number), current_device=lambda: played.device(), set_device=set_device,
        _exchange_device=_answer(0), _maybe_exchange_device=_answer(0), synchronize=_answer(),
        get_device_properties=_answer(properties), get_device_name=_answer(properties.name),
        get_device_capability=_answer((9, 0)), is_bf16_supported=_answer(True),
        memory_allocated=lambda device=None: played.allocated(), max_memory_allocated=lambda device=None: played.peak(),
        memory_reserved=lambda device=None: played.allocated(), max_memory_reserved=lambda device=None: played.peak(),
        reset_peak_memory_stats=lambda device=None: played.reset_peak(), memory_stats=_answer({}),
        empty_cache=_answer(), mem_get_info=lambda device=None: (MEMORY - played.allocated(), MEMORY),
        Stream=Stream, Event=Event, current_stream=_answer(stream), default_stream=_answer(stream),
        stream=_answer(contextlib.nullcontext()), is_current_stream_capturing=_answer(False),
        set_sync_debug_mode=lambda mode: played.strict(mode in (2, "error")),
        manual_seed=_answer(), manual_seed_all=_answer(),
        get_rng_state=_answer(torch.get_rng_state()), set_rng_state=_answer(),
    )  # fmt: skip
    _take(torch.cuda.nvtx, range_push=_answer(), range_pop=_answer(), mark=_answer())
    _take(torch._C, _cuda_getDeviceCount=_answer(number), _cuda_getDevice=played.device)
    _take(torch._C, _cuda_getCurrentRawStream=_answer(0))
    torch.version.cuda = "13.0"


def _play_storages() -> None:
    import torch

    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> None:
        if storage.device.type == "cuda":
            torch.ops.played.resize_storage(torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage), size)
        else:
            resize(storage, size)

    _take(torch.UntypedStorage, resize_=resize_)
    _take(torch.Tensor, record_stream=_answer())


def _play_compiler() -> None:
    import torch

    compiler = torch.compile

    def traced(model: Any = None, *, backend: Any = None, mode: Any = None, options: Any = None, **kwargs: Any) -> Any:
        return compiler(model, backend="aot_eager", **kwargs)

    _take(torch, compile=traced)


def _play_collectives() -> None:
    import torch
    import torch.distributed as dist

    start = dist.init_process_group

    def started(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        start("gloo" if backend and "nccl" in backend else backend, *args, **kwargs)

    def on_host(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [on_host(each) for each in value]
        return torch.ops.played.on_host(value) if isinstance(value, torch.Tensor) else value

    def of_host(collective: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: collective(*map(on_host, args), **{k: on_host(v) for k, v in kwargs.items()})

    for module in (dist, dist.distributed_c10d):
        _take(module, init_process_group=started, is_nccl_available=_answer(True))
        _take(module, **{name: of_host(getattr(module, name)) for name in COLLECTIVES})


class Event:
    """Of a device that has done what it was asked for at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return (other.time - self.time) * 1e3

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...
    def wait(self, stream: Any = None) -> None: ...


class Stream:
    """The only one."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

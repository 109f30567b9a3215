"""Stands in for DeepSpeed's `async_io`, which takes minutes to compile: the same calls, done at once by plain reads."""

from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder


class PlainHandle:
    """Reads and writes whole tensors when asked to, and says so when waited for."""

    def __init__(self, **options: Any) -> None:
        self._done = 0

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        with open(path, "rb") as file:
            file.readinto(memoryview(buffer.view(torch.uint8).numpy()))
        self._done += 1
        return 0

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        with open(path, "wb") as file:
            file.write(memoryview(buffer.view(torch.uint8).numpy()))
        self._done += 1
        return 0

    def wait(self) -> int:
        done, self._done = self._done, 0
        return done

    def new_cpu_locked_tensor(self, numel: int, example: torch.Tensor) -> torch.Tensor:
        return torch.empty(numel, dtype=example.dtype)

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        return False


def plant() -> None:
    """Use it in this process."""
    AsyncIOBuilder.is_compatible = lambda self, verbose=False: True
    AsyncIOBuilder.load = lambda self, verbose=False: SimpleNamespace(aio_handle=PlainHandle)

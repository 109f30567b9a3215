"""What a run costs: bytes of memory, tokens per second, bytes gathered.

Each meter belongs to one rank and knows nothing of the others; whoever wants all ranks gathers the values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Memory of one rank, in bytes: now, and at its highest since the last reset."""

    current: int
    peak: int


class MemoryMeter:
    """Current and peak memory of this process on one device.

    On a GPU the numbers are the CUDA allocator's (tensors, not the context nor the allocator's cache). On the
    CPU they are the resident set: `reset` restarts the kernel's own high-water mark, so the peak is exact.
    Where the kernel does not offer that (no `/proc/self/clear_refs`, or it is read-only), `peak_is_exact` is
    False and the peak is only the largest of the values seen by `reset` and `read`.
    The mark is the process's: two meters for one device in one process disturb each other.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.phases: dict[str, int] = {}
        self._floor = 0
        self._process = psutil.Process()
        self.peak_is_exact = self.device.type == "cuda" or _can_restart_high_water_mark()
        self.reset()

    def reset(self) -> None:
        """Forget the peak: from here on it is that of what follows (at least the current bytes)."""
        self._floor = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.peak_is_exact:
            _restart_high_water_mark()
        else:
            self._floor = self._current()

    def read(self) -> Memory:
        """The current bytes and the peak since the last `reset` (or since the phase began)."""
        current = self._current()
        peak = max(self._floor, current, self._device_peak())
        if not self.peak_is_exact:
            self._floor = peak
        return Memory(current, peak)

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, int]]:
        """Measure the body by itself; yields `phases`, where `name` appears when the body ends.

        `phases[name]` is the highest peak, in bytes, of all phases of that name. Phases nest, and what an
        inner one uses does not count for the outer: an evaluation does not raise training's peak.
        """
        outer_peak = self.read().peak
        self.reset()
        try:
            yield self.phases
        finally:
            self.phases[name] = max(self.phases.get(name, 0), self.read().peak)
            self.reset()
            self._floor = max(self._floor, outer_peak)

    def _current(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return int(self._process.memory_info().rss)

    def _device_peak(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return _high_water_mark() if self.peak_is_exact else 0


def _restart_high_water_mark() -> None:
    """Set this process's VmHWM to its current resident set. OSError: the kernel does not allow it."""
    _CLEAR_REFS.write_text("5")


def _high_water_mark() -> int:
    """VmHWM in bytes; 0: the kernel does not report it. OSError: no `/proc`."""
    sizes = [line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(sizes[0]) * 1024 if sizes else 0


def _can_restart_high_water_mark() -> bool:
    try:
        _restart_high_water_mark()
        return _high_water_mark() > 0
    except OSError:
        return False


@dataclass(frozen=True)
class Counts:
    """Work done and the time it took: numbers of tokens, samples and forward passes; seconds."""

    tokens: int = 0
    samples: int = 0
    forwards: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Work per second; all zero when no time has passed."""

    tokens_per_second: float
    samples_per_second: float
    forwards_per_second: float


class ThroughputMeter:
    """Tokens, samples and forwards per second of running time.

    Reads a monotonic clock and nothing else: on a GPU, read it where the losses have already come back to the
    host, else the work is still queued.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counted = Counts()
        self._at_reset = Counts()
        self._running_since = clock()
        self._num_pauses = 0

    def count(self, *, tokens: int = 0, samples: int = 0, forwards: int = 0) -> None:
        """Add work. Work done inside `pause` is not counted, as its time is not."""
        if self._num_pauses == 0:
            c = self._counted
            self._counted = Counts(c.tokens + tokens, c.samples + samples, c.forwards + forwards, c.seconds)

    def reset(self) -> None:
        """Start a new interval for `interval` and `rates`; `totals` go on."""
        self._at_reset = self.totals()

    def totals(self) -> Counts:
        """Everything since the meter was made, pauses left out."""
        c, now = self._counted, self._clock()
        running = now - self._running_since if self._num_pauses == 0 else 0.0
        return Counts(c.tokens, c.samples, c.forwards, c.seconds + running)

    def interval(self) -> Counts:
        """Everything since the last `reset`, pauses left out."""
        now, then = self.totals(), self._at_reset
        return Counts(*(n - t for n, t in zip(astuple(now), astuple(then), strict=True)))

    def rates(self) -> Rates:
        """Work per second since the last `reset`."""
        i = self.interval()
        if i.seconds <= 0.0:
            return Rates(0.0, 0.0, 0.0)
        return Rates(i.tokens / i.seconds, i.samples / i.seconds, i.forwards / i.seconds)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the body (an evaluation, a checkpoint) out of the time and of the counts. Nests."""
        self._counted = self.totals()
        self._num_pauses += 1
        try:
            yield
        finally:
            self._num_pauses -= 1
            self._running_since = self._clock()


@dataclass(frozen=True)
class Traffic:
    """Gathered bytes (the size of the outputs on this rank) and the number of collectives that gave them."""

    num_bytes: int
    num_calls: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.num_bytes + other.num_bytes, self.num_calls + other.num_calls)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.num_bytes - other.num_bytes, self.num_calls - other.num_calls)


class CommMeter:
    """Bytes and calls of the gathers of parameters; fed by `count_allgathers`."""

    def __init__(self) -> None:
        self.totals = Traffic(0, 0)
        self._taken = Traffic(0, 0)

    def record(self, num_bytes: int) -> None:
        """Add one collective with an output of `num_bytes` bytes."""
        self.totals += Traffic(num_bytes, 1)

    def take(self) -> Traffic:
        """What was recorded since the last `take`."""
        since, self._taken = self.totals - self._taken, self.totals
        return since


_GATHERS = frozenset({"allgather_fn", "all_gather_into_tensor", "all_gather", "all_reduce"})


class _CountingComm:
    """`deepspeed.comm` with the collectives that bring parameters counted; all else passes through."""

    def __init__(self, comm: Any, meter: CommMeter) -> None:
        self._comm = comm
        self._meter = meter

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._comm, name)
        if name not in _GATHERS:
            return function

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = next(iter((*args, *kwargs.values())))  # the output comes first in all of them
            self._meter.record(sum(t.nbytes for t in (output if isinstance(output, list) else [output])))
            return function(*args, **kwargs)

        return counted


@contextmanager
def count_allgathers(meter: CommMeter) -> Iterator[CommMeter]:
    """While the body runs, feed `meter` with every collective by which ZeRO-3 gathers parameters.

    All of them (single, coalesced, quantized weights and their scales, secondary shards, the all-reduce of
    `stage3_use_all_reduce_for_fetch_params`, `GatheredParameters`) go through one name, `dist` in DeepSpeed's
    module `partition_parameters`; it is replaced here and put back at the end. Collectives issued elsewhere
    are not counted. A parameter held by one rank alone is not gathered: at world size 1 the counts are zero.
    """
    from deepspeed.runtime.zero import partition_parameters

    comm = partition_parameters.dist
    partition_parameters.dist = _CountingComm(comm, meter)
    try:
        yield meter
    finally:
        partition_parameters.dist = comm

"""Seconds, bytes and collectives of a cell's variants, taken in turns in one process per rank.

python -m bench.measure CELL_JSON OUT_FILE        started by `launch/benchmark.py`, under torchrun for several ranks
"""

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.cells import Cell
from bench.variants import Bench, build
from zoscale.mesh import Mesh
from zoscale.meters import CommMeter, MemoryMeter, Traffic, count_allgathers
from zoscale.models.sizes import blocks_of
from zoscale.runtime import stop
from zoscale.shards import local_bytes, true_numel

_SETTLE = 2  # steps before the timed one where ZeRO-3 has to learn a variant's order of modules anew
_M_MMAP_THRESHOLD = -3  # of mallopt
Steps = dict[str, Callable[[], None]]


def measure(cell: Cell) -> list[dict[str, Any]]:
    """One row per variant, the same on every rank."""
    bench = build(cell)
    mesh = bench.engine.mesh
    for step in bench.steps.values():  # compilation, first touches
        step()
    seconds = alternate(bench.steps, mesh, cell.repetitions)
    traffic = {name: _traffic(step, bench) for name, step in bench.steps.items()}
    peaks = {name: _peak(step, mesh) for name, step in bench.steps.items()}
    model = bench.engine.model
    blocks = blocks_of(model)
    shared = {
        "scheme": cell.scheme, "probe": cell.probe, "dtype": cell.dtype, "ranks": cell.ranks, "q": cell.q,
        "batch": cell.batch, "tokens": cell.tokens, "compile": cell.compile,
        "model_bytes": sum(true_numel(p) * p.element_size() for p in model.parameters()),
        "shard_bytes": max(mesh.gather_objects(local_bytes(model))),
        "block_bytes": max(sum(true_numel(p) * p.element_size() for p in b.parameters()) for b in blocks),
        "blocks": len(blocks),
    }  # fmt: skip
    return [
        {
            "variant": name,
            **shared,
            "seconds_per_step": statistics.median(turn.wall for turn in taken),
            "ratio_to_bare": statistics.median(t.wall / b.wall for t, b in zip(taken, seconds["bare"], strict=True)),
            "cpu_seconds_per_step": statistics.median(turn.cpu for turn in taken),
            "cpu_ratio_to_bare": statistics.median(t.cpu / b.cpu for t, b in zip(taken, seconds["bare"], strict=True)),
            "bare_peak_bytes": peaks["bare"].extra,
            "peak_bytes": peaks[name].whole,
            "peak_extra_bytes": peaks[name].extra - peaks["bare"].extra,
            "gathered_bytes_per_step": traffic[name].num_bytes,
            "collectives_per_step": traffic[name].num_calls,
        }
        for name, taken in seconds.items()
    ]


class Peak(NamedTuple):
    """Bytes at the highest point of a step, and above what lies there before it; of the rank that has most of each."""

    whole: int
    extra: int


class Turn(NamedTuple):
    """One timed step: seconds that passed, of the slowest rank, and of all its threads' work on processors."""

    wall: float
    cpu: float


def alternate(steps: Steps, mesh: Mesh, repetitions: int) -> dict[str, list[Turn]]:
    """Each variant's timed steps; the variants take turns, every other round backwards."""
    turns: dict[str, list[Turn]] = {name: [] for name in steps}
    for repetition in range(repetitions):
        names = list(steps) if repetition % 2 == 0 else list(reversed(steps))
        for name in names:
            for _ in range(_SETTLE if mesh.world_size > 1 else 0):
                steps[name]()
            turns[name].append(_timed(steps[name], mesh))
        _say(f"round {repetition + 1}: " + ", ".join(f"{name} {turns[name][-1].wall:.3f} s" for name in steps), mesh)
    ranks = mesh.gather_objects({name: [tuple(turn) for turn in taken] for name, taken in turns.items()})
    return {name: [_slowest(own) for own in zip(*(rank[name] for rank in ranks), strict=True)] for name in steps}


def _slowest(turns: Sequence[tuple[float, float]]) -> Turn:
    wall, cpu = zip(*turns, strict=True)
    return Turn(max(wall), max(cpu))


def _timed(step: Callable[[], None], mesh: Mesh) -> Turn:
    _synchronize(mesh)
    mesh.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    _synchronize(mesh)
    return Turn(time.perf_counter() - wall, time.process_time() - cpu)


def _say(text: str, mesh: Mesh) -> None:
    if mesh.is_main:
        print(text, file=sys.stderr, flush=True)


def _synchronize(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)


def _traffic(step: Callable[[], None], bench: Bench) -> Traffic:
    """Of weights and adapters in one step on this rank; the exchange of the K losses is not among them."""
    mesh, meter = bench.engine.mesh, CommMeter()
    if mesh.world_size == 1:
        return meter.totals
    for _ in range(_SETTLE):
        step()
    before = Traffic(mesh.gathered_bytes, mesh.num_gathers)
    with count_allgathers(meter):
        step()
    return meter.totals + Traffic(mesh.gathered_bytes, mesh.num_gathers) - before


def _peak(step: Callable[[], None], mesh: Mesh) -> Peak:
    """Of one step.

    On a CPU freed memory is given back to the system at once, else what earlier steps left would hide the peak.
    """
    gc.collect()
    if mesh.device.type == "cpu":
        _give_memory_back()
    meter = MemoryMeter(mesh.device)
    before = meter.read().current
    step()
    peak = meter.read().peak
    return Peak(*map(max, zip(*mesh.gather_objects((peak, peak - before)), strict=True)))


def _give_memory_back() -> None:
    """glibc: return free memory, and from now on that of large tensors when they are freed; elsewhere nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 131072)
        libc.malloc_trim(0)


def main() -> None:
    cell, out = Cell.read(sys.argv[1]), Path(sys.argv[2])
    rows = measure(cell)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(rows))
    stop()


if __name__ == "__main__":
    main()

"""Cost of the noise: against `torch.randn`, and of the passes over weights that use it against a plain copy.

python launch/benchmark_noise.py [generators | passes] [--elements N] [--repeats R] [--directions Q] [--threads T]
    [--device cpu | cuda] [--json FILE]
python launch/benchmark_noise.py passes --device cuda --elements 268435456     # on a GPU

A ratio is a median time over that of `torch.randn`. A share is the bytes of weights and state that a pass must read and
write, per second, over those of `copy_` on as many float32 numbers: 100 % costs the memory traffic alone.
The weights are bfloat16 with a float32 master slice.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from zoscale.cli import guarded
from zoscale.config import ConfigError, at_least
from zoscale.estimators import GradientEstimate
from zoscale.noise.generator import Key, Noise, Range
from zoscale.optim import ZOSGD, JaguarSignSGD
from zoscale.probes import Block, Direction, Gaussian, Probe, Rademacher, pieces
from zoscale.shards import ShardedParam, TensorSpec

Work = Callable[[], object]
_WIDTH = 1024


def medians(contestants: Mapping[str, Work], repeats: int, device: torch.device) -> dict[str, float]:
    """Median wall seconds of each over alternating repetitions, the device's queue included."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 2):
        for name, work in contestants.items():
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= 2:  # the first two compile and warm up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def generators(elements: int, device: torch.device) -> dict[str, Work]:
    """Each distribution drawn to memory, and `torch.randn`."""
    eager, compiled = Noise(0), Noise(0, compiled=True)
    key, ranges = Key(0), [Range(0, 0, elements)]
    return {
        "torch.randn": lambda: torch.randn(elements, device=device),
        "normal, compiled": lambda: compiled.normal(key, ranges, device),
        "normal, eager": lambda: eager.normal(key, ranges, device),
        "rademacher, compiled": lambda: compiled.rademacher(key, ranges, device),
        "rademacher, eager": lambda: eager.rademacher(key, ranges, device),
    }


class Weights:
    """A matrix of zeros, and the passes of a step over it.

    Args:
        elements: of the matrix, rounded up to whole rows.
        q: directions of an update.
    """

    def __init__(self, elements: int, q: int, device: torch.device) -> None:
        spec = TensorSpec(0, "weight", (-(-elements // _WIDTH), _WIDTH))
        weight = nn.Parameter(torch.zeros(spec.shape, dtype=torch.bfloat16, device=device), requires_grad=False)
        self.shard = ShardedParam(weight, spec)
        self.q = q
        self.noise = Noise(0, compiled=True)

    def passes(self) -> dict[str, tuple[int, Work]]:
        """By name the bytes per element that must be read and written, and the pass."""
        master, live, memory = 4, 2, 4
        probes = {"gaussian": Gaussian(), "rademacher": Rademacher(), "block 0.5 x 0.5": Block(rows=0.5, columns=0.5)}
        made: dict[str, tuple[int, Work]] = {}
        for name, probe in probes.items():
            made[f"perturb, {name}"] = (master + live, self._perturbation(probe))
        for name, probe in probes.items():
            made[f"zo_sgd, {name}"] = (2 * master + live, self._update(ZOSGD([self.shard], lr=1e-6), probe))
        for name, probe in probes.items():
            update = self._update(JaguarSignSGD([self.shard], lr=1e-6), probe)
            made[f"jaguar_sign_sgd, {name}"] = (2 * master + live + 2 * memory, update)
        return made

    def _directions(self, probe: Probe) -> tuple[Direction, ...]:
        return tuple(probe.draw(self.noise, [self.shard.spec], 0, k) for k in range(self.q))

    def _perturbation(self, probe: Probe) -> Work:
        direction = self._directions(probe)[0]

        def work() -> None:
            for group in pieces([self.shard], stream=direction.stream):
                for piece, segment in zip(group, direction.segments(group), strict=True):
                    if segment is not None:
                        segment.write(self.shard.live, self.shard.truth, piece.start, 1e-3)

        return work

    def _update(self, optimizer: ZOSGD | JaguarSignSGD, probe: Probe) -> Work:
        estimate = GradientEstimate(self._directions(probe), (1e-3,) * self.q, 0.0)
        return lambda: optimizer.step(estimate)


def ratios(elements: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Of the generators' times to that of `torch.randn`, by name."""
    seconds = medians(generators(elements, device), repeats, device)
    return {name: taken / seconds["torch.randn"] for name, taken in seconds.items()}


def shares(elements: int, q: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Of the passes' bandwidth in that of a copy, by name."""
    weights = Weights(elements, q, device)
    source, passes = torch.zeros_like(weights.shard.truth), weights.passes()
    target = torch.empty_like(source)
    works: dict[str, Work] = {name: work for name, (_, work) in passes.items()}
    seconds = medians({"copy_": lambda: target.copy_(source), **works}, repeats, device)
    copied = 2 * source.element_size() / seconds["copy_"]
    print(f"{'copy_':32} {copied * len(source) / 1e9:6.1f} GB/s")
    return {name: size / seconds[name] / copied for name, (size, _) in passes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="?", choices=["generators", "passes"], help="only these")
    parser.add_argument("--elements", type=at_least(1), default=2**20, help="elements of a call")
    parser.add_argument("--repeats", type=at_least(1), default=20, help="timed calls of each contestant")
    parser.add_argument("--directions", type=at_least(1), default=1, help="directions of an update")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("a GPU for --device cuda", "none that torch can use", "leave --device out")
    torch.set_num_threads(arguments.threads)
    size, repeats, device = arguments.elements, arguments.repeats, torch.device(arguments.device)
    found: dict[str, float] = {}
    if arguments.what != "passes":
        found |= (generated := ratios(size, repeats, device))
        for name, ratio in generated.items():
            print(f"{name:32} {ratio:6.2f} x torch.randn")
    if arguments.what != "generators":
        found |= (passed := shares(size, arguments.directions, repeats, device))
        for name, share in passed.items():
            print(f"{name:32} {share:6.1%} of the copy's bandwidth")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(guarded("launch/benchmark_noise.py", main, sys.argv[1:]))

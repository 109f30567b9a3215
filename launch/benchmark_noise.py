"""Cost of the noise against `torch.randn`, as ratios measured in one run.

python launch/benchmark_noise.py [--elements N] [--repeats R] [--threads T] [--device cuda] [--json FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from zoscale.noise import Key, Noise, Range


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's queue included."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(elements: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Median time of each generator over alternating repetitions, divided by that of `torch.randn`."""
    eager, compiled = Noise(0), Noise(0, compiled=True)
    key, ranges = Key(0), [Range(0, 0, elements)]
    contestants: dict[str, Callable[[], object]] = {
        "torch.randn": lambda: torch.randn(elements, device=device),
        "normal, compiled": lambda: compiled.normal(key, ranges, device),
        "normal, eager": lambda: eager.normal(key, ranges, device),
        "rademacher, compiled": lambda: compiled.rademacher(key, ranges, device),
        "rademacher, eager": lambda: eager.rademacher(key, ranges, device),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 2):
        for name, work in contestants.items():
            taken = seconds(work, device)
            if repeat >= 2:  # the first two compile and warm up
                times[name].append(taken)
    base = statistics.median(times["torch.randn"])
    return {name: statistics.median(taken) / base for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--elements", type=int, default=2**20, help="elements drawn per call")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each generator")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the ratios here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ratios = measure(arguments.elements, arguments.repeats, torch.device(arguments.device))
    for name, ratio in ratios.items():
        print(f"{name:22} {ratio:6.2f} x torch.randn")
    if arguments.json:
        arguments.json.write_text(json.dumps(ratios, indent=2) + "\n")


if __name__ == "__main__":
    main()

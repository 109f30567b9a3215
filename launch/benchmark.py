"""A zero-order step against the bare forward of the same rows, MeZO's step and one forward per candidate.

    python launch/benchmark.py [--json FILE] [--model opt-125m] [--schemes lora full]
        [--probes block rademacher gaussian]
        [--dtypes fp32 bf16] [--ranks 1 2] [--q 1 4] [--batch 16] [--tokens 48] [--repetitions 5] [--threads N]
        [--compile off | blocks | cuda_graphs]
    python launch/benchmark.py --scale [FILE] --link GB/s [--node-link GB/s] [--latency MICROSECONDS] [--group G]

Each cell runs in processes of its own (with torchrun for several ranks), on GPUs if there are any. All variants share
one model, batch and dtype, and take turns:

    bare        the model's own forward of all K x B rows (K = 2q), the head on answer positions only: the limit
    mezo        MeZO's step as published: in place, torch.normal per tensor, the logits of all positions
    sequential  a whole step of the engine, one forward per candidate
    fan_out     a whole step of the engine, all candidates in one forward

Steps of the engine draw the noise, take the losses and update by JAGUAR SignSGD. `seconds_per_step` is a median,
`ratio_to_bare` the median of the ratios within each turn; `cpu_ratio_to_bare` is that of processor time, which says
more where other jobs share the cores. `peak_bytes` is the highest point of a step: on a GPU what its allocator holds,
on a CPU the resident set. `peak_extra_bytes` is it less what lies there before the step and less the same of `bare`.
At 1 rank the model is plain, at more it is under ZeRO-3. `probe` is the engine's (mezo draws normals).
`gathered_bytes_per_step` and `collectives_per_step` count, on one rank, what brings weights and adapters; the exchange
of the K losses, one small collective per step, is not among them. FILE is written after every cell.

`--scale` computes what 8 to 1,024 GPUs would do (see bench/scale.py), from the `fan_out` rows at 1 rank of a FILE that
`--json` wrote, or from --layer-ms.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.cells import DTYPES, SHAPES, Cell, add_options, select
from bench.scale import Layers, Network, curve, first_exposed
from bench.table import table

from zoscale.cli import guarded
from zoscale.config import ConfigError

COLUMNS = {
    "variant": "", "scheme": "", "probe": "", "dtype": "", "ranks": "", "q": "", "seconds_per_step": ".4f",
    "ratio_to_bare": ".3f", "cpu_ratio_to_bare": ".3f", "peak_bytes": "MB", "peak_extra_bytes": "MB",
    "gathered_bytes_per_step": "MB", "model_bytes": "MB", "collectives_per_step": "", "blocks": "",
}  # fmt: skip
SCALE_COLUMNS = {
    "sharding": "", "gpus": "", "group": "", "gather_seconds": ".6f", "compute_seconds": ".6f", "hidden": "",
    "seconds_per_step": ".4f", "efficiency": ".2f",
}  # fmt: skip


def run(cell: Cell) -> list[dict[str, Any]]:
    """The rows of a cell, measured in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        launcher = [sys.executable, "-m"]
        if cell.ranks > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(cell.ranks), "-m"]
        here = Path(__file__).resolve().parent
        paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(cell.threads)}
        subprocess.run([*launcher, "bench.measure", cell.text(), str(out)], env=environment, check=True, stdout=2)
        rows: list[dict[str, Any]] = json.loads(out.read_text())
        return rows


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all selected cells, printing each as it is done."""
    from zoscale.provenance import commit, libraries

    report: dict[str, Any] = {
        "commit": commit(),
        "command": " ".join(sys.argv),
        "hardware": hardware(),
        "libraries": libraries(),
        "model": options.model,
        "seed": options.seed,
        "rows": [],
    }
    for cell in select(options):
        found = run(cell)
        report["rows"] += found
        print(table(found, COLUMNS), flush=True)
        write(options.json, report)
    return report


def write(file: Path | None, report: dict[str, Any]) -> None:
    """The report so far, if a file is wanted."""
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n")


def hardware() -> dict[str, Any]:
    """What was measured on."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"cpus": os.cpu_count(), "gpus": gpus}


def scale(options: argparse.Namespace) -> dict[str, Any]:
    """Print and return the simulated curves of all steps that are known.

    Raises:
        ConfigError: for numbers that cannot be, or no step.
    """
    given = (options.link, options.node_link, options.layer_ms, options.node, options.group)
    wrong = [value for value in given if value is not None and not 0 < value < math.inf]
    if wrong or not 0 <= options.latency < math.inf:
        got = str([*wrong, options.latency][0])
        raise ConfigError("links, times and group sizes above 0, and finite", got, "correct it")
    node_link = 1e9 * (options.link if options.node_link is None else options.node_link)
    network = Network(1e9 * options.link, node_link, options.node, 1e-6 * options.latency)
    rows = []
    for what, layers in known_layers(options):
        found = curve(layers, network, options.group)
        print(f"{what}\n{table(found, SCALE_COLUMNS)}")
        for sharding in ("all", "groups"):
            first = first_exposed(found, sharding)
            verdict = "hidden up to 1,024 GPUs" if first is None else f"not hidden from {first} GPUs on"
            print(f"sharding over {sharding}: communication is {verdict}")
        rows += [{"step": what, **row} for row in found]
    return {"link": options.link, "node_link": node_link / 1e9, "latency": options.latency, "rows": rows}


def known_layers(options: argparse.Namespace) -> list[tuple[str, Layers]]:
    """Steps to scale, with a name each: measured ones of a file, or the one that the options give.

    Raises:
        ConfigError: if there is none.
    """
    if options.layer_ms is not None:
        return [given_layers(options)]
    try:
        rows = json.loads(Path(options.scale).read_text(encoding="utf-8"))["rows"] if options.scale else []
        return [
            (
                " ".join(str(row[key]) for key in ("scheme", "probe", "dtype", "q", "batch", "tokens")),
                Layers(
                    row["blocks"],
                    row["block_bytes"],
                    row["model_bytes"] - row["blocks"] * row["block_bytes"],
                    row["seconds_per_step"] / row["blocks"],
                ),
            )
            for row in known(rows, options)
        ]
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError("a file that --json wrote", f"{type(error).__name__}: {error}", "name another") from error


def known(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one whole step on one device."""
    found = [row for row in rows if row["variant"] == "fan_out" and row["ranks"] == 1]
    if not found:
        raise ConfigError("rows of fan_out at 1 rank, or --layer-ms", "neither", "measure with --ranks 1 first")
    return found


def given_layers(options: argparse.Namespace) -> tuple[str, Layers]:
    """The step that --model, --dtypes and --layer-ms describe."""
    import torch

    from zoscale.config import ModelConfig
    from zoscale.models.loading import read_model_config
    from zoscale.models.sizes import count_parameters

    architecture = read_model_config(ModelConfig(config=SHAPES[options.model]))
    size = count_parameters(architecture)
    width = getattr(torch, DTYPES[options.dtypes[0]]).itemsize
    blocks = (size.total - size.outside_blocks) // size.largest_block
    layers = Layers(blocks, size.largest_block * width, size.outside_blocks * width, 1e-3 * options.layer_ms)
    return f"{options.model} {options.dtypes[0]}, {options.layer_ms} ms per block", layers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--scale", nargs="?", const="", metavar="FILE", help="simulate 8 to 1,024 GPUs instead")
    parser.add_argument("--layer-ms", type=float, help="time of a block of --model in the first of --dtypes")
    parser.add_argument("--link", type=float, default=50.0, help="GB/s per GPU between nodes")
    parser.add_argument("--node-link", type=float, help="GB/s per GPU within a node; default: as --link")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--latency", type=float, default=5.0, help="microseconds per hop")
    parser.add_argument("--group", type=int, default=8, help="GPUs of a shard group")
    options = parser.parse_args()
    if options.scale is None and options.layer_ms is not None:
        raise ConfigError("--scale with --layer-ms", "none", "add it, or leave --layer-ms out to measure")
    try:
        report = benchmark(options) if options.scale is None else scale(options)
    except subprocess.CalledProcessError as error:
        print(f"expected the cell to run, got status {error.returncode}; its message is above", file=sys.stderr)
        return 1
    write(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(guarded("launch/benchmark.py", main, sys.argv[1:]))

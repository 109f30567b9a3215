"""`launch/benchmark.py`: every variant on tiny shapes, MeZO's maths, and the arithmetic of `--scale` by hand."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT, ended, run
from torch import nn

sys.path.insert(0, str(ROOT / "launch"))

import benchmark
from bench.cells import SHAPES
from bench.mezo import Mezo
from bench.scale import Layers, Network, curve, first_exposed, simulate

from zoscale.cli import guarded
from zoscale.config import ModelConfig
from zoscale.models.loading import read_model_config
from zoscale.models.sizes import count_parameters
from zoscale.shards import shard_parameters

KEYS = {
    "variant", "scheme", "probe", "dtype", "ranks", "q", "batch", "tokens", "seconds_per_step", "ratio_to_bare",
    "peak_bytes", "peak_extra_bytes", "gathered_bytes_per_step", "model_bytes", "collectives_per_step", "blocks",
}  # fmt: skip
TINY = ["--model", "tiny", "--tokens", "8", "--batch", "2", "--repetitions", "1"]


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    return guarded("benchmark.py", benchmark.main, arguments)


def test_shapes_are_those_of_the_published_models() -> None:
    sizes = {"opt-125m": 125_239_296, "opt-1.3b": 1_315_758_080, "opt-13b": 12_853_473_280, "opt-30b": 29_974_540_288}
    made = {name: read_model_config(ModelConfig(config=shape)) for name, shape in SHAPES.items() if name != "tiny"}
    assert {name: count_parameters(config).total for name, config in made.items()} == sizes
    assert {config.hidden_size // config.num_attention_heads for config in made.values()} == {64, 128}


# --- measuring ---------------------------------------------------------------------------------------------


def test_all_variants_at_one_and_two_ranks(tmp_path: Path) -> None:
    cells = ["--schemes", "lora", "--dtypes", "fp32", "--ranks", "1", "2", "--q", "1"]
    printed = run([sys.executable, "launch/benchmark.py", *TINY, *cells, "--json", str(tmp_path / "rows.json")]).stdout
    report = json.loads((tmp_path / "rows.json").read_text())
    rows = {(row["ranks"], row["variant"]): row for row in report["rows"]}
    assert len(report["rows"]) == len(rows) == 8 and report["commit"] and report["seed"] == 0
    assert printed.count("| fan_out") == 2
    for (ranks, variant), row in rows.items():
        assert row.keys() >= KEYS
        assert row["batch"] == 2 and row["tokens"] == 8 and row["blocks"] == 2 and row["seconds_per_step"] > 0
        assert row["model_bytes"] == rows[1, "bare"]["model_bytes"] > 4 * 2 * 12 * 32 * 32
        assert row["peak_bytes"] > max(row["bare_peak_bytes"] + row["peak_extra_bytes"], row["shard_bytes"])
        assert (row["ratio_to_bare"] == 1 and row["peak_extra_bytes"] == 0) or variant != "bare"
        assert (row["gathered_bytes_per_step"] == row["collectives_per_step"] == 0) == (ranks == 1)
    sharded = {variant: row for (ranks, variant), row in rows.items() if ranks == 2}
    whole = sharded["bare"]["model_bytes"]
    assert 0.98 * whole < sharded["fan_out"]["gathered_bytes_per_step"] < 1.02 * whole, "one gather, adapters included"
    for variant in ("mezo", "sequential"):
        assert 1.96 * whole < sharded[variant]["gathered_bytes_per_step"] < 2.04 * whole, "one gather per forward"
    assert sharded["fan_out"]["collectives_per_step"] <= 2 + 4, "blocks, embeddings, norm and one of all adapters"
    assert rows[1, "bare"]["shard_bytes"] == whole > 1.9 * rows[2, "bare"]["shard_bytes"]


def test_all_weights_in_bf16(tmp_path: Path) -> None:
    """Also the way from measured rows to `--scale`."""
    cells = ["--schemes", "full", "--probes", "gaussian", "--dtypes", "bf16", "--ranks", "1", "--q", "2"]
    file = tmp_path / "rows.json"
    run([sys.executable, "launch/benchmark.py", *TINY, *cells, "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["bare", "mezo", "sequential", "fan_out"]
    assert {row["probe"] for row in rows} == {"gaussian"} and rows[0]["model_bytes"] % 2 == 0
    curve = ["--scale", str(file), "--link", "1", "--json", str(tmp_path / "scale.json")]
    run([sys.executable, "launch/benchmark.py", *curve])
    scaled = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert len(scaled) == 16
    assert scaled[0]["compute_seconds"] == pytest.approx(rows[-1]["seconds_per_step"] / 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tokens", "65"],
        ["--ranks", "0"],
        ["--scale"],
        ["--scale", "absent.json"],
        ["--scale", "--link", "0"],
        ["--scale", "--layer-ms", "0"],
        ["--layer-ms", "1"],
        ["--scale", "--layer-ms", "1", "--node-link", "0"],
        ["--scale", "--layer-ms", "1", "--latency", "nan"],
        ["--threads", "0"],
        ["--json", ""],
        ["--compile", "blocks", "--schemes", "lora"],
        ["--compile", "blocks", "--ranks", "1"],
    ],
)
def test_mistakes_are_told(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(lambda: main(monkeypatch, "--model", "tiny", *arguments)) == 2
    assert re.search(r"(?m)^benchmark.py: error: (argument --\w+: )?expected ", capsys.readouterr().err)


# --- MeZO --------------------------------------------------------------------------------------------------


class Weights(nn.Module):
    def __init__(self, value: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((60, 50), value, dtype=dtype))
        self.b = nn.Parameter(torch.full((3000,), value, dtype=dtype))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([param.detach().reshape(-1).double() for param in model.parameters()])


def drawn(seed: int, number: int, dtype: torch.dtype) -> torch.Tensor:
    """The z that a step uses, read off weights of zero."""
    model = Weights(0.0, dtype)
    Mezo(shard_parameters(model), lambda: 0.0).move(seed, number, 1.0)
    return flat(model)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-7), (torch.bfloat16, 2e-2)])
def test_mezo_moves_along_what_it_drew(dtype: torch.dtype, error: float) -> None:
    """A linear loss c x has rho = c z whatever eps is; then x' = x - lr rho z to rounding, q = 1 and 2."""
    for q in (1, 2):
        model = Weights(1.0, dtype)
        c = torch.linspace(-1, 1, 6000, dtype=torch.float64)
        mezo = Mezo(shard_parameters(model), lambda: float(c @ flat(model)), eps=0.25, lr=1e-2, num_directions=q)  # noqa: B023
        rhos = mezo.step(seed=7)
        directions = [drawn(7, number, dtype) for number in range(q)]
        assert rhos == pytest.approx([float(c @ z) for z in directions], rel=1e-2, abs=1e-2 if error < 1e-3 else 10)
        expected = 1.0 - 1e-2 * sum(rho * z for rho, z in zip(rhos, directions, strict=True)) / q
        scale = float(expected.abs().max())
        assert float((flat(model) - expected).abs().max()) < 3 * error * scale
        assert float((flat(model) - 1.0).abs().max()) > 0.1, "the step is far above rounding"


def test_mezo_draws_normals_afresh_for_each_tensor_direction_and_step() -> None:
    z = drawn(7, 0, torch.float32)
    assert abs(float(z.mean())) < 0.05 and abs(float(z.std()) - 1) < 0.05
    assert torch.equal(z, drawn(7, 0, torch.float32))
    others = (z.roll(3000), drawn(7, 1, torch.float32), drawn(8, 0, torch.float32))
    assert all(abs(float(z @ other) / 6000) < 0.06 for other in others), "uncorrelated"


# --- scaling -----------------------------------------------------------------------------------------------

LAYERS = Layers(num_blocks=10, block_bytes=8e8, outside_bytes=4e8, block_seconds=0.02)


def test_step_by_hand() -> None:
    """8 GPUs, 100 GB/s, 1 ms per hop: 7/8 of 0.8 GB take 7 ms, 7 hops 7 ms: 14 ms, hidden behind 20 ms."""
    row = simulate(LAYERS, Network(link=5e10, node_link=1e11, latency=1e-3), gpus=8, group=8)
    assert row["gather_seconds"] == pytest.approx(0.014) and row["hidden"]
    # outside 3.5 + 7 ms, the first gather 14, nine blocks of 20, the last block 20, losses 7
    assert row["seconds_per_step"] == pytest.approx(0.0105 + 0.014 + 9 * 0.02 + 0.02 + 0.007)
    assert row["efficiency"] == pytest.approx(0.2 / row["seconds_per_step"])


def test_exposed_gathers_set_the_time() -> None:
    """16 GPUs leave the node: 15/16 of 0.8 GB at 25 GB/s take 30 ms, more than the 20 of a block."""
    row = simulate(LAYERS, Network(link=2.5e10, node_link=1e11, latency=0.0), gpus=16, group=16)
    assert row["gather_seconds"] == pytest.approx(0.03) and not row["hidden"]
    assert row["seconds_per_step"] == pytest.approx(0.015 + 0.03 + 9 * 0.03 + 0.02)


def test_where_communication_stops_being_hidden() -> None:
    """0.8 GB at 50 GB/s take at most 16 ms; at 0.1 ms per hop 4 ms are 40 hops: 32 GPUs fit into 20 ms, 64 do not."""
    rows = curve(LAYERS, Network(link=5e10, node_link=1e11, latency=1e-4), group=8)
    assert [row["gpus"] for row in rows[:8]] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert first_exposed(rows, "all") == 64 and first_exposed(rows, "groups") is None
    assert {row["group"] for row in rows if row["sharding"] == "groups"} == {8}
    alone = simulate(LAYERS, Network(link=1.0, node_link=1.0, latency=0.0), gpus=8, group=1)
    assert alone["seconds_per_step"] == pytest.approx(0.2), "no gather, no matter how slow the links"


def test_scale_from_given_times(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", "opt-13b", "--dtypes", "bf16", "--layer-ms", "2", "--link", "50", "--node-link", "400"]
    assert main(monkeypatch, "--scale", *given) == 0
    printed = capsys.readouterr().out
    # a block: 12 x 5120 squared in 2 bytes = 0.63 GB: 1.4 ms within a node, 12 between nodes
    assert "sharding over all: communication is not hidden from 16 GPUs on" in printed
    assert "sharding over groups: communication is hidden up to 1,024 GPUs" in printed

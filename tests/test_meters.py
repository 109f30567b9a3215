"""The meters: exact peaks per phase, rates with a hand-driven clock, the bytes that ZeRO-3 really gathers."""

from __future__ import annotations

import ast
import gc
import inspect
import json
import os
import socket
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from zoscale import meters
from zoscale.meters import CommMeter, Counts, MemoryMeter, Rates, ThroughputMeter, Traffic

MIB = 1 << 20
REPO = Path(__file__).resolve().parents[1]


def spike(num_bytes: int) -> None:
    """Touch `num_bytes` bytes and give them back at once."""
    torch.ones(num_bytes, dtype=torch.uint8)


# --- memory ------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_meter() -> MemoryMeter:
    meter = MemoryMeter("cpu")
    if not meter.peak_is_exact:
        pytest.skip("this kernel has no resettable high-water mark")
    return meter


def test_peak_sees_memory_that_is_gone_at_the_time_of_reading(exact_meter: MemoryMeter) -> None:
    before = exact_meter.read().current
    spike(200 * MIB)
    after = exact_meter.read()
    assert after.current < before + 50 * MIB
    assert before + 190 * MIB < after.peak < before + 260 * MIB
    exact_meter.reset()
    assert exact_meter.read().peak < before + 50 * MIB


def test_phases_exclude_each_other(exact_meter: MemoryMeter) -> None:
    """Pitfall 23: the peak of training leaves out loading and evaluation."""
    spike(300 * MIB)  # "loading": before any phase
    with exact_meter.phase("train") as phases:
        base = exact_meter.read().current
        spike(60 * MIB)
        with exact_meter.phase("evaluate"):
            spike(200 * MIB)
        assert base + 55 * MIB < exact_meter.read().peak < base + 120 * MIB, "evaluation counts for train"
    assert base + 55 * MIB < phases["train"] < base + 120 * MIB
    assert phases["evaluate"] > base + 190 * MIB
    highest = phases["evaluate"]
    with pytest.raises(RuntimeError), exact_meter.phase("evaluate"):
        raise RuntimeError
    assert phases["evaluate"] == highest, "a phase keeps the highest peak of its name"


def test_sampled_fallback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meters, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    meter = MemoryMeter("cpu")
    assert not meter.peak_is_exact
    before = meter.read().current
    block = torch.ones(150 * MIB, dtype=torch.uint8)
    held = meter.read()
    assert held.peak > before + 140 * MIB
    del block
    after = meter.read()
    assert after.current < before + 50 * MIB and after.peak >= held.peak
    meter.reset()
    assert meter.read().peak < before + 50 * MIB


@pytest.mark.gpu
def test_memory_on_a_gpu_is_the_allocator_s() -> None:
    gc.collect()  # what other tests have left is not freed within
    meter = MemoryMeter("cuda")
    before = meter.read().current
    block = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    del block
    assert meter.read().peak == before + 64 * MIB and meter.read().current == before
    meter.reset()
    assert meter.read().peak == before


# --- throughput --------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_leave_out_pauses() -> None:
    clock = Clock()
    meter = ThroughputMeter(clock=clock)
    assert meter.rates() == Rates(0.0, 0.0, 0.0)
    meter.count(tokens=600, samples=30, forwards=6)
    clock.now += 2.0
    with meter.pause():
        meter.count(tokens=10_000, forwards=99)
        clock.now += 50.0
        with meter.pause():
            clock.now += 50.0
        clock.now += 50.0
        assert meter.interval().seconds == 2.0
    clock.now += 1.0
    assert meter.rates() == Rates(tokens_per_second=200.0, samples_per_second=10.0, forwards_per_second=2.0)
    meter.reset()
    assert meter.interval() == Counts()
    meter.count(tokens=8)
    clock.now += 2.0
    assert meter.rates() == Rates(4.0, 0.0, 0.0)
    assert meter.totals() == Counts(tokens=608, samples=30, forwards=6, seconds=5.0)


def test_reset_within_a_pause() -> None:
    clock = Clock()
    meter = ThroughputMeter(clock=clock)
    meter.count(tokens=5)
    clock.now += 1.0
    with meter.pause():
        clock.now += 7.0
        meter.reset()
        clock.now += 7.0
    meter.count(tokens=6)
    clock.now += 2.0
    assert meter.rates().tokens_per_second == 3.0


# --- gathered bytes ----------------------------------------------------------------------------------------


def test_comm_meter_takes_once() -> None:
    meter = CommMeter()
    meter.record(10)
    meter.record(5)
    assert meter.take() == Traffic(num_bytes=15, num_calls=2)
    assert meter.take() == Traffic(0, 0)
    meter.record(1)
    assert meter.take() == Traffic(1, 1) and meter.totals == Traffic(16, 3)


def test_every_collective_that_moves_parameters_is_counted() -> None:
    """A new collective in DeepSpeed's partitioning code must be looked at, not silently missed."""
    from deepspeed.runtime.zero import partition_parameters

    tree = ast.parse(inspect.getsource(partition_parameters))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist"
    }
    # `broadcast` sends the initial values, `reduce_scatter` gradients; the others move nothing.
    harmless = {"broadcast", "reduce_scatter", "ReduceOp"}
    assert {n for n in used if not n.startswith(("get_", "has_", "is_"))} - harmless == meters._GATHERS


def run_ranks(world_size: int, out: Path, *, deadline: float = 240.0) -> list[dict[str, Any]]:
    """Run this file once per rank; the results of all ranks. Hung workers are killed at the deadline (s)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(out / f"{rank}.json")],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=deadline)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bytes_of_a_zero3_forward(world_size: int, tmp_path: Path) -> None:
    for result in run_ranks(world_size, tmp_path):
        padded = result["padded_bytes"] if world_size > 1 else 0
        assert padded <= 1.01 * result["model_bytes"]
        for name in ("plain", "all_reduce", "secondary"):
            counts = result[name]
            # The first forward only records the order: it gathers the tied embedding once per use.
            first = padded + (result["embedding_bytes"] if world_size > 1 else 0)
            assert [num_bytes for num_bytes, _ in counts["forwards"]] == [first, padded, padded], name
            assert all((num_calls > 0) == (world_size > 1) for _, num_calls in counts["forwards"])
            assert counts["totals"][0] == first + 2 * padded
            assert counts["after"] == [0, 0] and counts["restored"], "the context must undo itself"
        assert result["gathered_parameters"] == padded


def worker(out: Path) -> None:
    """One rank: three forwards of a small OPT, counted, once per way of gathering."""
    import deepspeed
    from deepspeed.utils import groups

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    world_size = torch.distributed.get_world_size()
    groups._create_zero_param_parallel_group(world_size)
    result: dict[str, Any] = {}
    for name, way in {
        "plain": {},
        "all_reduce": {"stage3_use_all_reduce_for_fetch_params": True},
        "secondary": {"zero_hpz_partition_size": world_size},
    }.items():
        engine = build(way, result, world_size)
        result[name] = count_forwards(engine)
        if name == "secondary" and world_size > 1:
            assert all(p.ds_secondary_tensor is not None for p in engine.module.parameters())
    meter = CommMeter()
    with meters.count_allgathers(meter), deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        pass
    result["gathered_parameters"] = meter.take().num_bytes
    out.write_text(json.dumps(result, default=astuple))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def build(way: dict[str, Any], result: dict[str, Any], world_size: int) -> Any:
    """An engine around a small OPT; its sizes in bytes go into `result`."""
    import deepspeed
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=301, hidden_size=40, num_hidden_layers=3, ffn_dim=96, num_attention_heads=4,
        max_position_embeddings=50, word_embed_proj_dim=40, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval()
    sizes = [p.numel() for p in model.parameters()]
    result["model_bytes"] = 4 * sum(sizes)
    result["embedding_bytes"] = model.get_input_embeddings().weight.nbytes
    result["padded_bytes"] = 4 * sum(-(-size // world_size) * world_size for size in sizes)
    zero = {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 10**9,
        "stage3_max_live_parameters": 10**9, "stage3_prefetch_bucket_size": 20_000,
        "memory_efficient_linear": False, **way,
    }  # fmt: skip
    return deepspeed.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})[0]


def count_forwards(engine: Any) -> dict[str, Any]:
    from deepspeed.runtime.zero import partition_parameters

    tokens = torch.arange(12).reshape(2, 6)
    meter, comm, forwards = CommMeter(), partition_parameters.dist, []
    with torch.no_grad():
        with meters.count_allgathers(meter):
            for _ in range(3):
                engine(tokens)
                torch.distributed.all_reduce(torch.ones(1000))  # a collective of the caller's: not counted
                forwards.append(meter.take())
        engine(tokens)
    after, restored = meter.take(), partition_parameters.dist is comm
    return {"forwards": forwards, "totals": meter.totals, "after": after, "restored": restored}


if __name__ == "__main__":
    worker(Path(sys.argv[1]))

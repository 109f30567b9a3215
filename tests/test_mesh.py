"""Shard groups between one rank and all: four ranks as 2 x 2 under real ZeRO-3, against one rank alone."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import zero3_worker
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from jobs import FULL as FULL_TUNING
from jobs import SHORT, JobServer, result_bytes, run_dir_of, steps_done, wait_for_step
from processes import ROOT, torchrun
from safetensors.torch import load_file
from test_weight_fan import model_of
from test_zero3 import BLOCK, FOUR, FULL, LLAMA, LORA, MUON, ONE_SIDED, SIGN, TWO, assert_same_bits
from torch import nn

from zoscale.config import ConfigError, RunConfig, build, parse
from zoscale.estimators import Candidate
from zoscale.forward.division import Division
from zoscale.forward.sequential import SequentialForward
from zoscale.mesh import Mesh
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.answers import AnswerModel
from zoscale.models.loading import read_model_config
from zoscale.placement import check_dtype
from zoscale.plan import fit
from zoscale.plan.budget import Job
from zoscale.plan.footprint import Footprint, ModelShapes
from zoscale.run_report import repeated_work
from zoscale.runtime import Runtime, default_shard_size, start
from zoscale.shard_groups import GroupSharded
from zoscale.step import micro_batches

FAN = {"forward": "fan_out"}
TWO_BY_TWO = {"shard_size": 2}
TRAJECTORIES: dict[str, dict[str, Any]] = {
    "sign_full": FULL | SIGN | BLOCK | TWO | TWO_BY_TWO,
    "sign_lora": LORA | SIGN | BLOCK | TWO | TWO_BY_TWO | {"zero": {"stage3_param_persistence_threshold": 640}},
    "sign_lora_fan": LLAMA | SIGN | BLOCK | FOUR | FAN | TWO_BY_TWO,
    "sign_lora_fan_bf16": LLAMA | SIGN | BLOCK | TWO | FAN | TWO_BY_TWO | {"dtype": "bfloat16"},
    "sign_full_parts": FULL | SIGN | BLOCK | FOUR | TWO_BY_TWO | {"parts": 3},
    "sign_full_fan_parts": FULL | SIGN | BLOCK | FOUR | FAN | TWO_BY_TWO | {"parts": 4, "max_rows": 2},
    "sign_lora_fan_parts": LORA | SIGN | BLOCK | ONE_SIDED | FAN | TWO_BY_TWO | {"parts": 2},
    "muon_full": FULL | MUON | BLOCK | TWO | TWO_BY_TWO,
}  # fmt: skip
RANDOM = {"config": tiny.ARCHITECTURES["llama"], "check": "beginning"}
CHECKS: dict[str, dict[str, Any]] = {
    "beginning_loaded": LLAMA | SIGN | BLOCK | TWO | TWO_BY_TWO | {"check": "beginning"},
    "beginning_random": LORA | SIGN | BLOCK | TWO | TWO_BY_TWO | RANDOM,
    "resident": LORA | SIGN | BLOCK | TWO | TWO_BY_TWO | {"check": "resident", "dtype": "bfloat16"},
    "traffic": FULL | SIGN | BLOCK | FOUR | FAN | TWO_BY_TWO | {"check": "traffic"},
    "beginning_all": LORA | SIGN | BLOCK | TWO | RANDOM,  # last: Accelerate does not forget that it used DeepSpeed
}  # fmt: skip


def test_a_model_may_make_modules_in_its_forward() -> None:
    """BigBird exchanges its attention for short rows; a module that ZeRO-3 has not seen is left alone."""

    class Making(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.own = nn.Identity()
            return x

    parameters: Any = ZeROOrderedDict(parent_module=None)
    making = Making()
    making._parameters = parameters
    grouped = GroupSharded.__new__(GroupSharded)
    nn.Module.__init__(grouped)
    grouped.module = making
    assert grouped(torch.ones(2)).sum() == 2.0 and parameters._in_forward is False


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("models")
    models = {name: str(tiny.save_model(name, folder / name)) for name in tiny.ARCHITECTURES}
    both = (TRAJECTORIES | CHECKS).items()
    return {name: {"name": name, "model": models[s["arch"]], "steps": 4, **s} for name, s in both}


@pytest.fixture(scope="module")
def job(scenarios: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios in one job of four ranks."""
    out = tmp_path_factory.mktemp("groups")
    (out / "scenarios.json").write_text(json.dumps(list(scenarios.values())))
    torchrun(4, zero3_worker.__file__, str(out / "scenarios.json"), str(out), timeout=420)
    return out


def alone(scenario: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """What the scenario gives in this process, without any sharding."""
    torch.set_num_threads(1)
    engine = zero3_worker.engine_of(dict(scenario), None)
    report = zero3_worker.CHECKS[scenario.get("check", "trajectory")](engine, {**scenario, "num_empty": 0})
    return json.loads(json.dumps(report)), zero3_worker.weights(engine)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_groups_equal_one_rank(job: Path, scenarios: dict[str, Any], name: str) -> None:
    """Losses, projected gradients and weights: the same bits; Muon's to 1e-5."""
    report = json.loads((job / f"{name}.json").read_text())
    weights = load_file(job / f"{name}.safetensors")
    expected, expected_weights = alone(scenarios[name])
    if "muon" in name:
        torch.testing.assert_close(torch.tensor(report["losses"]), torch.tensor(expected["losses"]), rtol=0, atol=1e-5)
        for tensor, value in weights.items():
            torch.testing.assert_close(value, expected_weights[tensor], rtol=1e-5, atol=1e-5)
    else:
        assert report == expected
        assert_same_bits(weights, expected_weights)


@pytest.mark.parametrize("name", [name for name in TRAJECTORIES if "parts" in name])
def test_parts_of_the_candidates_give_the_same_estimate(job: Path, scenarios: dict[str, Any], name: str) -> None:
    """As one rank that takes all candidates together, to rounding; pass by pass it is the same bits."""
    losses = json.loads((job / f"{name}.json").read_text())["losses"]
    unsplit = alone({**scenarios[name], "parts": 1, "max_rows": None, "steps": 2})[0]["losses"]
    if "fan" in name:
        torch.testing.assert_close(torch.tensor(losses[:2]), torch.tensor(unsplit), rtol=1e-5, atol=1e-5)
    else:
        assert losses[:2] == unsplit


@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith("beginning")])
def test_every_group_starts_from_the_bits_of_one_rank(job: Path, scenarios: dict[str, Any], name: str) -> None:
    """Loaded and random weights, LoRA's A, buffers that no checkpoint holds; only a group's first rank builds them."""
    ranks = json.loads((job / f"{name}.json").read_text())["ranks"]
    ((prints, buffers, _),) = alone(scenarios[name])[0]["ranks"]
    assert any("inv_freq" in buffer for buffer in buffers)
    assert [rank[:2] for rank in ranks] == [[prints, buffers]] * 4
    empty = [rank[2] > 0 for rank in ranks]
    assert empty == ([False, True] * 2 if "shard_size" in scenarios[name] else [False] * 4)


def test_a_group_holds_one_copy_and_gathers_within(job: Path) -> None:
    """Half the model per rank; a step gathers the model once, whatever the number of candidates."""
    report = json.loads((job / "resident.json").read_text())
    assert report["zero"] == "DeepSpeedZeRoOffload"
    assert report["held"] == 0
    assert report["dtypes"] == ["torch.bfloat16"]
    assert report["total"] / 2 <= report["local"] <= report["total"] / 2 * 1.02 + 1024
    report = json.loads((job / "traffic.json").read_text())
    for num_bytes, calls in report["steps"][1:]:
        assert 0.99 * report["model_bytes"] < num_bytes <= report["model_bytes"]
        assert calls <= report["blocks"] + 6


# ------------------------------------------------------------ whole runs


def test_resume_on_other_groups(server: JobServer) -> None:
    """2 x 2 -> 2 replicas -> 4 along one run: the bytes of one rank; replicas are compared on the way."""
    options = [*SHORT, *FULL_TUNING, "train.steps=14", "checkpoint.every=3", "mesh.check_every=2", "mesh.candidates=2"]
    whole, out = server.folder / "whole", server.folder / "elastic"
    server.run(1, *options, f"output_dir={whole}")
    for ranks, until, shard_size in ((4, 5, "2"), (2, 9, "auto")):
        job = server.start(ranks, *options, f"output_dir={out}", f"mesh.shard_size={shard_size}")
        wait_for_step(job, out, until)
        job.kill()
        job.wait()
        assert until <= steps_done(out) < 14
    text = server.run(4, *options, f"output_dir={out}")
    assert "steps replayed" in text
    assert result_bytes(out) == result_bytes(whole)


def test_groups_that_do_not_come_out_even_are_refused(server: JobServer) -> None:
    out = server.folder / "uneven"
    text = server.run(3, *SHORT, f"output_dir={out}", "mesh.shard_size=2", expect=2)
    assert "expected mesh.shard_size to divide the number of ranks (3), got 2" in text
    assert "one of 1, 3" in text
    assert run_dir_of(out) is None


def test_weights_that_only_some_ranks_read_are_refused_on_all(server: JobServer, tmp_path: Path) -> None:
    """The others wait for the first rank of their group: they end with it, and for its reason."""
    model = shutil.copytree(ROOT / "launch/tiny_opt/model", tmp_path / "model")
    (model / "model.safetensors").unlink()
    options = [f"model.id={model}", f"output_dir={server.folder / 'unreadable'}", "mesh.shard_size=2"]
    assert "expected readable safetensors weights" in server.run(4, *SHORT, *options, expect=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 3}, "mesh.shard_size to one of 1, 2, 4"),
        ({"shard_size": 0}, "mesh.shard_size to one of 1, 2, 4"),
        ({"shard_size": 2, "deepspeed": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}}, "hpz"),
        ({"shard_size": 1, "deepspeed": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}}, "hpz"),
        ({"deepspeed": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "x"}}}, "hpz"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_max_live": 1}}},
            "that DeepSpeed takes, got .*max_live",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 3, "reduce_bucket_size": -1}}}, "got .*reduce_bucket_size"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 4}},
            "no gradient_accumulation_steps in the DeepSpeed configuration, got 4",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}},
            r"zero_hpz_partition_size to divide the number of ranks \(4\), got 3",
        ),
    ],
)
def test_refused_before_a_process_group_is_joined(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    with pytest.raises(ConfigError, match=message):
        start(Runtime(**options))
    assert not torch.distributed.is_initialized()


def test_a_whole_model_has_the_type_of_the_run() -> None:
    """Else a run on one rank would compute in another type than one on two, whose ZeRO-3 casts."""
    model = model_of("opt")
    check_dtype(model, "float32")
    with pytest.raises(ValueError, match=r"expected weights of bfloat16, .* got float32: load the model with"):
        check_dtype(model, "bfloat16")


# ------------------------------------------------------------ who takes what


@pytest.mark.parametrize(("world", "shard_size"), [(1, 1), (2, 2), (4, 2), (4, 1), (6, 3), (8, 2)])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 9])
@pytest.mark.parametrize("num_batches", [1, 3, 4])
@pytest.mark.parametrize("together", [True, False])
def test_every_loss_is_taken_once(
    world: int, shard_size: int, num_parts: int, num_batches: int, *, together: bool
) -> None:
    """All ranks take as many turns, those of a group the same candidates where they must; each loss finds its place."""
    meshes = [Mesh(ranks=(rank, world), shard_size=shard_size) for rank in range(world)]
    divisions = [Division(mesh, num_batches, 5, num_parts, together=together) for mesh in meshes]
    turns = [division.items() for division in divisions]
    assert len({len(items) for items in turns}) == 1
    own = [(i.batch, k) for items in turns for i in items if i.is_own for k in _numbers(i.candidates)]
    assert sorted(own) == [(batch, k) for batch in range(num_batches) for k in range(5)]
    for rank, items in enumerate(turns):
        first = turns[rank - rank % shard_size]
        assert not together or [i.candidates for i in items] == [i.candidates for i in first]
    columns = [_column(divisions[0], turns[rank][turn]) for turn in range(len(turns[0])) for rank in range(world)]
    meshes[0].gather_items = lambda local, num_items: torch.stack(columns[:num_items], dim=1)  # type: ignore[method-assign]
    *losses, counts = divisions[0].gather(torch.empty(0))
    assert losses == [[100.0 * batch + k for batch in range(num_batches)] for k in range(5)]
    assert counts == [float(batch) for batch in range(num_batches)]


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_all_ranks_generate_equally_often(num_parts: int) -> None:
    """They wait for each other at every token; three candidates in two parts are one and two."""
    model, calls = model_of("opt"), list[list[Any]]()
    for rank in range(2):
        mesh = Mesh(ranks=(rank, 2), shard_size=1)
        mesh.gather_items = lambda local, num_items: torch.ones(len(local), num_items)  # type: ignore[method-assign]
        calls.append([])
        answer = calls[-1].append
        forward = SequentialForward(AnswerModel(model, model), [], mesh, num_parts=num_parts, answer=answer)
        found = forward.losses(micro_batches(tiny.batch(0)), [Candidate(None, 0.0)] * 3, lambda *_: (0.0, 1.0))
        assert len(found.values) == 3
    assert len(calls[0]) == len(calls[1])


REPEATED = [
    (8, [], "4 of 8 ranks have none of their own and repeat what others compute. Try data.micro_batch_size=2"),
    (8, ["data.micro_batch_size=2"], None),
    (2, [], None),
    (8, ["mesh.candidates=2"], None),
    (32, [], "28 of 32 ranks have none of their own and repeat what others compute. "
             "Try data.micro_batch_size=1 mesh.candidates=2"),
    (32, ["optimizer.name=fo_adamw"],
     "28 of 32 ranks have none of their own and repeat what others compute. Try data.micro_batch_size=1"),
    (5, ["data.micro_batch_size=2"], "20% of what the 5 ranks compute is repeated. "
     "Try data.micro_batch_size=1 mesh.candidates=2"),
    (3, ["data.micro_batch_size=1"], None),  # 11 %: what would mend it costs more
]  # fmt: skip


@pytest.mark.parametrize(("world", "options", "expected"), REPEATED)
def test_a_run_says_which_ranks_repeat_the_work_of_others(world: int, options: list[str], expected: str | None) -> None:
    config = parse(["model.id=x", *options], TABLES, DEFAULTS)
    estimator = build(config.estimator, TABLES["estimator"])
    engine: Any = SimpleNamespace(mesh=Mesh(ranks=(0, world)), estimator=estimator, forward=None)
    said = repeated_work(config, engine)
    size = config.data.micro_batch_size
    assert said == (expected and f"repeated work: micro-batches of a step: {16 // size}; {expected}")


def _numbers(part: slice) -> range:
    return range(part.start, part.stop)


def _column(division: Division, item: Any) -> torch.Tensor:
    column = division.new_table([item])[:, 0]
    for row, k in enumerate(_numbers(item.candidates)):
        column[row] = 100 * item.batch + k
    column[-1] = item.batch
    return column


# ------------------------------------------------------------ automatic shard size

OPT_13B = {
    "model_type": "opt", "hidden_size": 5120, "word_embed_proj_dim": 5120, "ffn_dim": 20480, "num_hidden_layers": 40,
    "num_attention_heads": 40,
}  # fmt: skip
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


@pytest.fixture(scope="module")
def planned() -> Callable[..., tuple[ModelShapes, Job, Footprint]]:
    """What `fit` needs to know of a run of 16 x 512 tokens, by the shapes of its model."""

    @functools.cache
    def plan(name: str) -> tuple[ModelShapes, Job, Footprint]:
        config = config_of({"OPT_13B": OPT_13B, "LLAMA_70B": LLAMA_70B}[name])
        shapes = ModelShapes(config.model, read_model_config(config.model), config.adapter)
        job = fit.job_of(config, shapes, 1, 512, copies=False)
        return shapes, job, shapes.run(job.micro_batch, job.tokens, candidates=job.together)

    return plan


def config_of(shapes: dict[str, Any], **changes: Any) -> RunConfig:
    tree = {"model": {"config": shapes}, "mesh": {"shard_size": "auto"}, "data": {"micro_batch_size": 16}}
    return RunConfig.from_dict(tree | changes, TABLES, DEFAULTS)


@pytest.mark.parametrize(
    ("name", "world", "per_node", "memory", "expected"),
    [
        ("OPT_13B", 8, 8, 80, 1),
        ("OPT_13B", 8, 8, 24, 2),
        ("LLAMA_70B", 16, 8, 80, 4),
        ("LLAMA_70B", 6, 6, 80, 3),
        ("LLAMA_70B", 12, 4, 80, 4),  # not 3: groups lie within nodes
        ("LLAMA_70B", 16, 8, 24, 16),  # whole nodes
        ("LLAMA_70B", 2, 2, 24, None),  # fits nowhere
    ],
)
def test_the_smallest_group_that_fits(
    planned: Any, name: str, world: int, per_node: int, memory: int, expected: int | None
) -> None:
    shapes, job, footprint = planned(name)
    job = replace(job, ranks=world)
    sizes = fit.shard_sizes(world, per_node)
    assert fit.smallest_shard(shapes, job, footprint, fit.USABLE * memory * 2**30, sizes) == expected


def test_auto_looks_at_the_memory_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's own size is what a plan of it says; a container has what it was given."""
    config = config_of(tiny.ARCHITECTURES["llama"])
    architecture = read_model_config(config.model)
    assert fit.shard_size_of_run(config, architecture) == 1, "without a launcher"
    first_order = config_of(tiny.ARCHITECTURES["llama"], optimizer={"name": "fo_adamw"})
    assert fit.shard_size_of_run(first_order, architecture) == 1, "such a run may be evaluated so"
    monkeypatch.setenv("WORLD_SIZE", "4")
    for limit, expected in ((1e12, 1), (1.0, 4)):
        monkeypatch.setattr(fit, "container_limit", lambda limit=limit: limit)
        assert fit.shard_size_of_run(config, architecture) == expected
    offloaded = config_of(
        tiny.ARCHITECTURES["llama"], runtime={"deepspeed": str(ROOT / "ds_configs/zero3_offload.json")}
    )
    assert fit.shard_size_of_run(offloaded, architecture) is None, "ZeRO-3 offloads, over all ranks"
    assert fit.shard_size_of_run(config_of({}, mesh={"shard_size": 2}), None) == 2
    assert fit.shard_size_of_run(config_of({}, mesh={"shard_size": None}), None) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    half = fit.memory_of_a_rank(2)
    assert half == 0.5 == fit.memory_of_a_rank(1) / 2, "ranks of a node share it"


def test_all_ranks_of_a_node_see_the_memory_of_its_smallest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that are used. A rank may see its own GPU alone, whatever its number."""
    sizes = [80, 40, 4]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=sizes[gpu]))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert (fit.memory_of_a_rank(1), fit.memory_of_a_rank(2), fit.memory_of_a_rank(3)) == (80, 40, 4)
    del sizes[1:]
    assert fit.memory_of_a_rank(8) == 80


def test_a_single_rank_holds_the_model_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unless ZeRO-3 is asked for: by a file that the run names, an offload, or a method that is ZeRO-3's."""
    zero3, offload = (str(ROOT / f"ds_configs/{name}.json") for name in ("zero3", "zero3_offload"))

    def size_of(**sections: Any) -> int | None:
        config = config_of({}, **{"mesh": {"shard_size": None}, **sections})
        found = fit.shard_size_of_run(config, None)
        if config.optimizer.name == "jaguar_sign_sgd":
            assert default_shard_size(int(os.environ["WORLD_SIZE"]), config.runtime.deepspeed) == found
        return found

    for name in ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert size_of() == 1
    assert size_of(runtime={"deepspeed": zero3}) is None
    assert size_of(optimizer={"name": "fo_adamw"}) is None
    for file, expected in ((zero3, 1), (offload, None)):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", file)
        assert size_of() == expected
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    assert size_of() is None
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert size_of() is None


@pytest.mark.parametrize(
    ("listed", "limits", "expected"),
    [
        ("0::/job/step", {"job/memory.max": "4096", "job/step/memory.max": "max"}, 4096),
        ("0::/job/step", {"memory.max": "8192", "job/memory.max": "9000"}, 8192),
        ("5:cpu,memory:/job\n0::/", {"memory/job/memory.limit_in_bytes": "77"}, 77),
        ("4:memory:/elsewhere", {"memory/memory.limit_in_bytes": "55"}, 55),  # a container sees its own as the root
        ("0::/", {"memory.max": "max"}, float("inf")),
        ("1:cpu:/", {}, float("inf")),
    ],
)
def test_limits_of_control_groups(listed: str, limits: dict[str, str], expected: float, tmp_path: Path) -> None:
    """Versions 1 and 2, mixed; the least on the way up counts."""
    (tmp_path / "listed").write_text(listed + "\n")
    for name, text in limits.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert fit.container_limit(tmp_path / "listed", tmp_path / "root") == expected
    assert fit.container_limit(tmp_path / "absent", tmp_path / "root") == float("inf")


LATE = """
import os, torch
from pathlib import Path
import torch.distributed as dist
from zoscale.runtime import stop

dist.init_process_group("gloo")
kept = dist.group.WORLD  # as weights and engines do
dist.barrier()
names = {int(file.parent.name): file.read_text() for file in Path("/proc/self/task").glob("*/comm")}
late = [thread for thread, name in names.items() if name.startswith("pt_gloo")]
for thread in names:
    os.sched_setaffinity(thread, [min(os.sched_getaffinity(0))])
for thread in late:
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
for _ in range(20):
    whole = torch.zeros(2000)
    dist.all_gather(list(whole.split(1000)), torch.ones(1000))
stop()
print(f"late: {len(late)}")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs Linux's SCHED_IDLE")
def test_threads_that_drop_their_tensors_late_do_not_abort_the_end(tmp_path: Path) -> None:
    """Gloo's threads get the processor when the main thread leaves it to them; Python ends meanwhile."""
    (tmp_path / "late.py").write_text(LATE)
    said = torchrun(2, str(tmp_path / "late.py")).stdout
    assert said.count("late: ") == 2 and "late: 0" not in said

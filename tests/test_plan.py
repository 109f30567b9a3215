"""`zoscale plan`: what it says is what a run takes."""

import dataclasses
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import ROOT, status_of, torchrun
from transformers import AutoConfig, AutoModelForCausalLM

from zoscale import cli
from zoscale.config import ConfigError, ModelConfig, RunConfig
from zoscale.devices import DEVICES, GIB
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.loading import read_model_config
from zoscale.models.sizes import count_parameters
from zoscale.plan import report as plan_report
from zoscale.plan import timing as plan_timing
from zoscale.plan.budget import Job
from zoscale.plan.fit import state_per_element
from zoscale.plan.footprint import ModelShapes
from zoscale.plan.report import make_plan
from zoscale.plan.stopwatch import Course, Method, StepSeconds, extrapolate, with_depth
from zoscale.plan.table import table

SHAPES = {
    "model_type": "opt", "vocab_size": 40_000, "hidden_size": 256, "word_embed_proj_dim": 256, "num_hidden_layers": 3,
    "ffn_dim": 4096, "num_attention_heads": 4, "max_position_embeddings": 128, "dropout": 0.0,
}  # fmt: skip
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def shapes_of(adapter: dict[str, Any] | None, **changes: Any) -> ModelShapes:
    config = ModelConfig(config={**SHAPES, **changes}, dtype="float32")
    return ModelShapes(config, read_model_config(config), adapter)


IN_4_BITS = {**SHAPES, "vocab_size": 2000, "hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 8192}
RUNS: dict[str, tuple[int, list[str]]] = {
    "zero_order": (2, ["--config", "shapes.yaml", "--rows", "32"]),
    "zero_order_full": (2, ["--config", "shapes.yaml", "--rows", "32", "--full", "--dtype", "bfloat16"]),
    "first_order": (2, ["--config", "shapes.yaml", "--rows", "32", "--method", "first_order", "--full"]),
    "in_4_bits": (1, ["--model", "model", "--rows", "16", "--quantization", "nf4", "--shard-size", "1"]),
}
"""Real runs: number of ranks and options of `launch/measure_memory.py`."""

KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""For glibc: freed memory is not given back, which costs a varying third of a step on a CPU."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every run took, and the plan of the same run; side by side, for memory does not mind."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "shapes.yaml").write_text(yaml.safe_dump(SHAPES))
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**IN_4_BITS)).save_pretrained(folder / "model")

    def take(name: str) -> Any:
        ranks, options = RUNS[name]
        options = [str(folder / word) if (folder / word).exists() else word for word in options]
        command = ["launch/measure_memory.py", *options, "--steps", "2", "--tokens", "64", "--micro-batches", "2"]
        command += ["--deepspeed", "ds_configs/zero3_cpu.json", "--json", str(folder / f"{name}.json")]
        torchrun(ranks, *command, MALLOC_MMAP_THRESHOLD_="131072", CUDA_VISIBLE_DEVICES="")
        return json.loads((folder / f"{name}.json").read_text())

    with ThreadPoolExecutor() as pool:
        return dict(zip(RUNS, pool.map(take, RUNS), strict=True))


@pytest.mark.parametrize("name", ["zero_order", "zero_order_full", "in_4_bits"])
def test_shards_and_gathered_bytes_are_exact(measured: dict[str, Any], name: str) -> None:
    plan, ranks = measured[name]["planned"], measured[name]["ranks"]
    assert [rank["shard"] for rank in ranks] == [plan["memory"]["weights"]] * len(ranks)
    assert [rank["gathered_per_step"] for rank in ranks] == [plan["work"]["gathered"]] * len(ranks)


@pytest.mark.parametrize(("name", "part"), [("zero_order", 40e6), ("zero_order_full", 20e6)])
def test_the_peak_of_a_step_is_within_a_tenth(measured: dict[str, Any], name: str, part: float) -> None:
    """What a step takes beyond what lies there between steps: gathered weights, activations, candidates' adapters."""
    parts = measured[name]["planned"]["memory"]
    predicted = parts["gathered weights"] + parts["activations"] + parts["candidates' adapters"]
    assert parts["gathered weights"] > part and parts["activations"] > part, "the parts are large enough to be seen"
    for rank in measured[name]["ranks"]:
        assert rank["step_extra"] == pytest.approx(predicted, rel=0.1)


def test_so_is_that_of_a_base_in_4_bits(measured: dict[str, Any]) -> None:
    """The copy of a layer's weights that is made to compute with them is seen."""
    report = measured["in_4_bits"]
    predicted = report["planned"]["memory"]["activations"] + report["planned"]["memory"]["candidates' adapters"]
    assert report["ranks"][0]["step_extra"] == pytest.approx(predicted, rel=0.1)
    unpacked = 512 * 8192 * 4
    assert unpacked > 0.15 * predicted
    assert report["planned"]["memory"]["weights"] < 0.3 * report["model_bytes"], "the embedding is whole"


def test_so_are_adamw_s_step_and_its_whole_memory(measured: dict[str, Any]) -> None:
    """Gradients, the bucket in which they are reduced, and moments included."""
    plan = measured["first_order"]["planned"]
    parts = plan["memory"]
    assert parts["reduction bucket"] > 0.1 * plan["total"]
    for rank in measured["first_order"]["ranks"]:
        assert rank["step_extra"] == pytest.approx(parts["gathered weights"] + parts["activations"], rel=0.1)
        assert rank["training_peak"] == pytest.approx(plan["total"], rel=0.1)


@pytest.mark.measured
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "method"), [(1, "first_order"), (2, "zero_order")])
def test_so_are_the_seconds_that_are_timed_here(tmp_path: Path, ranks: int, method: str) -> None:
    """A model of twelve blocks, from two and eight. A neighbour may disturb a timing: within a tenth once of four."""
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump({**SHAPES, "num_hidden_layers": 12, "vocab_size": 8000}))
    command = ["launch/measure_memory.py", "--config", str(tmp_path / "shapes.yaml"), "--rows", "8", "--tokens", "32"]
    command += ["--micro-batches", str(2 * ranks), "--deepspeed", "ds_configs/zero3_cpu.json", "--steps", "5", "--full"]
    command += ["--method", method, "--timed", "--json", str(tmp_path / "seconds.json")]
    ratios: list[float] = []
    while len(ratios) < 4 and not any(0.9 < ratio < 1.1 for ratio in ratios):
        torchrun(ranks, *command, CUDA_VISIBLE_DEVICES="", **KEEP_FREED)
        report = json.loads((tmp_path / "seconds.json").read_text())
        ratios.append(report["timed"]["step"] / report["ranks"][0]["seconds"])
        assert report["timed"]["losses"] > report["timed"]["update"] > 0 and report["timed"]["link"] is None
    assert 0.9 < ratios[-1] < 1.1, ratios


@pytest.mark.gpu
def test_so_is_that_on_a_gpu(tmp_path: Path) -> None:
    """The whole model on one GPU, the allocator's own peak."""
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump(SHAPES))
    command = ["launch/measure_memory.py", "--config", str(tmp_path / "shapes.yaml"), "--rows", "64", "--tokens", "64"]
    torchrun(1, *command, "--shard-size", "1", "--dtype", "bfloat16", "--json", str(tmp_path / "memory.json"))
    report = json.loads((tmp_path / "memory.json").read_text())
    parts = report["planned"]["memory"]
    assert report["ranks"][0]["shard"] == parts["weights"]
    assert report["ranks"][0]["step_extra"] == pytest.approx(
        parts["activations"] + parts["candidates' adapters"], rel=0.1
    )


def test_flops_are_those_of_the_formula() -> None:
    """Projections, attention and head of a dense decoder; the head on one position per row."""
    rows, tokens, h, ffn, layers, vocabulary = 3, 16, 256, 4096, 3, 40_000
    dense = 2 * rows * tokens * layers * (4 * h * h + 2 * h * ffn) + 2 * rows * h * vocabulary
    attention = layers * 4 * rows * tokens * tokens * h
    full = shapes_of(None)
    assert full.run(rows, tokens).flops == dense + attention
    assert full.run(rows, tokens, backward=True).flops == pytest.approx(3 * dense, rel=0.05)
    lora = layers * 2 * 2 * 2 * rows * tokens * 2 * h * 8  # two candidates
    assert shapes_of(LORA).run(rows, tokens, candidates=2).flops == 2 * (dense + attention) + lora


def test_activations_of_a_pass() -> None:
    """The two wide tensors of the feed-forward layer dominate; nothing is kept without a backward pass."""
    shapes = shapes_of(LORA)
    wide = 2 * 8 * 64 * 4096 * 4
    one, two = shapes.run(8, 64, candidates=1), shapes.run(8, 64, candidates=2)
    assert wide < one.blocks < 1.4 * wide and one.kept == 0
    assert two.blocks == pytest.approx(2 * one.blocks, rel=0.01)
    logits = 8 * 40_000 * 4
    assert 2 * logits < one.outside < 4 * logits
    kept = shapes.run(8, 64, backward=True)
    assert kept.kept > 3 * wide / 2, "what every layer's backward pass needs"
    assert kept.blocks >= kept.kept / 2 and not any(p.grad is not None for p in shapes.model.parameters())
    assert torch.empty(1).device.type == "cpu", "the mode is left"


def test_adapters_with_tensors_beside_their_weights_can_be_planned() -> None:
    """PEFT's numbers of virtual tokens, and of the tokens that are trained of a table, are no parameters."""
    whole, virtual = shapes_of(None), {"num_virtual_tokens": 48}
    prompt = shapes_of({"peft_type": "prompt_tuning", **virtual}).run(4, 16)
    assert prompt.flops == whole.run(4, 64).flops and prompt.blocks == pytest.approx(whole.run(4, 64).blocks, rel=0.05)
    assert shapes_of({"peft_type": "prefix_tuning", **virtual}).run(4, 16).blocks > whole.run(4, 16).blocks
    table = 40_000 * 256 * 4
    assert table < shapes_of({**LORA, "trainable_token_indices": [1, 2]}).run(4, 16).outside < 1.1 * table


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_weights_are_all_there_once(kind: str) -> None:
    config = ModelConfig(config={"model_type": kind, "num_hidden_layers": 2}, dtype="bfloat16")
    architecture = read_model_config(config)
    shapes, size = ModelShapes(config, architecture, LORA), count_parameters(architecture)
    assert sum(weight.numel for weight in shapes.weights if not weight.trainable) == size.total
    tied = [weight for weight in shapes.weights if weight.is_embedding and weight.is_head]
    assert len(tied) == (kind == "opt")
    block = sum(weight.numel for weight in shapes.weights if weight.block == 1 and not weight.trainable)
    assert block == size.largest_block
    assert {weight.width for weight in shapes.weights if weight.trainable} == {4}, "PEFT keeps adapters in fp32"


def test_a_model_whose_code_asks_for_values_cannot_be_planned() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2, "kv_channels": 8, "vocab_size": 50}
    tree = {"model_type": "jetmoe", "num_local_experts": 2, "intermediate_size": 16, **sizes}
    config = ModelConfig(config=tree, dtype="float32")
    shapes = ModelShapes(config, read_model_config(config), None)
    with pytest.raises(ConfigError, match=r"without values, got JetMoeForCausalLM.*train it without a plan"):
        shapes.run(2, 4)


BOTH: tuple[Method, Method] = ("zero_order", "first_order")


def plan_of(ranks: int, gib: float, *, measure: Collection[Method] = (), **changes: Any) -> dict[str, Any]:
    tree = {
        "model": {"config": SHAPES, "dtype": "float32"},
        "data": {"batch_size": 8, "micro_batch_size": 1},
        **changes,
    }
    device = dataclasses.replace(DEVICES["h100"], memory=gib * GIB)
    config = RunConfig.from_dict(tree, TABLES, DEFAULTS)
    return make_plan(config, ranks, device, tokens=16, reserve=0.0, measure=measure)


def test_adapters_in_float32_have_no_master() -> None:
    """Over a base in 16 bits, too: they are the truth themselves."""
    bf16 = {"config": SHAPES, "dtype": "bfloat16"}
    masters = [plan_of(1, 8, adapter=a, model=bf16)["zero_order"]["memory"]["fp32 master"] for a in (LORA, None)]
    assert masters[0] == 0 < masters[1]


def test_the_smallest_shard_size_that_fits() -> None:
    """A divisor of the ranks; one more than needed is never taken."""
    bf16 = {"config": SHAPES, "dtype": "bfloat16"}
    full = {"adapter": None, "optimizer": {"name": "jaguar_sign_sgd"}, "model": bf16}
    columns = [(gib, plan_of(6, gib, **full)["zero_order"]) for gib in (8, 0.13, 0.1, 0.08, 0.01)]
    assert [column["shard_size"] for _, column in columns] == [1, 2, 3, 6, 6]
    assert all(column["fits"] == (column["total"] <= gib * GIB) for gib, column in columns)
    assert [column["fits"] for _, column in columns] == [True, True, True, True, False]
    column = plan_of(6, 8, **full)["zero_order"]
    assert column["memory"]["gathered weights"] == 0 == column["work"]["received"], "replicas gather nothing"
    weights = sum(weight.numel for weight in shapes_of(None).weights) * 4
    kept = [column["memory"][name] for name in ("weights", "fp32 master", "optimizer state")]
    assert kept == [weights / 2, weights, weights]


def test_weights_in_fp32_are_their_own_master() -> None:
    """One pass for all candidates draws them beside the weights; one pass each writes over the weights."""
    weights = sum(weight.numel for weight in shapes_of(None).weights) * 4
    for forward, restored in (("auto", 0), ("sequential", weights)):
        memory = plan_of(1, 8, adapter=None, forward={"name": forward})["zero_order"]["memory"]
        assert (memory["weights"], memory["fp32 master"], memory["weights to restore"]) == (weights, 0, restored)


def test_work_of_a_step() -> None:
    """Fan-out gathers once for all passes, else once for each; AdamW gathers for both passes."""
    estimator = {"name": "two_point", "num_directions": 2}
    lora = plan_of(2, 8, adapter=LORA, estimator=estimator, mesh={"shard_size": 2})
    full = plan_of(2, 8, adapter=None, estimator=estimator, mesh={"shard_size": 2})
    one_by_one = plan_of(
        2, 8, adapter=None, estimator=estimator, mesh={"shard_size": 2}, forward={"name": "sequential"}
    )
    model = full["parameters"] * 4
    turns = 4
    assert lora["zero_order"]["work"]["gathered"] == pytest.approx(model, rel=0.02)
    assert full["zero_order"]["work"]["gathered"] == model
    assert one_by_one["zero_order"]["work"]["gathered"] == turns * 4 * model
    assert one_by_one["zero_order"]["work"]["flops"] == full["zero_order"]["work"]["flops"]
    named = plan_of(2, 8, adapter=None, estimator=estimator, mesh={"shard_size": 2}, forward={"name": "fan_out"})
    assert named["zero_order"] == full["zero_order"]
    activations = [plan["zero_order"]["memory"]["activations"] for plan in (one_by_one, full)]
    assert activations[0] < activations[1], "of one candidate only"
    assert full["first_order"]["work"]["gathered"] == turns * 2 * model
    assert full["first_order"]["memory"]["fp32 master and moments"] == full["parameters"] * 3 * 4 / 2
    cut = plan_of(2, 8, adapter=LORA, estimator=estimator, mesh={"shard_size": 2}, forward={"max_rows": 2})
    assert cut["job"]["together"] == 2
    assert (cut["job"]["passes"], cut["job"]["rounds"]) == (8, 1), "side by side"
    assert cut["zero_order"]["work"]["gathered"] == lora["zero_order"]["work"]["gathered"]
    waits = [plan["zero_order"]["memory"]["passes side by side"] for plan in (lora, cut, one_by_one)]
    state = 16 * 256 * 4
    assert waits == [4 * 3 * 4 * state, 4 * 7 * 2 * state, 0], "four hidden states for each that waits"
    assert cut["zero_order"]["work"]["flops"] == lora["zero_order"]["work"]["flops"]
    halves = plan_of(2, 8, adapter=LORA, estimator=estimator, mesh={"shard_size": 2, "candidates": 2})
    assert halves["job"]["turns"] == 8 and halves["job"]["together"] == 2, "twice as many passes of half the rows"
    assert halves["zero_order"]["work"]["gathered"] == lora["zero_order"]["work"]["gathered"]
    assert halves["zero_order"]["work"]["flops"] == lora["zero_order"]["work"]["flops"]
    assert halves["zero_order"]["total"] < lora["zero_order"]["total"]
    assert halves["first_order"] == lora["first_order"]
    few = {"adapter": LORA, "estimator": estimator, "data": {"batch_size": 1, "micro_batch_size": 1}}
    one, four = (plan_of(4, 8, **few, mesh={"candidates": parts})["zero_order"]["work"] for parts in (1, 4))
    assert four["flops"] == pytest.approx(one["flops"] / 4), "one row of four candidates occupies four ranks"
    assert plan_of(1, 8, adapter=LORA, estimator=estimator)["zero_order"]["work"]["gathered"] == 0, "all is there"
    halved = {"model": {"config": SHAPES, "dtype": "bfloat16"}}
    kinds: list[dict[str, Any]] = [{}, {"optimizer": {"name": "zo_sgd"}}, halved, halved | {"master": "none"}]
    traffic = [
        plan_of(1, 8, adapter=None, **kind)["zero_order"]["work"]["traffic"] / full["parameters"] for kind in kinds
    ]
    assert traffic[0] - traffic[1] == 2 * 4, "a momentum is read and written"
    assert traffic[2] - traffic[3] == 2 * 4 - 2, "so is a master, and the weights are written only"
    for column in (lora["zero_order"], full["first_order"]):
        seconds = column["seconds"]
        assert seconds["compute"] == column["work"]["flops"] / 67e12
        assert seconds["link"] == column["work"]["received"] / 450e9
        assert seconds[column["bound"]] == max(seconds.values())


def test_the_update_of_adamw(tmp_path: Path) -> None:
    """A deep model with few tokens: its copies are the highest point; DeepSpeed's configuration bounds them."""
    deep = {"model": {"config": {**SHAPES, "num_hidden_layers": 12}, "dtype": "float32"}, "adapter": None}
    column = plan_of(2, 8, **deep)["first_order"]
    weights = column["memory"]["weights"]
    assert column["phase"] == "update" and column["memory"]["copies for the update"] == 3 * weights
    assert column["memory"]["reduction bucket"] == 2**24 * 4
    sizes = {"reduce_bucket_size": 1000, "sub_group_size": 2000}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3, **sizes}}))
    bounded = plan_of(2, 8, **deep, runtime={"deepspeed": str(tmp_path / "zero3.json")})["first_order"]
    assert bounded["memory"]["reduction bucket"] == 4000 and bounded["phase"] == "backward"


def test_only_what_is_trained_has_a_state() -> None:
    plan = plan_of(1, 8, adapter=None, trainable="norm", model={"config": SHAPES, "dtype": "bfloat16"})
    assert plan["trainable"] == (2 * 3 + 1) * 2 * 256
    assert plan["zero_order"]["memory"]["fp32 master"] == 4 * plan["trainable"]


TIMED = {
    "mesh": {"shard_size": 4, "candidates": 2}, "adapter": None, "data": {"batch_size": 8, "micro_batch_size": 1},
}  # fmt: skip


def put_together(monkeypatch: pytest.MonkeyPatch, ranks_here: int, **changes: Any) -> tuple[Any, list[Course]]:
    """The plan of four ranks whose candidates are in two parts, on a machine that has so many ranks."""
    courses: list[Course] = []

    def take(config: RunConfig, course: Course) -> StepSeconds:
        courses.append(course)
        return StepSeconds(losses=2.0, update=1.0)

    monkeypatch.setattr(plan_timing, "ranks_here", lambda: ranks_here)
    monkeypatch.setattr(plan_timing, "time_step", take)
    return plan_of(4, 8, measure=BOTH, **TIMED, **changes), courses


def test_a_step_is_put_together_from_those_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches in turn, a rank's own candidates, updates of its slices; a prefetched gather overlaps."""
    plan, courses = put_together(monkeypatch, 3)
    assert [(c.method, c.ranks, c.shard_size, c.micro_batches) for c in courses] == [
        ("zero_order", 1, 1, 2), ("first_order", 1, 1, 2),
    ]  # fmt: skip
    link = plan["zero_order"]["seconds"]["link"]
    assert 0 < link < 1
    ours = {"losses": 2 * 2.0 / 2, "update": 1.0 / 4, "link": link, "step": 2.25}
    theirs = {"losses": 2.0, "update": 1.0 / 4, "link": plan["first_order"]["seconds"]["link"], "step": 2.25}
    assert plan["timed"] == {"device": "cpu", "ranks": 1, "zero_order": ours, "first_order": theirs}
    alone, _ = put_together(monkeypatch, 3, runtime={"deepspeed": str(ROOT / "ds_configs/zero3_cpu.json")})
    assert alone["timed"]["zero_order"]["step"] == pytest.approx(2.25 + link), "nothing is prefetched"
    text = table(plan)
    assert "as timed here (cpu, one rank)" in text and "2250.000" in text and "link, as given" in text
    assert table({**plan, "timed": {**plan["timed"], "first_order": None}}).count("2250.000") == 1


def test_a_step_is_put_together_from_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathers, parts of the candidates and slices are in what they take."""
    plan, courses = put_together(monkeypatch, 4)
    assert [(c.method, c.ranks, c.shard_size, c.micro_batches) for c in courses] == [
        ("zero_order", 4, 4, 4), ("first_order", 4, 4, 8),
    ]  # fmt: skip
    ours = {"losses": 2 * 2.0, "update": 1.0, "link": None, "step": 5.0}
    theirs = {"losses": 2.0, "update": 1.0, "link": None, "step": 3.0}
    assert plan["timed"] == {"device": "cpu", "ranks": 4, "zero_order": ours, "first_order": theirs}
    text = table(plan)
    assert "as timed here (cpu, 4 ranks together)" in text and "link, as given" not in text


def test_one_rank_takes_the_steps_of_a_job_that_is_too_large_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """All candidates, though the job's ranks would divide them."""
    monkeypatch.setattr(plan_timing, "ranks_here", lambda: 3)
    small = {"config": {**SHAPES, "vocab_size": 64, "ffn_dim": 64}, "dtype": "float32"}
    plan = plan_of(4, 8, measure=BOTH, **TIMED, model=small)
    assert plan["timed"]["ranks"] == 1
    for name in ("zero_order", "first_order"):
        step = plan["timed"][name]
        assert step["losses"] > 0 and step["update"] > 0 and step["link"] == plan[name]["seconds"]["link"] > 0


def test_what_cannot_be_timed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for changes, expected in (
        (
            {"runtime": {"deepspeed": str(ROOT / "ds_configs/zero3_offload.json")}},
            "no offloaded weights with --measure",
        ),
        ({"model": {"config": SHAPES, "dtype": "float16"}}, "bfloat16 or float32 to time on a CPU"),
        ({"adapter": LORA, "model": {"config": SHAPES, "quantization": "nf4"}}, "no model.quantization with --measure"),
    ):
        with pytest.raises(ConfigError, match=expected):
            plan_of(1, 8, measure=BOTH, **changes)


def test_a_step_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than positions, of which nobody knew: what the process that takes the step says last."""
    count = plan_report.count_parameters
    monkeypatch.setattr(
        plan_report, "count_parameters", lambda *a, **k: dataclasses.replace(count(*a, **k), positions=None)
    )
    with pytest.raises(ConfigError, match="a step that can be timed here, got IndexError: index out of range"):
        plan_of(1, 8, measure=BOTH, model={"config": {**SHAPES, "max_position_embeddings": 8}, "dtype": "float32"})


def test_blocks_that_are_left_out_take_as_long_as_those_that_are_timed() -> None:
    steps = {1: StepSeconds(1.0, 0.5), 3: StepSeconds(2.0, 0.4)}
    assert extrapolate(steps, 5) == StepSeconds(3.0, 0.5), "no block takes less than nothing"
    architecture = AutoConfig.for_model("qwen3", num_hidden_layers=4)
    for depth in (2, 8):
        other = with_depth(architecture, depth)
        assert other.num_hidden_layers == len(other.layer_types) == depth and architecture.num_hidden_layers == 4
    assert with_depth(AutoConfig.for_model("gpt2"), 2).n_layer == 2


@pytest.mark.parametrize(("name", "values"), [("zo_sgd", 0), ("jaguar_sign_sgd", 1), ("jaguar_muon", 1)])
def test_state_of_the_optimizers(name: str, values: int) -> None:
    assert (
        state_per_element(RunConfig.from_dict({"model": {"id": "x"}, "optimizer": {"name": name}}, TABLES, DEFAULTS))
        == values
    )


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The README's line with the bundled model; a file of shapes; mistakes."""
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("zoscale plan")]
    words = line.partition("#")[0].split()[1:]
    words[words.index("--model") + 1] = str(ROOT / "launch/tiny_opt/model")
    words[words.index("--tokens") + 1] = "128"  # as many as it has positions
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "1,027,456 parameters" in text and "set mesh.shard_size=1: 8 replicas" in text and "bound by" in text
    recipe = ["plan", "--config", str(ROOT / "launch/recipes/quickstart.yaml"), "--gpus", "2"]
    assert cli.main(recipe) == 0
    assert "1,027,456 parameters" in capsys.readouterr().out
    (tmp_path / "other.yaml").write_text("model: {id: nowhere}")
    model = ["--model", words[words.index("--model") + 1]]
    assert cli.main(["plan", "--config", str(tmp_path / "other.yaml"), *model, "seed=1", "--gpus", "2", "name=a"]) == 0
    assert "1,027,456 parameters" in capsys.readouterr().out, "--model goes over the files"
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump(SHAPES))
    shapes = ["plan", "--model", str(tmp_path / "shapes.yaml"), "--gpus", "2", "--reserve", "0", "adapter=null"]
    assert cli.main([*recipe, *shapes[1:3], "adapter=null"]) == 0
    assert "1,027,456 parameters" not in capsys.readouterr().out, "shapes go over the files too"
    more = ["model.dtype=float32", "--json", "--gpu-memory", "0.01", "--batch", "6", "--flops", "2"]
    assert cli.main([*shapes, *more]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["job"]["batch"], report["job"]["micro_batch"]) == (6, 1), "which four do not divide"
    assert report["zero_order"]["seconds"]["compute"] == report["zero_order"]["work"]["flops"] / 2e12
    assert report["parameters"] == sum(weight.numel for weight in shapes_of(None).weights)
    assert cli.main([*shapes, "--gpu-memory", "0.01"]) == 1
    assert "does not fit: more GPUs" in (text := capsys.readouterr().out) and " NO " in text
    assert cli.main([*shapes[:-1], "model.quantization=nf4"]) == 0
    assert "zero-order, nf4" in (text := capsys.readouterr().out) and "set mesh.shard_size=1: 2 replicas" in text
    for options, message in (
        (["--gpus", "0", "--model", str(tmp_path / "shapes.yaml")], "--gpus"),
        (["--gpus", "2"], "expected --model, --config or model.id"),
        (["--gpus", "2", "--model", "/nowhere"], "there is no folder /nowhere"),
        *(
            ([*shapes[1:], f"--{name}", value], f"--{name} above 0, and finite, got {float(value)}")
            for name in ("link", "flops", "bandwidth", "gpu-memory")
            for value in ("-1", "0", "nan", "inf")
        ),
        *(
            ([*shapes[1:], f"--reserve={value}"], "--reserve of at least 0, and finite")
            for value in ("-1", "nan", "inf")
        ),
        ([*shapes[1:], "--reserve", "80"], "--reserve below the device's 75 GiB, got 80.0"),
        ([*shapes[1:], "--tokens", "129"], "--tokens up to 128, the model's positions, got 129"),
        ([*shapes[1:], "--batch", "8", "data.batch_size=16"], "data.batch_size once"),
        (["--gpus", "2", "--model", "x", "model.id=y"], "model.id once"),
        ([*shapes[1:], "--batch", "0"], "--batch: expected a whole number of at least 1, got '0'"),
        ([*shapes[1:], "--tokens", "0"], "--tokens: expected a whole number of at least 1, got '0'"),
        ([*shapes[1:], "--tokens", "-5"], "--tokens: expected a whole number of at least 1, got '-5'"),
        ([*shapes[1:], "optimizer.name=fo_adamw"], "a zero-order optimizer to plan"),
        ([*shapes[1:], "estimator.name=backpropagation"], "an estimator from losses to plan"),
        ([*shapes[1:], "estimator.name=forward_grad"], "an estimator from losses to plan"),
        ([*shapes[1:], "mesh.shard_size=3"], "mesh.shard_size to divide the number of ranks (2), got 3"),
        ([*shapes[1:], "model.quantization=nf4"], "an adapter beside model.quantization=nf4"),
        ([*shapes[1:-1], "model.quantization=nf4", "mesh.shard_size=2"], "mesh.shard_size 1 beside"),
    ):
        assert status_of("plan", *options) == 2 and message in capsys.readouterr().err


def test_passes_go_side_by_side_as_far_as_their_hidden_states_may_wait() -> None:
    job = Job(
        ranks=2, batch=32, micro_batch=2, tokens=64, candidates=4, parts=1, fan="adapters", max_rows=4, waiting=4096,
        hidden=1024, state=1, master=True, prefetch=False, copies=False, bucket=None, sub_group=1,
    )  # fmt: skip
    assert (job.turns, job.together, job.passes, job.rounds) == (8, 2, 16, 1)
    assert [dataclasses.replace(job, waiting=tokens).rounds for tokens in (4095, 1024, 1)] == [2, 4, 16]
    alone = dataclasses.replace(job, fan=None)
    assert alone.rounds == alone.passes == 32


def test_what_is_offloaded_is_not_in_the_gpu_memory(tmp_path: Path) -> None:
    """One GPU: shards in the host's memory, or of the frozen base only buffers; blocks are uploaded once per pass.

    Of page-locked memory torch takes the next power of two for each slice: 64 MiB for an embedding of 39.
    """

    def of(file: str, **changes: Any) -> dict[str, Any]:
        model = {"config": {**SHAPES, "num_hidden_layers": 6}, "dtype": "float32"}
        runtime = {"deepspeed": str(ROOT / "ds_configs" / file)}
        return plan_of(1, 8, adapter=LORA, model=model, runtime=runtime, **changes)

    plain, cpu, nvme = (of(f"zero3{name}.json") for name in ("", "_offload", "_nvme"))
    not_pinned = tmp_path / "paged.json"
    not_pinned.write_text((ROOT / "ds_configs/zero3_offload.json").read_text().replace("true\n", "false\n"))
    assert '"pin_memory": false' in not_pinned.read_text()
    held = {name: plain["zero_order"]["memory"][name] for name in ("weights", "fp32 master", "optimizer state")}
    frozen = plain["parameters"] * 4
    assert plain["host"] == {} and of(str(not_pinned))["host"] == held
    rounding = cpu["host"]["weights"] - held["weights"]
    assert cpu["host"] == {**held, "weights": held["weights"] + rounding}
    assert rounding > 2**26 - 40_000 * 256 * 4, "that of the embedding, and of small ones"
    in_files = 6 * 2 * 256 * 4096 * 4
    assert nvme["host"]["weights"] == cpu["host"]["weights"] - in_files, "small ones and the embedding stay"
    assert (2 * 6 + 2) * 256 * 4096 * 4 < nvme["host"]["buffers of NVMe"] == 2**26, "two blocks, tokens and positions"
    for plan in (cpu, nvme):
        column = plan["zero_order"]
        assert "leave mesh.shard_size as it is: 1 of 1 ranks share a copy, offloaded" in table(plan)
        assert column["memory"].keys().isdisjoint(held) and column["total"] < plain["zero_order"]["total"]
        assert column["memory"]["gathered weights"] > 40_000 * 256 * 4, "what one block and the embedding take"
        assert column["work"]["uploaded"] == column["work"]["gathered"] == plan["job"]["rounds"] * frozen
        assert column["work"]["received"] == 0 == plain["zero_order"]["work"]["uploaded"]
    config = {"deepspeed": str(ROOT / "ds_configs/zero3_offload.json")}
    half = plan_of(2, 8, adapter=LORA, runtime=config)["zero_order"]["work"]
    assert half["uploaded"] == pytest.approx(half["gathered"] / 2, rel=0.01), "each rank uploads its own shard"
    with pytest.raises(ConfigError, match=r"expected an adapter beside offload_param\.device nvme, got none"):
        plan_of(1, 8, adapter=None, runtime={"deepspeed": str(ROOT / "ds_configs/zero3_nvme.json")})
    with pytest.raises(ConfigError, match=r"expected another mesh\.shard_size beside offload_param\.device cpu"):
        of("zero3_offload.json", mesh={"shard_size": 1})

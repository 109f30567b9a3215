"""WeightLoRA: adapters with weights, of which the strongest are kept, at twice the rank if asked to."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jobs import SHORT, JobServer, result_bytes, run_dir_of
from peft import PeftModel
from processes import ROOT
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from zoscale.adapters.schemes import check_scheme, selection_of
from zoscale.adapters.selection import Selection, expanded, strongest
from zoscale.adapters.weighted_lora import weigh_adapters
from zoscale.config import ConfigError, parse
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import GradientEstimate
from zoscale.forward.fan_out import FanOutForward
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.loading import add_adapter
from zoscale.recovery import checkpoint
from zoscale.recovery.journal import Journal
from zoscale.release.export import save_trained
from zoscale.shards import local_bytes
from zoscale.step import micro_batches

PLAN = {"keep": 2, "warmup_steps": 2, "expansions": 1, "expand_every": 2}
ADAPTER = {**tiny.LORA, "peft_type": "weight_lora", **PLAN}
IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])


# ------------------------------------------------------------ the maths


@pytest.mark.parametrize("rows", ["any", "alike", "zero"])
def test_expansion_keeps_the_product(rows: str) -> None:
    """B' A' = B A; A' has orthonormal rows and rows orthogonal to them; what is new in B' is zero."""
    torch.manual_seed(0)
    a, b, noise = torch.randn(3, 40), torch.randn(7, 3), torch.randn(3, 40)
    a = {"any": a, "alike": a[:1].repeat(3, 1), "zero": a * 0}[rows]
    wide_a, wide_b = expanded(a, b, noise)
    assert wide_a.shape == (6, 40) and wide_b.shape == (7, 6)
    torch.testing.assert_close(wide_b @ wide_a, b @ a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide_a[:3] @ wide_a[:3].T, torch.eye(3), atol=1e-6, rtol=0)
    assert (wide_a[:3] @ wide_a[3:].T).abs().max() < 1e-6
    assert not wide_b[:, 3:].any() and torch.linalg.matrix_rank(wide_a) == 6
    q = wide_a[:3].double()
    expected = (noise.double() - noise.double() @ q.T @ q) / 40**0.5
    torch.testing.assert_close(wide_a[3:].double(), expected, atol=1e-6, rtol=0)


def test_the_strongest_are_kept_and_ties_go_by_place() -> None:
    weights = {"a": -2.0, "b": 1.0, "c": 1.5, "d": 1.0, "e": 0.1}
    assert strongest(weights, 3) == ["a", "b", "c"]
    assert strongest(weights, 1) == ["a"]
    plan = Selection(keep=5, warmup_steps=10, expansions=2, expand_every=4)
    made = {step: plan.expansions_at(step) for step in range(40)}
    assert {step: number for step, number in made.items() if number is not None} == {10: 0, 14: 1, 18: 2}
    assert [plan.kept_at(number) for number in range(3)] == [5, 2, 1] and plan.last_step == 18


# ------------------------------------------------------------ one process


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model("opt", tmp_path_factory.mktemp("base"))


def engine_of(
    base: Path, adapter: dict[str, Any], optimizer: str = "jaguar_sign_sgd", **options: Any
) -> ZeroOrderEngine:
    """An engine with known values in A and B, and weights by which the adapters of the second layer are stronger."""
    model = add_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    rule = TABLES["optimizer"][optimizer]
    engine = ZeroOrderEngine(
        model, optimizer=lambda shards, mesh: rule(shards, mesh, lr=1e-3), selection=selection_of(adapter), **options
    )
    for shard in engine.shards:
        is_factor = shard.spec.name.endswith("factor")
        shard.assign(tiny.values(shard.spec.name, shard.spec.shape) * (0.1 if is_factor else 2) + is_factor)
        if is_factor and "layers.1" in shard.spec.name:
            shard.assign(shard.truth * -3)
    return engine


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def live(engine: ZeroOrderEngine) -> dict[str, torch.Tensor]:
    return {shard.spec.name: shard.live.clone() for shard in engine.shards}


def logits_of_the_strongest(engine: ZeroOrderEngine, keep: int) -> torch.Tensor:
    """Of the model in which all other adapters have w = 0."""
    factors = {s.spec.name: (s, s.truth.clone()) for s in engine.shards if s.spec.name.endswith("factor")}
    weak = sorted(factors, key=lambda name: abs(float(factors[name][1])))[:-keep]
    for name in weak:
        factors[name][0].assign(torch.zeros(1))
    found = logits(engine.model)
    for name in weak:
        factors[name][0].assign(factors[name][1])
    return found


@pytest.mark.parametrize("arguments", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}])
def test_choices_keep_the_function_and_load_in_plain_peft(
    arguments: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """What is left gives what it gave with w = 0 in the others, at any rank; plain PEFT gives the same each time."""
    engine = engine_of(base, ADAPTER | arguments)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    sizes, before = [], logits(engine.model)
    for step, keep in enumerate((4, 2, 2, 1)):
        expected = logits_of_the_strongest(engine, keep)
        engine.step(tiny.batch(step))
        found = logits(engine.model)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
        assert ((found - before).abs().max() > 1e-3) == (step in (1, 3)), "adapters were dropped"
        before = found
        save_trained(engine, tmp_path / str(step))
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        plain = PeftModel.from_pretrained(plain, tmp_path / str(step))
        torch.testing.assert_close(logits(plain), found, atol=2e-5, rtol=1e-5)
        tensors = load_file(tmp_path / f"{step}/adapter_model.safetensors")
        assert len(tensors) == 2 * keep
        sizes.append(sum(value.numel() for value in tensors.values()))
    assert sizes[0] == 2 * sizes[1] == 2 * sizes[2]
    assert "rank_pattern" in arguments or sizes[3] == sizes[2]


def test_what_is_disconnected_costs_nothing(base: Path) -> None:
    """Neither passes, nor memory, nor momentum, nor noise; blocks before the first adapter are shared."""
    engine = engine_of(base, ADAPTER)
    bytes_before, held = local_bytes(engine.model), [shard.live for shard in engine.shards]
    calls = dict.fromkeys([slot.own_name for slot in engine.adapters.slots], 0)  # type: ignore[union-attr]
    for slot in engine.adapters.slots:  # type: ignore[union-attr]
        for module in (slot.a, slot.b):
            module.register_forward_hook(lambda *_, name=slot.own_name: calls.update({name: calls[name] + 1}))
    numel = engine.num_trainable
    engine.step(tiny.batch(0))
    engine.step(tiny.batch(1))
    calls = dict.fromkeys(calls, 0)  # a pass on trial is one of the model
    logits(engine.model)
    kept = {slot.own_name for slot in engine.adapters.connected}  # type: ignore[union-attr]
    assert len(kept) == 2 and all(calls[name] == (2 if name in kept else 0) for name in calls)
    assert engine.num_trainable == numel // 2 == sum(len(shard) for shard in engine.shards)
    assert bytes_before - local_bytes(engine.model) == 4 * numel // 2
    assert sum(value.untyped_storage().nbytes() for value in held) == 4 * numel // 2, "whoever still refers to it"
    gc.collect()
    assert len(engine.optimizer.state) == len(engine.shards) == 6
    assert {spec.id for spec in engine.specs} == set(range(6))
    assert isinstance(engine.forward, FanOutForward)
    engine.step(tiny.batch(2))
    assert not any(calls[name] for name in calls if name not in kept), "also on trial"
    first = next(iter(engine.model.get_submodule("base_model.model.model.decoder.layers")))  # type: ignore[arg-type]
    candidates = engine.estimator.candidates(engine.directions(3))
    assert engine.forward.shared.blocks(candidates) == [first]


@pytest.mark.parametrize("optimizer", ["jaguar_muon", "zo_adam", "zo_muon_subspace"])
def test_fanned_out_or_one_by_one_across_choices(optimizer: str, base: Path) -> None:
    """The losses agree before and after each choice; what stays keeps its momentum, what is widened starts anew."""
    probe = TABLES["probe"]["subspace"](rank=2) if optimizer == "zo_muon_subspace" else None
    engines = [engine_of(base, ADAPTER, optimizer, forward=name, probe=probe) for name in ("fan_out", "sequential")]
    for step in range(5):
        before = {shard.spec.name: dict(engines[0].optimizer.state[shard.truth]) for shard in engines[0].shards}
        found = [engine.losses(micro_batches(tiny.batch(step)), engine.directions(step)) for engine in engines]
        assert found[0].values == pytest.approx(found[1].values, abs=3e-6)
        estimate = engines[0].estimator.estimate(engines[0].directions(step), found[0].values)
        for engine in engines:
            engine.optimizer.step(GradientEstimate(estimate.directions, estimate.projected_grads, 0.0))
            engine.end_step()
        if before and step == 3 and optimizer != "zo_muon_subspace":
            for shard in engines[0].shards:
                state = engines[0].optimizer.state.get(shard.truth, {})
                assert bool(state) == shard.spec.name.endswith("factor")
    assert all(torch.equal(a, b) for a, b in zip(*(live(engine).values() for engine in engines), strict=True))
    assert len(engines[0].shards) == 3 and engines[0].shards[0].spec.shape == (6, 36)


def test_checkpoints_of_every_layout_load_into_every_other(base: Path, tmp_path: Path) -> None:
    """Forth and back, with the momentum; then the steps that follow are the same bits."""
    engine = engine_of(base, ADAPTER)
    saved = []
    for step in range(6):
        checkpoint.save(engine, tmp_path / f"step_{step:08d}", "x")
        saved.append(live(engine))
        engine.step(tiny.batch(step))
    final = live(engine)
    for start in (4, 1, 5, 0, 3):
        checkpoint.load(engine, tmp_path / f"step_{start:08d}", "x")
        assert live(engine).keys() == saved[start].keys() and engine.num_steps == start
        assert all(torch.equal(value, saved[start][name]) for name, value in live(engine).items())
        for step in range(start, 6):
            engine.step(tiny.batch(step))
        assert all(torch.equal(value, final[name]) for name, value in live(engine).items())
    other = engine_of(base, {**ADAPTER, "target_modules": ["q_proj", "k_proj"]})
    before = live(other)
    with pytest.raises(ConfigError, match="it belongs to another model"):
        checkpoint.load(other, tmp_path / "step_00000002", "x")
    assert all(torch.equal(value, before[name]) for name, value in live(other).items())


# ------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0}, "adapter.keep to be a whole number of at least 1, got 0"),
        ({"keep": "all"}, "adapter.keep to be a whole number of at least 1, got 'all'"),
        ({"keep": 1}, "adapter.keep to be at least 2, got 1, of which 1 expansions leave none"),
        ({"expansions": 4, "keep": 16}, "adapter.expansions to be at most 3"),
        ({"expand_every": True}, "adapter.expand_every to be a whole number"),
        ({"warmup_steps": 0}, "adapter.warmup_steps to be a whole number of at least 1"),
        ({"warmup_steps": 98}, "the last choice of adapters before train.steps=100, got step 100"),
        ({"kept": 3}, "a field of peft.LoraConfig, got adapter.kept"),
    ],
)
def test_impossible_selections_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_scheme(ADAPTER | changes, None, 100)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 4}, "adapter.keep to be fewer than the model's adapters, got 4 of 4"),
        ({"r": 20}, "a rank of at most 36 at model.decoder.layers.0.self_attn.v_proj, got 40 after 1 expansions"),
        ({"use_dora": True}, "only plain LoRA of linear layers"),
        ({"bias": "all"}, "adapter.target_modules: all-linear takes experts too"),
        ({"lora_bias": True}, "only plain LoRA of linear layers"),
    ],
)
def test_selections_that_do_not_fit_the_model_are_refused(changes: dict[str, Any], message: str) -> None:
    options = dict(tiny.ARCHITECTURES["opt"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    with pytest.raises(ConfigError) as caught:
        add_adapter(model, ADAPTER | changes)
    assert message in str(caught.value)


def test_defaults_and_a_model_without_weights() -> None:
    adapter = parse(["model.id=x", "adapter.peft_type=weight_lora", "adapter.keep=3"], TABLES, DEFAULTS).adapter
    assert selection_of(adapter) == Selection(3, warmup_steps=100, expansions=0, expand_every=100)
    assert adapter is not None and adapter["r"] == 8 and Selection().keep == 8
    assert selection_of({"r": 8}) is None and selection_of(None) is None
    options = dict(tiny.ARCHITECTURES["opt"])
    model = add_adapter(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options)), tiny.LORA
    )
    with pytest.raises(ValueError, match="call weigh_adapters before"):
        ZeroOrderEngine(model, selection=Selection())
    weigh_adapters(model, Selection(keep=1))
    assert ZeroOrderEngine(model, selection=Selection(keep=1)).num_trainable == 4 * (2 * 3 * 36 + 1)


# ------------------------------------------------------------ several processes

RUN = [
    *SHORT[2:], "optimizer.name=zo_adam", "optimizer.lr=1e-2", "probe.rows=1.0", "probe.columns=1.0", "train.steps=9",
    "checkpoint.every=2", "train.eval_every=4", "data.num_dev=4", "adapter.peft_type=weight_lora", "adapter.r=3",
    "adapter.keep=4", "adapter.warmup_steps=3", "adapter.expansions=1", "adapter.expand_every=3",
]  # fmt: skip
DIE = """
import os
from zoscale.recovery.ledger import Ledger
append = Ledger.append
def dying(self, result):
    if {recorded}: append(self, result)
    if result.step == {step}: os._exit(9)
    if not {recorded}: append(self, result)
Ledger.append = dying
"""


def test_any_number_of_ranks_killed_or_not_and_replayed(server: JobServer) -> None:
    """1 rank; 3 ranks killed after the selection, 2 x 2 killed before the expansion is on record, 2: the same bytes."""
    recipe = (ROOT / "launch/recipes/quickstart.yaml").read_text().splitlines()
    own = server.folder / "own.yaml"  # without its optimizer
    own.write_text("\n".join(line for line in recipe if not line.startswith("optimizer:")))
    command, outs = ["--config", str(own), *RUN], [server.folder / name for name in ("whole", "killed")]
    text = server.run(1, *command, f"output_dir={outs[0]}")
    assert "adapters: 8; the strongest 4 are kept after 3 steps, 2 of twice the rank after 6" in text
    assert "step 3: kept 4 of 8 adapters, of rank 3: model." in text
    assert "step 6: kept 2 of 4 adapters, of rank 6: model." in text
    for ranks, recorded, step, *more in ((3, True, 2), (4, False, 5, "mesh.shard_size=2")):
        plant = DIE.format(recorded=recorded, step=step)
        job = server.start(ranks, *command, f"output_dir={outs[1]}", *map(str, more), plant=plant)
        assert job.wait() == [9] * ranks, job.log.read_text()[-3000:]
    assert "checkpoint of step 2, 1 steps replayed" in job.log.read_text()
    assert "checkpoint of step 4, 1 steps replayed" in server.run(2, *command, f"output_dir={outs[1]}")
    whole, killed = map(run_dir_of, outs)
    assert whole is not None and killed is not None
    assert result_bytes(outs[1]) == result_bytes(outs[0])
    assert Journal.read(killed / "journal.bin").records == Journal.read(whole / "journal.bin").records
    for choice in ("step_00000003.json", "step_00000006.json"):
        assert (killed / "choices" / choice).read_bytes() == (whole / "choices" / choice).read_bytes()
    check_records(whole)
    assert "the same bits" in server.run(1, "replay", str(whole))


def check_records(run_dir: Path) -> None:
    """What a run says of its choices, in its files and metrics."""
    chosen = json.loads((run_dir / "choices/step_00000006.json").read_text())
    assert set(chosen["kept"].values()) == {6} and len(chosen["weights"]) == 4
    assert len({abs(weight) for weight in chosen["weights"].values()}) > 1, "the weights have moved"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["dev"]["best_step"] >= 4, "weights of before the selection are no result"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = {(row["step"], name): value for row in rows for name, value in row["metrics"].items()}
    assert [metrics[step, "train/adapters"] for step in (3, 6, 9)] == [4, 2, 2]
    name = next(iter(chosen["kept"]))
    assert metrics[6, f"adapters/weight/{name}"] == chosen["weights"][name]

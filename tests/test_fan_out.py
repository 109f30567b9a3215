"""`FanOutForward` against `SequentialForward` on plain tensors; real ranks are in test_zero3.py."""

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import Estimator, OneSided, TwoPoint
from zoscale.forward.fan_out import WAITING, FanOutForward
from zoscale.forward.lora_fan import LoraFan, find_lora_pairs
from zoscale.forward.sequential import SequentialForward, perturbed
from zoscale.models.sizes import tokens_per_pass
from zoscale.noise import fused, kernels
from zoscale.probes import Block, Gaussian, Probe
from zoscale.shards import trainable_specs
from zoscale.step import micro_batches

pytestmark = pytest.mark.usefixtures("short_rows")
ARCHITECTURES: dict[str, tuple[dict[str, Any], Any]] = {
    name: (options, tiny.TARGETS[name]) for name, options in tiny.FAMILIES.items()
}


def model_of(name: str, dtype: torch.dtype, **lora: Any) -> nn.Module:
    options, targets = ARCHITECTURES[name]
    options = dict(options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options)).to(dtype)
    adapted = get_peft_model(model, LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": targets} | lora)))
    for parameter in adapted.parameters():
        parameter.data.normal_(std=0.15)
    return adapted


def both(model: nn.Module, estimator: Estimator, probe: Probe, **options: Any) -> tuple[Any, Any]:
    """The losses by fan-out and one by one."""
    found = []
    for forward in ("fan_out", "sequential"):
        engine = ZeroOrderEngine(model, estimator=estimator, probe=probe, forward=forward, **options)  # type: ignore[arg-type]
        assert isinstance(engine.forward, FanOutForward if forward == "fan_out" else SequentialForward)
        found.append(engine.losses(micro_batches(tiny.batch(0)), engine.directions(3)))
        options.pop("max_rows", None)
    return found[0], found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_are_those_of_one_pass_per_candidate(name: str, dtype: torch.dtype) -> None:
    """With padding, tied and untied heads, an adapter on the head, Conv1D; half the difference is what matters."""
    fan, one = both(model_of(name, dtype), TwoPoint(tau=0.05, num_directions=2), Gaussian())
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    assert fan.values == pytest.approx(one.values, abs=tolerance)
    assert (fan.count, fan.local_tokens, fan.local_samples) == (one.count, one.local_tokens, one.local_samples)
    assert len({round(value, 5) for value in one.values}) == 4, "the candidates differ"


def test_adapters_of_single_experts_are_not_fanned_out() -> None:
    """They take the tokens that are routed to them, whose number may be a multiple of the rows by chance."""
    model = nn.Module()
    model.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=r"experts\..*"), model)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    assert find_lora_pairs(adapted, [spec for spec, _ in trainable_specs(adapted)]) is None


class _Behind(nn.Module):
    """Reads a layer's weights without calling it, and calls one of several others."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.some = nn.ModuleList([nn.Sequential(nn.Linear(36, 36)), nn.Linear(36, 36), nn.Linear(36, 36)])

    def forward(self, x: torch.Tensor) -> Any:
        return nn.functional.linear(self.some[2](x), self.inner.weight, self.inner.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("forward", ["fan_out", "sequential"])
def test_adapters_of_layers_that_are_not_called_are_told_once(forward: Any) -> None:
    """Mamba's dt_proj is such a layer; of a list, as experts are, other inputs may call others."""
    options = dict(tiny.FAMILIES["opt"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    for layer in model.model.decoder.layers:
        layer.self_attn.v_proj = _Behind(layer.self_attn.v_proj)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "inner", "some.0.0", "some.1", "some.2"]))
    engine = ZeroOrderEngine(adapted, forward=forward)
    with pytest.warns(UserWarning, match=r"not call model\.decoder\.layers\.\*\.self_attn\.v_proj\.inner, so") as told:
        engine.step(tiny.batch(0))
    assert len(told) == 1
    assert not any(module._forward_pre_hooks for module in adapted.modules())
    other = ZeroOrderEngine(model_of("opt", torch.float32), forward=forward)
    with warnings.catch_warnings(action="error"):
        engine.step(tiny.batch(1))
        other.step(tiny.batch(0))


def test_tokens_of_a_pass_where_each_block_has_a_width_of_its_own() -> None:
    """Gemma 3n's configuration has a list of them."""
    one, many = nn.Linear(4, 4), nn.Linear(4, 4)
    one.config = AutoConfig.for_model("gemma3n_text", intermediate_size=64)
    many.config = AutoConfig.for_model("llama", hidden_size=one.config.hidden_size, intermediate_size=64)
    assert isinstance(one.config.intermediate_size, list)
    assert tokens_per_pass(one) == tokens_per_pass(many)


@pytest.mark.parametrize("target", ["project_in", "embed_tokens"])
def test_blocks_after_an_adapter_of_the_embedding_are_not_shared(target: str) -> None:
    """An adapter's own modules are never called: it is its layer that comes before the blocks. A later pass shares."""
    options = {**tiny.FAMILIES["opt"], "word_embed_proj_dim": 20, "do_layer_norm_before": False}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=[target]))
    for parameter in adapted.parameters():
        parameter.data.normal_(std=0.15)
    fan, one = both(adapted, TwoPoint(tau=0.05, num_directions=2), Gaussian())
    assert fan.values == pytest.approx(one.values, abs=5e-6)
    assert len({round(value, 5) for value in one.values}) > 1, "the candidates differ"


def test_adapters_are_rounded_as_one_pass_per_candidate_rounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16: what the layers see is the truth plus the perturbation, rounded once."""
    model = model_of("opt", torch.bfloat16).to(torch.bfloat16)  # PEFT itself leaves adapters in fp32
    engine = ZeroOrderEngine(model, probe=Gaussian(), estimator=TwoPoint(tau=0.05), forward="fan_out")
    for shard in engine.shards:
        shard.truth.add_(1e-3)  # not a bf16 number
        shard.publish()
    seen: dict[str, torch.Tensor] = {}
    adapted = LoraFan.adapted
    monkeypatch.setattr(
        LoraFan, "adapted", lambda self, stacks, rows: seen.update(stacks) or adapted(self, stacks, rows)
    )
    directions = engine.directions(0)
    engine.losses(micro_batches(tiny.batch(0, 1)), directions)
    for number, candidate in enumerate(engine.estimator.candidates(directions)):
        with perturbed(engine.shards, candidate):
            for shard in engine.shards:
                assert seen[shard.spec.name].dtype == torch.bfloat16
                assert torch.equal(seen[shard.spec.name][number].flatten(), shard.live)


@pytest.mark.parametrize("max_rows", [1, 2, 5, 100])
def test_candidates_are_cut_to_max_rows(max_rows: int) -> None:
    """Also the point itself, which has no direction, and sparse directions."""
    estimator, probe = OneSided(tau=0.05, num_directions=3), Block(rows=0.2, columns=0.2)
    fan, one = both(model_of("opt", torch.float32), estimator, probe, max_rows=max_rows)
    assert fan.values == pytest.approx(one.values, abs=2e-6)


def test_rows_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """K x R rows together, or nearly equal passes of at most `max_rows`; before the first one, three on trial."""
    model = model_of("opt", torch.float32)
    rows = []
    model.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    for max_rows in (None, 6):
        engine = ZeroOrderEngine(model, estimator=TwoPoint(num_directions=2), forward="fan_out", max_rows=max_rows)
        engine.losses(micro_batches(tiny.batch(0, 1)), engine.directions(0))
    assert rows == [2, 2, 2, 8, 2, 2, 2, 4, 4]


def test_the_bound_on_a_pass_follows_from_the_model_alone() -> None:
    """1 GiB of activations, or an eighth of larger weights; 8 widths and 2 inner ones per token."""
    shapes: dict[str, Any] = {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 1, "vocab_size": 999}
    with torch.device("meta"):
        small = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **shapes))
        large = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **shapes | {"num_hidden_layers": 320}))
    assert tokens_per_pass(small.float()) == 2**30 // 4 // (16 * 768)
    assert tokens_per_pass(small.bfloat16()) == 2**30 // 2 // (16 * 768)
    weights = sum(parameter.numel() for parameter in large.parameters())
    assert tokens_per_pass(large.float()) == weights // 8 // (16 * 768) > 2**30 // 4 // (16 * 768)


def test_layers_are_what_they_were_also_after_an_error() -> None:
    model = model_of("opt", torch.float32)
    engine = ZeroOrderEngine(model, forward="fan_out")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def breaks(logprobs: torch.Tensor, batch: Any) -> Any:
        raise RuntimeError("planted")

    batches = micro_batches(tiny.batch(0))
    engine.losses(batches, engine.directions(0))
    engine.objective = breaks
    with pytest.raises(RuntimeError, match="planted"):
        engine.losses(batches, engine.directions(0))
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "lora",
    [
        {"lora_bias": True},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_adapters_with_other_trainables_go_through_the_weights(lora: dict[str, Any]) -> None:
    model = model_of("opt", torch.float32, **lora)
    assert find_lora_pairs(model, ZeroOrderEngine(model).specs) is None
    fan, one = both(model, TwoPoint(tau=0.05, num_directions=2), Gaussian())
    assert fan.values == pytest.approx(one.values, abs=2e-6)


def test_layers_before_the_first_adapter_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter on the last layer only; the first pass learns the order."""
    model = model_of("opt", torch.float32, layers_to_transform=[1])
    estimator = TwoPoint(tau=0.05, num_directions=2)
    engine = ZeroOrderEngine(model, estimator=estimator, probe=Gaussian(), forward="fan_out")
    batches, directions = micro_batches(tiny.batch(0, 1)), engine.directions(3)
    first = engine.losses(batches, directions)
    rows = rows_of_blocks(model)
    second = engine.losses(batches, directions)
    assert rows == [2, 8]
    assert second.values == pytest.approx(first.values, abs=2e-6)
    assert first.values == pytest.approx(both(model, estimator, Gaussian())[1].values, abs=1)


def rows_of_blocks(model: nn.Module) -> list[int]:
    """The rows that each decoder layer's attention will see, as they come."""
    rows: list[int] = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(lambda m, args, output: rows.append(len(output[0])))
    return rows


@pytest.mark.parametrize("q", [1, 2, 5, 9])
def test_how_often_a_step_goes_through_the_model(q: int) -> None:
    """Once while its tokens are those of four full passes at most, and once more for each four: what is gathered."""
    engine = ZeroOrderEngine(
        model_of("opt", torch.float32), estimator=TwoPoint(num_directions=q), forward="fan_out", noise="eager"
    )
    forward: Any = engine.forward
    batches, calls = micro_batches(tiny.batch(0, 2)), list[int]()
    run = forward.lanes.run
    forward.lanes.run = lambda passes: calls.append(len(passes)) or run(passes)
    whole = engine.losses(batches, engine.directions(0))
    assert calls == [2] and WAITING * forward.max_tokens > 2 * (2 * 9) * 2 * 8, "a pass per micro-batch"
    forward.max_tokens = 2 * 8  # a pass of one candidate
    tokens = 2 * (2 * q) * 2 * 8  # micro-batches, candidates, rows of the widest
    cut = engine.losses(batches, engine.directions(0))
    assert len(calls) == 1 + -(-tokens // (WAITING * forward.max_tokens)) == 1 + q
    assert sum(calls[1:]) == 2 * (2 * q) and cut.values == pytest.approx(whole.values, abs=2e-6)


def test_small_adapters_are_perturbed_and_updated_in_as_many_launches_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One per candidate and one for the update: on a GPU small tensors cost launches, and no arithmetic."""
    calls: list[str] = []

    def kernel(name: str) -> Any:
        return defaultdict(lambda: lambda *_, **__: calls.append(name))

    names = ("perturb", "remember_and_descend_sign")
    idle = SimpleNamespace(UNIT=128, SIZE=2048, SLICES=3, **{name: kernel(name) for name in names})
    monkeypatch.setattr(kernels, "kernels_on", lambda _: idle)
    monkeypatch.setattr(fused, "_compile", lambda function, *_: function)
    fused.compiled.cache_clear()
    model = model_of("opt", torch.bfloat16)
    engine = ZeroOrderEngine(model, probe=Block(), estimator=TwoPoint(num_directions=2), noise="compiled")
    engine.step(tiny.batch(0))  # and a rehearsal
    calls.clear()
    engine.step(tiny.batch(1))
    fused.compiled.cache_clear()
    assert len(engine.shards) == 16 and isinstance(engine.forward, FanOutForward)
    assert calls == ["perturb"] * 4 + ["remember_and_descend_sign"]

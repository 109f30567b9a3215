"""`FanOutForward` over any trainable weights, against `SequentialForward`; real ranks are in test_zero3.py."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from test_fan_out import ARCHITECTURES
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from zoscale.config import ConfigError
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import Candidate, Estimator, OneSided, TwoPoint
from zoscale.forward.fan import Rows
from zoscale.forward.fan_out import FanOutForward
from zoscale.forward.scratch import Draws
from zoscale.forward.sequential import Losses, SequentialForward
from zoscale.forward.units import LinearUnit, LookupUnit, PatchedUnit, Unit
from zoscale.forward.weight_fan import find_units
from zoscale.noise.generator import Key, Noise, Range
from zoscale.probes import Block, Coordinate, Gaussian, JaguarDirection, Piece, Probe, Rademacher, Tensors, pieces
from zoscale.shards import CHUNK, ShardedParam, TensorSpec, trainable_specs
from zoscale.step import micro_batches

pytestmark = pytest.mark.usefixtures("short_rows")


def model_of(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    architecture = dict(ARCHITECTURES[name][0]) | options
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture.pop("model_type"), **architecture))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    return model.to(dtype)


def losses(
    model: nn.Module, forward: Any, estimator: Estimator, probe: Probe, steps: int = 2, **options: Any
) -> Losses:
    """Of the last of some evaluations: the first pass may only learn the order of the modules."""
    engine = ZeroOrderEngine(model, estimator=estimator, probe=probe, forward=forward, **options)
    assert isinstance(engine.forward, FanOutForward if forward == "fan_out" else SequentialForward)
    for _ in range(steps):
        found = engine.losses(micro_batches(tiny.batch(0)), engine.directions(3))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_weights_of_every_architecture(name: str, dtype: torch.dtype) -> None:
    """Tied and untied heads, Conv1D, RMSNorm, learned positions, padding; every kind of direction and the point."""
    model = model_of(name, dtype)
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    for estimator, probe in (
        (TwoPoint(tau=0.05, num_directions=2), Gaussian()),
        (OneSided(tau=0.05, num_directions=3), Block(rows=0.2, columns=0.2)),
        (TwoPoint(tau=0.05, num_directions=2), Tensors(share=0.1)),
    ):
        fan, one = (losses(model, forward, estimator, probe) for forward in ("fan_out", "sequential"))
        assert fan.values == pytest.approx(one.values, abs=2e-6 if dtype == torch.float32 else 2e-2)
        assert (fan.count, fan.local_tokens, fan.local_samples) == (one.count, one.local_tokens, one.local_samples)
        assert len({round(value, 6) for value in one.values}) == len(one.values), "the candidates differ"
    assert all(torch.equal(before[key], parameter) for key, parameter in model.named_parameters())


def norms(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


def biases(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def ia3(model: nn.Module) -> nn.Module:
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"])
    return get_peft_model(model, config)


def saved_head(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))


@pytest.mark.parametrize("scheme", [norms, biases, ia3, saved_head])
def test_parts_of_the_weights(scheme: Callable[[nn.Module], nn.Module]) -> None:
    model = scheme(model_of("opt", tie_word_embeddings=False))
    estimator = TwoPoint(tau=0.1, num_directions=2)
    fan, one = (losses(model, forward, estimator, Rademacher()) for forward in ("fan_out", "sequential"))
    assert fan.values == pytest.approx(one.values, abs=2e-6)
    assert len(set(one.values)) == 4


def test_large_weights_are_run_slab_by_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of whole rows, of which the scratch copy never holds more; those drawn together end within a module."""
    monkeypatch.setattr("zoscale.shards.CHUNK", 100)
    monkeypatch.setattr("zoscale.forward.scratch._SMALL", 40)
    monkeypatch.setattr("zoscale.forward.scratch._TOGETHER", 64)
    model = model_of("llama")
    units = find_units(model)
    assert units is not None
    heads = [unit for unit in units if isinstance(unit, LinearUnit)]
    assert all(len(outline) <= 108 for unit in heads for outline in unit.outlines)  # three rows of 36
    fan, one = (losses(model, f, TwoPoint(tau=0.05, num_directions=2), Gaussian()) for f in ("fan_out", "sequential"))
    assert fan.values == pytest.approx(one.values, abs=2e-6)


@pytest.mark.parametrize(("probe", "draws"), [(Rademacher(), 5), (Block(rows=0.5, columns=0.5), 5), (Gaussian(), 40)])
def test_signs_of_several_slabs_are_drawn_together(monkeypatch: pytest.MonkeyPatch, probe: Probe, draws: int) -> None:
    """As bits they take little memory, and every draw costs a call; an update draws whole groups, too."""
    monkeypatch.setattr("zoscale.shards.CHUNK", 640)
    monkeypatch.setattr("zoscale.forward.scratch._SMALL", 64)
    monkeypatch.setattr("zoscale.forward.scratch._TOGETHER", 320)
    monkeypatch.setattr("zoscale.noise.generator._LONG", 32)
    monkeypatch.setattr("zoscale.noise.fused._WORTH", 2**30)
    specs = [TensorSpec(number, f"{number:02}", (10, 32)) for number in range(40)]
    direction = probe.draw(Noise(0, compiled=True), specs, 0, 0)
    drawn: list[int] = []
    draw = Noise._draw
    monkeypatch.setattr("zoscale.noise.generator.compiled", lambda function: function)

    def counted(self: Noise, kernel: Any, key: Key, ranges: Sequence[Range], device: Any) -> list[Tensor]:
        drawn.append(len(ranges))
        return draw(self, kernel, key, ranges, device)

    monkeypatch.setattr(Noise, "_draw", counted)
    slabs = [ShardedParam.outline(spec, 0, spec.numel, torch.device("cpu")) for spec in specs]
    table = Draws([Candidate(direction, 1.0)], slabs)
    zero = torch.zeros(320)
    found = [values[0].clone() for slab in slabs for _, values in table.values([(zero, slab)])]
    assert len(drawn) == draws and sum(drawn) == len(slabs)
    for slab, values in zip(slabs, found, strict=True):
        (segment,) = direction.segments([Piece(slab, 0, 320)])
        assert segment is not None and torch.equal(values, segment.value)
    groups = [len(group) for group in pieces(slabs, is_bits=direction.is_bits)]
    assert groups == ([8] * 5 if draws == 5 else [2] * 20)


@pytest.mark.parametrize(("width", "height"), [(3072, 768), (768, 3072), (20480, 5120), (512, 50272), (2**21, 3)])
def test_slabs_have_the_heights_that_matrix_products_are_made_for(width: int, height: int) -> None:
    module = nn.Linear(width, height, bias=False, device="meta")
    unit = LinearUnit(module, {module.weight: TensorSpec(0, "weight", (height, width))})
    heights = [len(outline) // width for outline in unit.outlines]
    assert sum(heights) == height
    assert all(tall * width <= CHUNK and (tall % 64 == 0 or tall < 64) for tall in heights[:-1]) or width > CHUNK
    assert heights[0] >= min(height, CHUNK // width - 63, 64) or width > CHUNK


def test_units_are_the_smallest_modules_with_a_forward() -> None:
    kinds = {type(unit) for unit in find_units(model_of("opt")) or ()}
    assert kinds == {Unit, LinearUnit, LookupUnit}
    adapted = ia3(model_of("opt"))
    assert {type(unit.module).__module__.split(".")[0] for unit in find_units(adapted) or ()} == {"peft"}


def wide(dtype: torch.dtype = torch.float32) -> nn.Module:
    return model_of("opt", dtype, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128)


def test_few_rows_and_columns_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers multiply z where it is a patch, drawn with those of the next layers, and copy where one is not."""
    specs = [spec for spec, _ in trainable_specs(wide())]
    small, large = (probe.draw(Noise(0), specs, 0, 0) for probe in (Block(rows=0.2, columns=0.2), Block()))
    linear = [unit for unit in find_units(wide()) or () if isinstance(unit, LinearUnit)]
    assert all(isinstance(unit.suited([small, small]), PatchedUnit) for unit in linear)
    assert all(unit.suited([small, large]) is unit for unit in linear)
    half = [unit for unit in find_units(wide(torch.bfloat16)) or () if isinstance(unit, LinearUnit)]
    assert all(unit.suited([small]) is unit for unit in half), "the sum would be rounded twice"
    monkeypatch.setattr("zoscale.forward.scratch._PATCHED", 3 * max(spec.numel for spec in specs))
    drawn: list[int] = []
    original = JaguarDirection.patches
    monkeypatch.setattr(
        JaguarDirection, "patches", lambda self, s, device: drawn.append(len(s)) or original(self, s, device)
    )
    estimator, probe = TwoPoint(tau=0.05, num_directions=2), Block(rows=0.1, columns=0.5)
    fan, one = (losses(wide(), forward, estimator, probe, steps=1) for forward in ("fan_out", "sequential"))
    assert fan.values == pytest.approx(one.values, abs=2e-6) and len(set(one.values)) == 4
    assert sum(drawn) == 2 * len(linear) * len(micro_batches(tiny.batch(0)))
    assert 1 < max(drawn) < len(linear)


@pytest.mark.parametrize("trained", ["weight", "fc1.weight", "bias", "fc1", "weight|layer_norm"])
def test_weights_and_biases_are_patched_alone_and_together(trained: str) -> None:
    found = []
    for forward in ("fan_out", "sequential"):
        model = wide()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.search(trained, name) is not None)
        found.append(losses(model, forward, OneSided(tau=0.1, num_directions=3), Block(rows=0.1, columns=0.3)))
    assert found[0].values == pytest.approx(found[1].values, abs=2e-6) and len(set(found[1].values)) == 4


@pytest.mark.parametrize("max_rows", [1, 5, 100])
def test_candidates_are_cut_to_max_rows(max_rows: int) -> None:
    model, estimator = model_of("opt"), OneSided(tau=0.05, num_directions=3)
    fan = losses(model, "fan_out", estimator, Gaussian(), max_rows=max_rows)
    assert fan.values == pytest.approx(losses(model, "sequential", estimator, Gaussian()).values, abs=2e-6)


class _Copies(TorchFunctionMode):
    """Counts the copies of tokens that are made for the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.Tensor.cpu and args[0].dtype == torch.int64
        return func(*args, **(kwargs or {}))


def test_tokens_are_asked_for_once_per_micro_batch() -> None:
    """However many passes it takes; and never where no table is trained. A batch may be on a GPU already."""
    batches, estimator = micro_batches(tiny.batch(0)), OneSided(tau=0.05, num_directions=3)
    for train, count in ((lambda model: model, len(batches)), (biases, 0)):
        engine = ZeroOrderEngine(train(model_of("opt")), estimator=estimator, forward="fan_out", max_rows=2)
        directions = engine.directions(0)
        with _Copies() as copies:
            engine.losses(batches, directions)
        assert copies.count == count


@pytest.mark.gpu
def test_a_batch_may_be_on_the_gpu_already() -> None:
    engine = ZeroOrderEngine(model_of("opt").to("cuda"), probe=Gaussian(), forward="fan_out")
    batches, directions = micro_batches(tiny.batch(0)), engine.directions(0)
    there = [batch.to(engine.mesh.device) for batch in batches]
    assert engine.losses(there, directions) == engine.losses(batches, directions)


def test_blocks_before_the_first_perturbed_weight_are_run_once() -> None:
    """One coordinate per direction: what comes before the first one is the same for every candidate."""
    model = model_of("opt", tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name or "lm_head" in name)
    rows: list[int] = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(lambda m, args, output: rows.append(len(output[0])))
    estimator = TwoPoint(tau=0.05, num_directions=2)
    engine = ZeroOrderEngine(model, estimator=estimator, probe=Gaussian(), forward="fan_out")
    batches = micro_batches(tiny.batch(0, 1))
    first = engine.losses(batches, engine.directions(0))
    assert rows[-2:] == [2, 8] and {*rows[:-2]} == {2}, "a pass on trial learns the order"
    rows.clear()
    assert engine.losses(batches, engine.directions(0)) == first
    assert rows == [2, 8]
    engine.probe = Coordinate()
    direction = next(d for s in range(99) if "lm_head" in touched_by(engine, d := engine.directions(s)[0]))
    shared = engine.losses(batches, [direction] * 2)
    assert rows[2:] == [2, 2]
    engine.forward = SequentialForward(engine.answers, engine.shards, engine.mesh)
    assert shared.values == pytest.approx(engine.losses(batches, [direction] * 2).values, abs=2e-6)


def test_perturbed_weights_are_looked_for_up_to_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every pass: of a deep model with adapters everywhere it would take longer than some blocks."""
    engine = ZeroOrderEngine(model_of("opt"), probe=Gaussian())
    batches, directions = micro_batches(tiny.batch(0, 1)), engine.directions(0)
    engine.losses(batches, directions)
    asked: list[str] = []
    monkeypatch.setattr(type(directions[0]), "touches", lambda self, spec: asked.append(spec.name) or True)
    assert isinstance(engine.forward, FanOutForward)
    assert not engine.forward.shared.blocks(engine.estimator.candidates(directions))
    assert asked == ["model.decoder.embed_tokens.weight"]


def touched_by(engine: ZeroOrderEngine, direction: Any) -> str:
    return " ".join(spec.name for spec in engine.specs if direction.touches(spec))


def test_what_cannot_be_fanned_out_is_run_one_by_one() -> None:
    """Variants of LoRA, tokens of a tied head, experts, a weight of the model itself; `fan_out` says why it cannot."""
    dora, activated, tokens = (
        get_peft_model(model_of("opt"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **variant))
        for variant in ({"use_dora": True}, {"alora_invocation_tokens": [5, 9]}, {"trainable_token_indices": [5]})
    )
    routed = model_of("opt")
    routed.experts = nn.ModuleList([nn.Linear(2, 2)])
    own = model_of("opt")
    own.scale = nn.Parameter(torch.ones(1))
    for model in (dora, activated, tokens, routed, own):
        assert find_units(model) is None
        assert isinstance(ZeroOrderEngine(model).forward, SequentialForward)
        with pytest.raises(ConfigError, match="keep rows in order for forward"):
            ZeroOrderEngine(model, forward="fan_out")


def test_rows_that_left_their_order_are_refused() -> None:
    rows = Rows(copies=2, rows=3, positions=5)
    assert rows.by_candidate(torch.zeros(6, 7, 4)).shape == (2, 21, 4)
    assert rows.by_candidate(torch.zeros(1, 10, 4)).shape == (2, 5, 4)
    for shape in ((5, 4), (1, 9, 4), (7, 3, 4)):
        with pytest.raises(ConfigError, match=r"forward\.name=sequential"):
            rows.by_candidate(torch.zeros(shape))
        with pytest.raises(ConfigError, match=r"forward\.name=sequential"):
            rows.split_call([torch.zeros(shape)], {})


class Behind(nn.Module):
    """Reads a linear layer's weights without calling it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


def test_a_weight_read_behind_its_modules_back_is_an_error() -> None:
    model = model_of("opt")
    layer: Any = model.model.decoder.layers[0]  # type: ignore[union-attr]
    layer.fc1 = Behind(layer.fc1)
    engine = ZeroOrderEngine(model, forward="fan_out")
    with pytest.raises(ConfigError, match="expected every trained module to be called, got none of Linear"):
        engine.losses(micro_batches(tiny.batch(0, 1)), engine.directions(0))


@pytest.mark.parametrize(
    "raised",
    [None, torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_rows_that_a_model_counts_for_itself_are_told_from_a_lack_of_memory(raised: RuntimeError | None) -> None:
    model = model_of("opt")

    def fail(module: nn.Module, args: Any) -> None:
        if raised is not None:
            raise raised
        args[0] + torch.zeros(2, *args[0].shape[1:])  # the rows of one candidate

    model.model.decoder.layers[0].register_forward_pre_hook(fail)  # type: ignore[union-attr, index]
    engine = ZeroOrderEngine(model, forward="fan_out")
    with pytest.raises((ConfigError, RuntimeError)) as caught:
        engine.losses(micro_batches(tiny.batch(0, 1)), engine.directions(0))
    if raised is not None:
        assert caught.value is raised
    else:
        assert re.fullmatch(r"expected a model.*must match the size.*forward\.name=sequential", str(caught.value))
        assert isinstance(caught.value, ConfigError)
        assert type(caught.value.__cause__) is RuntimeError


UNUSUAL: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"vocab_size": 211, "hidden_size": 32, "n_layer": 3, "n_head": 4}, r"h\.2\."),
    "gemma4_text": (
        {
            "vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 8, "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 211, "pad_token_id": 0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        r"layers\.2\.self_attn",
    ),
    "hrm_text": (
        {
            "vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 16, "head_dim": 8,
            "num_attention_heads": 4, "num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 3,
        },
        r"H_module.*_proj",
    ),
    "mamba": (
        {"vocab_size": 211, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
        r"layers\.2\..*(in|out)_proj",
    ),
}  # fmt: skip
"""Models with more than hidden states between blocks, blocks that run again or lie in one another; what is trained."""


@pytest.mark.parametrize("name", UNUSUAL)
def test_blocks_before_the_trained_ones_of_unusual_models(name: str) -> None:
    """In a micro-batch of two rows and one of one, in which other rows would be broadcast without an error."""
    options, trained = UNUSUAL[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options))
    for key, parameter in model.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
        parameter.requires_grad_(re.search(trained, key) is not None)
    found = []
    for forward in ("fan_out", "sequential"):
        engine = ZeroOrderEngine(
            model, estimator=TwoPoint(tau=0.2, num_directions=2), probe=Gaussian(), forward=forward,  # type: ignore[arg-type]
        )  # fmt: skip
        two, other, _ = tiny.batch(0)
        batches = micro_batches([two, {key: value[1:] for key, value in other.items()}])
        found.append([engine.losses(batches, engine.directions(3)).values for _ in range(2)][1])
    assert found[0] == pytest.approx(found[1], abs=2e-5)
    assert len({round(value, 5) for value in found[1]}) == 4, "the candidates differ"


def test_weights_that_a_module_uses_outside_its_forward_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n: AltUp's forward scales only, its linear layers serve other methods; candidates would be alike there.

    Known models of this kind are run one by one.
    """
    options = {
        "vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_shared_layers": 0, "laurel_rank": 4,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 211, "pad_token_id": 0,
        "activation_sparsity_pattern": [0.0, 0.0], "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3n_text", **options))
    assert isinstance(ZeroOrderEngine(model).forward, SequentialForward)
    with pytest.raises(ConfigError, match=r"in its own way: set forward\.name to auto or sequential"):
        ZeroOrderEngine(model, forward="fan_out")
    monkeypatch.setattr("zoscale.forward.weight_fan._OWN_WAYS", ())
    engine = ZeroOrderEngine(model, estimator=TwoPoint(tau=0.2), probe=Gaussian())
    with pytest.raises(ConfigError, match=r"by the forward of Gemma3nTextAltUp only.*forward\.name=sequential"):
        engine.losses(micro_batches(tiny.batch(0)), engine.directions(0))
    assert not any(module._forward_pre_hooks for module in model.modules())

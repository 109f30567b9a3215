"""Transformer blocks under torch.compile: the losses of eager ones, few graphs, and none after the rehearsal."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from processes import ROOT, needs_compiler
from test_weight_fan import model_of
from torch import nn
from torch._dynamo.utils import counters

from zoscale.config import ConfigError, DataConfig, RunConfig
from zoscale.data.batch import MicroBatch
from zoscale.data.splits import Encoder
from zoscale.data.train_batches import TrainBatches
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import ForwardGrad, TwoPoint
from zoscale.forward import lora_fan
from zoscale.forward.compilation import CompiledAnswers, check_compile, compiled_answers
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.answers import AnswerModel
from zoscale.optim import JaguarSignSGD, ZOSGDConservative
from zoscale.probes import Gaussian, Layers, Rademacher
from zoscale.tasks import Example

torch.set_num_threads(1)


@pytest.fixture
def fresh() -> Iterator[None]:
    """No graphs of other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made, and run as they are: no C++ is compiled. After a rehearsal, a missing one is an error."""
    compile_, stance_ = torch.compile, torch.compiler.set_stance
    strict = {"eager_on_recompile": "fail_on_recompile"}
    monkeypatch.setattr(torch, "compile", lambda f, *, mode, **rest: compile_(f, backend="eager", **rest))
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: stance_(strict.get(stance, stance)))


def engine_of(arch: str, compile: str, *, lora: bool = True, device: str = "cpu", **options: Any) -> ZeroOrderEngine:
    model: nn.Module = model_of(arch, num_hidden_layers=2).to(device)
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **tiny.LORA)).to(device)
    default: dict[str, Any] = {"probe": Gaussian(), "estimator": TwoPoint(tau=0.05, num_directions=2)}
    return ZeroOrderEngine(model, compile=compile, **{**default, "optimizer": JaguarSignSGD, **options})  # type: ignore[arg-type]


def batches(step: int) -> list[MicroBatch]:
    return [MicroBatch.from_labels(batch) for batch in tiny.batch(step, 2)]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_losses_are_those_of_eager_blocks() -> None:
    """With inductor's code, for adapters by batched products; evaluation stays eager."""
    needs_compiler()
    one = batches(0)[:1]
    for number, arch in enumerate(("opt", "llama"), start=1):
        compiled, plain = engine_of(arch, "blocks"), engine_of(arch, "off")
        for _ in range(2):
            ours, theirs = (engine.step(one).losses.values for engine in (compiled, plain))
            assert ours == pytest.approx(theirs, rel=1e-5) and len(set(ours)) == 4
            compiled.answers.answer_logprobs(one[0])
        assert counters["stats"]["unique_graphs"] == number, "one for both blocks"
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("compile", ["off", "blocks", "cuda_graphs"])
def test_candidates_in_one_pass_are_those_one_by_one_on_a_gpu(compile: str) -> None:
    """With directions in registers, however few elements are trained."""
    engines = [engine_of("llama", compile, forward=name, device="cuda") for name in ("fan_out", "sequential")]
    assert all(engine.noise.compiled for engine in engines)
    for engine in engines:
        engine.rehearse(batches(0))
    for step in range(4):
        ours, theirs = (engine.losses(batches(step), engine.directions(step)).values for engine in engines)
        assert ours == pytest.approx(theirs, rel=1e-4) and len(set(ours)) == 4
    for engine in engines:
        assert not engine.step(batches(0)).skipped


WAYS: dict[str, dict[str, Any]] = {
    "dense": {"probe": Rademacher()},
    "layers": {"probe": Layers(share=0.25)},
    "several_passes": {"max_rows": 6},
    "trials": {"optimizer": ZOSGDConservative, "estimator": TwoPoint(tau=0.05, num_directions=1)},
    "sequential": {"forward": "sequential"},
    "sequential_weights": {"forward": "sequential", "lora": False},
}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("way", WAYS)
def test_no_step_compiles_after_the_rehearsal(way: str) -> None:
    """Passes of fewer candidates, or of blocks that see one copy of the rows, have their graphs before, too."""
    compiled, plain = (engine_of("llama", name, **WAYS[way]) for name in ("blocks", "off"))
    compiled.rehearse(batches(0))
    before = counters["stats"]["unique_graphs"]
    assert before >= 2, "one for each of two lengths, at least"
    for step in range(3):
        ours, theirs = (engine.step(batches(step)).losses.values for engine in (compiled, plain))
        assert ours == pytest.approx(theirs, rel=1e-5) and len(set(ours)) > 1
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("compile", "places"), [("cuda_graphs", 1), ("blocks", 4)])
def test_graphs_find_the_candidates_adapters_at_one_place(
    compile: str, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each would be recorded anew in every step: to torch, what a module holds is a weight, which stays."""
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        engine = engine_of("llama", compile, max_rows=6)  # four candidates of 3 rows: two passes
    found, held, make = [], [], lora_fan._adapted_forward

    def noted(layer: nn.Module, adapters: Any, *rest: Any) -> Any:
        found.append([(id(layer), len(own.a), own.a.data_ptr(), own.b.data_ptr(), own.a.stride()) for own in adapters])
        held.extend((own.a, own.b) for own in adapters)  # no other tensor is given the memory that one has left
        return make(layer, adapters, *rest)

    monkeypatch.setattr(lora_fan, "_adapted_forward", noted)
    for _ in range(2):
        engine.losses(batches(0)[:1], engine.directions(0))
    layers = {row[0][0] for row in found}
    assert len({str(row) for row in found}) == places * len(layers)


@pytest.mark.usefixtures("fresh")
def test_a_shape_that_was_not_rehearsed_runs_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_: Callable[..., Any] = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, *, mode, **rest: compile_(f, backend="eager", **rest))
    compiled, plain = (engine_of("opt", name) for name in ("blocks", "off"))
    compiled.rehearse(batches(0)[:1])
    before = counters["stats"]["unique_graphs"]
    ours, theirs = (engine.step(batches(0)).losses.values for engine in (compiled, plain))
    assert ours == pytest.approx(theirs, rel=1e-5) and counters["stats"]["unique_graphs"] == before


class Letters:
    """A token per letter."""

    pad_token_id = 0

    def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text], "special_tokens_mask": [0] * len(text)}


def test_shapes_of_a_run_are_few_and_known_before() -> None:
    examples = [Example("x" * (3 + number), ("a", "b"), 0, ("a", "b")) for number in range(60)]
    encoder: Any = Encoder(Letters(), 60)  # type: ignore[arg-type]
    config = DataConfig(batch_size=6, micro_batch_size=3, length_window=4)
    made = {m: TrainBatches(examples, encoder, config, 0, gold_only=False, multiple=m) for m in (1, 16)}
    known = {tuple(batch.input_ids.shape) for batch in made[16].one_of_each_shape(40)}
    assert known == {tuple(batch.input_ids.shape) for step in range(40) for batch in made[16].at(step)}
    assert known == {(3, 16), (3, 32), (3, 48), (3, 60)}, "the longest row bounds the padding"
    for step in range(40):
        for wide, narrow in zip(made[16].at(step), made[1].at(step), strict=True):
            width = narrow.input_ids.shape[1]
            assert torch.equal(wide.input_ids[:, :width], narrow.input_ids) and wide.num_tokens == narrow.num_tokens
            assert not wide.attention_mask[:, width:].any()


@pytest.mark.parametrize("multiple", [1, 32])
def test_shapes_of_packed_rows_are_known_before(multiple: int) -> None:
    examples = [Example("x" * (3 + number), ("a", "b"), 0, ("a", "b")) for number in range(60)]
    encoder: Any = Encoder(Letters(), 60, packing=True)  # type: ignore[arg-type]
    config = DataConfig(batch_size=6, micro_batch_size=3)
    batches = TrainBatches(examples, encoder, config, 0, gold_only=False, multiple=multiple)

    def outline(batch: MicroBatch) -> tuple[int, ...]:
        return (*batch.input_ids.shape, batch.ends is not None)

    taken = [outline(batch) for step in range(40) for batch in batches.at(step)]
    assert sorted({*taken}) == [outline(batch) for batch in batches.one_of_each_shape(40)]
    assert {rows for rows, _, is_packed in taken if is_packed} == ({1, 2} if multiple == 1 else {1})
    assert all(width % multiple == 0 or (width == 60 and not is_packed) for _, width, is_packed in taken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": False}, "got weights that each candidate has drawn within the blocks"),
        ({"estimator": ForwardGrad(), "probe": Gaussian()}, "got forward gradients"),
        ({"compile": "cuda_graphs"}, "got no GPU"),
    ],
)
def test_what_cannot_be_compiled_is_refused(options: dict[str, Any], message: str) -> None:
    if options.get("compile") == "cuda_graphs" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message):
        engine_of("opt", **({"compile": "blocks"} | options))
    answers = engine_of("opt", **(options | {"compile": "auto"})).answers
    assert not isinstance(answers, CompiledAnswers)


class Linear4bit(nn.Module):
    """As bitsandbytes names its own."""


def test_models_that_cannot_be_compiled_are_refused() -> None:
    """Also where no option says so: a model may come in 4 bits."""
    for change, message in (("extra", "weights in 4 bits"), ("blocks", "a model without transformer blocks")):
        model: Any = model_of("opt")
        if change == "extra":
            model.extra = Linear4bit()
        else:
            model.model.decoder.layers = nn.ModuleList()
        with pytest.raises(ValueError, match=f"got {message}"):
            compiled_answers("blocks", AnswerModel(model, model), None)


@pytest.mark.parametrize(("kernels", "kind"), [(None, AnswerModel), (object(), CompiledAnswers)])
def test_auto_leaves_blocks_as_they_are_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, kernels: object, kind: type
) -> None:
    """As on a GPU whose machine has no C compiler, which Triton needs too."""
    asked: list[torch.device] = []
    monkeypatch.setattr("zoscale.forward.compilation.kernels_on", lambda device: (asked.append(device), kernels)[1])
    model, gpu = model_of("opt"), torch.device("cuda", 0)
    answers: Any = AnswerModel(model, model)
    answers.head = SimpleNamespace(weight=SimpleNamespace(device=gpu))
    assert type(compiled_answers("auto", answers, None)) is kind and asked == [gpu]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"shard_size": None}}, "expected mesh.shard_size 1 beside forward.compile=blocks, got null"),
        ({"adapter": {"peft_type": "weight_lora"}}, "expected another adapter beside"),
        ({"adapter": None}, "expected forward.name sequential beside forward.compile=blocks without an adapter"),
        ({"model": {"id": "x", "quantization": "nf4"}}, "expected no model.quantization beside"),
        ({"optimizer": {"name": "fo_adamw", "lr": 1e-3}}, "expected a zero-order optimizer beside"),
    ],
)
def test_configurations_are_refused_before_anything_starts(changes: dict[str, Any], message: str) -> None:
    tree: dict[str, Any] = {
        "model": {"id": str(ROOT / "launch/tiny_opt/model")},
        "mesh": {"shard_size": 1},
        "forward": {"compile": "blocks"},
    }
    check_compile(RunConfig.from_dict(tree, TABLES, DEFAULTS))
    with pytest.raises(ConfigError, match=message):
        check_compile(RunConfig.from_dict(tree | changes, TABLES, DEFAULTS))
    with pytest.raises(ConfigError, match="expected losses of given answers beside"):
        check_compile(RunConfig.from_dict(tree, TABLES, DEFAULTS), losses_of_answers=False)

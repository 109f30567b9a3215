"""No step waits for its device but where it reads the losses; and the masks that nobody has to look at."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from processes import ROOT, torchrun
from test_weight_fan import model_of
from torch import nn
from torch.overrides import TorchFunctionMode

from zoscale.backward import BackwardForward, _count
from zoscale.config import ConfigError, ModelConfig
from zoscale.data.batch import MicroBatch, Question
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import Backpropagation, TwoPoint
from zoscale.evaluate import evaluate
from zoscale.forward.fan_out import FanOutForward
from zoscale.mesh import Mesh
from zoscale.models.answers import AnswerModel
from zoscale.models.attention import check_attention
from zoscale.models.loading import load_model, read_model_config
from zoscale.models.sizes import blocks_of
from zoscale.noise.generator import Noise
from zoscale.objectives import classification, language_modeling, predictions
from zoscale.optim import OPTIMIZERS
from zoscale.placement import keep_near
from zoscale.probes import PROBES
from zoscale.probes.gradient import Gradient
from zoscale.shards import ShardedParam, shard_parameters

torch.set_num_threads(1)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are made up; whoever else reads a tensor on the device `meta`, which has no values, fails.

    What need not be run is seen before the first step, by reading.
    """

    def made_up(self: Mesh, local: torch.Tensor, num_items: int) -> torch.Tensor:
        return torch.arange(1.0, 1 + len(local) * num_items, dtype=torch.float64).view(len(local), num_items)

    def seen(self: FanOutForward, batches: Any) -> None:
        inside = dict(blocks_of(self.model.model)[-1].named_modules())
        self.answers.modules = tuple(inside[name] for name in ("fc1", "fc2", "mlp") if name in inside)

    monkeypatch.setattr(Mesh, "gather_items", made_up)
    monkeypatch.setattr(FanOutForward, "learn", seen)


def take_steps(device: str, arch: str, *, lora: bool, **options: Any) -> None:
    """A step on merged rows and one on plain ones."""
    model: nn.Module = model_of(arch, torch.bfloat16, num_hidden_layers=1)
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **tiny.LORA))
    engine = ZeroOrderEngine(model.to(device), **options)
    for objective, merged in ((classification, True), (language_modeling, False)):
        engine.objective = objective
        engine.step(tiny.options(merged=merged, num_micro_batches=1))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("arch", ["opt", "llama"])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("forward", ["fan_out", "sequential"])
def test_nothing_but_the_losses_is_read(arch: str, lora: bool, forward: str) -> None:
    take_steps("meta", arch, lora=lora, forward=forward, probe=PROBES["rademacher"]())


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_update_reads_the_device(name: str) -> None:
    take_steps("meta", "opt", lora=True, optimizer=OPTIMIZERS[name])


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", PROBES)
def test_no_probe_reads_the_device(name: str) -> None:
    take_steps("meta", "opt", lora=True, probe=PROBES[name](), estimator=TwoPoint(num_directions=1))


@pytest.mark.usefixtures("unread")
def test_the_device_meta_shows_who_reads() -> None:
    """The checks above see what they are there to see."""
    model = model_of("opt").to("meta")
    engine = ZeroOrderEngine(model, objective=lambda logprobs, batch: (logprobs.sum().item(), 1))  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="meta"):
        engine.step(tiny.options(merged=False))
    engine.objective = lambda logprobs, batch: (logprobs[logprobs > 0].sum(), torch.ones(()))
    with pytest.raises(NotImplementedError, match="nonzero"):
        engine.step(tiny.options(merged=False))


def test_options_are_chosen_before_anything_is_read() -> None:
    """Of all examples at once: a score of choices is read once per candidate, not once per example too."""
    (batch,) = tiny.options(merged=False, num_micro_batches=1)
    logprobs = torch.empty(len(batch.answer_token), device="meta")
    assert predictions(logprobs, batch.to(logprobs.device)).shape == (batch.num_examples,)


VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
WAITING = {
    "compiled": (LoraConfig(task_type="CAUSAL_LM", **tiny.LORA), {"forward": "fan_out", "noise": "compiled"}),
    "eager": (LoraConfig(task_type="CAUSAL_LM", **tiny.LORA), {"forward": "fan_out", "noise": "eager"}),
    "prompt": (PromptTuningConfig(**VIRTUAL), {}),
    "prefix": (PrefixTuningConfig(**VIRTUAL), {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", WAITING)
def test_no_step_waits_on_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As CUDA itself sees it, from the second step on."""
    read = Mesh.gather_items

    def allowed(self: Mesh, local: torch.Tensor, num_items: int) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("default")
        found = read(self, local, num_items)
        torch.cuda.set_sync_debug_mode("error")
        return found

    adapter, options = WAITING[name]
    engine = ZeroOrderEngine(get_peft_model(model_of("llama", torch.bfloat16), adapter).to("cuda"), **options)
    engine.step(tiny.options(merged=False))
    monkeypatch.setattr(Mesh, "gather_items", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for merged in {not adapter.is_prompt_learning, False}:
            engine.step(tiny.options(merged=merged))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_is_a_block_ahead_of_its_gpu_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every pass; passes beside the one that gathers do not wait."""
    said: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.number = sum(text.startswith("record") for text in said)

        def record(self) -> None:
            said.append(f"record {self.number}")

        def synchronize(self) -> None:
            said.append(f"wait for {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    keep_near([*model])
    for block in model:
        block.register_forward_pre_hook(lambda *_: said.append("gather"))
    for number in (None, 1, 0):
        monkeypatch.setattr("zoscale.placement.lane", lambda number=number: number)
        model(torch.zeros(1))
    told = iter(said)
    assert [next(told), next(told)] == ["record 0", "gather"]
    for block in (1, 2):
        assert [next(told), next(told), next(told)] == [f"wait for {block - 1}", f"record {block}", "gather"]
    assert [next(told) for _ in model] == ["gather"] * 3, "the pass in lane 1"
    for block in (3, 4, 5):
        assert [next(told), next(told), next(told)] == [f"wait for {block - 1}", f"record {block}", "gather"]


@pytest.mark.gpu
def test_gathers_wait_for_writes_on_gpus() -> None:
    """Pitfall: DeepSpeed gathers on a stream of its own, which waits for no update of the shards."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: a rank alone gathers nothing")
    torchrun(2, str(ROOT / "tests" / "race_worker.py"), timeout=300)


class Ordered(nn.Module):
    """What ZeRO-3's engine is to the passes; a pass that reads shards whose writes no gather waits for is an error.

    Args:
        model: the model within.
        has_optimizer: whether it is an engine that trains by backpropagation.
    """

    def __init__(self, model: Any, *, has_optimizer: bool = False) -> None:
        super().__init__()
        self.model = model
        self.num_passes = self.num_writes = 0
        self.is_written = True
        self.zero = SimpleNamespace(
            forward_hooks=[], fwd_pre_hook=model.register_forward_pre_hook(lambda *_: None), module=self,
            get_param_coordinator=lambda: SimpleNamespace(reset_step=lambda: None),
            _DeepSpeedZeRoOffload__allgather_stream=SimpleNamespace(wait_stream=self.wait),
        )  # fmt: skip
        outer = SimpleNamespace(parameter_offload=self.zero, zero_grad=lambda: None)
        self.optimizer: Any = outer if has_optimizer else self.zero
        blocks_of(model)[0].register_forward_pre_hook(lambda *_: self.read())

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def wait(self, stream: str) -> None:
        assert stream == "the one that computes"
        self.is_written = False

    def write(self) -> None:
        self.is_written = True
        self.num_writes += 1

    def read(self) -> None:
        assert not self.is_written, "a gather may read a shard before it is written"
        self.num_passes += 1

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None: ...

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's streams, to `zoscale.shards` alone; and who writes shards says so to `Ordered`."""
    cuda = SimpleNamespace(is_available=lambda: True, current_stream=lambda: "the one that computes")
    monkeypatch.setattr("zoscale.shards.torch", SimpleNamespace(**vars(torch) | {"cuda": cuda}))


def engine_on_streams(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[ZeroOrderEngine, Ordered]:
    monkeypatch.setattr("zoscale.engine.place", lambda model, accelerator: (Ordered(model), Mesh(ranks=(0, 1))))
    engine = ZeroOrderEngine(model_of("opt"), **options)
    ordered: Any = engine.answers.module
    monkeypatch.setattr(ShardedParam, "reach_next_forward", lambda shard: ordered.write())
    return engine, ordered


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize(
    ("forward", "passes", "writes", "trial"), [("sequential", 3 * 4, 2 * 4 + 1, 0), ("fan_out", 3, 1, 3)]
)
def test_gathers_of_a_step_and_of_an_evaluation_wait_for_writes(
    monkeypatch: pytest.MonkeyPatch, forward: Any, passes: int, writes: int, trial: int
) -> None:
    """Of every candidate and micro-batch; passes side by side gather once, for the first one."""
    engine, ordered = engine_on_streams(monkeypatch, forward=forward, estimator=TwoPoint(num_directions=2))
    for step in (1, 2):
        engine.step(tiny.batch(step))
        assert ordered.num_passes == step * passes + trial
        assert ordered.num_writes == step * writes * len(engine.shards)
    evaluate(engine.answers, tiny.options(merged=False), engine.mesh, ["loss"])
    assert ordered.num_passes == 2 * passes + trial + 3


class Letters:
    """A tokenizer that knows no word."""

    pad_token_id, eos_token_id, unk_token_id = 0, None, 3

    def encode(self, text: str, **_: Any) -> list[int]:
        return [3]

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


@pytest.mark.gpu
def test_prompts_go_to_the_gpu_by_themselves() -> None:
    """Those behind virtual tokens are looked up here, not by transformers."""
    model = get_peft_model(model_of("opt"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    engine = ZeroOrderEngine(model.to("cuda"), tokenizer=Letters())
    assert engine.generator is not None
    (batch,) = tiny.options(merged=False, num_micro_batches=1)
    asked = replace(batch, questions=(Question(("a", "b"), ("a",), (5, 6), 2),) * 2)
    assert engine.generator.texts(asked) == engine.generator.texts(asked.to(engine.mesh.device))


@pytest.mark.usefixtures("streams")
def test_gathers_of_a_generation_wait_for_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ordered = engine_on_streams(monkeypatch, tokenizer=Letters())
    (batch,) = tiny.options(merged=False, num_micro_batches=1)
    asked = replace(batch, questions=(Question(("a", "b"), ("a",), (5, 6), 2),) * 2)
    assert engine.generator is not None
    for _ in range(2):
        ordered.write()
        assert len(engine.generator.texts(asked)) == 2
    assert ordered.num_passes >= 2 * 2, "a pass per token"


@pytest.mark.usefixtures("streams")
def test_gathers_of_a_first_order_pass_wait_for_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("opt")
    ordered, shards = Ordered(model, has_optimizer=True), shard_parameters(model)
    monkeypatch.setattr("zoscale.backward.local_gradient", lambda shard: shard.param.grad)
    forward = BackwardForward(AnswerModel(ordered, model), shards, Mesh(ranks=(0, 1)))
    candidates = Backpropagation().candidates([Gradient().draw(Noise(0), [], 0, 0)])
    for _ in range(2):
        ordered.write()
        forward.losses(tiny.options(merged=False), candidates, language_modeling)
    assert ordered.num_passes == 2 * 3


def test_the_batch_of_a_first_order_step_may_be_on_its_device_already() -> None:
    """The number of things that its loss is the mean of is found where the batch is."""

    def summed(logprobs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return (logprobs * batch.answer_option).sum(), torch.tensor(3.0)

    (batch,) = tiny.options(merged=False, num_micro_batches=1)
    assert _count([batch, batch.to(torch.device("meta"))], summed) == 6


class _Masks(TorchFunctionMode):
    """Counts attention calls with and without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.masked: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self.masked.append((kwargs or {}).get("attn_mask") is not None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_padding_at_the_ends_needs_no_mask_and_other_padding_gets_one(arch: str) -> None:
    """The same answers on whichever side the padding is; SDPA is what models take unasked."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 200, (3, 12), generator=generator)
    right = {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    right["attention_mask"][0, 7:] = 0
    left = {key: value.clone() for key, value in right.items()}
    for key in left:
        left[key][0] = right[key][0].roll(5)
    within = {key: value.clone() for key, value in right.items()}
    within["attention_mask"][0, 10:] = 1
    for batch in (left, right, within):
        batch["labels"][batch["attention_mask"] == 0] = -100
    left["labels"][0, 5] = right["labels"][0, 0] = -100  # the first token has nothing before it
    model = model_of(arch)
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    answers, found = AnswerModel(model, model), []
    for batch, masked in ((right, False), (left, False), (within, True)):
        rows = MicroBatch.from_labels(batch)
        with torch.no_grad(), _Masks() as calls:
            found.append(answers.answer_logprobs(rows))
        assert rows.is_right_padded is not masked and calls.masked == [masked] * len(calls.masked) and calls.masked
    torch.testing.assert_close(*found[:2], rtol=1e-5, atol=1e-5)


def test_attention_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(config=tiny.ARCHITECTURES["opt"], attention="eager")
    assert load_model(config, read_model_config(config)).config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"expected model\.dtype bfloat16 or float16 beside"):
        check_attention(ModelConfig(attention="flash_attention_2", dtype="float32"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"expected the package flash-attn beside .*pip install flash-attn"):
        check_attention(ModelConfig(attention="flash_attention_2"))
    check_attention(ModelConfig())

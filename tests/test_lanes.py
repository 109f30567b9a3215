"""Passes side by side: each part of the model is held once for all of them, and every pass has its own bits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import TwoPoint
from zoscale.forward.fan import replaced_forward
from zoscale.forward.fan_out import FanOutForward
from zoscale.lanes import Lanes, lane
from zoscale.models.answers import AnswerModel
from zoscale.models.sizes import blocks_of
from zoscale.objectives import language_modeling
from zoscale.probes import Gaussian
from zoscale.step import micro_batches


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Model(nn.Module):
    """An embedding, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, *, skip: bool = False) -> Tensor:
        hidden = self.table(x)
        for block in self.blocks[1:] if skip else self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Zero:
    """Hooks like ZeRO-3's: they say which module holds its weights."""

    def __init__(self, model: Model) -> None:
        self.held: list[str] = []
        self.events: list[str] = []
        self.forward_hooks = []
        names = {module: name for name, module in model.named_modules()}
        for module in (model.table, *model.blocks, model.head):
            name = names[module]
            self.forward_hooks.append(module.register_forward_pre_hook(partial(self._fetch, name)))
            self.forward_hooks.append(module.register_forward_hook(partial(self._release, name)))
        self.fwd_pre_hook = model.register_forward_pre_hook(lambda *_: self.events.append("begin"))

    def _fetch(self, name: str, *_: Any) -> None:
        self.held.append(name)
        self.events.append(name)

    def _release(self, name: str, *_: Any) -> None:
        self.held.remove(name)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def zero(model: Model) -> Zero:
    return Zero(model)


@pytest.fixture
def lanes(model: Model, zero: Zero) -> Lanes:
    module = nn.Sequential(model)
    module.optimizer = zero  # type: ignore[assignment]
    return Lanes(module, model, list(model.blocks))


ROWS = [torch.tensor([[1, 2, 3]]), torch.tensor([[4], [0]]), torch.tensor([[2, 2], [3, 1]])]


def read(model: Model, zero: Zero, rows: Tensor, used: list[Any], **options: Any) -> Tensor:
    """A pass that notes what is held where it uses weights."""

    def noted(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            used.append((lane(), name, list(zero.held)))
            return forward(*args)

        return run

    with noting(model, noted):
        return model(rows, **options)


@contextmanager
def noting(model: Model, noted: Callable[..., Any]) -> Iterator[None]:
    first, second = model.blocks
    with replaced_forward(first, partial(noted, "blocks.0")), replaced_forward(second, partial(noted, "blocks.1")):
        yield


@torch.no_grad()
def test_each_part_is_held_once_for_all_passes(model: Model, zero: Zero, lanes: Lanes) -> None:
    alone = [model(rows) for rows in ROWS]
    zero.events.clear()
    used: list[Any] = []
    found = lanes.run([partial(read, model, zero, rows, used) for rows in ROWS])
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(found, alone, strict=True))
    assert zero.events == ["begin", "table", "blocks.0", "blocks.1", "head"] and not zero.held
    wanted = [(number, name, [name]) for name in ("blocks.0", "blocks.1") for number in (1, 2, 0)]
    assert used == wanted, "block by block, with its weights there"
    assert lane() is None


def untouched(model: Model, zero: Zero) -> bool:
    """Whether the model runs as it did before anything was replaced."""
    zero.events.clear()
    model(ROWS[0])
    plain = all("forward" not in vars(module) for module in model.modules())
    return plain and zero.events == ["begin", "table", "blocks.0", "blocks.1", "head"] and lane() is None


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_error_in_a_pass_ends_all_and_leaves_the_model_as_it_was(
    number: int, model: Model, zero: Zero, lanes: Lanes
) -> None:
    class Planted(Exception):
        pass

    closed: list[int] = []

    def run(own: int) -> Tensor:
        def broken(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def raises(*args: Any) -> Tensor:
                if own == number:
                    raise Planted
                return forward(*args)

            return raises

        try:
            with replaced_forward(model.blocks[1], broken):
                return model(ROWS[own])
        finally:
            closed.append(own)

    with pytest.raises(Planted):
        lanes.run([partial(run, own) for own in range(3)])
    assert sorted(closed) == [0, 1, 2], "no pass is left half way"
    zero.held.clear()  # what ZeRO-3's own hooks leave behind an error is theirs
    assert untouched(model, zero)


@torch.no_grad()
@pytest.mark.parametrize("skips", [(False, True), (True, False)])
def test_passes_through_other_modules_are_refused(
    skips: tuple[bool, bool], model: Model, zero: Zero, lanes: Lanes
) -> None:
    with pytest.raises(RuntimeError, match=r"the same modules in the same order.*forward.name=sequential"):
        lanes.run([partial(model, ROWS[0], skip=skip) for skip in skips])
    zero.held.clear()
    assert untouched(model, zero)


@torch.no_grad()
def test_without_zero3_passes_follow_each_other(model: Model) -> None:
    lanes = Lanes(model, model, list(model.blocks))
    seen: list[int] = []
    with torch.no_grad():
        handle = model.blocks[0].register_forward_hook(lambda *_: seen.append(lane()))
        found = lanes.run([partial(model, rows) for rows in ROWS])
        handle.remove()
    assert not lanes.share and seen == [None, None, None]
    assert all(torch.equal(ours, model(rows)) for ours, rows in zip(found, ROWS, strict=True))


def test_forwards_are_replaced_within_each_other(model: Model) -> None:
    block, calls = model.blocks[0], []

    def wrap(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            calls.append(name)
            return forward(*args)

        return run

    with replaced_forward(block, partial(wrap, "inner")):
        with replaced_forward(block, partial(wrap, "outer")):
            model(ROWS[0])
        model(ROWS[0])
    model(ROWS[0])
    assert calls == ["outer", "inner", "inner"] and "forward" not in vars(block)


class Sharded(nn.Module):
    """What ZeRO-3's engine is to `AnswerModel`: called like the model, with an optimizer that has hooks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.optimizer = SimpleNamespace(
            forward_hooks=[], fwd_pre_hook=model.register_forward_pre_hook(lambda *_: None)
        )

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@torch.no_grad()
def test_rows_padded_behind_and_within_go_side_by_side(tmp_path: Path) -> None:
    """Masks and answer positions of a pass are its own: the bits of each alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.save_model("opt", tmp_path / "opt")).eval()
    right = tiny.batch(0)
    within = [{**rows, "attention_mask": rows["attention_mask"].clone()} for rows in right]
    for rows in within:
        rows["attention_mask"][:, 1] = 0
    batches = [batch for pair in zip(micro_batches(right), micro_batches(within), strict=True) for batch in pair]
    assert [batch.is_right_padded for batch in batches[1:]] == [False, True, False, True, False]
    answers = AnswerModel(sharded := Sharded(model), model)
    lanes = Lanes(sharded, model, blocks_of(model))
    alone = [answers.answer_logprobs(batch) for batch in batches]
    found = lanes.run([partial(answers.answer_logprobs, batch) for batch in batches])
    assert lanes.share and all(torch.equal(ours, wanted) for ours, wanted in zip(found, alone, strict=True))
    again = answers.answer_logprobs(batches[1])
    assert torch.equal(again, alone[1]), "masks are made as before"


def test_passes_do_not_meet_within_a_module_that_runs_once_per_candidate(tmp_path: Path) -> None:
    """An adapter of the embedding: the layer's own weights are gathered while the adapter's are a candidate's."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.save_model("llama", tmp_path / "llama"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    engine = ZeroOrderEngine(adapted, probe=Gaussian(), estimator=TwoPoint(tau=0.2))
    assert isinstance(engine.forward, FanOutForward)
    batches, candidates = micro_batches(tiny.batch(0)), engine.estimator.candidates(engine.directions(0))
    sharded = FanOutForward(AnswerModel(Sharded(adapted), adapted), engine.mesh, engine.forward.fan)
    found, alone = (fan.losses(batches, candidates, language_modeling) for fan in (sharded, engine.forward))
    assert found == alone and not sharded.lanes.share

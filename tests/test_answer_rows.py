"""Tokens that no answer is read from are left out behind the last attention, where nothing can tell; else nowhere.

That losses are those of `SequentialForward`, which leaves out none, is in test_fan_out.py, test_weight_fan.py and
test_zero3.py, where short rows count as long ones.
"""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from test_weight_fan import model_of
from torch import Tensor, nn

from zoscale.data.batch import MicroBatch
from zoscale.data.prefixes import Row
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import TwoPoint
from zoscale.forward.fan_out import FanOutForward
from zoscale.forward.sequential import SequentialForward
from zoscale.probes import Gaussian
from zoscale.step import micro_batches

pytestmark = pytest.mark.usefixtures("short_rows")
FOUND = {
    "opt": ["self_attn.out_proj", "fc1", "fc2"],
    "gpt2": ["attn.c_proj", "mlp"],
    "llama": ["self_attn.o_proj", "mlp"],
    "qwen2": ["self_attn.o_proj", "mlp"],
    "mistral": ["self_attn.o_proj", "mlp"],
}


def engine_of(model: nn.Module) -> ZeroOrderEngine:
    return ZeroOrderEngine(model, estimator=TwoPoint(tau=0.05), probe=Gaussian(), forward="fan_out")


def found_in(model: nn.Module, batches: list[MicroBatch] | None = None) -> list[str]:
    """Names within the last block, after one evaluation, whose losses are checked."""
    engine = engine_of(model)
    batches = batches or micro_batches(tiny.batch(0))
    losses = engine.losses(batches, engine.directions(0))
    assert isinstance(engine.forward, FanOutForward)
    names = {
        module: name.partition("layers.1.")[2] or name.partition("h.1.")[2] for name, module in model.named_modules()
    }
    found = [names[module] for module in engine.forward.answers.modules]
    engine.forward = SequentialForward(engine.answers, engine.shards, engine.mesh)
    assert losses.values == pytest.approx(engine.losses(batches, engine.directions(0)).values, abs=2e-6)
    return found


@pytest.mark.parametrize("name", FOUND)
def test_what_follows_the_last_attention(name: str) -> None:
    assert found_in(model_of(name)) == FOUND[name]


def test_the_modules_see_the_tokens_of_answers() -> None:
    """As many in each row as the row with most has; all modules before them see all tokens."""
    model = model_of("llama")
    block = model.model.layers[1]
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in {"v_proj": block.self_attn.v_proj, "down_proj": block.mlp.down_proj}.items():
        module.register_forward_pre_hook(lambda m, args, n=name: seen.update({n: tuple(args[0].shape[:2])}))
    rows = [Row((5, 6, 7, 8, 9), ((1, 3, 0), (3, 4, 0)), 0), Row((6, 7, 8), ((2, 3, 0),), 1)]
    batch = MicroBatch.from_rows(rows, [[True], [True]], 0)
    engine = engine_of(model)
    engine.losses([batch], engine.directions(0))
    assert seen == {"v_proj": (4, 5), "down_proj": (4, 2)}


def test_columns_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns without an answer fill up rows with fewer; none are given where answers are many."""
    monkeypatch.setattr("zoscale.data.batch.FEW", 8)

    def columns(width: int, *answers: tuple[int, ...]) -> list[list[int]] | None:
        rows = [
            Row((5,) * width, tuple((column, 3, 0) for column in own), number) for number, own in enumerate(answers)
        ]
        found = MicroBatch.from_rows(rows, [[True]] * len(rows), 0).answer_columns
        return None if found is None else found.tolist()

    assert columns(16, (1, 3), (4,), (0,)) == [[1, 3], [4, 0], [0, 1]]
    assert columns(24, (0, 1, 2), (23,)) == [[0, 1, 2], [23, 0, 1]]
    assert columns(23, (0, 1, 2), (22,)) is None


class Mixing(nn.Module):
    """A module of the last block, and something that reads several tokens."""

    def __init__(self, inner: nn.Module, mix: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.mix = mix

    def forward(self, x: Tensor) -> Any:
        return self.mix(self.inner, x)


def shifted(inner: nn.Module, x: Tensor) -> Tensor:
    """RWKV's feed-forward reads the token before, too."""
    return inner(x) + inner(x).roll(1, dims=1)


def normalised(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x / x.norm(dim=1, keepdim=True))


def silenced(inner: nn.Module, x: Tensor) -> Tensor:
    """No value shows what a NaN does."""
    return inner(x) + 0.0 * x.sum(dim=1, keepdim=True)


def refusing(inner: nn.Module, x: Tensor) -> Tensor:
    assert not x.isnan().any()
    return inner(x)


@pytest.mark.parametrize("mix", [shifted, normalised, silenced, refusing])
def test_a_module_that_reads_other_tokens_sees_all(mix: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """And with it what it reads."""
    model = model_of("llama")
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp, mix)
    assert {"self_attn.o_proj", "mlp"}.isdisjoint(found_in(model))


def test_what_comes_before_the_last_module_of_attention_sees_all() -> None:
    """Queries would do with few tokens, too, but so would keys that are read in longer rows only."""
    model = model_of("llama")
    attention = model.model.layers[1].self_attn
    attention.o_proj = Mixing(attention.o_proj, shifted)
    assert found_in(model) == ["mlp"]


class Chosen(nn.Module):
    """Experts by number for every token, as GPT-OSS gives them to a module."""

    def __init__(self, routed: nn.Module) -> None:
        super().__init__()
        self.routed = routed

    def forward(self, x: Tensor) -> Any:
        return self.routed(x, torch.zeros(x.shape[:2], dtype=torch.long))


class Experts(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, numbers: Tensor) -> Any:
        return self.inner(x) + numbers[..., None] + x[numbers > 0].sum() + shifted(nn.Identity(), x) * 0.0


def test_a_module_that_is_given_a_number_for_every_token_is_not_tried_with_fewer() -> None:
    """On a GPU numbers that lie outside end the process."""
    model = model_of("llama")
    model.model.layers[1].mlp = Chosen(Experts(model.model.layers[1].mlp))
    assert found_in(model) == ["mlp.routed.inner"]


def test_modules_that_run_in_other_blocks_too_see_all() -> None:
    model = model_of("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert found_in(model) == []


def test_a_last_block_that_only_cuts_rows_sees_all() -> None:
    """BLT's entropies say where a patch begins: no value of theirs reaches an answer, and NaN is below any limit."""
    model = model_of("llama", num_hidden_layers=3)
    cutting, deciding = model.model.layers[2], model.model.layers[1]
    model.config.num_hidden_layers = 1

    def cut(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0]
        shown = cutting(deciding(hidden, **kwargs), **kwargs)
        begins = (shown[..., :1] > 0.0).to(hidden.dtype)
        return (hidden + begins.cumsum(dim=1), *args[1:]), kwargs

    model.model.layers[0].register_forward_pre_hook(cut, with_kwargs=True)
    assert found_in(model) == []


def test_what_is_added_in_place_is_added_once() -> None:
    model = model_of("llama")
    block = model.model.layers[1]
    own = block.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden += 1.0
        return own(hidden, *args, **kwargs)

    block.forward = forward
    assert found_in(model) == FOUND["llama"]


@pytest.mark.parametrize("spoil", ["norm", "again", "nan"])
def test_a_last_block_whose_other_tokens_are_read_runs_whole(spoil: str) -> None:
    """By what follows it, by itself once more, or nobody knows."""
    model = model_of("llama")
    if spoil == "norm":
        model.model.norm = Mixing(model.model.norm, shifted)
    elif spoil == "again":
        model.model.layers.append(model.model.layers[1])
        model.config.num_hidden_layers = 3
    else:
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
        engine = engine_of(model)
        engine.losses(micro_batches(tiny.batch(0)), engine.directions(0))
        assert isinstance(engine.forward, FanOutForward)
        assert engine.forward.answers.modules == ()
        return
    assert found_in(model) == []


def test_the_first_step_of_a_run_runs_the_rows_of_every_other() -> None:
    """So that one that was killed goes on bit for bit on a GPU, too, whose products depend on the number of rows."""
    model = model_of("opt")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    shapes: list[tuple[int, ...]] = []
    for module in model.modules():
        if type(module).__name__ == "OPTAttention":
            module.register_forward_hook(lambda m, args, result: shapes.append(tuple(result[0].shape)))
    engine, batches = engine_of(model), micro_batches(tiny.batch(0))
    taken = []
    for step in range(3):
        engine.losses(batches, engine.directions(step))
        taken.append(shapes.copy())
        shapes.clear()
    assert taken[0][-len(taken[1]) :] == taken[1] == taken[2]
    assert [shape[0] for shape in taken[1]] == [2, 4] * 3, "of the first block, rows of one candidate"


@pytest.mark.parametrize("width", [1, 2, 3])
def test_rows_too_short_to_have_a_middle_are_run_whole(width: int) -> None:
    batch = MicroBatch.from_rows([Row((5,) * width, ((width - 1, 3, 0),), 0)], [[True]], 0)
    assert found_in(model_of("opt"), [batch]) == []

"""One process: the head on answer positions, weights restored bit for bit, and whole steps against the dense oracle."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import reference as ref
import torch
from allocations import highest_point
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from zoscale.config.sections import Master
from zoscale.data.batch import MicroBatch
from zoscale.data.prefixes import Row
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import ESTIMATORS, Candidate, OneSided, TwoPoint
from zoscale.evaluate import evaluate
from zoscale.forward.sequential import SequentialForward, perturbed
from zoscale.mesh import Mesh
from zoscale.models import answers as answers_module
from zoscale.models import wide_head
from zoscale.models.answers import AnswerModel
from zoscale.models.wide_head import wide_logits, widen
from zoscale.noise.generator import Noise
from zoscale.noise.segments import Segment
from zoscale.objectives import classification, language_modeling
from zoscale.optim import ZOSGD, JaguarMuon, JaguarSignSGD
from zoscale.probes import PROBES, Block, Coordinate, Direction, Entry, Gaussian, Piece, Probe, Rademacher, Tensors
from zoscale.shards import ShardedParam, shard_parameters, trainable_specs

torch.set_num_threads(1)

Kind = Literal["opt", "llama", "gpt2", "opt-lora"]
KINDS: list[Kind] = ["opt", "llama", "gpt2", "opt-lora"]
VOCABULARY = 50


def tiny(kind: Kind, dtype: torch.dtype = torch.float32, dropout: float = 0.1) -> nn.Module:
    """A random model with large weights, so that positions matter; LoRA's B is not zero."""
    torch.manual_seed(0)
    model: nn.Module
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3,
                tie_word_embeddings=False, attention_dropout=dropout,
            )
        )  # fmt: skip
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3,
                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=1, eos_token_id=1,
            )
        )  # fmt: skip
    else:
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2,
                max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=0, init_std=0.3, dropout=dropout,
            )
        )  # fmt: skip
    model = model.to(dtype)
    if kind == "opt-lora":
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "lora_B" in name:
                    param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    else:
        model.requires_grad_(True)
    return model


def batches() -> list[MicroBatch]:
    """Two micro-batches with padding, shared rows and options of one and two tokens."""
    generator = torch.Generator().manual_seed(2)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())

    first = [
        Row(tokens(7), ((6, 5, 0), (6, 9, 1)), 0),
        Row(tokens(4), ((2, 8, 0), (3, 7, 0)), 1),
        Row(tokens(5), ((2, 8, 1), (3, 6, 1)), 1),
    ]
    second = [Row(tokens(3), ((2, 5, 0), (2, 9, 1)), 0)]
    return [
        MicroBatch.from_rows(first, [[True, False], [False, True]], pad_token=0),
        MicroBatch.from_rows(second, [[False, True]], pad_token=0),
    ]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(param.view(torch.int16 if param.element_size() == 2 else torch.int32), old.view(
            torch.int16 if old.element_size() == 2 else torch.int32))
        for (name, param), old in zip(model.named_parameters(), before.values(), strict=True)
    )  # fmt: skip


# --- The answers. ---


@pytest.mark.parametrize("kind", KINDS)
def test_answers_equal_full_logits_without_padding(kind: Kind) -> None:
    """Each row alone, unpadded, all positions, log-softmax in float64."""
    model = tiny(kind)
    for batch in batches():
        with torch.no_grad():
            ours = AnswerModel(model, model).answer_logprobs(batch)
            expected = []
            for position, token in zip(batch.answer_position.tolist(), batch.answer_token.tolist(), strict=True):
                row, column = int(batch.position_row[position]), int(batch.position_column[position])
                ids = batch.input_ids[row][batch.attention_mask[row].bool()][None]
                expected.append(model(input_ids=ids).logits[0, column].double().log_softmax(-1)[token])
        assert ours.dtype == torch.float32 and ours.shape == batch.answer_token.shape
        torch.testing.assert_close(ours.double(), torch.stack(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_computed_for_answer_positions_only(kind: Kind) -> None:
    """Pitfall 25: P rows go through the head, not rows x tokens; other forwards of the model are not affected."""
    model = tiny(kind)
    shapes: list[tuple[int, ...]] = []
    head = model.get_output_embeddings()  # type: ignore[operator]
    head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    answers, (batch, _) = AnswerModel(model, model), batches()
    with torch.no_grad():
        answers.answer_logprobs(batch)
        model(input_ids=batch.input_ids)
    assert batch.position_row.numel() == 5 < batch.input_ids.numel() == 21
    assert shapes == [(1, 5, VOCABULARY), (3, 7, VOCABULARY)]


def test_logits_are_not_copied_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 they have half the bytes of one copy in float32, of which the sum's exponentials are another."""
    logits = torch.randn(512, 4096).bfloat16()
    whole = answers_module._logsumexp(logits)
    assert torch.equal(whole, torch.logsumexp(logits.float(), dim=-1))
    assert highest_point(lambda: answers_module._logsumexp(logits)) > 3 * logits.nbytes
    monkeypatch.setattr(answers_module, "_AT_ONCE", 32 * 4096)
    assert highest_point(lambda: answers_module._logsumexp(logits)) < 0.5 * logits.nbytes
    assert torch.equal(answers_module._logsumexp(logits), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bit_heads_are_not_rounded(
    kind: Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-probabilities that float64 gives for the hidden states and weights at hand; without derivatives only."""
    monkeypatch.setattr(wide_head, "_ROWS", 16)
    model = tiny(kind).to(dtype)
    (batch, _) = batches()
    answers, plain = AnswerModel(model, model), AnswerModel(model, model, wide_logits=False)
    head = model.get_output_embeddings()  # type: ignore[operator]
    hidden: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: hidden.append(args[0][0]))
    with torch.no_grad():
        ours, theirs = answers.answer_logprobs(batch), plain.answer_logprobs(batch)
        logits = hidden[0].double() @ head.weight.double().T
        expected = logits.log_softmax(-1)[batch.answer_position, batch.answer_token]
        assert model(input_ids=batch.input_ids).logits.dtype == dtype, "the model's own forward is as it was"
    handle.remove()
    torch.testing.assert_close(ours.double(), expected, atol=2e-6, rtol=0)
    assert (theirs - expected).abs().max() > 2e-4, "with 16-bit logits"
    assert torch.equal(answers.answer_logprobs(batch), theirs), "where derivatives are taken"


@pytest.mark.parametrize("bias", [True, False])
def test_heads_in_wrappers_of_peft_are_wide_too(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of the head, or a trained copy of it."""
    monkeypatch.setattr(wide_head, "_ROWS", 16)
    for options in ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        torch.manual_seed(0)
        base = tiny("llama")
        base.lm_head = nn.Linear(base.config.hidden_size, VOCABULARY, bias=bias)
        model = get_peft_model(base, LoraConfig(r=2, **options)).to(torch.bfloat16)  # type: ignore[arg-type]
        head = model.get_output_embeddings()
        widen(head)
        x = torch.randn(3, base.config.hidden_size).bfloat16()
        with torch.no_grad():
            with wide_logits(True):
                wide = head(x)
            assert wide.dtype == torch.float32 and head(x).dtype == torch.bfloat16
            torch.testing.assert_close(wide.double(), copy.deepcopy(head).double()(x.double()), atol=2e-3, rtol=0)
            assert torch.equal(wide.bfloat16(), head(x)) or (wide.bfloat16() - head(x)).abs().max() < 2e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_off_and_the_model_in_eval_mode(kind: Kind) -> None:
    """Pitfall 28: no key/value cache in a training forward. Dropout is off."""
    model = tiny(kind, dropout=0.5).train()
    answers = AnswerModel(model, model)
    inner = model.get_base_model() if kind == "opt-lora" else model  # type: ignore[operator]
    caches: list[Any] = []
    inner.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
    (batch, _) = batches()
    with torch.no_grad():
        first, second = answers.answer_logprobs(batch), answers.answer_logprobs(batch)
        inner(input_ids=batch.input_ids)
    assert caches[:2] == [None, None] and caches[2] is not None, "the third forward is Hugging Face's default"
    assert torch.equal(first, second)
    assert not any(module.training for module in model.modules())


def test_the_hook_is_removed_when_the_forward_raises() -> None:
    model = tiny("opt")
    (batch, _) = batches()
    answers = AnswerModel(model, model)
    handle = model.get_output_embeddings().register_forward_hook(broken)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="broken"):
        answers.answer_logprobs(batch)
    handle.remove()
    assert model(input_ids=batch.input_ids).logits.shape == (3, 7, VOCABULARY)


def broken(*args: object) -> None:
    raise RuntimeError("broken on purpose")


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="output embedding, got Linear"):
        AnswerModel(nn.Linear(2, 2), nn.Linear(2, 2))


# --- Perturbing and restoring. ---

PRECISIONS: list[tuple[torch.dtype, Master]] = [
    (torch.float32, "fp32"),
    (torch.bfloat16, "fp32"),
    (torch.bfloat16, "none"),
]
every_precision = pytest.mark.parametrize(("dtype", "master"), PRECISIONS)


def test_only_16_bit_weights_have_a_master() -> None:
    """A second copy of fp32 weights would be the same bits."""
    for dtype, has_master in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, True)):
        shards = shard_parameters(tiny("opt", dtype))
        assert {shard.has_master for shard in shards} == {has_master}
        assert {shard.truth.dtype for shard in shards} == {torch.float32}


def drifted(model: nn.Module, master: Master) -> list[ShardedParam]:
    """Shards whose fp32 truth is not representable in 16 bits."""
    shards = shard_parameters(model, master=master)
    for shard in shards:
        shard.truth.mul_(1.0001)
        shard.publish()
    return shards


@every_precision
@pytest.mark.parametrize("name", PROBES)
def test_weights_are_bit_identical_after_the_losses(dtype: torch.dtype, master: Master, name: str) -> None:
    """Pitfall 7: no drift from +tau and -tau, in any precision; and each candidate reads exactly x + tau z."""
    model = tiny("opt", dtype)
    shards = drifted(model, master)
    before, truths = weights_of(model), [shard.truth.clone() for shard in shards]
    specs = [shard.spec for shard in shards]
    directions = [PROBES[name]().draw(Noise(1), specs, 0, k) for k in range(2)]
    forward = SequentialForward(AnswerModel(model, model), shards, Mesh())
    for tau in (1e-3, 10.0):
        result = forward.losses(
            batches(), TwoPoint(tau=tau, num_directions=2).candidates(directions), language_modeling
        )
        assert len(result.values) == 4 and result.count == 4
    assert same_bits(model, before)
    assert all(torch.equal(shard.truth, truth) for shard, truth in zip(shards, truths, strict=True))
    for shard, truth in zip(shards, truths, strict=True):
        with perturbed(shards, Candidate(directions[0], 0.25)):
            (segment,) = directions[0].segments([Piece(shard, 0, len(shard))])
            z = torch.zeros(len(shard))
            if segment is not None:
                segment.add_to(z, 1.0)
            expected = torch.where(z == 0, truth.to(dtype), (truth.float() + z * 0.25).to(dtype))
            assert torch.equal(shard.live, expected)
            if shard.has_master:
                assert torch.equal(shard.truth, truth), "the truth is not touched"
    assert same_bits(model, before)


class FailsMidway(Direction):
    """Good for all pieces but the last, whose segment cannot be written: the weights are perturbed in part."""

    def __init__(self, inner: Direction) -> None:
        self.inner = inner

    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        found = self.inner.segments(group)
        found[-1] = Segment(torch.ones(10**6))
        return found


@every_precision
def test_weights_are_bit_identical_after_an_exception(dtype: torch.dtype, master: Master) -> None:
    """Pitfall 7: raised in the forward of a later candidate, or while perturbing."""
    model = tiny("opt", dtype)
    shards = drifted(model, master)
    before = weights_of(model)
    specs = [shard.spec for shard in shards]
    direction = Rademacher().draw(Noise(1), specs, 0, 0)
    forward = SequentialForward(AnswerModel(model, model), shards, Mesh())
    countdown = iter([False, False, True])
    changed: list[bool] = []

    def third(*args: object) -> None:
        changed.append(not same_bits(model, before))
        if next(countdown):
            raise RuntimeError("third forward")

    handle = model.register_forward_pre_hook(third)
    with pytest.raises(RuntimeError, match="third forward"):
        forward.losses(batches(), TwoPoint(tau=0.5).candidates([direction]), language_modeling)
    handle.remove()
    assert changed == [True] * 3
    assert same_bits(model, before)
    with pytest.raises(RuntimeError), perturbed(shards, Candidate(FailsMidway(direction), 0.5)):
        raise AssertionError("not reached")
    assert same_bits(model, before)
    with perturbed(shards, Candidate(direction, 0.5)):
        assert not same_bits(model, before), "it can go on after that"
    assert same_bits(model, before)


def test_only_trainable_weights_move() -> None:
    model = tiny("opt-lora")
    shards = shard_parameters(model)
    assert len(shards) == 8 and all("lora_" in shard.spec.name for shard in shards)
    before = weights_of(model)
    direction = Gaussian().draw(Noise(0), [shard.spec for shard in shards], 0, 0)
    with perturbed(shards, Candidate(direction, 1.0)):
        moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == {shard.spec.name for shard in shards}


def test_the_candidate_without_a_direction_is_the_point_itself() -> None:
    model = tiny("opt")
    shards = shard_parameters(model)
    forward = SequentialForward(AnswerModel(model, model), shards, Mesh())
    (direction,) = (Gaussian().draw(Noise(0), [shard.spec for shard in shards], 0, 0),)
    points = [Candidate(None), Candidate(direction, 0.1), Candidate(None)]
    first, other, last = forward.losses(batches(), points, language_modeling).values
    answers = AnswerModel(model, model)
    with torch.no_grad():
        sums = [language_modeling(answers.answer_logprobs(batch), batch) for batch in batches()]
    assert first == last == sum(float(s) for s, _ in sums) / sum(float(n) for _, n in sums)
    assert other != first


def test_tied_embeddings_are_one_tensor_with_one_perturbation() -> None:
    """Pitfall 10: one id, and the head and the embedding both read x + tau z, not x + 2 tau z."""
    model = tiny("opt")
    names = [spec.name for spec, _ in trainable_specs(model)]
    assert names == sorted(names) and not any("lm_head" in name for name in names)
    assert names.count("model.decoder.embed_tokens.weight") == 1
    shards = shard_parameters(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # type: ignore[operator]
    assert embedding is head
    before = embedding.detach().clone()
    direction = Rademacher().draw(Noise(0), [shard.spec for shard in shards], 0, 0)
    z = ref.Probe("rademacher").direction([shard.spec.shape for shard in shards], 0, 0, 0)
    with perturbed(shards, Candidate(direction, 0.5)):
        assert torch.equal(head, before + 0.5 * torch.from_numpy(z[names.index("model.decoder.embed_tokens.weight")]))
    assert torch.equal(head, before)
    untied = [spec.name for spec, _ in trainable_specs(tiny("llama"))]
    assert "lm_head.weight" in untied and "model.embed_tokens.weight" in untied


def test_nothing_trainable_and_not_contiguous_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        shard_parameters(nn.Linear(2, 2).requires_grad_(False))
    layer = nn.Linear(2, 3)
    layer.weight = nn.Parameter(layer.weight.detach().mT)
    with pytest.raises(ValueError, match="weight to be contiguous"):
        shard_parameters(layer)


# --- Steps of the engine. ---


def engine_of(model: nn.Module, **options: Any) -> ZeroOrderEngine:
    """With one pass per candidate, whose arithmetic is the oracle's to the bit (`test_fan_out.py` has the other)."""
    chosen: dict[str, Any] = {
        "optimizer": lambda shards, mesh: JaguarSignSGD(shards, mesh, lr=1e-3),
        "probe": Block(rows=0.5, columns=0.5),
        "noise": "eager",
        "forward": "sequential",
    }
    return ZeroOrderEngine(model, **(chosen | options))


@pytest.mark.parametrize("option", ["master", "noise", "forward", "compile"])
def test_values_that_an_engine_does_not_know_are_refused(option: str) -> None:
    """`float32` for `fp32` would train without a master and say nothing."""
    options: dict[str, Any] = {option: "float32"}
    with pytest.raises(ValueError, match=f"expected {option} to be one of .*, got 'float32'"):
        engine_of(nn.Linear(1, 1), **options)


def test_a_step_leaves_the_global_generators_alone() -> None:
    """Pitfall 6: data order and dropout elsewhere are not disturbed."""
    engine = engine_of(tiny("opt", dropout=0.5))
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    engine.step(batches())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_state()) == repr(before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
    other = engine_of(tiny("opt", dropout=0.5))
    torch.manual_seed(123)
    other.step(batches())
    assert same_bits(other.model, weights_of(engine.model)), "nor do they decide anything"


def test_the_logged_loss_is_the_two_sided_mean() -> None:
    """Pitfall 16: near f(x), and not f(x + tau z)."""
    for estimator in (TwoPoint(tau=1e-2, num_directions=2), OneSided(tau=1e-2, num_directions=2)):
        engine = engine_of(tiny("opt"), estimator=estimator)
        at_start = SequentialForward(engine.answers, engine.shards, Mesh()).losses(
            batches(), [Candidate(None)], language_modeling
        )
        result = engine.step(batches())
        values = result.losses.values
        assert len(values) == estimator.num_candidates
        if isinstance(estimator, TwoPoint):
            assert result.loss == sum(values) / 4 and result.loss not in values
        else:
            assert result.loss == values[0] == at_start.values[0]
        assert result.loss == pytest.approx(at_start.values[0], rel=0.02)


class Spoiled:
    """An objective that is not finite on its n-th call."""

    def __init__(self, bad: float, calls: Sequence[int]) -> None:
        self.bad, self.calls, self.count = bad, calls, 0

    def __call__(self, logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        total, count = language_modeling(logprobs, batch)
        self.count += 1
        return (torch.full_like(total, self.bad) if self.count - 1 in self.calls else total), count


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", [TwoPoint(num_directions=2), OneSided(num_directions=2)])
def test_a_non_finite_loss_skips_the_step_and_is_shown(bad: float, estimator: Any) -> None:
    """Pitfall 15: weights, memory and schedule are untouched, the loss is not reported as 0, and the run goes on."""
    engine = engine_of(tiny("opt"), estimator=estimator)
    assert not engine.step(batches()).skipped
    memory = copy.deepcopy(engine.optimizer.state_dict())
    before = weights_of(engine.model)
    engine.objective = Spoiled(bad, [estimator.num_candidates])  # a middle candidate, one of its micro-batches
    result = engine.step(batches())
    assert result.skipped and result.step == 1
    assert not all(math.isfinite(rho) for rho in result.estimate.projected_grads)
    assert sum(not math.isfinite(value) for value in result.losses.values) == 1
    assert result.loss != 0 and (isinstance(estimator, OneSided) or not math.isfinite(result.loss))
    assert same_bits(engine.model, before)
    for index, state in memory["state"].items():
        assert torch.equal(engine.optimizer.state_dict()["state"][index]["momentum"], state["momentum"])
    engine.objective = language_modeling
    after = engine.step(batches())
    assert after.step == 2 and not after.skipped and not same_bits(engine.model, before)


def test_weights_that_are_nan_are_shown() -> None:
    """Pitfall 15, from the model itself."""
    engine = engine_of(tiny("opt"))
    for shard in engine.shards:
        shard.truth.fill_(math.nan)
        shard.publish()
    result = engine.step(batches())
    assert result.skipped and math.isnan(result.loss)


def test_parameters_change_once_per_engine_step() -> None:
    """Pitfall 13: one optimizer step per step, each truth slice written once."""
    engine = engine_of(tiny("opt", torch.bfloat16))
    calls: list[int] = []
    engine.optimizer.register_step_post_hook(lambda *args: calls.append(1))
    for step in range(3):
        versions = [shard.truth._version for shard in engine.shards]
        assert engine.step(batches()).step == step
        assert [s.truth._version - v for s, v in zip(engine.shards, versions, strict=True)] == [1] * len(versions)
    assert len(calls) == 3


def test_the_lr_of_a_step_is_the_schedules() -> None:
    """Pitfall 12: what is reported and what moves the weights is lr(t)."""
    engine = engine_of(
        tiny("opt-lora"), optimizer=lambda shards, mesh: JaguarSignSGD(shards, mesh, lr=0.5), probe=Rademacher()
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lambda t: 1 / (1 + t))
    for step in range(4):
        before = [shard.truth.clone() for shard in engine.shards]
        result = engine.step(batches())
        schedule.step()
        assert result.lr == 0.5 / (1 + step)
        moves = torch.cat([(s.truth - b).abs() for s, b in zip(engine.shards, before, strict=True)])
        torch.testing.assert_close(moves, torch.full_like(moves, result.lr), atol=1e-6, rtol=0)


LOSSES = ("loss", "lm_loss")


@pytest.mark.parametrize(("dtype", "master"), PRECISIONS)
def test_evaluation_after_a_step_sees_the_new_weights(dtype: torch.dtype, master: Master) -> None:
    """Pitfall 14: nothing is deferred; a fresh model with the engine's truth scores the same."""
    engine = engine_of(
        tiny("opt", dtype), master=master, optimizer=lambda shards, mesh: JaguarSignSGD(shards, mesh, lr=0.05)
    )
    previous = evaluate(engine.answers, batches(), engine.mesh, LOSSES)
    for _ in range(2):
        engine.step(batches())
        result = evaluate(engine.answers, batches(), engine.mesh, LOSSES)
        fresh = tiny("opt", dtype)
        truths = {s.spec.name: s.truth.view(s.spec.shape) for s in engine.shards}
        with torch.no_grad():
            for name, param in fresh.named_parameters():
                param.copy_(truths[name])
        assert result == evaluate(AnswerModel(fresh, fresh), batches(), Mesh(), LOSSES)
        assert result != previous
        previous = result


def test_hugging_face_tensors_are_a_batch() -> None:
    input_ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    data = {"input_ids": input_ids, "labels": input_ids}
    one, same, split = (engine_of(tiny("opt")) for _ in range(3))
    result = one.step(data)
    assert result.losses.values == same.step([MicroBatch.from_labels(data)]).losses.values
    halves = [{key: value[i : i + 1] for key, value in data.items()} for i in range(2)]
    np.testing.assert_allclose(split.step(halves).losses.values, result.losses.values, rtol=1e-5)
    assert result.losses.count == 10 and result.losses.local_tokens == 2 * 12 and result.losses.local_samples == 4
    with pytest.raises(ValueError, match="at least one micro-batch"):
        one.step([])


# --- Whole trajectories against the dense oracle. ---


def oracle_loss(kind: Kind, dtype: torch.dtype, objective: Any) -> Callable[[dict[str, Tensor]], float]:
    """The loss of full weights in a second model; micro-batches summed in order, in float64."""
    twin = tiny(kind, dtype)
    answers = AnswerModel(twin, twin)

    @torch.no_grad()
    def loss(weights: dict[str, Tensor]) -> float:
        for name, param in twin.named_parameters():
            if name in weights:
                param.copy_(weights[name])
        parts = [objective(answers.answer_logprobs(batch), batch) for batch in batches()]
        return sum(float(total) for total, _ in parts) / sum(float(count) for _, count in parts)

    return loss


def trajectory(
    kind: Kind,
    make: Callable[..., Any],
    oracle: ref.Optimizer,
    probes: tuple[Probe, ref.Probe],
    *,
    estimator: str = "two_point",
    q: int = 1,
    dtype: torch.dtype = torch.float32,
    steps: int = 4,
) -> Iterator[tuple[ZeroOrderEngine, ref.DenseTrainer, Any, tuple[list[float], list[float]]]]:
    """Engine and oracle side by side, after each step."""
    model = tiny(kind, dtype)
    start = {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}
    engine = engine_of(
        model, optimizer=make, probe=probes[0], seed=2**33 + 1, objective=classification,
        estimator=ESTIMATORS[estimator](tau=1e-2, num_directions=q),
    )  # fmt: skip
    trainer = ref.DenseTrainer(
        start, oracle_loss(kind, dtype, classification), oracle, probes[1], seed=2**33 + 1, tau=1e-2,
        num_directions=q, estimator=estimator, dtype=dtype,
    )  # fmt: skip
    for step in range(steps):
        yield engine, trainer, engine.step(batches()), trainer.step(step)


DIFFERENCES = ["two_point", "one_sided"]
SIGN_PROBES: dict[str, tuple[Probe, ref.Probe]] = {
    "block": (Block(rows=0.5, columns=0.5), ref.Probe("block", rows=0.5, cols=0.5)),
    "row": (PROBES["row"](), ref.Probe("row")),
    "entry": (Entry(), ref.Probe("entry")),
    "coordinate": (Coordinate(), ref.Probe("coordinate")),
    "tensors": (Tensors(share=0.5, signs="ones"), ref.Probe("tensors", fraction=0.5, signs="ones")),
    "rademacher": (Rademacher(), ref.Probe("rademacher")),
}


def assert_same_bits(engine: ZeroOrderEngine, trainer: ref.DenseTrainer) -> None:
    for shard in engine.shards:
        name, shape = shard.spec.name, shard.spec.shape
        assert torch.equal(shard.truth.view(shape), trainer.params[name]), name
        assert torch.equal(shard.live, shard.truth.to(shard.live.dtype))
        assert np.array_equal(engine.optimizer.state[shard.truth]["momentum"].view(shape).numpy(), trainer.memory[name])


@pytest.mark.parametrize("name", SIGN_PROBES)
@pytest.mark.parametrize("estimator", DIFFERENCES)
@pytest.mark.parametrize("q", [1, 4])
def test_jaguar_sign_sgd_is_the_oracles_trajectory_bit_for_bit(name: str, estimator: str, q: int) -> None:
    """Pitfalls 4, 5, 11, 22: losses, projected gradients, weights and memory of every step."""
    for engine, trainer, result, (losses, rhos) in trajectory(
        "opt",
        lambda shards, mesh: JaguarSignSGD(shards, mesh, lr=5e-3, beta=0.8, weight_decay=0.01),
        ref.Optimizer("jaguar_sign_sgd", lr=5e-3, beta=0.8, weight_decay=0.01),
        SIGN_PROBES[name],
        estimator=estimator,
        q=q,
    ):
        assert list(result.losses.values) == losses
        assert list(result.estimate.projected_grads) == rhos and any(rhos)
        assert_same_bits(engine, trainer)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("opt-lora", torch.float32), ("opt", torch.bfloat16), ("gpt2", torch.float32)]
)
def test_jaguar_sign_sgd_on_lora_and_in_bf16(kind: Kind, dtype: torch.dtype) -> None:
    """Pitfalls 7 and 8: a 16-bit model with the fp32 truth follows the dense fp32 run exactly."""
    for engine, trainer, result, (losses, _) in trajectory(
        kind,
        lambda shards, mesh: JaguarSignSGD(shards, mesh, lr=1e-3),
        ref.Optimizer("jaguar_sign_sgd", lr=1e-3),
        SIGN_PROBES["block"],
        q=2,
        dtype=dtype,
    ):
        assert list(result.losses.values) == losses
        assert_same_bits(engine, trainer)


@pytest.mark.parametrize("estimator", DIFFERENCES)
@pytest.mark.parametrize("q", [1, 4])
@pytest.mark.parametrize("rule", ["zo_sgd", "jaguar_muon"])
def test_zo_sgd_and_jaguar_muon_follow_the_oracle(rule: str, estimator: str, q: int) -> None:
    """To 1e-5: Gaussians and matrix products are not bit-reproducible."""
    make: Callable[..., Any]
    if rule == "zo_sgd":
        make, oracle = lambda s, m: ZOSGD(s, m, lr=1e-4), ref.Optimizer("zo_sgd", lr=1e-4)
        probes: tuple[Probe, ref.Probe] = (Gaussian(), ref.Probe("gaussian"))
    else:
        make = lambda s, m: JaguarMuon(s, m, lr=1e-3, sign_lr_scale=0.1)  # noqa: E731
        oracle = ref.Optimizer("jaguar_muon", lr=1e-3, sign_names=("*embed*",), sign_lr_scale=0.1)
        probes = SIGN_PROBES["block"]
    start: dict[str, Tensor] = {}
    for engine, trainer, result, (losses, _) in trajectory(
        "opt", make, oracle, probes, estimator=estimator, q=q, steps=3
    ):
        np.testing.assert_allclose(result.losses.values, losses, atol=1e-5)
        for shard in engine.shards:
            name = shard.spec.name
            torch.testing.assert_close(shard.truth.view(shard.spec.shape), trainer.params[name], atol=1e-5, rtol=1e-5)
            start.setdefault(name, shard.truth.clone())
    moved = max(float((shard.truth - start[shard.spec.name]).abs().max()) for shard in engine.shards)
    assert moved > 1e-4, "the steps are larger than the tolerance"

"""Several sequences in one row against a row each, on every architecture that is said to allow it."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from test_fan_out import ARCHITECTURES, model_of
from transformers import AutoConfig, AutoModelForCausalLM

from zoscale.config import ModelConfig
from zoscale.data.batch import MicroBatch
from zoscale.data.prefixes import Row, share_prefixes
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import TwoPoint
from zoscale.models.answers import AnswerModel
from zoscale.models.loading import MERGING, can_merge_rows
from zoscale.objectives import classification
from zoscale.probes import Gaussian

SHARING = sorted(ARCHITECTURES)
_OTHERS = {
    "vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
_SMALLER = {"gptj": {"n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}}


def test_the_architectures_that_share() -> None:
    """All of them are tested below."""
    assert set(SHARING) <= MERGING
    assert all(can_merge_rows(AutoConfig.for_model(name), ModelConfig(), 40) for name in MERGING)


def small(name: str) -> Any:
    options: dict[str, Any] = dict(ARCHITECTURES[name][0]) if name in ARCHITECTURES else {"model_type": name} | _OTHERS
    options |= _SMALLER.get(name, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(MERGING))
def test_sequences_side_by_side_do_not_see_each_other(name: str, attention: str) -> None:
    """Examples of 2 to 20 tokens, two of which share a prompt; and the test would see a mistake."""
    model = small(name)
    model.set_attn_implementation(attention)
    answers = AnswerModel(model, model)
    generator = torch.Generator().manual_seed(3)
    tokens = [tuple(torch.randint(4, 200, (length,), generator=generator).tolist()) for length in (9, 2, 12, 20)]
    rows = [Row(own, ((len(own) - 1, 5, 0), (len(own) // 2, 6, 0)), number) for number, own in enumerate(tokens)]
    rows += share_prefixes([Row((7, 8, 9, n), ((3, n, n),), 4) for n in range(2)], 20, branching=True)
    gold = [[True]] * 4 + [[True, False]]
    apart, packed = (MicroBatch.from_rows(rows, gold, 0, groups=groups) for groups in (None, [[3], [0, 4, 1], [2]]))
    assert packed.input_ids.shape == (3, 20) and packed.num_tokens == apart.num_tokens == 48
    with torch.no_grad():
        expected = by_option(apart, answers.answer_logprobs(apart))
        torch.testing.assert_close(by_option(packed, answers.answer_logprobs(packed)), expected, rtol=0, atol=5e-6)
        assert packed.ends is not None
        sees_all = replace(packed, ends=torch.full_like(packed.ends, packed.ends.shape[1]))
        assert float((by_option(sees_all, answers.answer_logprobs(sees_all)) - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHARING)
def test_losses_of_merged_rows_are_those_of_separate_rows(name: str, dtype: torch.dtype) -> None:
    """All candidates in one pass and one by one."""
    model = model_of(name, dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    found = []
    for forward, merged in (("sequential", False), ("sequential", True), ("fan_out", True)):
        engine = ZeroOrderEngine(
            model, estimator=TwoPoint(tau=0.05, num_directions=2), probe=Gaussian(), objective=classification,
            forward=forward,  # type: ignore[arg-type]
        )  # fmt: skip
        found.append(engine.losses(tiny.options(merged=merged), engine.directions(0)))
    separate, *others = found
    assert len({round(value, 6) for value in separate.values}) == 4, "the candidates differ"
    for merged_losses in others:
        assert merged_losses.values == pytest.approx(separate.values, abs=tolerance)
        assert merged_losses.local_tokens < 0.7 * separate.local_tokens
        assert merged_losses.local_samples == separate.local_samples


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHARING)
def test_answers_depend_on_the_mask_and_the_positions(name: str, attention: str) -> None:
    """Each option's tokens, by both implementations of attention; and the test would see a mistake."""
    model: Any = model_of(name, torch.float32)
    model.base_model.model.set_attn_implementation(attention)
    answers = AnswerModel(model, model)
    (separate, merged) = (tiny.options(merged=merged)[0] for merged in (False, True))
    assert merged.position_ids is not None and merged.ends is not None
    with torch.no_grad():
        expected = by_option(separate, answers.answer_logprobs(separate))
        assert_close = torch.testing.assert_close
        assert_close(by_option(merged, answers.answer_logprobs(merged)), expected, rtol=0, atol=2e-6)
        sees_all = replace(merged, ends=torch.full_like(merged.ends, merged.ends.shape[1]))
        by_column = replace(merged, position_ids=torch.arange(merged.ends.shape[1]).expand_as(merged.ends))
        for wrong in (sees_all, by_column):
            assert float((by_option(wrong, answers.answer_logprobs(wrong)) - expected).abs().max()) > 1e-4


def by_option(batch: Any, logprobs: torch.Tensor) -> torch.Tensor:
    """In an order that does not depend on the rows; a column is that of the sequence."""
    columns = batch.position_column if batch.position_ids is None else batch.position_ids[
        batch.position_row, batch.position_column
    ]  # fmt: skip
    place = batch.answer_option * 1000 + columns[batch.answer_position]
    return logprobs[place.argsort()]


@pytest.mark.parametrize(
    ("model_type", "model", "options", "longest"),
    [
        ("llama", {"attention": "flash_attention_2"}, {}, 40),
        ("llama", {"trust_remote_code": True}, {}, 40),
        ("mistral", {}, {"sliding_window": 39}, 40),
        ("bloom", {}, {}, 40),
    ],
)
def test_other_models_run_a_row_for_each(
    model_type: str, model: dict[str, Any], options: dict[str, Any], longest: int
) -> None:
    architecture = AutoConfig.for_model(model_type, **options)
    assert not can_merge_rows(architecture, ModelConfig(id="x", **model), longest)

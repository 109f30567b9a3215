"""Options of one prompt merged into one row against a row each, on every architecture that is said to allow it."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from test_fan_out import ARCHITECTURES, model_of
from transformers import AutoConfig

from zoscale.config import ModelConfig
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import TwoPoint
from zoscale.models.answers import AnswerModel
from zoscale.models.loading import can_share_prefixes
from zoscale.objectives import classification
from zoscale.probes import Gaussian

SHARING = sorted(name for name in ARCHITECTURES if can_share_prefixes(AutoConfig.for_model(name), ModelConfig(), 40))


def test_the_architectures_that_share() -> None:
    assert SHARING == ["gpt2", "llama", "mistral", "opt", "qwen2"]


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
    """In an order that does not depend on the rows."""
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
    assert not can_share_prefixes(architecture, ModelConfig(id="x", **model), longest)

"""Perturbations that 16 bits round away: told, or refused where nothing is left."""

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from processes import ROOT
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from zoscale.assembly import build_engine, plan
from zoscale.config import ConfigError, parse
from zoscale.data.train_batches import TrainBatches
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import Estimator, ForwardGrad, OneSided, TwoPoint
from zoscale.methods import DEFAULTS, TABLES
from zoscale.optim import ZOSGD
from zoscale.probes import Block, Gaussian, Probe, Rademacher
from zoscale.rounding import check_rounding


def told(model: nn.Module, probe: Probe, estimator: Estimator) -> list[str]:
    lines: list[str] = []
    check_rounding(ZeroOrderEngine(model, optimizer=ZOSGD, probe=probe, estimator=estimator), lines.append)
    return lines


def llama(trained: str, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> nn.Module:
    """Its norms' weights are 1, its matrices' small; trained are those with `trained` in their names."""
    torch.manual_seed(0)
    options: dict[str, Any] = {**tiny.ARCHITECTURES["llama"], **sizes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options)).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("estimator", [TwoPoint(tau=1e-3), OneSided(tau=1e-3, num_directions=2)])
def test_weights_that_no_perturbation_changes_are_refused(estimator: Estimator) -> None:
    model = llama("norm", hidden_size=480)
    with pytest.raises(
        ConfigError, match=r"none of 2,400 in bfloat16 at estimator\.tau=0\.001.*: raise estimator\.tau"
    ):
        told(model, Rademacher(), estimator)
    assert told(model, Rademacher(), TwoPoint(tau=1e-2)) == []


def test_tensors_that_hardly_change_are_named() -> None:
    """Among others that do; the matrices are smaller by a factor of fifty."""
    (line,) = told(llama(""), Gaussian(), TwoPoint(tau=1e-3))
    assert line.startswith("rounding: 5 of 21 trained tensors, as model.layers.0.input_layernorm.weight, hardly change")
    share = int(line.partition("(")[2].partition("%")[0])
    assert share < 10, "a change of 1 by 1/512 takes a draw beyond 1.95, to one side or the other"
    assert told(llama("proj"), Block(rows=0.5, columns=0.5), TwoPoint(tau=1e-3)) == []


def test_nothing_is_told_where_nothing_is_rounded_away() -> None:
    """In float32, without perturbations, and of so few elements that it may be chance."""
    assert told(llama("norm", torch.float32), Rademacher(), TwoPoint(tau=1e-3)) == []
    assert told(llama("norm"), Rademacher(), ForwardGrad()) == []
    (line,) = told(llama("norm"), Rademacher(), TwoPoint(tau=1e-3))
    assert "(0% of their elements)" in line, "180 elements"


def slopes(dtype: str, options: Sequence[str], wide_logits: bool) -> Tensor:
    """Projected gradients of 3 steps, 8 directions each, of the bundled OPT on its data."""
    sizes = ["data.num_train=64", "data.num_validation=8", "data.num_dev=0", "estimator.num_directions=8"]
    argv = ["--config", "launch/recipes/quickstart.yaml", "optimizer.name=zo_sgd", f"model.dtype={dtype}", *sizes]
    config = parse([*argv, *options], TABLES, DEFAULTS)
    made = plan(config)
    engine = build_engine(config, made.architecture, None, objective=made.objective, tokenizer=made.encoder.tokenizer)
    engine.answers.wide_logits = wide_logits
    batches = TrainBatches(made.splits.train, made.encoder, config.data, config.seed, gold_only=False)
    found = []
    for step in range(3):
        directions = engine.directions(step)
        losses = engine.losses(batches.at(step), directions)
        found += engine.estimator.estimate(directions, losses.values).projected_grads
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (["probe.rows=0.5", "probe.columns=0.5", "probe.name=block"], 0.9),
        (["probe={name: orthogonal}", "estimator.tau=0.1"], 0.9),
        (["adapter=null", "probe={name: orthogonal}", "estimator.tau=0.1"], 0.95),
    ],
    ids=["lora", "orthogonal, lora", "orthogonal, all weights"],
)
def test_slopes_in_bfloat16_are_those_in_float32(
    options: list[str], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along the same directions; but not with logits in 16 bits, or with the tau of directions that are longer."""
    monkeypatch.chdir(ROOT)
    exact = slopes("float32", options, wide_logits=True)

    def correlation(*changed: str, wide_logits: bool = True) -> float:
        found = slopes("bfloat16", [*options, *changed], wide_logits)
        return float(torch.corrcoef(torch.stack([exact, found]))[0, 1])

    assert correlation() > least
    if "orthogonal" in options[-2]:
        assert correlation(f"estimator.tau={1e-3 if 'adapter=null' in options else 1e-2}") < 0.7
    else:
        assert correlation(wide_logits=False) < 0.8

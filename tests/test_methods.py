"""The methods beside JAGUAR: the oracle, any layout, their company, and real runs that are replayed and moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest
import test_forward
import test_optim
import torch
from jobs import SHORT, JobServer, run_dir_of
from peft import LoraConfig, get_peft_model
from processes import ROOT
from reference_methods import Method, oracle_probe, power_iteration
from safetensors.torch import load_file
from test_optim import SHAPES, fixed_estimate, quadratic, shards_of, start_values, take_step, values_of
from test_probes import densified, slice_of
from torch import Tensor

from zoscale.assembly import check_methods
from zoscale.config import ConfigError, parse
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import ESTIMATORS, ForwardGrad, GradientEstimate, NormalizedOneSided, TwoPoint
from zoscale.forward.sequential import perturbed
from zoscale.mesh import Mesh
from zoscale.methods import DEFAULTS, TABLES
from zoscale.objectives import classification
from zoscale.optim import OPTIMIZERS, ElementwiseOptimizer, Shared, ZOSGDConservative
from zoscale.optim.newton_schulz import orthogonalize
from zoscale.optim.power_iteration import partially_orthogonalize
from zoscale.probes import PROBES, Gaussian, Layers, Piece, Rademacher
from zoscale.recovery import checkpoint
from zoscale.recovery.journal import Journal
from zoscale.recovery.replay import rebuild
from zoscale.recovery.resume import record_of, replay
from zoscale.release.export import save_trained
from zoscale.shards import ShardedParam

torch.set_num_threads(1)

# --- Against the oracle, and cut at any places. ---

SPECTRAL: dict[str, Any] = {"sign_names": ("embed*",), "sign_lr_scale": 0.1}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("zo_sgd_momentum", {"momentum": 0.7, "weight_decay": 0.1}, {"momentum": 0.7, "weight_decay": 0.1}),
    ("zo_sgd_conservative", {}, {}),
    ("zo_sign_sgd", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
    ("zo_sign_rho", {}, {}),
    ("zo_adam", {"beta1": 0.8, "beta2": 0.95, "eps": 1e-3}, {"betas": (0.8, 0.95), "eps": 1e-3}),
    ("zo_adam", {"second_moment": "max", "beta2": 0.5}, {"amsgrad": True, "betas": (0.9, 0.5)}),
    ("fzoo", {}, {}),
    ("zo_muon", {}, SPECTRAL),
    (
        "zo_muon",
        {"beta": 0.6, "scale": "spectral", "weight_decay": 0.1},
        {**SPECTRAL, "beta": 0.6, "scale": "sqrt_ratio", "weight_decay": 0.1},
    ),
    ("zo_muon", {"iteration": "power", "power_rank": 2}, {**SPECTRAL, "polynomial": "power", "power_rank": 2}),
    ("zo_muon_orthogonal", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
    ("zo_muon_orthogonal", {}, {}),
    ("zo_muon_subspace", {"iteration": "cubic"}, {**SPECTRAL, "polynomial": "cubic"}),
    ("zo_muon_subspace", {"scale": "rms"}, {**SPECTRAL, "scale": "match_rms"}),
    ("zo_muon_subspace", {"weight_decay": 0.1}, {**SPECTRAL, "weight_decay": 0.1}),
]
PROBES_OF_CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "zo_muon_orthogonal": [("orthogonal", {"rank": 2})],
    "zo_muon_subspace": [("subspace", {"rank": 3, "resample_every": 2})],
}
for own in PROBES_OF_CASES.values():  # LeZO with what they need
    own += [("layers", {"share": 0.4, "inner": {"name": name, **options}}) for name, options in own]
USUAL = [("gaussian", {}), ("block", {"rows": 0.5, "columns": 0.4}), ("layers", {"share": 0.4})]


def test_every_rule_is_checked_against_the_oracle() -> None:
    here, there = {name for name, *_ in CASES}, {make for make, *_ in test_optim.CASES}
    assert {name for name, make in OPTIMIZERS.items() if make not in there} == here


@pytest.mark.parametrize(("name", "options", "oracle_options"), CASES)
@pytest.mark.parametrize("q", [1, 3])
def test_equals_the_oracle_step_by_step(
    name: str, options: dict[str, Any], oracle_options: dict[str, Any], q: int
) -> None:
    shapes = {key: shape for key, shape in SHAPES.items() if "muon" not in name or len(shape) < 3}
    for kind, given in PROBES_OF_CASES.get(name, USUAL):
        shards = shards_of(start_values(shapes))
        optimizer = OPTIMIZERS[name](shards, lr=0.03, **options)  # type: ignore[call-arg]
        x = {key: value.numpy() for key, value in values_of(shards).items()}
        m: dict[str, Any] = {key: np.zeros_like(value) for key, value in x.items()}
        rule = Method(name, lr=0.03, **oracle_options)
        oracle = oracle_probe(kind, sorted(shapes), **given)
        for step in range(4):
            estimate = fixed_estimate(shards, step, q, PROBES[kind](**given), seed=5)
            optimizer.step(estimate)
            zs = [oracle.direction([a.shape for a in x.values()], 5, step, k) for k in range(q)]
            for i, key in enumerate(x):
                rhos = list(estimate.projected_grads)
                x[key], m[key] = rule.update(key, x[key], m[key], [z[i] for z in zs], rhos)
        for key, value in values_of(shards).items():
            np.testing.assert_allclose(value.numpy(), x[key], rtol=1e-4, atol=3e-5, err_msg=f"{kind} {key}")


GATHERING = {"zo_muon", "jaguar_muon"}  # real ranks exchange matrices in test_zero3.py


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in GATHERING])
@pytest.mark.parametrize("world_size", [2, 3])
def test_slices_take_the_steps_of_the_whole(name: str, world_size: int) -> None:
    """Bit for bit, wherever the tensors are cut; the state of a rank is as long as its slices."""
    make, values = OPTIMIZERS[name], start_values(SHAPES)
    probe = PROBES[make.goes_with.probe]()
    whole = shards_of(values)
    specs = [shard.spec for shard in whole]
    ranks = [[slice_of(spec, rank, world_size) for spec in specs] for rank in range(world_size)]
    for shards in ranks:
        for shard in shards:
            shard.truth.copy_(values[shard.spec.name].view(-1)[shard.offset : shard.offset + len(shard)])
    optimizers = [make(shards, lr=0.05, weight_decay=0.1) for shards in [whole, *ranks]]  # type: ignore[call-arg]
    for step in range(3):
        estimate = fixed_estimate(whole, step, 2, probe)
        for optimizer in optimizers:
            optimizer.step(estimate)
    for i, shard in enumerate(whole):
        assert torch.equal(torch.cat([shards[i].truth for shards in ranks]), shard.truth)
        for shards, optimizer in zip(ranks, optimizers[1:], strict=True):
            held = optimizer.state.get(shards[i].truth, {}).values()
            assert all(len(value) == len(shards[i]) for value in held if isinstance(value, Tensor))


# --- FZOO's estimator. ---


def test_fzoo_divides_by_the_standard_deviation_of_the_losses() -> None:
    losses = [1.0, 1.5, 0.75, 2.0]
    directions: Any = ["z"] * 3
    estimator = NormalizedOneSided(tau=0.5, num_directions=3)
    estimate = estimator.estimate(directions, losses)
    expected = (np.array(losses[1:]) - 1.0) / 0.5 / np.std(losses[1:], ddof=1)
    np.testing.assert_allclose(estimate.projected_grads, expected, rtol=1e-12)
    assert (estimate.loss, estimator.num_candidates) == (1.0, 4)
    scaled = estimator.estimate(directions, [10 * loss for loss in losses])
    np.testing.assert_allclose(scaled.projected_grads, expected, rtol=1e-12, err_msg="the loss's unit drops out")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_fzoo_skips_a_step_with_a_loss_that_is_not_finite(bad: float) -> None:
    directions: Any = ["z", "z", "z"]
    for losses in (
        [1.0, bad, 2.0, 2.0],
        [1.0, 2.0, 2.0, bad],
        [bad, 1.0, 2.0, 3.0],
        [bad, 2.0, 2.0, 2.0],
        [1.0, *[bad] * 3],
    ):
        assert not NormalizedOneSided(num_directions=3).estimate(directions, losses).is_finite


@pytest.mark.parametrize("losses", [[1.0, 2.0, 2.0, 2.0], [0.3, 0.1, 0.1, 0.1]])
def test_fzoo_without_a_spread_has_no_gradient(losses: list[float]) -> None:
    """The mean of three times 0.1 is not 0.1: its rounding is no spread."""
    directions: Any = ["z", "z", "z"]
    assert NormalizedOneSided(num_directions=3).estimate(directions, losses).projected_grads == (0.0,) * 3


@pytest.mark.parametrize("name", ["fzoo", "one_sided", "two_point"])
def test_equal_losses_are_a_step_without_an_update_and_not_a_skip(name: str) -> None:
    """As a loss of few values gives them, or bf16 with a small tau; its replay is the same step."""

    def constant(logprobs: Any, batch: Any) -> Any:
        total, count = classification(logprobs, batch)
        return 0.0 * total + 0.1 * count, count

    def engine() -> ZeroOrderEngine:
        optimizer = OPTIMIZERS["fzoo" if name == "fzoo" else "zo_sgd"]
        estimator = ESTIMATORS[name](num_directions=3)
        return ZeroOrderEngine(
            test_forward.tiny("opt-lora"), optimizer=optimizer, estimator=estimator, objective=constant
        )

    trained, replayed = engine(), engine()
    before = [shard.truth.clone() for shard in trained.shards]
    result = trained.step(test_forward.batches())
    assert not result.skipped and result.estimate.projected_grads == (0.0,) * 3
    assert all(torch.equal(value, shard.truth) for value, shard in zip(before, trained.shards, strict=True))
    replay(replayed, [record_of(result)])
    assert all(torch.equal(a.truth, b.truth) for a, b in zip(trained.shards, replayed.shards, strict=True))


# --- Forward gradients. ---


@pytest.mark.parametrize("kind", ["opt", "opt-lora", "llama", "gpt2"])
def test_forward_gradients_are_the_derivatives_that_backpropagation_gives(kind: Any) -> None:
    """To rounding; the loss is f(x); weights stay as they are."""
    estimator = ForwardGrad(num_directions=2)
    engine = ZeroOrderEngine(
        test_forward.tiny(kind), optimizer=OPTIMIZERS["zo_sgd"], estimator=estimator, objective=classification
    )
    before = [shard.live.clone() for shard in engine.shards]
    directions, batches = engine.directions(0), test_forward.batches()
    losses = engine.losses(batches, directions).values
    sums = [classification(engine.answers.answer_logprobs(batch), batch) for batch in batches]
    loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
    loss.backward()
    assert losses[0] == pytest.approx(float(loss), rel=1e-6)
    for direction, found in zip(directions, losses[1:], strict=True):
        expected = 0.0
        for shard, z in zip(engine.shards, densified(direction, engine.shards), strict=True):
            expected += float((shard.param.grad.view(-1).double() * z).sum())
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert all(torch.equal(a, shard.live) for a, shard in zip(before, engine.shards, strict=True))
    assert not engine.step(batches).skipped
    with pytest.raises(ValueError, match="auto or sequential for forward gradients, got fan_out"):
        ZeroOrderEngine(test_forward.tiny(kind), estimator=estimator, probe=engine.probe, forward="fan_out")


def test_forward_gradients_leave_every_parameter_in_its_place() -> None:
    """Also one that is reached by two names: trained tokens of a tied head are one module in two places."""
    model = get_peft_model(
        test_forward.tiny("opt"), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 9])
    )
    engine = ZeroOrderEngine(model, optimizer=OPTIMIZERS["zo_sgd"], estimator=ForwardGrad(num_directions=2))
    before = [(id(param), param.requires_grad) for param in model.parameters()]
    assert not engine.step(test_forward.batches()).skipped
    assert [(id(param), param.requires_grad) for param in model.parameters()] == before


# --- The conservative rule's second round. ---


def test_conservative_never_makes_the_batch_worse() -> None:
    """Each trial is the very point that its choice leads to, and the best one is taken."""
    values = start_values({"layers.0.weight": (5, 4), "norm.weight": (3,)})
    loss, _ = quadratic(values)
    shards = shards_of(values)
    groups = [{"pattern": "norm", "lr_scale": 3.0}]
    optimizer = ZOSGDConservative(shards, lr=0.12, groups=groups)
    reached, kept = loss(values), []
    for step in range(40):
        before, estimator = values_of(shards), TwoPoint(tau=2.0) if step % 2 else TwoPoint()
        _, losses = take_step(optimizer, shards, loss, Gaussian(), estimator, step)
        now = loss(values_of(shards))
        assert losses[2] == reached and now == min(losses[2:]) <= reached
        kept.append(losses[2:].index(now))
        assert (kept[-1] == 0) == all(torch.equal(value, before[name]) for name, value in values_of(shards).items())
        reached = now
    assert set(kept) >= {0, 1}


def test_conservative_takes_the_other_side_or_skips() -> None:
    (shard,) = shards_of({"w": torch.zeros(4)})
    optimizer = ZOSGDConservative([shard], lr=0.5)
    estimate = GradientEstimate((Rademacher().draw(test_optim.Noise(0), [shard.spec], 0, 0),), (2.0,), 1.0)
    stay, forward, back = optimizer.trials(estimate)
    assert stay.direction is None and forward.direction is back.direction
    with perturbed([shard], back):
        there = shard.live.clone()
    optimizer.step(optimizer.decide(estimate, [1.0, 1.0, 0.5]))
    assert torch.equal(shard.truth, there) and float(there.abs().min()) == 1.0
    assert optimizer.decide(estimate, [1.0, 1.0, 1.0]).projected_grads == (0.0,), "a tie stays"
    for losses in ([math.nan, 0.0, 0.0], [1.0, math.inf, 0.5]):
        assert not optimizer.decide(estimate, losses).is_finite


# --- Power iteration. ---


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_power_iteration_finds_the_dominant_directions(shape: tuple[int, int]) -> None:
    """Where the spectrum has a gap it is U_k V_k^T; Newton-Schulz lifts the noise below it instead."""
    matrix = test_optim.with_singular_values(shape, np.array([3.0, 2.0, 1.5, *[0.02] * (min(shape) - 3)]))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    out = partially_orthogonalize(matrix, rank=3)
    torch.testing.assert_close(out, u[:, :3] @ vt[:3], atol=1e-4, rtol=0)
    assert torch.linalg.matrix_rank(orthogonalize(matrix), rtol=0.02) == min(shape)
    for factor in (1e-20, 1e20):
        torch.testing.assert_close(partially_orthogonalize(matrix * factor, rank=3), out, atol=1e-3, rtol=0)


def test_power_iteration_makes_nothing_of_rounding() -> None:
    """A matrix of lower rank than asked gives that rank; zero gives zero."""
    one = torch.outer(torch.arange(1.0, 7.0), torch.tensor([1.0, -2.0, 0.5]))
    out = orthogonalize(one, iteration="power", power_rank=3)
    torch.testing.assert_close(out, one / torch.linalg.matrix_norm(one), atol=1e-5, rtol=0)
    assert not partially_orthogonalize(torch.zeros(4, 5), rank=2).any()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_power_iteration_takes_many_matrices_at_once(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as it is alone, whatever the size of the others, with one decomposition: on a GPU the host waits for it."""
    generator, svd, calls = torch.Generator().manual_seed(0), torch.linalg.svd, []
    many = torch.randn(5, *shape, generator=generator) * torch.tensor([1.0, 1e-20, 0.0, 1e20, 3.0]).view(-1, 1, 1)
    alone = torch.stack([partially_orthogonalize(one, rank=2) for one in many])
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **options: calls.append(1) or svd(*args, **options))
    together = orthogonalize(many, iteration="power", power_rank=2)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert len(calls) == 1 and not together[2].any()


def test_jaguar_muon_moves_by_the_dominant_directions_of_its_memory() -> None:
    """The memory itself is compared with the oracle's in test_optim.py."""
    shapes = {"wide": (5, 9), "tall": (8, 4)}
    shards = shards_of(start_values(shapes))
    optimizer = OPTIMIZERS["jaguar_muon"](shards, lr=0.03, iteration="power", power_rank=2)  # type: ignore[call-arg]
    for step in range(3):
        before = values_of(shards)
        optimizer.step(fixed_estimate(shards, step, 2, PROBES["block"](rows=0.5, columns=0.5)))
        for shard in shards:
            name, shape = shard.spec.name, shard.spec.shape
            memory = optimizer.state[shard.truth]["momentum"].view(shape).numpy()
            moved = ((before[name] - values_of(shards)[name]) / 0.03).numpy()
            np.testing.assert_allclose(moved, power_iteration(memory, 2), atol=1e-4)
            assert np.linalg.matrix_rank(moved, tol=1e-2) == 2 < np.linalg.matrix_rank(memory)


# --- Which probe and estimator a method takes. ---


def config_of(*argv: str) -> Any:
    return parse(["model.id=x", *argv], TABLES, DEFAULTS)


@pytest.mark.parametrize("name", TABLES["optimizer"])
def test_a_method_brings_its_probe_and_estimator(name: str) -> None:
    """Where none is named; what is named stands; the result reads back as the same configuration."""
    company = TABLES["optimizer"][name].goes_with
    config = config_of(f"optimizer.name={name}")
    assert (config.probe.name, config.estimator.name) == (company.probe, company.estimator)
    for section, options in company.options.items():
        assert options.items() <= getattr(config, section).args.items()
    check_methods(config)
    if "probe" not in TABLES["optimizer"][name].needs:
        assert config_of(f"optimizer.name={name}", "probe.name=row").probe.name == "row"
    assert type(config).from_dict(config.to_dict(), TABLES, DEFAULTS) == config
    assert config_of().probe.name == "block", "JAGUAR is the default"


@pytest.mark.parametrize("name", TABLES["optimizer"])
def test_every_option_of_a_method_has_a_meaning_and_no_other_is_taken(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        config_of("--help")
    _, _, text = capsys.readouterr().out.partition(f"optimizer.name={name}: ")
    text = " ".join(text.partition("optimizer.name=")[0].split())
    args = config_of(f"optimizer.name={name}").optimizer.args
    assert {"lr", "weight_decay", "groups"} <= set(args)
    for option in args:
        meaning = text.partition(f" optimizer.{option} ")[2].partition(f"default: {show_default(args[option])}")
        assert meaning[1] and len(meaning[0].partition("(type: ")[0]) > 10, option
    with pytest.raises(TypeError, match="unexpected keyword argument 'betta'"):
        TABLES["optimizer"][name](shards_of(start_values(SHAPES)), betta=0.5)


def show_default(value: Any) -> str:
    return "null" if value is None else str(value)


def test_directions_of_a_subspace_are_four_unless_another_number_is_given() -> None:
    """Of a single one only the sign of rho would be left."""
    chosen = "optimizer.name=zo_muon_subspace"
    assert config_of(chosen).estimator.args["num_directions"] == 4
    assert config_of(chosen, "estimator.name=two_point").estimator.args["num_directions"] == 4
    assert config_of(chosen, "estimator.num_directions=1").estimator.args["num_directions"] == 1
    assert "num_directions" in config_of(chosen, "estimator.name=forward_grad", "mesh.shard_size=1").estimator.args
    assert config_of("optimizer.name=zo_muon").estimator.args["num_directions"] == 1


def test_defaults_of_a_run_are_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """`launch/RESULTS.md`: blocks of a half, a linear schedule; tau with an adapter and without."""
    config = config_of()
    assert (config.probe.args["rows"], config.probe.args["columns"], config.schedule.name) == (0.5, 0.5, "linear")
    for estimator in ("two_point", "one_sided", "fzoo"):
        chosen = f"estimator.name={estimator}"
        assert config_of(chosen).estimator.args["tau"] == 1e-2
        assert config_of(chosen, "adapter.peft_type=ia3").estimator.args["tau"] == 1e-2
        assert config_of("adapter=null", chosen).estimator.args["tau"] == 1e-3
        assert config_of(chosen, "estimator.tau=0.5").estimator.args["tau"] == 0.5
    assert "tau" not in config_of("estimator.name=forward_grad", "mesh.shard_size=1").estimator.args
    with pytest.raises(SystemExit):
        config_of("--help")
    text = " ".join(capsys.readouterr().out.split())
    with_an_adapter = "units of the weights. Left out, it is 0.01 unless adapter=null. "
    orthogonal = "Left out, it is 0.1 with optimizer.name=zo_muon_orthogonal. "
    assert f"{with_an_adapter}{orthogonal}(type: float, default: 0.001)" in text
    for adapter in ((), ("adapter=null",)):
        assert config_of(*adapter, "optimizer.name=zo_muon_orthogonal").estimator.args["tau"] == 0.1
    assert "Left out, it is 4 with optimizer.name=zo_muon_subspace. (type: int, default: 1)" in text


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "fzoo"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_layers_without_a_direction_cost_no_update(name: str, weight_decay: float) -> None:
    """LeZO: a rule without a memory writes the active tensors only; with weight decay, or a memory, all."""
    needed = OPTIMIZERS[name].goes_with.probe if "probe" in OPTIMIZERS[name].needs else "gaussian"
    probe = Layers(share=0.3, inner={"name": needed})
    shards = shards_of(start_values({f"layers.{i}.{part}": (4, 3) for i in range(4) for part in "ab"}))
    optimizer = OPTIMIZERS[name](shards, lr=0.05, weight_decay=weight_decay)  # type: ignore[call-arg]
    estimate = fixed_estimate(shards, 0, 2, probe)
    versions, before = [shard.truth._version for shard in shards], values_of(shards)
    optimizer.step(estimate)
    active = [estimate.touches(shard.spec) for shard in shards]
    assert sum(active) == 2
    written = [shard.truth._version > version for shard, version in zip(shards, versions, strict=True)]
    changed = [not torch.equal(shard.truth, before[shard.spec.name].view(-1)) for shard in shards]
    is_spared = not weight_decay and name in RESTING
    assert written == (active if is_spared else [True] * len(shards))
    assert changed == ([True] * len(shards) if weight_decay else active)


TANGENTS = ["estimator.name=forward_grad", "mesh.shard_size=1"]
RESTING = {
    "zo_sgd", "zo_sgd_conservative", "zo_sign_sgd", "zo_sign_rho", "zo_muon_orthogonal", "zo_muon_subspace"
}  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["optimizer.name=zo_muon_subspace", "probe.name=gaussian"], "expected the probe subspace with ZOMuonSubspace"),
        (["optimizer.name=zo_muon_orthogonal", "probe.name=layers"], "expected the probe orthogonal"),
        (["optimizer.name=fzoo", "estimator.name=one_sided"], "expected the estimator fzoo with FZOO"),
        (["estimator.name=fzoo", "estimator.num_directions=1"], "num_directions >= 2"),
        (["estimator.name=forward_grad"], "whole model on every rank for estimator forward_grad"),
        ([*TANGENTS, "objective=accuracy"], "objective classification or lm for estimator forward_grad, got accuracy"),
        ([*TANGENTS, "forward.name=fan_out"], "forward.name auto or sequential for estimator forward_grad"),
        (["optimizer.name=zo_adam", "optimizer.beta2=1.0"], "expected beta2 in"),
        (["optimizer.name=zo_adam", "optimizer.eps=0.0"], "eps > 0"),
        (["optimizer.name=zo_sgd_momentum", "optimizer.momentum=-0.1"], "expected momentum in"),
        (["optimizer.name=zo_muon", "optimizer.power_rank=0"], "power_rank >= 1"),
        (["estimator.name=backpropagation"], "an estimator of losses with JaguarMuon, got Block and Backpropagation"),
        (["optimizer.name=zo_sgd", "probe.name=gradient"], "a probe that draws"),
        (["optimizer.name=fo_sgd", "estimator.name=two_point"], "expected the estimator backpropagation with FOSGD"),
        (["optimizer.name=fo_adamw", "probe.name=block"], "expected the probe gradient with FOAdamW, got Block"),
        (["optimizer.name=fo_adamw", "optimizer.max_grad_norm=0.0"], "finite max_grad_norm > 0"),
        (["optimizer.name=fo_adamw", "optimizer.eps=0.0"], "eps > 0"),
        (["optimizer.name=fo_adamw", "objective=f1"], "objective classification or lm with optimizer fo_adamw, got f1"),
        (["optimizer.name=fo_adamw", "mesh.shard_size=1"], "mesh.shard_size null with optimizer fo_adamw, got 1"),
        (["optimizer.name=fo_adamw", "mesh.candidates=2"], "mesh.candidates 1"),
        (["optimizer.name=fo_adamw", "forward.name=sequential"], "forward.name auto"),
        (["optimizer.name=fo_adamw", "forward.max_rows=8"], "forward.max_rows null"),
        (["optimizer.name=fo_adamw", "master=none"], "master fp32"),
        (["optimizer.name=fo_adamw", "model.dtype=float16"], "model.dtype bfloat16 or float32"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run(argv: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        check_methods(config_of(*argv))


def test_an_engine_refuses_a_probe_that_its_rule_cannot_step_along() -> None:
    """Also where it is built without a configuration."""
    with pytest.raises(ValueError, match="expected the probe orthogonal"):
        ZeroOrderEngine(test_forward.tiny("opt"), optimizer=OPTIMIZERS["zo_muon_orthogonal"], probe=Gaussian())


# --- Adding a method takes one class and one row. ---


class Halving(ElementwiseOptimizer):
    """x <- x - lr (g / 2 + weight_decay x), for the test."""

    def __init__(
        self, shards: Sequence[ShardedParam], mesh: Mesh | None = None, *, lr: float = 0.1, **shared: Unpack[Shared]
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr}, **shared)

    def direction(self, piece: Piece, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        return gradient / 2


def test_a_new_optimizer_takes_one_class_and_one_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row makes it configurable, documented and checked by the common table."""
    for table in (OPTIMIZERS, TABLES["optimizer"]):
        monkeypatch.setitem(table, "halving", Halving)
    config = config_of("optimizer.name=halving", "optimizer.lr=0.5")
    check_methods(config)
    assert config.probe.name == "gaussian"
    with pytest.raises(SystemExit):
        config_of("--help")
    assert "optimizer.name=halving: x <- x - lr (g / 2 + weight_decay x), for the test." in capsys.readouterr().out
    common = [test for name, test in vars(test_optim).items() if test_optim.every_optimizer.mark in marks(test, name)]
    plain = [test for test in common if len(marks(test)) == 1]
    assert len(common) >= 10 and len(plain) >= 5
    for test in plain:
        test(Halving)


def marks(test: Any, name: str = "test_") -> list[Any]:
    return list(getattr(test, "pytestmark", [])) if name.startswith("test_") else []


# --- Real runs on two ranks: replayed without a forward, and continued on one rank from a checkpoint. ---

RUNS: dict[str, list[str]] = {
    "zo_adam": ["optimizer.lr=1e-3", "optimizer.second_moment=max"],
    "zo_sgd_momentum": ["optimizer.lr=1e-3", "probe.name=layers", "probe.share=0.5", "probe.inner.name=rademacher"],
    "zo_sgd_conservative": ["optimizer.lr=1e-2"],
    "fzoo": ["optimizer.lr=1e-6", "estimator.num_directions=3"],
    "zo_sgd": ["optimizer.lr=1e-3", "estimator.name=forward_grad", "mesh.shard_size=1"],
    "zo_muon_subspace": ["probe.rank=2", "probe.resample_every=2", "estimator.num_directions=3"],
}
STEPS = 4


@pytest.fixture(scope="module")
def runs(server: JobServer) -> dict[str, Path]:
    recipe = (ROOT / "launch/recipes/quickstart.yaml").read_text().splitlines()
    own = server.folder / "own.yaml"  # without the methods, which each run chooses
    own.write_text("\n".join(line for line in recipe if not line.startswith(("probe:", "estimator:", "optimizer:"))))
    short = [str(own) if word.endswith("quickstart.yaml") else word for word in SHORT]
    length = [f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=3"]
    found: dict[str, Path] = {}
    for name, options in RUNS.items():
        out = server.folder / name
        tau = [] if "estimator.name=forward_grad" in options else ["estimator.tau=1e-2"]
        server.run(2, *short, f"optimizer.name={name}", *tau, *options, *length, f"output_dir={out}")
        found[name] = run_dir_of(out) or out
    return found


@pytest.mark.parametrize("name", RUNS)
def test_journal_and_checkpoint_lead_to_the_weights_of_the_run(
    name: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Pitfall 17: all of it from the journal; half of it from the checkpoint of two ranks, state included, on one."""
    run = runs[name]
    journal = Journal.read(run / "journal.bin")
    (path,) = (run / "adapter").glob("*.safetensors")
    expected = load_file(path)
    for start in (0, 2):
        engine = rebuild(journal.header)
        if start:
            checkpoint.load(engine, run / f"checkpoints/step_{start:08d}", journal.header.config_hash)
        assert engine.num_steps == start
        replay(engine, journal.records[start:])
        save_trained(engine, tmp_path / str(start))
        weights = load_file(tmp_path / str(start) / path.name)
        for key, value in expected.items():
            if engine.optimizer.is_elementwise and engine.probe.is_elementwise:
                assert torch.equal(weights[key], value), key
            else:
                torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=0)
    assert len(journal.records) == STEPS and not any(record.skipped for record in journal.records)
    assert all(len(record.losses) == engine.num_losses for record in journal.records)
    if name == "zo_sgd_conservative":
        signs = [best_sign(record.losses[2:]) for record in journal.records]
        rhos = [(a - b) / (2 * engine.estimator.tau) for a, b, *_ in (record.losses for record in journal.records)]
        assert [record.projected_grads for record in journal.records] == [
            (sign * rho,) for sign, rho in zip(signs, rhos, strict=True)
        ]


def best_sign(trials: Sequence[float]) -> float:
    return (0.0, 1.0, -1.0)[trials.index(min(trials))]

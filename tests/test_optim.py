"""Update rules: one table of checks for every optimizer, then each against the oracle and the published algorithms."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import pytest
import reference as ref
import torch
from torch import Tensor, nn

from zoscale.config.sections import Master
from zoscale.estimators import ESTIMATORS, Estimator, GradientEstimate, OneSided, TwoPoint
from zoscale.forward.sequential import perturbed
from zoscale.mesh import Mesh
from zoscale.noise.generator import Noise
from zoscale.noise.segments import Segment
from zoscale.optim import (
    FZOO,
    OPTIMIZERS,
    ZOSGD,
    JaguarMuon,
    JaguarSignSGD,
    Shared,
    ZeroOrderOptimizer,
    ZOMuon,
    ZOMuonOrthogonal,
    ZOMuonSubspace,
    ZOSGDMomentum,
    ZOSignRho,
    base,
    jaguar,
    orthogonalize,
)
from zoscale.optim.first_order import FIRST_ORDER
from zoscale.optim.newton_schulz import update_scale
from zoscale.optim.owners import deal
from zoscale.probes import (
    PROBES,
    Block,
    Coordinate,
    Direction,
    Entry,
    Gaussian,
    Piece,
    Probe,
    Rademacher,
    Row,
    Tensors,
    pieces,
)
from zoscale.shards import CHUNK, ShardedParam, TensorSpec, shard_parameters

torch.set_num_threads(1)

Shapes = Mapping[str, tuple[int, ...]]
SHAPES: Shapes = {
    "embed_tokens.weight": (10, 6),
    "layers.0.bias": (5,),
    "layers.0.weight": (5, 6),
    "layers.1.lora_A.default.weight": (1, 6),
    "layers.1.weight": (7, 4),
    "layers.2.conv": (3, 2, 4),
    "layers.2.fc.ia3_l.default": (1, 5),
    "layers.2.v_proj.ia3_l.default": (4, 1),
    "norm.weight": (6,),
}
VECTORS = {"layers.0.bias", "layers.2.fc.ia3_l.default", "layers.2.v_proj.ia3_l.default", "norm.weight"}
"""Of these: what no rule decays or orthogonalises. IA3's scales are; LoRA's matrices of rank 1 are not."""


LR: dict[type[ZeroOrderOptimizer], float] = {
    ZOSGDMomentum: 0.02,
    ZOSignRho: 0.4,
    ZOMuonOrthogonal: 0.8,
    FZOO: 2e-4,
    ZOMuon: 0.2,
    ZOMuonSubspace: 0.2,
}
"""Of the convergence test, where 0.1 does not fit the rule's units."""


def probe_for(make: type[ZeroOrderOptimizer], otherwise: Probe | None = None) -> Probe | None:
    """The probe that a rule needs, or another."""
    return PROBES[make.goes_with.probe]() if "probe" in make.needs else otherwise


class Momentum(ZeroOrderOptimizer):
    """v <- mu v + g; x <- x - lr (v + weight_decay x): what a user adds, in one class."""

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None = None,
        *,
        lr: float = 1e-2,
        mu: float = 0.5,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr, "mu": mu}, **shared)

    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        for batch in pieces(shards):
            for piece, gradient in zip(batch, estimate.mean(batch), strict=True):
                state = self.state[piece.shard.truth]
                if not state:
                    state["velocity"] = torch.zeros_like(piece.shard.truth, dtype=torch.float32)
                velocity = state["velocity"][piece.start : piece.stop]
                self.descend(piece, velocity.mul_(group["mu"]).add_(gradient), group)


ALL: dict[str, type[ZeroOrderOptimizer]] = {**OPTIMIZERS, "momentum, defined in this test": Momentum}
every_optimizer = pytest.mark.parametrize("make", ALL.values(), ids=list(ALL))
every_precision = pytest.mark.parametrize(
    ("dtype", "master"),
    [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "none")],
    ids=["fp32", "bf16", "bf16-no-master"],
)


def start_values(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())}


class Bag(nn.Module):
    """Parameters under dotted names."""

    def __init__(self, values: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, value in values.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, nn.Parameter(value.to(dtype, copy=True)))


def shards_of(
    values: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32, master: Master = "fp32"
) -> list[ShardedParam]:
    return shard_parameters(Bag(values, dtype), master=master)


def values_of(shards: Sequence[ShardedParam]) -> dict[str, torch.Tensor]:
    return {shard.spec.name: shard.truth.detach().clone().view(shard.spec.shape) for shard in shards}


def fixed_estimate(
    shards: Sequence[ShardedParam], step: int, q: int = 2, probe: Probe | None = None, seed: int = 0
) -> GradientEstimate:
    """Directions of a step with projected gradients that depend on nothing but the step."""
    probe, specs = probe or Block(rows=0.5, columns=0.7), [shard.spec for shard in shards]
    directions = tuple(probe.draw(Noise(seed), specs, step, k) for k in range(q))
    return GradientEstimate(directions, tuple(float(np.cos(5.0 * step + 2.0 * k) + 0.1) for k in range(q)), 1.0)


def quadratic(values: Mapping[str, torch.Tensor]) -> tuple[Callable[[Mapping[str, torch.Tensor]], float], float]:
    """0.5 sum of curvature (x - target)^2 in float64, and its value at `values`."""
    generator = torch.Generator().manual_seed(99)
    target = {n: v + torch.randn(v.shape, generator=generator).double() for n, v in values.items()}
    curvature = {n: 0.5 + torch.rand(v.shape, generator=generator).double() for n, v in values.items()}

    def loss(x: Mapping[str, torch.Tensor]) -> float:
        return sum(float((0.5 * curvature[n] * (x[n].double() - target[n]) ** 2).sum()) for n in target)

    return loss, loss(values)


def take_step(
    optimizer: ZeroOrderOptimizer,
    shards: Sequence[ShardedParam],
    loss: Callable[[Mapping[str, torch.Tensor]], float],
    probe: Probe,
    estimator: Estimator,
    step: int,
    seed: int = 0,
) -> tuple[list[Direction], list[float]]:
    """What the engine does, on plain tensors: losses are read from the live slices."""
    specs = [shard.spec for shard in shards]
    directions = [probe.draw(Noise(seed), specs, step, k) for k in range(estimator.num_directions)]
    losses = []
    for candidate in estimator.candidates(directions):
        with perturbed(shards, candidate):
            losses.append(loss({s.spec.name: s.live.float().view(s.spec.shape) for s in shards}))
    estimate = estimator.estimate(directions, losses)
    tried = []
    for candidate in optimizer.trials(estimate):
        with perturbed(shards, candidate):
            tried.append(loss({s.spec.name: s.live.float().view(s.spec.shape) for s in shards}))
    optimizer.step(optimizer.decide(estimate, tried))
    return directions, losses + tried


# --- The table: everything below holds for every optimizer, one that is added included. ---


@every_optimizer
def test_converges_on_a_quadratic(make: Any) -> None:
    values = start_values({"layers.0.weight": (5, 4), "layers.1.weight": (3, 6), "layers.1.bias": (3,)})
    loss, first = quadratic(values)
    shards = shards_of(values)
    optimizer = make(shards, lr=LR.get(make, 0.1))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 60)
    estimator = ESTIMATORS[make.goes_with.estimator] if "estimator" in make.needs else TwoPoint
    for step in range(60):
        take_step(optimizer, shards, loss, probe_for(make, Rademacher()), estimator(num_directions=4), step)
        schedule.step()
    assert loss(values_of(shards)) < 0.25 * first


@every_optimizer
@every_precision
def test_dtypes(make: Any, dtype: torch.dtype, master: Master) -> None:
    """State is float32 whatever the weights are; the weights keep their dtype; the live slice follows the truth."""
    shards = shards_of(start_values(SHAPES), dtype, master)
    before = values_of(shards)
    optimizer = make(shards, lr=0.1)
    for step in range(2):
        optimizer.step(fixed_estimate(shards, step, probe=probe_for(make)))
    state = [value for param in optimizer.state.values() for value in param.values() if isinstance(value, torch.Tensor)]
    assert all(value.dtype == torch.float32 for value in state)
    for shard in shards:
        assert shard.live.dtype == dtype
        assert shard.truth.dtype == (torch.float32 if master == "fp32" else dtype)
        assert torch.equal(shard.live, shard.truth.to(dtype))
        assert not torch.equal(shard.truth.view(shard.spec.shape), before[shard.spec.name])


@every_optimizer
def test_parameters_change_exactly_once_per_step(make: Any) -> None:
    """Pitfall 13: each truth slice is written once per step, in one torch step."""
    shards = shards_of(start_values(SHAPES))
    optimizer = make(shards, lr=0.1)
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *args: steps.append(1))
    for step in range(3):
        versions = [shard.truth._version for shard in shards]
        optimizer.step(fixed_estimate(shards, step, probe=probe_for(make, Rademacher())))
        assert [shard.truth._version - v for shard, v in zip(shards, versions, strict=True)] == [1] * len(shards)
    assert len(steps) == 3


@every_optimizer
@every_precision
def test_state_dict_round_trip(make: Any, dtype: torch.dtype, master: Master) -> None:
    """Pitfall 17: saved after 3 steps and loaded into a fresh optimizer, the run goes on with the same bits."""
    shards = shards_of(start_values(SHAPES), dtype, master)
    optimizer = make(shards, lr=0.03)
    for step in range(3):
        optimizer.step(fixed_estimate(shards, step, probe=probe_for(make)))
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), values_of(shards)), file)
    file.seek(0)
    saved, values = torch.load(file, weights_only=True)
    kept = copy.deepcopy(saved)
    other = shards_of(start_values(SHAPES, seed=1), dtype, master)
    resumed = make(other, lr=7.0)
    for shard in other:
        shard.truth.copy_(values[shard.spec.name].view(-1))
        shard.publish()
    resumed.load_state_dict(saved)
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]
    for step in range(3, 6):
        optimizer.step(fixed_estimate(shards, step, probe=probe_for(make)))
        resumed.step(fixed_estimate(other, step, probe=probe_for(make)))
    for a, b in zip(shards, other, strict=True):
        assert torch.equal(a.truth, b.truth) and torch.equal(a.live, b.live)
        for name, value in optimizer.state[a.truth].items():
            again = torch.as_tensor(resumed.state[b.truth][name])
            assert torch.equal(again, torch.as_tensor(value)) and again.dtype == torch.as_tensor(value).dtype
    for index, state in kept["state"].items():
        for name, value in state.items():
            held = torch.as_tensor(saved["state"][index][name])
            assert torch.equal(held, torch.as_tensor(value)), "the loaded state is a copy"


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1 + t)),
    "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.25, 3),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
}
FACTORS: dict[str, Callable[[int], float]] = {
    "lambda": lambda t: 1.0 / (1 + t),
    "linear": lambda t: 1.0 - 0.75 * min(t, 3) / 3,
    "cosine": lambda t: (1 + np.cos(np.pi * t / 8)) / 2,
}


@every_optimizer
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_lr_of_a_step_is_the_schedules(make: Any, name: str) -> None:
    """Pitfall 12: stock schedulers drive it; the move of step t is lr(t) / lr times that of a constant lr."""
    values = start_values(SHAPES)
    constant, scheduled = shards_of(values), shards_of(values)
    plain, driven = make(constant, lr=0.5), make(scheduled, lr=0.5)
    schedule = SCHEDULES[name](driven)
    for step in range(5):
        before = values_of(constant), values_of(scheduled)
        assert [g["lr"] / p["lr"] for g, p in zip(driven.param_groups, plain.param_groups, strict=True)] == (
            pytest.approx([FACTORS[name](step)] * len(plain.param_groups))
        )
        plain.step(fixed_estimate(constant, step, probe=probe_for(make)))
        driven.step(fixed_estimate(scheduled, step, probe=probe_for(make)))
        schedule.step()
        after = values_of(constant), values_of(scheduled)
        for tensor in values:
            move = after[0][tensor] - before[0][tensor]
            torch.testing.assert_close(
                after[1][tensor] - before[1][tensor], FACTORS[name](step) * move, rtol=1e-4, atol=2e-6
            )


@every_optimizer
def test_weight_decay_is_decoupled(make: Any) -> None:
    """x <- x - lr (u + weight_decay x) of matrices, where u and the state do not see the decay; vectors have none."""
    values = start_values(SHAPES)
    sign = getattr(make(shards_of(values)), "_sign_lr_scale", 1.0)
    lrs = {name: 0.1 * (sign if name in ("embed_tokens.weight", "layers.2.conv") else 1.0) for name in SHAPES}
    plain, decayed = shards_of(values), shards_of(values)
    a, b = make(plain, lr=0.1), make(decayed, lr=0.1, weight_decay=0.3)
    for step in range(3):
        before = values_of(plain), values_of(decayed)
        a.step(fixed_estimate(plain, step, probe=probe_for(make)))
        b.step(fixed_estimate(decayed, step, probe=probe_for(make)))
        after = values_of(plain), values_of(decayed)
        for name in values:
            decay = 0.0 if name in VECTORS else 0.3
            move = after[0][name] - before[0][name] - lrs[name] * decay * before[1][name]
            torch.testing.assert_close(after[1][name] - before[1][name], move, rtol=1e-5, atol=1e-6)
    for one, other in zip(plain, decayed, strict=True):
        for name, value in a.state[one.truth].items():
            assert torch.equal(torch.as_tensor(b.state[other.truth][name]), torch.as_tensor(value))


@pytest.mark.parametrize("make", FIRST_ORDER.values(), ids=list(FIRST_ORDER))
def test_first_order_rules_decay_the_same_tensors(make: Any) -> None:
    """Their steps are compared with torch's in test_zero3.py."""
    groups = make(shards_of(start_values(SHAPES)), weight_decay=0.3).param_groups
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decays == {name: 0.0 if name in VECTORS else 0.3 for name in SHAPES}


@every_optimizer
def test_zero_lr_moves_nothing(make: Any) -> None:
    shards = shards_of(start_values(SHAPES))
    before = values_of(shards)
    make(shards, lr=0.0, weight_decay=0.5).step(fixed_estimate(shards, 0, probe=probe_for(make)))
    assert all(torch.equal(value, before[name]) for name, value in values_of(shards).items())


@every_optimizer
def test_large_and_sharded_slices_take_the_same_step(make: Any) -> None:
    """Cut at other places, in chunks or in one piece, the elementwise state and step are the same."""
    shape = {"layers.0.bias": (CHUNK + 77,)}  # a vector: elementwise in every rule
    values = start_values(shape)
    (large,) = shards_of(values)
    make([large], lr=0.1).step(fixed_estimate([large], 0, q=1, probe=probe_for(make, Rademacher())))
    for first in (0, CHUNK - 5):
        param: Any = nn.Parameter(torch.empty(0))
        param.ds_tensor = values["layers.0.bias"][first : first + 40].clone()
        param.ds_zero_partition_rank = 1
        part = ShardedParam(param, large.spec)
        part.offset = first
        make([part], lr=0.1).step(fixed_estimate([part], 0, q=1, probe=probe_for(make, Rademacher())))
        assert torch.equal(part.truth, large.truth[first : first + 40])


@pytest.mark.parametrize("master", ["fp32", "none", "stochastic"])
def test_small_matrices_together_take_the_step_of_each(master: Master, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two types, one of them too large to be small, some cut off by the limit of a chunk."""

    def stepped() -> list[Tensor]:
        values = start_values({f"layers.{number}.weight": (number + 3, 40) for number in range(9)})
        bag = Bag(values)
        for number in range(0, 9, 2):
            bag.layers.get_submodule(str(number)).bfloat16()
        shards = shard_parameters(bag, master=master)
        optimizer = JaguarMuon(shards, lr=0.1, weight_decay=0.1, scale="rms")
        for step in range(2):
            optimizer.step(fixed_estimate(shards, step, q=2, probe=Gaussian()))
        return [*(shard.truth for shard in shards), *(shard.live for shard in shards)]

    monkeypatch.setattr(base, "chunk", lambda _: 1000)
    monkeypatch.setattr(base, "_SMALL", 2.2)  # smaller than 454 elements
    seen: list[list[int]] = []
    together = base._together
    monkeypatch.setattr(base, "_together", lambda batch: seen.extend(found := list(together(batch))) or found)
    some = stepped()
    assert {len(numbers) for numbers in seen} >= {1, 2, 3}
    monkeypatch.setattr(base, "_SMALL", 1e9)
    for one, other in zip(some, stepped(), strict=True):
        assert torch.equal(one, other)


@every_optimizer
def test_groups_first_match_wins_and_every_tensor_is_in_exactly_one(make: Any) -> None:
    shards = shards_of(start_values(SHAPES))
    groups = [
        {"pattern": r"layers\.1\.", "lr": 3.0},
        {"pattern": r"layers", "max_ndim": 1, "lr": 4.0},
        {"pattern": r"layers", "lr_scale": 10.0, "lr": 5.0},
        {"max_ndim": 1, "lr_scale": 0.5, "weight_decay": 0.25},
    ]
    optimizer = make(shards, lr=2.0, groups=groups)
    shard_of = {id(shard.truth): shard.spec.name for shard in shards}
    names = [shard_of[id(param)] for group in optimizer.param_groups for param in group["params"]]
    assert sorted(names) == sorted(SHAPES)
    lrs = {shard_of[id(param)]: g["lr"] for g in optimizer.param_groups for param in g["params"]}
    sign = getattr(make(shards), "_sign_lr_scale", 1.0)
    assert lrs == {
        "embed_tokens.weight": 2.0 * sign,
        "layers.0.bias": 4.0 * sign,
        "layers.0.weight": 50.0,
        "layers.1.lora_A.default.weight": 3.0,
        "layers.1.weight": 3.0,
        "layers.2.conv": 50.0,
        "layers.2.fc.ia3_l.default": 50.0,
        "layers.2.v_proj.ia3_l.default": 50.0,
        "norm.weight": 1.0,
    }
    decays = {shard_of[id(param)]: g["weight_decay"] for g in optimizer.param_groups for param in g["params"]}
    assert decays == {name: 0.25 if name == "norm.weight" else 0.0 for name in SHAPES}


@every_optimizer
def test_groups_change_only_their_tensors(make: Any) -> None:
    values = start_values(SHAPES)
    plain, grouped = shards_of(values), shards_of(values)
    make(plain, lr=0.1).step(fixed_estimate(plain, 0, probe=probe_for(make)))
    make(grouped, lr=0.1, groups=[{"pattern": "conv|norm", "lr": 0.0}]).step(
        fixed_estimate(grouped, 0, probe=probe_for(make))
    )
    for name, value in values_of(grouped).items():
        assert torch.equal(value, values[name] if name in ("layers.2.conv", "norm.weight") else values_of(plain)[name])


@every_optimizer
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "expected lr >= 0"),
        ({"weight_decay": -0.1}, "weight_decay >= 0"),
        ({"groups": [{"pattern": "x", "learning_rate": 1.0}]}, "learning_rate"),
        ({"groups": [{"pattern": "(", "lr": 1.0}]}, "regular expression"),
        ({"groups": [{"pattern": 5}]}, "expected text for pattern in optimizer.groups, got 5"),
        ({"groups": [{"max_ndim": "1"}]}, "expected a number for max_ndim in optimizer.groups, got '1'"),
        ({"groups": [{"max_ndim": 1.5}]}, "expected a whole max_ndim >= 0 in optimizer.groups, got 1.5"),
        ({"groups": [{"max_ndim": -1}]}, "expected a whole max_ndim >= 0"),
        ({"groups": [{"lr_scale": "2"}]}, "expected a number for lr_scale"),
        ({"groups": [{"weight_decay": None}]}, "expected a number for weight_decay"),
    ],
)
def test_refused_options(make: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(shards_of(start_values(SHAPES)), **options)


@every_optimizer
@pytest.mark.parametrize("options", [{"lr": -1.0}, {"weight_decay": -0.1}])
def test_refused_options_of_groups(make: Any, options: dict[str, Any]) -> None:
    """What is refused for all tensors is refused for a group of them."""
    with pytest.raises(ValueError, match="lr >= 0"):
        make(shards_of(start_values(SHAPES)), groups=[options])


# --- Each rule against the oracle. ---

CASES: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (ZOSGD, {"lr": 0.03}, {"name": "zo_sgd"}),
    (ZOSGD, {"lr": 0.03, "weight_decay": 0.1}, {"name": "zo_sgd"}),
    (JaguarSignSGD, {"lr": 0.03}, {"name": "jaguar_sign_sgd"}),
    (JaguarSignSGD, {"lr": 0.03, "beta": 0.37, "weight_decay": 0.1}, {"name": "jaguar_sign_sgd"}),
    (JaguarSignSGD, {"lr": 0.03, "beta": 0.0}, {"name": "jaguar_sign_sgd"}),
    (JaguarMuon, {"lr": 0.03}, {"name": "jaguar_muon", "sign_names": ("embed*", "*conv*"), "sign_lr_scale": 0.1}),
    (
        JaguarMuon,
        {"lr": 0.03, "beta": 0.5, "weight_decay": 0.1, "scale": "spectral", "sign_lr_scale": 0.5},
        {"name": "jaguar_muon", "sign_names": ("embed*", "*conv*"), "sign_lr_scale": 0.5, "scale": "sqrt_ratio"},
    ),
    (
        JaguarMuon,
        {"lr": 0.03, "scale": "rms", "iteration": "cubic", "sign_lr_scale": 1.0},
        {"name": "jaguar_muon", "sign_names": ("embed*", "*conv*"), "scale": "match_rms", "polynomial": "cubic"},
    ),
]
ORACLE_PROBES = [
    (Gaussian(), ref.Probe("gaussian")),
    (Block(rows=0.5, columns=0.4), ref.Probe("block", rows=0.5, cols=0.4)),
    (Row(signs="ones"), ref.Probe("row", signs="ones")),
    (Tensors(share=0.5), ref.Probe("tensors", fraction=0.5)),
]


@pytest.mark.parametrize(("make", "options", "oracle_options"), CASES)
@pytest.mark.parametrize("q", [1, 3])
def test_equals_the_oracle_step_by_step(
    make: Any, options: dict[str, Any], oracle_options: dict[str, Any], q: int
) -> None:
    """JAGUAR SignSGD is the same bits wherever z is; ZO-SGD and Muon agree to 1e-5."""
    shared = {key: value for key, value in options.items() if key in ("lr", "beta", "weight_decay")}
    oracle = ref.Optimizer(**shared, **oracle_options)
    for probe, oracle_probe in ORACLE_PROBES:
        exact = make is JaguarSignSGD and not isinstance(probe, Gaussian)
        shards = shards_of(start_values(SHAPES))
        optimizer = make(shards, **options)
        x = {name: value.numpy() for name, value in values_of(shards).items()}
        m = {name: np.zeros_like(value) for name, value in x.items()}
        for step in range(4):
            estimate = fixed_estimate(shards, step, q, probe, seed=5)
            zs = [oracle_probe.direction([x[name].shape for name in x], 5, step, k) for k in range(q)]
            optimizer.step(estimate)
            for i, name in enumerate(x):
                rhos = list(estimate.projected_grads)
                x[name], m[name] = oracle.update(name, x[name], m[name], [z[i] for z in zs], rhos)
        for shard in shards:
            name, truth = shard.spec.name, shard.truth.view(shard.spec.shape).numpy()
            momentum = optimizer.state[shard.truth].get("momentum")
            if exact:
                assert np.array_equal(truth, x[name]), name
                assert momentum is not None and np.array_equal(momentum.view(shard.spec.shape).numpy(), m[name])
            else:
                np.testing.assert_allclose(truth, x[name], rtol=1e-5, atol=1e-5)
                if momentum is not None:
                    np.testing.assert_allclose(momentum.view(shard.spec.shape).numpy(), m[name], rtol=1e-6, atol=1e-6)


def test_memory_keeps_every_visited_block() -> None:
    """Pitfall 11: after two steps the memory holds both blocks, the first one's decayed only where seen again."""
    (shard,) = shards_of(start_values({"w": (20, 20)}))
    for make in (JaguarSignSGD, JaguarMuon):
        optimizer = make([shard], beta=0.9, lr=1e-3)
        visited, remembered = [], []
        for step in range(2):
            estimate = fixed_estimate([shard], step, q=1, probe=Block(rows=0.2, columns=0.2))
            (group,) = pieces([shard])
            ((_, visits),) = estimate.totals(group)
            optimizer.step(estimate)
            visited.append(visits > 0)
            remembered.append(optimizer.state[shard.truth]["momentum"].clone())
        first_only = visited[0] & ~visited[1]
        assert int(first_only.sum()) > 0 and int((visited[1] & ~visited[0]).sum()) > 0
        assert torch.equal(remembered[1] != 0, visited[0] | visited[1])
        assert torch.equal(remembered[1][first_only], remembered[0][first_only])


def test_every_remembered_coordinate_moves_and_no_other() -> None:
    """Sign of the whole memory, not of the newest block; sign(0) = 0."""
    (shard,) = shards_of(start_values({"w": (20, 20)}))
    optimizer = JaguarSignSGD([shard], lr=0.5)
    optimizer.step(fixed_estimate([shard], 0, q=1, probe=Block(rows=0.2, columns=0.2)))
    before = shard.truth.clone()
    optimizer.step(fixed_estimate([shard], 1, q=1, probe=Block(rows=0.2, columns=0.2)))
    memory = optimizer.state[shard.truth]["momentum"]
    assert torch.equal(shard.truth, before - 0.5 * memory.sign()) and 16 < int((memory != 0).sum()) <= 32


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_published_algorithms(beta: float) -> None:
    """arXiv 2506.04430: Algorithm 1 is coordinate + SignSGD, Algorithm 2 is entry + Muon; beta 0 is 2409.10442's."""
    matrices = start_values({"a.weight": (4, 3), "c.weight": (2, 3)})
    everything = start_values({"a.weight": (4, 3), "b.bias": (3,), "c.weight": (2, 3)})
    for make, probe, values in [
        (JaguarSignSGD, Coordinate(signs="ones"), everything),
        (JaguarSignSGD, Coordinate(), everything),
        (JaguarMuon, Entry(signs="ones"), matrices),
    ]:
        shards = shards_of(values)
        loss, _ = quadratic(values)
        optimizer = make(shards, lr=0.005, beta=beta)
        drawn: list[list[int]] = []
        for step in range(25):
            (z,), _ = take_step(optimizer, shards, loss, probe, TwoPoint(tau=0.01), step)
            (group,) = pieces(shards)
            hit: list[int] = []
            base = 0
            for piece, segment in zip(group, z.segments(group), strict=True):
                if segment is not None:
                    dense = torch.zeros(piece.stop - piece.start)
                    segment.add_to(dense, 1.0)
                    hit += [(base if make is JaguarSignSGD else 0) + int(i) for i in dense.nonzero()[:, 0]]
                base += len(piece.shard)
            drawn.append(hit)
        names = list(values)
        start = [value.numpy() for value in values.values()]
        published = ref.Published(
            lambda x, names=names, loss=loss: loss({n: torch.from_numpy(a) for n, a in zip(names, x, strict=True)}),
            start, lr=0.005, tau=0.01,
        )  # fmt: skip
        if make is JaguarSignSGD:
            coordinates = [hit[0] for hit in drawn]
            ends = [published.algorithm1(coordinates, beta)]
            if beta == 0:
                ends.append(published.jaguar_d_sign(coordinates))
        else:
            ends = [published.algorithm2(drawn, beta)]
        for x, memory in ends:
            for shard, a, m in zip(shards, x, memory, strict=True):
                momentum = optimizer.state[shard.truth]["momentum"].view(shard.spec.shape)
                np.testing.assert_allclose(momentum.numpy(), m, rtol=1e-3, atol=2e-4)
                np.testing.assert_allclose(shard.truth.view(shard.spec.shape).numpy(), a, atol=1e-4)


def test_one_sided_and_two_sided_runs_follow_the_dense_trainer() -> None:
    values = start_values(SHAPES)
    loss, _ = quadratic(values)
    for name, estimator in [("two_point", TwoPoint(tau=0.01, num_directions=2)), ("one_sided", OneSided(tau=0.01))]:
        shards = shards_of(values)
        optimizer = JaguarSignSGD(shards, lr=0.01)
        oracle = ref.DenseTrainer(
            dict(values), loss, ref.Optimizer("jaguar_sign_sgd", lr=0.01), ref.Probe("block", rows=0.5, cols=0.5),
            tau=0.01, num_directions=estimator.num_directions, estimator=name,
        )  # fmt: skip
        for step in range(4):
            _, losses = take_step(optimizer, shards, loss, Block(rows=0.5, columns=0.5), estimator, step)
            assert losses == oracle.step(step)[0]
        assert all(torch.equal(value, oracle.params[tensor]) for tensor, value in values_of(shards).items())


class Ones(Direction):
    """z = 1 everywhere."""

    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        return [Segment(torch.ones(piece.stop - piece.start)) for piece in group]


def test_thousand_small_steps_in_bf16_move_the_weights_by_their_sum() -> None:
    """Pitfall 8: with the fp32 master nothing is lost; without it every one of these steps is."""
    moved = {}
    masters: tuple[Master, Master] = ("fp32", "none")
    for master in masters:
        (shard,) = shards_of({"w": torch.ones(4, 4)}, torch.bfloat16, master)
        optimizer = JaguarSignSGD([shard], lr=2e-5)
        estimate = GradientEstimate((Ones(),), (-1.0,), 0.0)
        for _ in range(1000):
            optimizer.step(estimate)
        moved[master] = shard.live.float() - 1
        if master == "fp32":
            torch.testing.assert_close(shard.truth, torch.full((16,), 1.02), rtol=0, atol=1e-4)
            torch.testing.assert_close(moved[master], torch.full((16,), 0.02), rtol=0, atol=0.004)
    assert not moved["none"].any(), "the case is one where 16 bits lose every step"


@pytest.mark.parametrize("make", [JaguarSignSGD, JaguarMuon])
@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, float("nan")])
def test_refused_betas(make: Any, beta: float) -> None:
    shards = shards_of(start_values(SHAPES))
    with pytest.raises(ValueError, match=r"expected beta in \[0, 1\), got"):
        make(shards, beta=beta)


@pytest.mark.parametrize("make", [JaguarSignSGD, JaguarMuon])
def test_refused_betas_of_groups(make: Any) -> None:
    with pytest.raises(ValueError, match=r"expected beta in \[0, 1\), got"):
        make(shards_of(start_values(SHAPES)), groups=[{"beta": 1.5}])


@pytest.mark.parametrize("rank", [0, 1.5, 2.0])
def test_refused_power_ranks(rank: Any) -> None:
    with pytest.raises(ValueError, match="expected a whole power_rank >= 1"):
        JaguarMuon(shards_of(start_values(SHAPES)), groups=[{"power_rank": rank}])


@pytest.mark.parametrize("option", [{"scale": "sqrt"}, {"iteration": "quintc"}, {"precision": "bf16"}])
def test_unknown_scales_iterations_and_precisions_are_refused(option: dict[str, Any]) -> None:
    """A misspelt name must not become another algorithm (`none`, cubic)."""
    shards = shards_of(start_values(SHAPES))
    with pytest.raises(ValueError, match=next(iter(option.values()))):
        JaguarMuon(shards, groups=[option]).step(fixed_estimate(shards, 0))


# --- Which tensors are orthogonalised. ---

NEVER = [
    "model.decoder.embed_tokens.weight",
    "model.decoder.embed_positions.weight",
    "lm_head.weight",
    "model.lm_head.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "base_model.model.lm_head.lora_A.default.weight",
    "base_model.model.model.embed_tokens.lora_embedding_A.default",
    "bert.embeddings.word_embeddings.weight",
    "embed_out.weight",
    "score.weight",
    "model.layers.0.norm.weight",
    "model.layers.0.fc1.bias",
    "base_model.model.model.decoder.layers.0.self_attn.k_proj.ia3_l.default",
    "base_model.model.model.decoder.layers.0.fc2.ia3_l.default",
]
ALWAYS = [
    "model.decoder.layers.0.self_attn.q_proj.weight",
    "transformer.h.0.attn.c_attn.weight",
    "model.layers.1.mlp.up_proj.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
    "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight",
    "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight",
    "model.layers.0.headroom.weight",
]


def test_embeddings_head_and_vectors_never_reach_newton_schulz(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, name in enumerate(NEVER):
        thin = {"fc2.ia3_l": (1, 20 + i), "k_proj.ia3_l": (20 + i, 1), "bias": (20 + i,), "norm": (20 + i,)}
        shapes[name] = next((shape for part, shape in thin.items() if part in name), (20 + i, 3))
    for i, name in enumerate(ALWAYS):
        thin = {"layers.1.self_attn.q_proj.lora_A": (1, 50 + i), "layers.1.self_attn.q_proj.lora_B": (50 + i, 1)}
        shapes[name] = next((shape for part, shape in thin.items() if part in name), (50 + i, 4))
    stacked = "model.layers.0.experts.weight"  # matrices of several experts in one tensor: not one matrix
    shapes[stacked] = (60, 2, 3)
    seen: list[tuple[int, ...]] = []

    def recorded(matrix: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(tuple(matrix.shape))
        return orthogonalize(matrix, **options)

    monkeypatch.setattr(jaguar, "orthogonalize", recorded)
    values = start_values(shapes)
    shards = [
        ShardedParam(nn.Parameter(values[name].clone()), TensorSpec(i, name, shapes[name]))
        for i, name in enumerate(sorted(shapes))
    ]
    optimizer = JaguarMuon(shards, lr=0.5, sign_lr_scale=0.5)
    optimizer.step(fixed_estimate(shards, 0, probe=Rademacher()))
    assert sorted(seen) == sorted((1, *shapes[name]) for name in ALWAYS)
    for shard in shards:
        if shard.spec.name in (*NEVER, stacked):
            memory = optimizer.state[shard.truth]["momentum"]
            assert torch.equal(shard.truth, values[shard.spec.name].view(-1) - 0.25 * memory.sign())


def test_matrices_of_rank_one_are_normalised_and_scales_of_ia3_take_their_sign() -> None:
    """O of a row or a column is the vector over its norm: what Muon makes of LoRA with r = 1."""
    lora: Shapes = {"q.lora_A.default.weight": (1, 8), "q.lora_B.default.weight": (8, 1)}
    ia3: Shapes = {"k.ia3_l.default": (8, 1), "fc2.ia3_l.default": (1, 8)}
    shards = shards_of(start_values({**lora, **ia3}))
    optimizer, before = JaguarMuon(shards, lr=0.5, iteration="cubic"), values_of(shards)
    optimizer.step(fixed_estimate(shards, 0, probe=Gaussian()))
    for shard in shards:
        memory, name = optimizer.state[shard.truth]["momentum"].view(shard.spec.shape), shard.spec.name
        expected = 0.5 * memory / memory.norm() if name in lora else 0.05 * memory.sign()
        torch.testing.assert_close(before[name] - values_of(shards)[name], expected, rtol=0, atol=1e-6)


# --- Who orthogonalises what. ---


def specs_of(shapes: Sequence[tuple[int, int]]) -> list[TensorSpec]:
    return [TensorSpec(i, f"w{i}", shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("capacity", [1, 5_000, 10**9])
def test_matrices_are_shared_out_evenly_in_bounded_buckets(num_ranks: int, capacity: int) -> None:
    specs = specs_of([(8, 70), (70, 8), (64, 64), (8, 70), (64, 16)] * 7 + [(100, 90)])
    buckets = deal(specs, num_ranks, capacity)
    assert sorted(spec.id for bucket in buckets for spec in bucket.specs) == [spec.id for spec in specs]
    work = [0] * num_ranks
    for bucket in buckets:
        for rank, owned in enumerate(bucket.owned):
            assert len(owned) <= 1 or sum(spec.numel for spec in owned) <= capacity
            shapes = [spec.shape for spec in owned]
            assert shapes == [s for shape in dict.fromkeys(shapes) for s in shapes if s == shape], "shapes in runs"
            work[rank] += sum(min(s.shape) ** 2 * (min(s.shape) + 2 * max(s.shape)) for s in owned)
    assert max(work) - min(work) <= 90 * 90 * (90 + 2 * 100), "no more than the most expensive matrix"
    if capacity == 10**9:
        assert len(buckets) == 1


def test_a_bucket_is_filled_before_the_next() -> None:
    """Collectives are few: two per bucket, and buckets are as many as the capacity demands."""
    assert len(deal(specs_of([(10, 20)] * 48), 2, 1200)) == 4


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_precision_of_newton_schulz(precision: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU float32 unless asked otherwise; the momentum stays in float32."""
    seen: list[torch.dtype] = []

    def recorded(matrix: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(matrix.dtype)
        return orthogonalize(matrix, **options)

    monkeypatch.setattr(jaguar, "orthogonalize", recorded)
    shards = shards_of(start_values({"w": (6, 9)}))
    before = values_of(shards)["w"]
    optimizer = JaguarMuon(shards, lr=1.0, precision=precision)
    optimizer.step(fixed_estimate(shards, 0, probe=Rademacher()))
    memory = optimizer.state[shards[0].truth]["momentum"]
    assert seen == [dtype] and memory.dtype == torch.float32
    step = before - values_of(shards)["w"]
    torch.testing.assert_close(
        step, orthogonalize(memory.view(6, 9)), rtol=0, atol=1e-6 if precision == "auto" else 0.05
    )


# --- Newton-Schulz. ---


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_newton_schulz_of_many_is_that_of_each(shape: tuple[int, int]) -> None:
    many = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    many[1, 2] = 0
    each = torch.stack([orthogonalize(matrix) for matrix in many.flatten(0, 1)]).view_as(many)
    torch.testing.assert_close(orthogonalize(many), each, rtol=0, atol=5e-6)


def with_singular_values(shape: tuple[int, int], values: np.ndarray[Any, Any]) -> torch.Tensor:
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, min(shape))))[0] for n in shape)
    return torch.from_numpy(((u * values) @ v.T).astype(np.float32))


@pytest.mark.parametrize("shape", [(16, 16), (40, 8), (8, 40), (1, 9), (9, 1)])
def test_newton_schulz_singular_values(shape: tuple[int, int]) -> None:
    """Values above 0.01 of the norm land in [0.68, 1.13]; the singular vectors stay; the oracle agrees."""
    matrix = with_singular_values(shape, np.geomspace(1.0, 0.03, min(shape)))
    out = orthogonalize(matrix)
    assert out.shape == matrix.shape and out.dtype == torch.float32
    values = torch.linalg.svdvals(out)
    assert float(values.min()) >= 0.68 and float(values.max()) <= 1.13
    np.testing.assert_allclose(out.numpy(), ref.newton_schulz(matrix.numpy()), atol=1e-5)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.mT @ out @ vt.mT
    torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()), atol=1e-4, rtol=0)
    for factor in (1e-4, 1e4):
        torch.testing.assert_close(orthogonalize(matrix * factor), out, atol=1e-2, rtol=0)


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_newton_schulz_of_zero_is_zero(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for iteration in ("quintic", "cubic"):
        out = orthogonalize(torch.zeros(shape, dtype=dtype), iteration=iteration)  # type: ignore[arg-type]
        assert out.dtype == dtype and not out.any()


def test_cubic_converges_to_one() -> None:
    matrix = with_singular_values((12, 6), np.linspace(1.0, 0.5, 6))
    values = torch.linalg.svdvals(orthogonalize(matrix, iteration="cubic"))
    torch.testing.assert_close(values, torch.ones(6), atol=1e-3, rtol=0)
    np.testing.assert_allclose(
        orthogonalize(matrix, iteration="cubic").numpy(), ref.newton_schulz(matrix.numpy(), "cubic"), atol=1e-5
    )
    hard = with_singular_values((12, 6), np.geomspace(1.0, 1e-3, 6))
    assert float(torch.linalg.svdvals(orthogonalize(hard, iteration="cubic")).min()) < 0.9, "10 iterations are too few"
    for _ in range(4):
        hard = orthogonalize(hard, iteration="cubic")
    torch.testing.assert_close(torch.linalg.svdvals(hard), torch.ones(6), atol=1e-4, rtol=0)


@pytest.mark.parametrize("iteration", ["quintic", "cubic"])
def test_orthogonalised_in_16_bits(iteration: Any) -> None:
    """Products with a factor of 0 are not asked for: oneDNN's of many matrices in bfloat16 leave out the other one."""
    matrix = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonalize(matrix, iteration=iteration), orthogonalize(matrix.bfloat16(), iteration=iteration)
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
@pytest.mark.parametrize(("adjust", "scale"), [("original", "spectral"), ("match_rms_adamw", "rms")])
def test_newton_schulz_and_scales_against_torch_muon(shape: tuple[int, int], adjust: Any, scale: Any) -> None:
    """torch.optim.Muon iterates in bfloat16."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn=adjust).step()
    ours = update_scale(*shape, scale) * orthogonalize(gradient)
    torch.testing.assert_close(-weight.detach(), ours, atol=0.05, rtol=0)
    assert update_scale(*shape, "none") == 1.0

"""What `test_triton.py` runs in processes of their own: Triton reads TRITON_INTERPRET when it is imported.

python tests/triton_worker.py (numbers | steps | compiles)...
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import zoscale.shards
from zoscale import rehearsal
from zoscale.config.sections import Master
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import Candidate, GradientEstimate, OneSided, TwoPoint
from zoscale.forward import lora_fan
from zoscale.forward.scratch import Draws
from zoscale.forward.sequential import perturbed
from zoscale.noise import fused, kernels, streams
from zoscale.noise.generator import Domain, Key, Noise, Range
from zoscale.noise.kernels import kernels_on
from zoscale.noise.streams import Distribution, Mask, Stream
from zoscale.noise.sums import Sum
from zoscale.optim import ZOSGD, JaguarMuon, JaguarSignSGD, ZOAdam
from zoscale.probes import Block, Gaussian, Layers, Probe, Rademacher, Tensors
from zoscale.shards import ShardedParam, TensorSpec, shard_parameters
from zoscale.step import micro_batches

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() and not IS_INTERPRETED else torch.device("cpu")
SEED, STEP, TENSOR = 0xFEDCBA9876543210, 2**32 - 3, 2**32 - 1
RHOS = (0.3, -1.7, 2.9)
DIRECTIONS = (0, 2**24 - 1, 5)
LR, WEIGHT_DECAY, BETA = 0.01, 0.1, 0.9
DISTRIBUTIONS: tuple[Distribution, ...] = ("normal", "rademacher")
PLACES = [(0, 2304), (131, 77), (2**34 - 300, 300)]
"""Start and length: two programs and aligned, within one unit, the last elements there are."""


def same(ours: Tensor, expected: Tensor, distribution: Distribution) -> None:
    """Bit for bit where z are signs; else to the tolerance of normals, or a few neighbours in a 16-bit type."""
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    if distribution == "rademacher":
        assert torch.equal(ours, expected)
    elif ours.dtype == torch.float32:
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=2e-6)
    else:
        torch.testing.assert_close(ours, expected, rtol=2 * torch.finfo(ours.dtype).eps, atol=1e-6)
        assert float((ours != expected).float().mean()) < 0.01


def numbers() -> None:
    """Every kernel against the eager definition: dtypes, offsets, odd lengths, one direction and three."""
    for number, (start, n) in enumerate(PLACES):
        for other, distribution in enumerate(DISTRIBUTIONS):
            half = (torch.bfloat16, torch.float16)[(number + other) % 2]
            check_kernels(Range(TENSOR, start, start + n), distribution, half)
    for start, n in PLACES[:2]:
        check_kernels(Range(TENSOR, start, start + n), "rademacher", torch.bfloat16, is_masked=True)


def mask_of(k: int) -> Mask:
    """Half of the rows and columns of a matrix."""
    marks = torch.rand(70 + 37, generator=torch.Generator().manual_seed(k)) < 0.5
    return Mask(marks.to(DEVICE, torch.uint8), 70, 37)


def check_kernels(wanted: Range, distribution: Distribution, half: torch.dtype, *, is_masked: bool = False) -> None:
    n = wanted.stop - wanted.start
    noise, generator = Noise(SEED), torch.Generator().manual_seed(n)
    base, memory = torch.randn(2, n, generator=generator).to(DEVICE)
    kernels = kernels_on(DEVICE)
    assert kernels is not None
    found = [
        Stream(noise, Key(STEP, k), wanted, distribution, DEVICE, kernels, mask_of(k) if is_masked else None)
        for k in DIRECTIONS
    ]
    drawn = [streams.drawn([stream])[0] for stream in found]
    for out, start in ((base.to(half), base), (base.clone(), base.to(half))):
        expected = torch.empty_like(out)
        streams.perturb_all([found[1]], [(out, start)], 0.37)
        fused.perturb(expected, start, drawn[1], *fused.scalars(0.37))
        same(out, expected, distribution)
    (words,) = noise.words(Key(STEP, domain=Domain.ROUNDING), [wanted], DEVICE)
    lr, weight_decay = fused.scalars(LR, WEIGHT_DECAY)
    for q, (truth, live) in ((1, (base, base.to(half))), (3, (base.to(half), None))):
        ours, (total, visits) = Sum([found[:q]], RHOS[:q]), torch.zeros(2, n, device=DEVICE)
        for z, rho in zip(drawn[:q], fused.scalars(*RHOS), strict=False):
            fused.visit(total, visits, z, rho)
        mean = total / torch.full_like(total, q)  # CUDA multiplies by the reciprocal of a number
        same(ours.mean()[0], mean, distribution)
        kept, expected = memory.clone(), memory.clone()
        ours.remember([kept], BETA)
        fused.remember_mean(expected, total, visits, *fused.scalars(BETA, 1 - BETA))
        same(kept, expected, distribution)
        rounded = live is None
        one, other = clones(truth, live), clones(truth, live)
        ours.descend(one[:1], one[1:], LR, WEIGHT_DECAY, rounded=rounded)
        fused.descend(*other, mean, lr, weight_decay, words if rounded else None)
        same_slices(one, other, distribution)
        one, other, again = clones(truth, live), clones(truth, live), memory.clone()
        ours.remember_and_descend_sign([again], BETA, one[:1], one[1:], LR, WEIGHT_DECAY, rounded=rounded)
        fused.descend_sign(*other, kept, lr, weight_decay, words if rounded else None)
        assert torch.equal(again, kept)
        same_slices(one, other, "rademacher")  # the sign is not a matter of the last bit


def clones(truth: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return truth.clone(), None if live is None else live.clone()


def same_slices(
    ours: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None], distribution: Distribution
) -> None:
    for one, other in zip(ours, expected, strict=True):
        if one is not None and other is not None:
            same(one, other, distribution)


def shards_of(master: Master) -> list[ShardedParam]:
    """A slice of a matrix that starts anywhere, and two vectors: bfloat16."""
    generator, shards = torch.Generator().manual_seed(1), []
    for number, (shape, offset, length) in enumerate([((40, 16), 131, 250), ((33,), 0, 33), ((31,), 0, 31)]):
        live = nn.Parameter(torch.randn(length, generator=generator).to(DEVICE, torch.bfloat16), requires_grad=False)
        spec = TensorSpec(number, f"layers.{number}.weight", shape)
        shards.append(ShardedParam(live, spec, master=master))
        shards[-1].offset = offset
    return shards


def steps() -> None:
    """Whole steps with every z in registers are those with z in memory, whoever perturbs and updates."""
    calls: list[str] = []
    lengths: set[int] = set()
    counts: set[int] = set()
    launch = streams._launch_alike
    torch.compile = lambda function, **_: function
    zoscale.shards.CHUNK, zoscale.shards._TIMES_ON_A_GPU = 64, 1  # z in registers is cut larger
    streams.MANY = 2

    def counted(name: str, found: Sequence[tuple[Sequence[Stream], Any]], *rest: Any) -> None:
        calls.append(name)
        lengths.update(len(first) for (first, *_), _ in found)
        counts.add(len(found))
        launch(name, found, *rest)

    streams._launch_alike = counted
    cases: list[tuple[Any, Probe, int, Master, set[str]]] = [
        (JaguarSignSGD, Rademacher(), 2, "fp32", {"perturb", "remember_and_descend_sign"}),
        (JaguarSignSGD, Tensors(share=0.5), 1, "stochastic", {"perturb", "remember_and_descend_sign"}),
        (JaguarSignSGD, Block(rows=0.5, columns=0.4), 2, "fp32", {"perturb", "remember_and_descend_sign"}),
        (JaguarMuon, Block(rows=0.5, columns=0.4), 1, "none", {"perturb", "remember"}),
        (ZOSGD, Block(rows=0.5, columns=0.4), 3, "fp32", {"perturb", "descend"}),
        (ZOAdam, Block(rows=0.5, columns=0.4), 1, "none", {"perturb", "mean"}),
        (JaguarMuon, Layers(share=0.5, inner={"name": "rademacher"}), 1, "fp32", {"perturb", "remember"}),
        (ZOSGD, Rademacher(), 3, "stochastic", {"perturb", "descend"}),
        (ZOAdam, Gaussian(), 1, "none", {"perturb", "mean"}),
    ]
    for make, probe, q, master, expected in cases:
        calls.clear()
        ends = [run_steps(make, probe, q, master, Noise(SEED, compiled=compiled)) for compiled in (True, False)]
        distribution: Distribution = "normal" if isinstance(probe, Gaussian) else "rademacher"
        for one, other in zip(*ends, strict=True):
            same(one, other, distribution)
        assert expected <= set(calls), (make, calls)
    assert {64, 250} <= lengths and {1, 2} <= counts


def run_steps(make: Any, probe: Probe, q: int, master: Master, noise: Noise) -> list[Tensor]:
    """The values of every candidate, perturbed and on scratch copies, and the weights after two steps."""
    shards, seen = shards_of(master), list[Tensor]()
    optimizer = make(shards, lr=LR, weight_decay=WEIGHT_DECAY)
    for step in range(2):
        directions = tuple(probe.draw(noise, [shard.spec for shard in shards], step, k) for k in range(q))
        point = Candidate(directions[-1], 0.05)
        with perturbed(shards, point):
            seen += [shard.live.clone() for shard in shards]
        draws = Draws([point], shards)
        for _, values in draws.values([(shard.live, shard) for shard in shards]):
            seen += [value.clone() for value in values]
        optimizer.step(GradientEstimate(directions, RHOS[:q], 0.0))
    return [*seen, *(shard.truth.float() for shard in shards), *(shard.live for shard in shards)]


def rehearses() -> None:
    """What the lookup of several slabs draws and writes with was compiled before the first step."""
    names: list[str] = []
    fused._compile = lambda function, *_: names.append(function.__name__) or function  # type: ignore[func-returns-value]
    fused._WORTH, rehearsal._SHAPES = 2, [(40, 16), (33,)]
    shards, noise = shards_of("fp32"), Noise(SEED, compiled=True)
    make = partial(JaguarSignSGD, lr=LR)
    rehearsal.Rehearsal(Gaussian(), TwoPoint(), make, "fp32").run(noise, shards)
    known = len(names)
    specs = [shard.spec for shard in shards]
    draws = Draws([Candidate(Gaussian().draw(noise, specs, 0, 0), 0.1)], shards)
    slabs = [ShardedParam.outline(specs[0], first, first + 16, DEVICE) for first in (0, 64)]
    assert len(list(draws.scratch([(torch.zeros(32, dtype=torch.bfloat16, device=DEVICE), draws.at(slabs))]))) == 1
    assert {"normal", "perturb"} <= set(names) and names[known:] == []


def together() -> None:
    """All weights: the values that many slabs are given in one launch are those of each by itself."""
    zoscale.shards.CHUNK, zoscale.shards._TIMES_ON_A_GPU = 2**20, 16
    counts: list[int] = []
    launch = streams._launch_alike

    def counted(name: str, found: Sequence[Any], *rest: Any) -> None:
        counts[-1] += 1
        launch(name, found, *rest)

    streams._launch_alike = counted
    fused._compile = lambda function, *_: function
    batched, options = Draws._batched, dict(tiny.FAMILIES["opt"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options)).to(DEVICE)
    for probe, estimator in (
        (Block(), TwoPoint(num_directions=2)),
        (Block(signs="ones"), TwoPoint()),
        (Gaussian(), OneSided(num_directions=2)),
        (Layers(share=0.5), TwoPoint()),
    ):
        found = []
        for own in (batched, lambda *_: iter(())):
            Draws._batched = own  # type: ignore[assignment]
            engine = ZeroOrderEngine(model, probe=probe, estimator=estimator, forward="fan_out", noise="compiled")
            counts.append(0)
            found.append(engine.losses(micro_batches(tiny.batch(0, 1)), engine.directions(0)))
        assert found[0] == found[1] and len(set(found[0].values)) > 1
        assert counts[-2] * 4 < counts[-1] or (isinstance(probe, Block) and probe.signs == "ones"), counts


class Compiled:
    """`triton_kernels` for a GPU that need not be there: a launch compiles, and goes no further."""

    def __init__(self) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        from zoscale.noise import triton_kernels

        self.kernels = triton_kernels
        self.UNIT, self.SIZE, self.SLICES = triton_kernels.UNIT, triton_kernels.SIZE, triton_kernels.SLICES
        self.made: dict[int, tuple[bool, Any]] = {}
        target = GPUTarget("cuda", 90, 32)
        current = {"get_current_device": lambda: 0, "get_current_stream": lambda _: 0}
        triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target, **current))

    def __getattr__(self, name: str) -> "Grid":
        def launch(grid: tuple[int, ...], *arguments: Any, **variant: Any) -> None:
            kernel = getattr(self.kernels, name).warmup(*arguments, grid=grid, **variant)
            self.made[id(kernel)] = (variant["NORMAL"], kernel)

        return Grid(launch)


class Grid:
    """What kernel[grid](...) needs."""

    def __init__(self, launch: Callable[..., None]) -> None:
        self.launch = launch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)


def compiles() -> None:
    """Kernels compile for a GPU: nothing is contracted, values are taken at once, and sizes need no other variant."""
    compiled = Compiled()
    counts = []
    streams.MANY = 2
    for step, places in ((0, PLACES[:2]), (1, [(2048, 16), (2**33 + 1, 1)]), (2**31, [(3, 2**20)])):
        for start, n in places:
            truth, live, memory = torch.zeros(n), torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n)
            for distribution in DISTRIBUTIONS:
                wanted = Range(3, start, start + n)
                found = [Stream(Noise(SEED), Key(step, k), wanted, distribution, DEVICE, compiled) for k in DIRECTIONS]
                streams.perturb_all([found[0]], [(live, truth)], 0.1)
            mask = Mask(torch.ones(30 + 40, dtype=torch.uint8), 30, 40)
            masked = [replace(stream, mask=mask) for stream in found]
            streams.perturb_all([masked[0]], [(live, truth)], 0.1)
            alone = Sum([masked], RHOS)
            Sum.joined([alone, alone]).remember_and_descend_sign(
                [memory, memory], BETA, [truth, truth], [live, live], LR, 0.0, rounded=False
            )
            alone.remember_and_descend_sign([memory], BETA, [truth], [live], LR, 0.0, rounded=False)
            both, one = Sum([found], RHOS), Sum([found[:1]], RHOS[:1])
            both.remember_and_descend_sign([memory], BETA, [truth], [live], LR, 0.0, rounded=False)
            both.descend([live], [None], LR, 1.0, rounded=True)
            one.remember([memory], BETA)
            one.mean()
        counts.append(len(compiled.made))
    assert counts == [18] * 3, "with normals and signs, masked and not, aligned and not; of a tensor and of several"
    codes = [(is_normal, kernel.asm["ptx"]) for is_normal, kernel in compiled.made.values()]
    assert all(is_normal or "fma" not in ptx for is_normal, ptx in codes)
    assert sum("global.v4" in ptx for _, ptx in codes) == 9


def rehearses_kernels() -> None:
    """Every kernel of a step of many small tensors was compiled before the first one."""
    compiled = Compiled()
    for module in (kernels, rehearsal):
        module.kernels_on = lambda _: compiled  # type: ignore[attr-defined]
    fused._compile = lambda function, *_: function
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=torch.bfloat16) for shape in [(8, 64), (64, 8)] * 12]
    for probe in (Block(), Gaussian(), Layers(inner={"name": "block"})):
        for make in (JaguarSignSGD, JaguarMuon, ZOSGD):
            shards = shard_parameters(nn.ParameterList(map(nn.Parameter, values)))
            noise, specs = Noise(SEED, compiled=True), [shard.spec for shard in shards]
            rehearsal.Rehearsal(probe, TwoPoint(), partial(make, lr=LR), "fp32").run(noise, shards)
            known = len(compiled.made)
            point = Candidate(probe.draw(noise, specs, 0, 0), 0.1)
            lora_fan._perturbed(shards, [shard.live.dtype for shard in shards], [point])
            for _ in Draws([point], shards).values([(shard.live, shard) for shard in shards]):
                pass
            make(shards, lr=LR).step(GradientEstimate((point.direction,), RHOS[:1], 0.0))
            assert known and len(compiled.made) == known, (make, probe)


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenarios: dict[str, Callable[[], None]] = {
        "numbers": numbers, "steps": steps, "rehearses": rehearses, "compiles": compiles, "together": together,
        "rehearses_kernels": rehearses_kernels,
    }  # fmt: skip
    for name in sys.argv[1:]:
        scenarios[name]()

"""What `test_triton.py` runs in processes of their own: Triton reads TRITON_INTERPRET when it is imported.

python tests/triton_worker.py numbers | steps | gpu
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoscale import fused, streams
from zoscale.estimators import Candidate, GradientEstimate
from zoscale.forward import perturbed
from zoscale.noise import Domain, Key, Noise, Range
from zoscale.optim import ZOSGD, JaguarMuon, JaguarSignSGD, ZOAdam
from zoscale.probes import Gaussian, Layers, Probe, Rademacher, Tensors
from zoscale.scratch import Draws
from zoscale.shards import Master, ShardedParam, TensorSpec
from zoscale.streams import Distribution, Stream, Sum

CPU = torch.device("cpu")
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


def check_kernels(wanted: Range, distribution: Distribution, half: torch.dtype) -> None:
    n = wanted.stop - wanted.start
    noise, generator = Noise(SEED), torch.Generator().manual_seed(n)
    base, memory = torch.randn(2, n, generator=generator)
    found = [Stream(noise, Key(STEP, k), wanted, distribution, CPU) for k in DIRECTIONS]
    drawn = [streams.drawn([stream])[0] for stream in found]
    for out, start in ((base.to(half), base), (base.clone(), base.to(half))):
        expected = torch.empty_like(out)
        found[1].perturb(out, start, 0.37)
        fused.perturb(expected, start, drawn[1], *fused.scalars(0.37))
        same(out, expected, distribution)
    (words,) = noise.words(Key(STEP, domain=Domain.ROUNDING), [wanted])
    lr, weight_decay = fused.scalars(LR, WEIGHT_DECAY)
    for q, (truth, live) in ((1, (base, base.to(half))), (3, (base.to(half), None))):
        ours, total, visits = Sum(found[:q], RHOS[:q]), torch.zeros(n), torch.zeros(n)
        for z, rho in zip(drawn[:q], fused.scalars(*RHOS), strict=False):
            fused.visit(total, visits, z, rho)
        same(ours.mean(), total / q, distribution)
        kept, expected = memory.clone(), memory.clone()
        ours.remember(kept, BETA)
        fused.remember_mean(expected, total, visits, *fused.scalars(BETA, 1 - BETA))
        same(kept, expected, distribution)
        rounded = live is None
        one, other = clones(truth, live), clones(truth, live)
        ours.descend(*one, LR, WEIGHT_DECAY, rounded=rounded)
        fused.descend(*other, total / q, lr, weight_decay, words if rounded else None)
        same_slices(one, other, distribution)
        one, other, again = clones(truth, live), clones(truth, live), memory.clone()
        ours.remember_and_descend_sign(again, BETA, *one, LR, WEIGHT_DECAY, rounded=rounded)
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
    """A slice of a matrix that starts anywhere, and a vector: bfloat16."""
    generator, shards = torch.Generator().manual_seed(1), []
    for number, (shape, offset, length) in enumerate([((40, 16), 131, 250), ((33,), 0, 33)]):
        live = nn.Parameter(torch.randn(length, generator=generator).bfloat16(), requires_grad=False)
        spec = TensorSpec(number, f"layers.{number}.weight", shape)
        shards.append(ShardedParam(live, spec, master=master))
        shards[-1].offset = offset
    return shards


def steps() -> None:
    """Whole steps with every z in registers are those with z in memory, whoever perturbs and updates."""
    calls: list[str] = []
    launch = streams._launch

    def counted(kernels: Any, name: str, *rest: Any, **variant: bool) -> None:
        calls.append(name)
        launch(kernels, name, *rest, **variant)

    streams._launch = counted
    cases: list[tuple[Any, Probe, int, Master, set[str]]] = [
        (JaguarSignSGD, Rademacher(), 2, "fp32", {"perturb", "remember_and_descend_sign"}),
        (JaguarSignSGD, Tensors(share=0.5), 1, "stochastic", {"perturb", "remember_and_descend_sign"}),
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


def run_steps(make: Any, probe: Probe, q: int, master: Master, noise: Noise) -> list[Tensor]:
    """The values of every candidate, perturbed and on scratch copies, and the weights after two steps."""
    shards, seen = shards_of(master), list[Tensor]()
    optimizer = make(shards, lr=LR, weight_decay=WEIGHT_DECAY)
    for step in range(2):
        directions = tuple(probe.draw(noise, [shard.spec for shard in shards], step, k) for k in range(q))
        points = [Candidate(direction, 0.05) for direction in directions]
        with perturbed(shards, points[-1]):
            seen += [shard.live.clone() for shard in shards]
        draws = Draws(points, shards)
        for _, values in draws.values([(shard.live, draws.of(shard)) for shard in shards]):
            seen += [value.clone() for value in values]
        optimizer.step(GradientEstimate(directions, RHOS[:q], 0.0))
    return [*seen, *(shard.truth.float() for shard in shards), *(shard.live for shard in shards)]


def gpu() -> None:
    """Kernels compile for a GPU that need not be there: nothing is contracted, and values are taken at once."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zoscale import triton_kernels

    for name, slices, is_normal in [
        ("perturb", {"out": "*bf16", "base": "*fp32"}, True),
        ("perturb", {"out": "*bf16", "base": "*fp32"}, False),
        ("mean", {"out": "*fp32"}, False),
        ("remember", {"memory": "*fp32"}, False),
        ("descend", {"truth": "*bf16", "last_rounding": "i32"}, False),
        ("remember_and_descend_sign", {"memory": "*fp32", "truth": "*fp32", "live": "*bf16"}, False),
    ]:
        kernel: Any = getattr(triton_kernels, name)
        types = dict.fromkeys(("n", "skip", "unit", "tensor", "step", "seed_low", "seed_high", "last", "q"), "i32")
        types |= dict.fromkeys(("radius", "beta", "rest", "lr", "weight_decay"), "fp32")
        types |= {"lasts": "*i32", "rhos": "*fp32", **slices}
        constants = {arg: None for arg in kernel.arg_names if arg not in types}
        constants |= {"NORMAL": is_normal, "ALIGNED": True}
        signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
        assert "v4" in ptx and (is_normal or "fma" not in ptx), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenarios: dict[str, Callable[[], None]] = {"numbers": numbers, "steps": steps, "gpu": gpu}
    scenarios[sys.argv[1]]()

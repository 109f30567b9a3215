"""Fused arithmetic: compiled equals eager bit for bit, rounding has no bias, and no step after the first compiles."""

import itertools
import math
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from allocations import highest_point
from packaging.requirements import Requirement
from processes import ROOT, needs_compiler
from test_weight_fan import model_of
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from zoscale import rehearsal
from zoscale.engine import ZeroOrderEngine, is_compiled
from zoscale.estimators import GradientEstimate, TwoPoint
from zoscale.noise import fused, philox
from zoscale.noise import generator as noise
from zoscale.noise.generator import Noise
from zoscale.noise.segments import Segment
from zoscale.optim import ZOSGD, JaguarSignSGD
from zoscale.probes import Block, Direction, Gaussian, Piece, Probe, Rademacher, Row
from zoscale.rehearsal import Rehearsal
from zoscale.shards import ShardedParam, TensorSpec, shard_parameters

torch.set_num_threads(1)


WIDE = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
"""Rows of whole words, whose signs stay bits."""


@pytest.fixture
def fresh_compiled() -> Iterator[None]:
    """Forget which functions were compiled, before and after; there are at most eight graphs of one."""
    fused.compiled.cache_clear()
    torch._dynamo.reset()
    yield
    fused.compiled.cache_clear()
    torch._dynamo.reset()


def everything(
    x: Tensor, half: Tensor, fp16: Tensor, memory: Tensor, z: Tensor, words: Tensor, *settings: Tensor
) -> list[Tensor]:
    """Every function of the module once, on copies of slices that were rounded before, as in a step: [out, ...]."""
    rho, *rest = settings
    out, total, first, second = torch.empty_like(half), x.clone(), memory.clone(), memory.clone()
    visits = z.abs() * 3
    fused.perturb(out, x, z, rho)
    fused.accumulate(total, z, rho)
    fused.visit(total, visits, z, rho)
    fused.remember(first, z, *settings)
    fused.remember_mean(second, x, visits, *rest)
    ends = [out, total, visits, first, second]
    pairs = (half.clone(), x.clone(), None), (None, half.clone(), words), (None, fp16.clone(), words)
    for live, truth, drawn in pairs:
        fused.descend(truth, live, z, *rest, drawn)
        fused.descend_sign(truth, live, memory, *rest, drawn)
        ends += [truth] if live is None else [truth, live]
        kept = memory.clone()
        fused.remember_and_descend_sign(kept, truth, live, drawn, z, *settings, *rest)
        ends += [kept.clone(), truth.clone()] + ([] if live is None else [live.clone()])
    return ends


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiled")
def test_compiled_equals_eager() -> None:
    """Signs and every kind of update: no contracted product and sum, whole vectors and their rest alike."""
    needs_compiler()
    generator = torch.Generator().manual_seed(0)
    x, memory = torch.randn(2, 1111, generator=generator)
    z = torch.randint(-1, 2, (1111,), generator=generator).float()
    words = torch.randint(-(2**31), 2**31, (1111,), generator=generator, dtype=torch.int32)
    inputs = [x, x.bfloat16(), x.half(), memory, z, words]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for settings in (fused.scalars(0.3, 0.9, 0.1), fused.scalars(-1.7, 1e-3, 0.0)):
            for part in (slice(0, 1111), slice(37, 900), slice(5, 8)):
                cut = [tensor[part] for tensor in inputs]
                plain = everything(*cut, *settings)
                for one, other in zip(fused.compiled(everything)(*cut, *settings), plain, strict=True):
                    assert one.dtype == other.dtype and torch.equal(one, other)
        assert torch.equal(fused.compiled(philox.signs)(words), philox.signs(words))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiled")
@pytest.mark.parametrize("has_mask", [True, False])
def test_signs_of_several_directions_in_one_pass(has_mask: bool) -> None:
    """What a memory takes up of all at once is the mean over the visits of each; the step goes along its sign."""
    needs_compiler()
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-(2**31), 2**31, (3, 1 + has_mask, 70), generator=generator, dtype=torch.int32)
    memory, truth = torch.randn(2, 70, 32, generator=generator)
    rhos, settings, rest = fused.scalars(0.3, -2.0, 0.7), fused.scalars(0.9, 0.1), fused.scalars(1e-3, 0.1)
    total, visits, expected = torch.zeros_like(memory), torch.zeros_like(memory), memory.clone()
    for signs, rho in zip(z, rhos, strict=True):
        fused.visit(total, visits, signs, rho)
    fused.remember_mean(expected, total, visits, *settings)
    assert visits.max() == 3 and (visits.min() < 3) == has_mask
    moved = truth.clone()
    fused.descend_sign(moved, None, expected, *rest, None)
    for wrap in (lambda function: function, fused.compiled):
        found, ends = memory.clone(), truth.clone()
        wrap(fused.remember_signs)(found, z, *settings, *rhos)
        assert torch.equal(found, expected)
        found, live = memory.clone(), truth.bfloat16()
        wrap(fused.remember_signs_and_descend_sign)(found, ends, live, None, z, *settings, *rest, *rhos)
        assert torch.equal(found, expected) and torch.equal(ends, moved) and torch.equal(live, moved.bfloat16())


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_signs_move_16_bit_weights_in_one_loop(dtype: torch.dtype) -> None:
    """With the numbers of eager mode, and nothing of the length of the slices is put to memory."""
    needs_compiler()
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-(2**31), 2**31, (4, 2, 2**12), generator=generator, dtype=torch.int32)
    memory, truth = torch.randn(2, 2**12, 32, generator=generator)
    settings, rhos = fused.scalars(0.9, 0.1, 1e-3, 0.1), fused.scalars(0.3, -2.0, 0.7, -0.1)
    calls: list[tuple[Callable[..., None], tuple[Tensor | None, ...]]] = [
        (fused.perturb, (truth.to(dtype), z[0, :1], rhos[0])),
        (fused.perturb, (truth.to(dtype), z[0], rhos[0])),
        (fused.remember_and_descend_sign, (memory, truth, None, z[0, :1], rhos[0], *settings)),
        (fused.remember_signs_and_descend_sign, (memory, truth, None, z, *settings, *rhos)),
    ]
    for function, inputs in calls:
        copies = [[None if value is None else value.clone() for value in inputs] for _ in range(2)]
        live = [torch.zeros(2**12, 32, dtype=dtype) for _ in copies]
        for own, out in zip(copies, live, strict=True):
            own.insert(0 if function is fused.perturb else 2, out)
        function(*copies[0])
        run = fused.chosen(function, True)
        run(*(None if value is None else value.clone() for value in copies[1]))
        assert highest_point(lambda: (torch.empty(1), run(*copies[1]))) < 2**12  # noqa: B023
        for one, other in zip(*copies, strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.usefixtures("fresh_compiled")
@pytest.mark.parametrize("forward", ["fan_out", "sequential"])
@pytest.mark.parametrize(
    "probe", [Rademacher(), Gaussian(), Block(rows=0.5, columns=0.5), Block(rows=0.04, columns=0.5)]
)
def test_no_step_compiles_after_the_rehearsal(monkeypatch: pytest.MonkeyPatch, forward: Any, probe: Probe) -> None:
    """Other steps, learning rates, projected gradients and sizes need no other graph, nor do directions that reach no
    row of a piece; numbers are those of eager."""
    compile_: Callable[..., Any] = torch.compile

    def traced(function: Any, *, options: Any, **rest: Any) -> Any:
        return compile_(function, backend="eager", **rest)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(fused, "_WORTH", 2)
    monkeypatch.setattr(noise, "_LONG", 32)
    monkeypatch.setattr("zoscale.shards.CHUNK", 640)  # ten rows of a matrix
    q, dtype = (2, torch.float32) if isinstance(probe, Block) else (1, torch.bfloat16)
    engines = [
        ZeroOrderEngine(
            model_of("opt", dtype, **WIDE), optimizer=JaguarSignSGD, probe=probe, forward=forward, noise=backend,
            estimator=TwoPoint(tau=0.05, num_directions=q),
        )
        for backend in ("compiled", "eager")
    ]  # fmt: skip
    before = engines[0]._rehearsal
    assert before is not None
    before.run(engines[0].noise, engines[0].shards)
    graphs = [counters["stats"]["unique_graphs"]]
    for step in range(2):
        for engine in engines:
            engine.optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
            engine.step(tiny.batch(step))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs == [graphs[0]] * 3
    for one, other in zip(*(engine.shards for engine in engines), strict=True):
        assert torch.equal(one.truth, other.truth) and torch.equal(one.live, other.live)


@pytest.mark.usefixtures("fresh_compiled")
@pytest.mark.parametrize("probe", [Row(), Block(rows=0.05, columns=0.05)])
def test_matrices_of_few_rows_are_rehearsed(monkeypatch: pytest.MonkeyPatch, probe: Probe) -> None:
    """One row of LoRA's A is a large share of it, whose signs stay bits where those of a large matrix are an index."""
    compile_: Callable[..., Any] = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options, **rest: compile_(function, backend="eager", **rest))
    numbers, shards = Noise(0, compiled=True), shard_parameters(nn.Linear(4096, 8, bias=False))
    Rehearsal(probe, TwoPoint(), JaguarSignSGD, "fp32").run(numbers, shards)
    graphs, optimizer = counters["stats"]["unique_graphs"], JaguarSignSGD(shards)
    directions = [probe.draw(numbers, [shard.spec for shard in shards], 0, 0)]
    assert directions[0].is_bits(Piece(shards[0], 0, len(shards[0])))
    optimizer.step(TwoPoint().estimate(directions, [1.0, 0.5]))
    assert counters["stats"]["unique_graphs"] == graphs > 0


def test_noise_is_compiled_on_a_gpu_and_for_many_elements() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert is_compiled("auto", 1, gpu) and is_compiled("auto", 2**20, cpu) and not is_compiled("auto", 2**20 - 1, cpu)
    assert is_compiled("compiled", 1, cpu) and not is_compiled("eager", 2**30, gpu)


def test_sizes_that_are_fused_are_rehearsed() -> None:
    """Matrices and vectors, even and odd, from the size on from which steps call graphs."""
    sizes = [math.prod(shape) for shape in rehearsal._SHAPES]
    fused_ones = [size for size in sizes if size >= fused._WORTH]
    assert {size % 2 for size in fused_ones} == {size % 2 for size in sizes if size < fused._WORTH} == {0, 1}
    assert {len(shape) for shape in rehearsal._SHAPES if math.prod(shape) >= fused._WORTH} == {1, 2}


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1.0012, torch.bfloat16), (-3.14159, torch.bfloat16), (1.00037, torch.float16), (-0.1, torch.float16),
        (3.3e-6, torch.float16), (-2.0e-8, torch.float16), (6.0e-5, torch.float16),
    ],
)  # fmt: skip
def test_stochastic_rounding_has_no_bias(value: float, dtype: torch.dtype) -> None:
    """One of the two neighbours, with the value as the mean: normal and subnormal numbers, of either sign."""
    n = 2**16
    words = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    x = torch.full((n,), value)
    rounded = fused.stochastically_rounded(x, words, dtype)
    assert torch.equal(rounded.to(dtype).float(), rounded), "the type holds it"
    low, high = sorted(set(rounded.tolist()))
    assert low < float(x[0]) < high
    assert (torch.nextafter(torch.tensor(low, dtype=dtype), torch.tensor(torch.inf, dtype=dtype))).item() == high
    chance = (float(x[0]) - low) / (high - low)
    assert abs(float((rounded == high).double().mean()) - chance) < 5 * (chance * (1 - chance) / n) ** 0.5


def test_what_stochastic_rounding_leaves_alone() -> None:
    words = torch.full((6,), -1, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        kept = torch.tensor(
            [0.0, -1.5, torch.inf, -torch.inf, 2.0**-14, 2.0**-24 if dtype == torch.float16 else 2.0**-120]
        )
        assert torch.equal(fused.stochastically_rounded(kept, words, dtype), kept)
        assert fused.stochastically_rounded(torch.tensor([torch.nan]), words[:1], dtype).isnan().all()
    x = torch.rand(6)
    assert torch.equal(fused.stochastically_rounded(x, words, torch.float32), x)


def cut(value: Tensor, bounds: list[int]) -> list[ShardedParam]:
    """A tensor as the slices of several ranks, without a master."""
    spec, shards = TensorSpec(0, "w", tuple(value.shape)), []
    for start, stop in itertools.pairwise(bounds):
        part = nn.Parameter(value.view(-1)[start:stop].clone(), requires_grad=False)
        shards.append(ShardedParam(part, spec, master="stochastic"))
        shards[-1].offset = start
    return shards


def test_updates_are_rounded_the_same_way_at_any_sharding() -> None:
    """And without bias: the mean of many weights moves by less than half of a unit in the last place."""
    start = torch.ones(512, 16, dtype=torch.bfloat16)
    ends = []
    for bounds in ([0, 8192], [0, 1, 37, 5000, 8192]):
        shards = cut(start, bounds)
        for shard in shards:
            optimizer = ZOSGD([shard], lr=1.0, weight_decay=1e-3)
            for step in range(10):
                direction = Rademacher().draw(Noise(3), [shard.spec], step, 0)
                optimizer.step(GradientEstimate((direction,), (0.0,), 0.0))
        ends.append(torch.cat([shard.live for shard in shards]))
    assert torch.equal(*ends)
    assert len(ends[0].unique()) > 2, "elements are rounded one by one"
    assert float(ends[0].double().mean()) == pytest.approx(0.999**10, abs=5 * 2**-8 * (10 / 4 / 8192) ** 0.5)


def test_stochastic_rounding_needs_drawn_directions() -> None:
    class Ones(Direction):
        def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
            return [Segment(torch.ones(piece.stop - piece.start)) for piece in group]

    (shard,) = cut(torch.ones(4, 4, dtype=torch.bfloat16), [0, 16])
    with pytest.raises(ValueError, match="expected a direction that is drawn for stochastic rounding, got Ones"):
        ZOSGD([shard]).step(GradientEstimate((Ones(),), (1.0,), 0.0))


def test_scalars_are_kept_by_their_bits() -> None:
    zero, negative, again = (fused.scalars(value, 1e300)[0] for value in (0.0, -0.0, 0.0))
    assert zero is again and math.copysign(1.0, zero.item()) == 1.0 == -math.copysign(1.0, negative.item())
    tenth, infinite = fused.scalars(0.1, 1e300)
    assert tenth.dtype == torch.float32 and tenth.dim() == 0 and tenth.item() == torch.tensor(0.1).item()
    assert math.isinf(infinite.item())


def test_what_is_on_the_device_stays_there() -> None:
    """On tensors without memory: only those of the CPU can be pinned."""
    with FakeTensorMode():  # type: ignore[no-untyped-call]
        tensor = torch.ones(3, device="cuda")
        assert fused.on_device(tensor, tensor.device) is tensor
    tensor = torch.ones(3)
    assert fused.on_device(tensor, "cpu") is tensor


@pytest.mark.usefixtures("fresh_compiled")
def test_a_device_without_a_compiler_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles(function: Any, **_: Any) -> Any:
        def fused_one(x: Tensor) -> Tensor:
            if x.device.type == "cpu":
                raise RuntimeError("no g++")
            calls.append(x.device.type)
            return function(x)

        return fused_one

    calls: list[str] = []
    monkeypatch.setattr(torch, "compile", compiles)
    double = fused.compiled(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="torch.compile failed: no g"):
        assert torch.equal(double(torch.ones(4)), torch.full((4,), 2.0))
    double(torch.ones(4, device="meta"))
    assert double(torch.ones(4)).sum() == 8 and calls == ["meta"] * 2, "once to try, once"


@pytest.mark.usefixtures("fresh_compiled")
def test_combinations_of_types_beyond_what_torch_compiles_run_in_eager_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses one, and warns, the first time; it is not asked again."""
    needs_compiler()
    asked, compile_function = list[torch.dtype](), fused._compile

    def counted(function: Callable[..., Any], inputs: Sequence[Any], options: Any) -> Callable[..., Any]:
        graph = compile_function(function, inputs, options)
        return lambda total, *rest: (asked.append(total.dtype), graph(total, *rest))[1]

    monkeypatch.setattr(fused, "_compile", counted)
    run, z = fused.compiled(fused.accumulate), torch.ones(2**15)
    with torch._dynamo.config.patch(recompile_limit=1):
        for dtype in (torch.float32, torch.float64, torch.float64, torch.float32):
            total = torch.zeros(2**15, dtype=dtype)
            run(total, z, *fused.scalars(0.5))
            assert torch.equal(total, torch.full_like(total, 0.5))
    assert asked == [torch.float32, torch.float64, torch.float32]


def test_torch_knows_what_the_compiler_is_told() -> None:
    """It refuses an option that it does not know, and noise would stay eager: older ones are not installed with us."""
    assert fused._EAGER_NUMERICS.keys() | fused._ONE_LOOP.keys() <= set(torch._inductor.list_options())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [line for line in map(Requirement, project["dependencies"]) if line.name == "torch"]
    assert not any(wanted.specifier.contains(version) for version in ("2.10.0", "2.14.0"))
    assert all(wanted.specifier.contains(version) for version in ("2.11.0", "2.13.1"))
    assert "torch 2.11 to 2.13" in (ROOT / "README.md").read_text()

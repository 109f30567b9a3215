"""Estimators: the points, the scalars, and the gradient that a rank makes of them, against dense NumPy."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoscale.estimators import ESTIMATORS, Candidate, Estimator, GradientEstimate, OneSided, TwoPoint
from zoscale.forward.sequential import perturbed
from zoscale.noise.fused import remember_mean
from zoscale.noise.generator import Noise
from zoscale.noise.segments import Segment
from zoscale.optim import ZOSGD, JaguarSignSGD
from zoscale.probes import Block, Direction, DrawnDirection, Gaussian, Piece, Probe, Rademacher, Row, Tensors, pieces
from zoscale.shards import CHUNK, ShardedParam, TensorSpec

torch.set_num_threads(1)

SHAPES: list[tuple[int, ...]] = [(7,), (5, 3), (1, 9), (12, 11), (3, 4, 5)]


def shards_of(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[ShardedParam]:
    return [
        ShardedParam(nn.Parameter(torch.zeros(shape)), TensorSpec(i, f"t{i}", shape)) for i, shape in enumerate(shapes)
    ]


def draw(probe: Probe, shards: Sequence[ShardedParam], q: int, step: int = 0) -> list[Direction]:
    return [probe.draw(Noise(3), [shard.spec for shard in shards], step, k) for k in range(q)]


def densified(direction: Direction, shards: Sequence[ShardedParam]) -> np.ndarray[Any, Any]:
    """z of all tensors, concatenated."""
    parts = []
    for group in pieces(shards):
        for piece, segment in zip(group, direction.segments(group), strict=True):
            z = torch.zeros(piece.stop - piece.start)
            if segment is not None:
                segment.add_to(z, 1.0)
            parts.append(z)
    return torch.cat(parts).numpy()


@pytest.mark.parametrize("q", [1, 3])
def test_two_point(q: int) -> None:
    shards = shards_of()
    directions, estimator = draw(Gaussian(), shards, q), TwoPoint(tau=0.25, num_directions=q)
    points = estimator.candidates(directions)
    assert [(c.direction, c.radius) for c in points] == [(z, r) for z in directions for r in (0.25, -0.25)]
    assert len(points) == estimator.num_candidates == 2 * q
    losses = [1.0 + 0.5 * i**2 for i in range(2 * q)]
    estimate = estimator.estimate(directions, losses)
    assert estimate.directions == tuple(directions)
    assert estimate.projected_grads == tuple((losses[2 * k] - losses[2 * k + 1]) / 0.5 for k in range(q))
    assert estimate.loss == sum(losses) / (2 * q), "pitfall 16: the two-sided mean, not f(x + tau z)"


@pytest.mark.parametrize("q", [1, 3])
def test_one_sided(q: int) -> None:
    shards = shards_of()
    directions, estimator = draw(Gaussian(), shards, q), OneSided(tau=0.25, num_directions=q)
    points = estimator.candidates(directions)
    assert points == [Candidate(None), *(Candidate(z, 0.25) for z in directions)]
    assert len(points) == estimator.num_candidates == 1 + q
    losses = [1.0 + 0.5 * i**2 for i in range(1 + q)]
    estimate = estimator.estimate(directions, losses)
    assert estimate.projected_grads == tuple((loss - 1.0) / 0.25 for loss in losses[1:])
    assert estimate.loss == losses[0]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_is_exact_on_a_linear_function(name: str) -> None:
    """f(x) = <g, x>: rho_k = <g, z_k> whatever the radius (fzoo: over the losses' spread), and the loss is f(x)."""
    shards = shards_of()
    estimator: Estimator = ESTIMATORS[name](num_directions=3, **({} if name == "forward_grad" else {"tau": 0.5}))
    directions = draw(Gaussian(), shards, 3)
    gradient = np.random.default_rng(0).normal(size=sum(len(shard) for shard in shards))
    losses = []
    for c in estimator.candidates(directions):
        slope = 0.0 if c.direction is None else float(gradient @ densified(c.direction, shards))
        losses.append(slope if c.is_derivative else 2.0 + c.radius * slope)
    estimate = estimator.estimate(directions, losses)
    slopes = np.array([float(gradient @ densified(z, shards)) for z in directions])
    if name == "fzoo":
        slopes /= np.std(0.5 * slopes, ddof=1)
    np.testing.assert_allclose(estimate.projected_grads, slopes, rtol=1e-12, atol=1e-12)
    assert estimate.loss == pytest.approx(2.0) and estimate.is_finite


@pytest.mark.parametrize("name", ESTIMATORS)
def test_wrong_number_of_losses_is_refused(name: str) -> None:
    estimator: Estimator = ESTIMATORS[name](num_directions=2)
    shards = shards_of()
    directions = draw(Gaussian(), shards, 2)
    for surplus in (1, -1):
        losses = [1.0] * (estimator.num_candidates + surplus)
        with pytest.raises(ValueError, match=r"zip|losses"):
            estimator.estimate(directions, losses).mean([Piece(shards[0], 0, 7)])


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_not_finite(name: str, bad: float) -> None:
    """Pitfall 15: at any place among the losses; and never shown as 0."""
    estimator: Estimator = ESTIMATORS[name](num_directions=2)
    directions = draw(Gaussian(), shards_of(), 2)
    for place in range(estimator.num_candidates):
        losses = [1.0] * estimator.num_candidates
        losses[place] = bad
        estimate = estimator.estimate(directions, losses)
        assert not estimate.is_finite
        assert estimate.loss != 0.0
    assert estimator.estimate(directions, [1.0 + i for i in range(estimator.num_candidates)]).is_finite


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_overflowing_difference_is_not_finite(name: str) -> None:
    q = 2 if name == "fzoo" else 1
    estimator: Estimator = ESTIMATORS[name](num_directions=q)
    if estimator.takes_derivatives:
        pytest.skip("takes no difference")
    losses = [1e308, -1e308, *([0.0] * (estimator.num_candidates - 2))]
    assert not estimator.estimate(draw(Gaussian(), shards_of(), q), losses).is_finite


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "forward_grad"])
@pytest.mark.parametrize("options", [{"tau": 0.0}, {"tau": -1.0}, {"tau": math.nan}, {"tau": math.inf}])
def test_refused_radii(name: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected a finite tau > 0, got"):
        ESTIMATORS[name](**options)
    with pytest.raises(ValueError, match="expected num_directions >= 1, got 0"):
        ESTIMATORS[name](num_directions=0)


PROBES_TO_AVERAGE = [Gaussian(), Rademacher(), Row(), Block(rows=0.4, columns=0.6), Tensors(share=0.5)]


@pytest.mark.parametrize("probe", PROBES_TO_AVERAGE, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("q", [1, 4])
def test_mean_and_totals_against_numpy(probe: Probe, q: int) -> None:
    shards = shards_of()
    directions = draw(probe, shards, q)
    rhos = (0.75, -1.5, 0.123456789, 20.0)[:q]
    estimate = GradientEstimate(tuple(directions), rhos, 0.0)
    zs = np.stack([densified(z, shards) for z in directions])
    total = np.zeros(zs.shape[1], np.float32)
    for z, rho in zip(zs, rhos, strict=True):
        total = total + np.float32(rho) * z
    visits = (zs != 0).sum(0)
    for limit in (CHUNK, 10):
        mean, totals, seen, over_visits = [], [], [], []
        for group in pieces(shards, limit):
            mean += estimate.mean(group)
            pairs = estimate.totals(group)
            totals += [a for a, _ in pairs]
            seen += [b for _, b in pairs]
            over_visits += means_over_visits(pairs)
        assert all(part.dtype == torch.float32 for part in mean + totals + seen)
        assert np.array_equal(torch.cat(mean).numpy(), total / np.float32(q))
        assert np.array_equal(torch.cat(totals).numpy(), total)
        assert np.array_equal(torch.cat(seen).numpy(), visits)
        assert np.array_equal(torch.cat(over_visits).numpy(), total / np.maximum(visits, 1).astype(np.float32))
    if q > 1 and isinstance(probe, Block):
        assert (visits == 0).sum() > 0 and visits.max() > 1, "the test sees unvisited and repeated coordinates"


def means_over_visits(totals: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """What JAGUAR's memory becomes from 0 with beta = 0."""
    memories = [torch.zeros_like(total) for total, _ in totals]
    for memory, (total, visits) in zip(memories, totals, strict=True):
        remember_mean(memory, total, visits, torch.tensor(0.0), torch.tensor(1.0))
    return memories


def test_the_mean_over_visits_is_unbiased_for_any_support() -> None:
    """Given a visit, E[rho z_i] is the partial derivative i: on f(x) = <g, x> with rho = <g, z>."""
    shards = shards_of([(6, 4), (8,)])
    gradient = np.random.default_rng(1).normal(size=32)
    projected, squares, seen = 0.0, 0.0, np.zeros(32)
    for step in range(60):
        directions = draw(Block(rows=0.5, columns=0.5), shards, 4, step)
        rhos = tuple(float(gradient @ densified(z, shards)) for z in directions)
        (group,) = pieces(shards)
        pairs = GradientEstimate(tuple(directions), rhos, 0.0).totals(group)
        visited = torch.cat([visits > 0 for _, visits in pairs]).numpy()
        projected += float(torch.cat(means_over_visits(pairs)).numpy() @ gradient)
        squares += float((gradient**2)[visited].sum())
        seen += visited
    assert seen.min() > 20 and seen.max() < 60
    assert projected / squares == pytest.approx(1.0, abs=0.3), "not 1/q of it, and not its sum"


class Recorded(DrawnDirection):
    """Rademacher signs that write down what they are asked for, and how many answers are alive."""

    def __init__(self, inner: Direction, log: list[tuple[int, int, int]], alive: weakref.WeakSet[torch.Tensor]) -> None:
        super().__init__(inner.noise, inner.key.step, inner.key.direction)
        self.inner, self.log, self.alive = inner, log, alive

    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        found = self.inner.segments(group)
        ours = [s.value for s in found if s is not None]
        for value in ours:
            self.alive.add(value)
        self.log.append((self.key.direction, sum(piece.stop - piece.start for piece in group), len(self.alive)))
        return found


def test_directions_are_made_one_at_a_time_in_groups_of_at_most_a_chunk() -> None:
    """Pitfall 24: never a whole z, and never q of them."""
    shards = shards_of([(3, 5), (2 * CHUNK + 17,), (4,)])
    log: list[tuple[int, int, int]] = []
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    directions = tuple(Recorded(z, log, alive) for z in draw(Rademacher(), shards, 3))
    JaguarSignSGD(shards).step(GradientEstimate(directions, (1.0, -1.0, 0.5), 0.0))
    assert max(size for _, size, _ in log) == CHUNK
    assert sum(size for k, size, _ in log if k == 0) == sum(len(shard) for shard in shards)
    assert [k for k, _, _ in log] == [0, 1, 2] * (len(log) // 3), "direction by direction within each group"
    most = max(len(group) for group in pieces(shards))
    assert max(count for *_, count in log) <= 2 * most, "at most the last direction's answers beside this one's"


class PeakBytes(TorchDispatchMode):
    """The highest number of bytes of tensors that were made within and are alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, weakref.ref[Any]] = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in own and storage._cdata not in self.known:
                    self._made(storage)
        return out

    def _made(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: object) -> None:
            self.now -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_of(work: Callable[[], object]) -> int:
    with PeakBytes() as peak:
        work()
    return peak.peak


def test_the_meter_of_the_next_tests_sees_what_is_alive() -> None:
    def two_at_once() -> None:
        a = torch.zeros(1000)
        for _ in range(3):
            b = a + 1
            b.mul_(2)
        del b

    assert 8000 <= peak_of(two_at_once) <= 12000


@pytest.mark.parametrize("make", [ZOSGD, JaguarSignSGD])
def test_memory_of_an_update_does_not_grow_with_q_or_with_the_tensor(make: Any) -> None:
    """Pitfall 24: a few buffers of one chunk, however many directions and elements."""

    def peak(numel: int, q: int) -> int:
        shards = shards_of([(numel,)])
        optimizer = make(shards)
        directions = tuple(draw(Rademacher(), shards, q))
        optimizer.step(GradientEstimate(directions, (1.0,) * q, 0.0))  # makes the state
        return peak_of(lambda: optimizer.step(GradientEstimate(directions, (1.0,) * q, 0.0)))

    one = peak(2 * CHUNK, 1)
    assert 2 * 4 * CHUNK < one < 12 * 4 * CHUNK
    assert peak(2 * CHUNK, 5) <= 1.2 * one
    assert peak(5 * CHUNK, 1) <= 1.2 * one


def test_memory_of_a_perturbation_does_not_grow_with_the_tensor() -> None:
    """Pitfall 24: with a master, perturbing and restoring makes no copy of the weights and no whole z."""

    def peak(numel: int) -> int:
        weights = nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16))
        shards = [ShardedParam(weights, TensorSpec(0, "t0", (numel,)))]
        (direction,) = draw(Rademacher(), shards, 1)

        def cycle() -> None:
            with perturbed(shards, Candidate(direction, 0.1)):
                assert bool(shards[0].live[-1])

        return peak_of(cycle)

    one = peak(2 * CHUNK)
    assert 2 * 4 * CHUNK < one < 12 * 4 * CHUNK
    assert peak(5 * CHUNK) <= 1.2 * one


def test_signs_that_kernels_make_are_not_taken_for_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a tensor that some directions leave alone has streams of the others, and no sum of all."""
    shards = shards_of([(256, 128)])
    directions = [
        Tensors(share=1.0).draw(Noise(0, compiled=True), [shard.spec for shard in shards], 0, k) for k in (0, 1)
    ]
    (group,) = pieces(shards)
    estimate = GradientEstimate(tuple(directions), (1.0, 2.0), 0.0)
    assert estimate.signs(group) != [None]
    monkeypatch.setattr(directions[1], "stream", lambda piece: object())
    assert estimate.signs(group) == [None]

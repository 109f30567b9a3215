"""JAGUAR for black-box problems: estimators, sets and methods against exact and brute-force answers."""

import math
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import accumulate, islice
from typing import Any

import pytest
import torch
from torch import Tensor

from zoscale import blackbox
from zoscale.blackbox import (
    SPSA,
    Averaged,
    ConvexSet,
    FrankWolfe,
    FullDifferences,
    GradientDescent,
    GradientEstimator,
    JaguarD,
    JaguarS,
    L1Ball,
    L2Ball,
    Minibatches,
    Oracle,
    Simplex,
    SphereSmoothing,
)

D = 5
CENTRE = torch.tensor([0.9, -0.4, 0.1, 0.5, -0.2], dtype=torch.float64)
SCALE = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0], dtype=torch.float64)
SETS: list[ConvexSet] = [Simplex(), L1Ball(0.8), L2Ball(0.7)]


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * (SCALE * (x - CENTRE).square()).sum()


def gradient(x: Tensor) -> Tensor:
    return SCALE * (x - CENTRE)


def cubic(x: Tensor) -> Tensor:
    """Its differences are not its gradient: f = sum of x^3 + the quadratic."""
    return (x**3).sum() + quadratic(x)


def best_value(feasible: ConvexSet | None) -> float:
    """By projected gradients, which share nothing with the methods but the projection, tested by itself."""
    x = torch.zeros(D, dtype=torch.float64) if feasible is None else feasible.project(torch.zeros(D).double())
    for _ in range(400):
        moved = x - 0.3 * gradient(x)
        x = moved if feasible is None else feasible.project(moved)
    return float(quadratic(x))


def vertex(feasible: ConvexSet | None) -> Tensor:
    x = torch.zeros(D, dtype=torch.float64)
    x[2] = 1.0 if feasible is None else feasible.radius
    return x


ESTIMATORS: dict[str, Callable[[], GradientEstimator]] = {
    "jaguar_d": lambda: JaguarD(),
    "jaguar_d_from_zero": lambda: JaguarD(initial="zero"),
    "jaguar_s": lambda: Averaged(JaguarS()),
    "full_differences": lambda: FullDifferences(),
    "spsa": lambda: Averaged(SPSA(), weight=0.05),
    "sphere": lambda: Averaged(SphereSmoothing(), weight=0.05),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("feasible", [None, *SETS], ids=str)
@pytest.mark.parametrize("method", ["descent", "frank_wolfe"])
def test_every_method_converges_on_every_set(name: str, feasible: ConvexSet | None, method: str) -> None:
    noisy = name in ("spsa", "sphere")  # their variance does not vanish where the gradient does not
    if method == "descent":
        update: blackbox.Update = GradientDescent((lambda k: 0.05 / (1 + k / 100)) if noisy else 0.05, feasible)
    elif feasible is None:
        pytest.skip("Frank-Wolfe needs a set")
    else:
        update = FrankWolfe(feasible, (lambda k: 4 / (k + 50)) if noisy else None)
    oracle = Oracle(quadratic)
    result = blackbox.minimize(oracle, vertex(feasible), ESTIMATORS[name](), update, max_calls=3000)
    first, best = float(quadratic(vertex(feasible))), best_value(feasible)
    share = (float(quadratic(result.x)) - best) / (first - best)
    assert -1e-9 <= share < (0.06 if noisy or method == "frank_wolfe" else 1e-6), "of the distance at the start"
    assert oracle.num_calls == result.num_calls <= 3000


def test_published_step_sizes_and_weights() -> None:
    x, oracle = torch.zeros(D, dtype=torch.float64), Oracle(quadratic)
    stochastic = Averaged(JaguarS())
    for estimator in (deterministic := JaguarD(), stochastic):
        estimator.start(oracle, x)
    assert deterministic.frank_wolfe_step(7) == 4 / (7 + 8 * D)
    assert stochastic.frank_wolfe_step(7) == 4 / (7 + 8 * D * math.sqrt(D))
    assert stochastic.weight(7) == pytest.approx(4 / (7 + 8 * D * math.sqrt(D)) ** (2 / 3), rel=1e-15)


def central(x: Tensor, tau: float) -> Tensor:
    """Differences of the cubic by hand: gradient + tau^2."""
    return 3 * x**2 + tau**2 + gradient(x)


def seed_of_coordinate(wanted: int) -> int:
    """A seed whose first coordinate is the wanted one."""
    for seed in range(200):
        probe = JaguarD(seed=seed, initial="zero")
        probe.start(Oracle(lambda x: x.sum()), torch.zeros(D, dtype=torch.float64))
        if int(probe.estimate(Oracle(lambda x: x.sum()), torch.zeros(D, dtype=torch.float64), 0).argmax()) == wanted:
            return seed
    raise AssertionError("no seed found: coordinates are not uniform")


def test_jaguar_s_is_unbiased_whatever_its_memory_is() -> None:
    """The mean over all coordinates is the vector of all differences, exactly; and h_i is overwritten."""
    tau, old, new = 0.1, torch.linspace(-1, 1, D).double(), torch.linspace(0.5, -0.3, D).double()
    estimates = []
    for i in range(D):
        jaguar, oracle = JaguarS(tau=tau, seed=seed_of_coordinate(i)), Oracle(cubic)
        memory = jaguar.start(oracle, old)
        assert memory is not None
        torch.testing.assert_close(memory, central(old, tau), rtol=0, atol=1e-12)
        rho = jaguar.estimate(oracle, new, 0)
        expected = memory.clone()
        expected[i] += D * (central(new, tau)[i] - memory[i])
        torch.testing.assert_close(rho, expected, rtol=0, atol=1e-11)
        assert oracle.num_calls == 2 * D + 2
        moved = (jaguar.h != memory).nonzero().flatten().tolist()
        assert moved == [i], "one coordinate of h moves"
        torch.testing.assert_close(jaguar.h[i], central(new, tau)[i], rtol=0, atol=1e-12)
        estimates.append(rho)
    torch.testing.assert_close(torch.stack(estimates).mean(0), central(new, tau), rtol=0, atol=1e-11)


def test_jaguar_d_overwrites_and_remembers() -> None:
    tau, jaguar, oracle = 0.1, JaguarD(tau=0.1, initial="zero", seed=3), Oracle(cubic)
    start = jaguar.start(oracle, torch.zeros(D, dtype=torch.float64))
    assert start is not None and not start.any() and oracle.num_calls == 0
    expected, visited = torch.zeros(D, dtype=torch.float64), set()
    for step in range(60):
        x = torch.full((D,), 0.01 * step, dtype=torch.float64)
        h = jaguar.estimate(oracle, x, step)
        (changed,) = (h != expected).nonzero().flatten().tolist()
        expected[changed] = central(x, tau)[changed]
        torch.testing.assert_close(h, expected, rtol=0, atol=1e-12)
        expected = h
        visited.add(changed)
    assert visited == set(range(D))


def test_coordinates_are_uniform_and_repeat_by_seed() -> None:
    def chosen(seed: int) -> list[int]:
        jaguar, oracle = JaguarD(initial="zero", seed=seed), Oracle(lambda x: x.sum())
        jaguar.start(oracle, torch.zeros(D, dtype=torch.float64))
        found = []
        for step in range(1000):
            jaguar.h.zero_()
            found.append(int(jaguar.estimate(oracle, torch.zeros(D, dtype=torch.float64), step).argmax()))
        return found

    first = chosen(0)
    assert first == chosen(0) != chosen(1)
    counts = torch.bincount(torch.tensor(first), minlength=D).double()
    chi_square = float(((counts - 200).square() / 200).sum())
    assert chi_square < 18.5, "4 degrees of freedom, one in a thousand"


@pytest.mark.parametrize("estimator", [SPSA(tau=0.05), SphereSmoothing(tau=0.05)], ids=["spsa", "sphere"])
def test_random_directions_are_unbiased_for_linear_functions(estimator: GradientEstimator) -> None:
    oracle, x, slope = Oracle(lambda x: (SCALE * x).sum()), torch.zeros(D, dtype=torch.float64), SCALE
    estimator.start(oracle, x)
    draws = torch.stack([estimator.estimate(oracle, x, step) for step in range(2000)])
    error = (draws.mean(0) - slope) / (draws.std(0) / math.sqrt(len(draws)))
    assert float(error.abs().max()) < 4, "standard errors"
    assert oracle.num_calls == 4000


def test_full_differences_are_exact() -> None:
    estimator, oracle, x = FullDifferences(tau=0.1), Oracle(cubic), torch.linspace(-1, 1, D).double()
    estimator.start(oracle, x)
    torch.testing.assert_close(estimator.estimate(oracle, x, 0), central(x, 0.1), rtol=0, atol=1e-12)
    assert oracle.num_calls == estimator.calls_per_step(D) == 2 * D


def test_average_starts_with_what_is_known() -> None:
    x, oracle = torch.ones(D, dtype=torch.float64), Oracle(quadratic)
    averaged = Averaged(JaguarS(), weight=0.25)
    g = averaged.start(oracle, x)
    assert g is not None
    plain = JaguarS()
    plain.start(oracle, x)
    for step in range(5):
        point = x * (1 + step)
        g = 0.75 * g + 0.25 * plain.estimate(oracle, point, step)
        torch.testing.assert_close(averaged.estimate(oracle, point, step), g, rtol=0, atol=1e-9)
    memoryless = Averaged(SPSA(), weight=0.25)
    assert memoryless.start(oracle, x) is None
    spsa = SPSA()
    spsa.start(oracle, x)
    assert torch.equal(memoryless.estimate(oracle, x, 0), spsa.estimate(oracle, x, 0))


@pytest.mark.parametrize("feasible", SETS, ids=str)
def test_projection_and_linear_minimizer_against_brute_force(feasible: ConvexSet) -> None:
    """Points of the set by convex combination of its extreme points, none of them nearer or lower."""
    generator = torch.Generator().manual_seed(0)
    extreme = torch.cat([torch.eye(3), -torch.eye(3)]).double() * feasible.radius
    if isinstance(feasible, Simplex):
        extreme = extreme[:3]
    if isinstance(feasible, L2Ball):
        extreme = torch.nn.functional.normalize(torch.randn(300, 3, generator=generator).double()) * feasible.radius
    weights = torch.rand(20_000, len(extreme), generator=generator).double() ** 8
    inside = torch.cat([weights / weights.sum(1, keepdim=True) @ extreme, extreme])
    for _ in range(20):
        x = torch.randn(3, generator=generator).double() * 1.5
        nearest = feasible.project(x)
        assert feasible.contains(nearest, tolerance=1e-12)
        assert (inside - x).norm(dim=1).min() >= (nearest - x).norm() - 1e-12
        assert float(((inside - nearest) @ (x - nearest)).max()) <= 1e-10, "the obtuse angle of a projection"
        torch.testing.assert_close(feasible.project(nearest), nearest, rtol=0, atol=1e-12)
        lowest = feasible.linear_minimizer(x)
        assert feasible.contains(lowest, tolerance=1e-12)
        assert float((inside @ x).min()) >= float(lowest @ x) - 1e-12
    assert feasible.contains(feasible.linear_minimizer(torch.zeros(3).double()))
    assert not feasible.contains(torch.full((3,), 2.0).double())


def exact_projection(x: Tensor, radius: float) -> Tensor:
    """Onto the simplex, in fractions."""
    numbers = sorted((Fraction(value) for value in x.tolist()), reverse=True)
    thresholds = [(total - Fraction(radius)) / n for n, total in enumerate(accumulate(numbers), 1)]
    support = sum(number > threshold for number, threshold in zip(numbers, thresholds, strict=True))
    found = [max(Fraction(value) - thresholds[support - 1], Fraction(0)) for value in x.tolist()]
    return torch.tensor([float(value) for value in found], dtype=x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [1.0, 0.3, 50.0])
def test_projection_of_large_points_is_exact_and_feasible(dtype: torch.dtype, radius: float) -> None:
    """Where the radius is lost beside x in the type of x."""
    generator = torch.Generator().manual_seed(0)
    points = [[1e8, 0, 0], [3e7, 0, 0], [2e7, 2e7 + 2, 0], [1e17, 0, 0], [1e17, 1e17, -1e17], [-1e30, -1e30, -2e30]]
    made = [torch.tensor(point, dtype=dtype) for point in points]
    made += [scale * torch.randn(30, generator=generator).to(dtype) for scale in (1.0, 1e4, 1e8, 1e16, 1e30)]
    made += [1e6 + torch.rand(2000, generator=generator).to(dtype)]
    for x in made:
        close = partial(torch.testing.assert_close, rtol=0, atol=2 * radius * torch.finfo(dtype).eps)
        found, inside = Simplex(radius).project(x), L1Ball(radius).project(x)
        assert Simplex(radius).contains(found) and L1Ball(radius).contains(inside)
        close(found, exact_projection(x, radius))
        close(inside, x if x.abs().sum() <= radius else exact_projection(x.abs(), radius) * x.sign())


def test_feasible_is_told_from_infeasible_in_every_type() -> None:
    for dtype in (torch.float32, torch.float64):
        thirds = torch.full((3,), 1 / 3, dtype=dtype)
        eps = torch.finfo(dtype).eps
        assert Simplex().contains(thirds) and not Simplex().contains(thirds + max(1e-8, 8 * eps))
        assert Simplex(1e6).contains(1e6 * thirds), "the roundings of large sets are large"
    assert Simplex().contains(torch.tensor([1, 0])) and not L1Ball().contains(torch.tensor([1, 1]))


@pytest.mark.parametrize("feasible", SETS, ids=str)
def test_projection_solves_its_program(feasible: ConvexSet) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="needs scipy")
    conditions = {
        Simplex: [{"type": "eq", "fun": lambda p: p.sum() - feasible.radius}],
        L1Ball: [{"type": "ineq", "fun": lambda p: feasible.radius - abs(p).sum()}],
        L2Ball: [{"type": "ineq", "fun": lambda p: feasible.radius**2 - (p**2).sum()}],
    }[type(feasible)]
    bounds = [(0, None)] * 4 if isinstance(feasible, Simplex) else None
    for row in torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double():
        target = row.numpy()
        found = optimize.minimize(
            lambda p, target=target: ((p - target) ** 2).sum(), target * 0.1, bounds=bounds, constraints=conditions
        )
        torch.testing.assert_close(feasible.project(row), torch.from_numpy(found.x), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("feasible", SETS, ids=str)
def test_iterates_stay_feasible(name: str, feasible: ConvexSet) -> None:
    updates: list[blackbox.Update] = [FrankWolfe(feasible, lambda k: 2 / (k + 2)), GradientDescent(0.5, feasible)]
    for update in updates:
        run = blackbox.iterate(Oracle(quadratic), vertex(feasible), ESTIMATORS[name](), update)
        assert all(feasible.contains(point.x, tolerance=1e-9) for point in islice(run, 300))


def test_calls_and_steps_are_counted() -> None:
    update = FrankWolfe(Simplex())
    for name, at_start, each in (
        ("jaguar_d", 2 * D, 2),
        ("jaguar_d_from_zero", 0, 2),
        ("jaguar_s", 2 * D, 2),
        ("full_differences", 0, 2 * D),
        ("spsa", 0, 2),
    ):
        asked: list[Tensor] = []

        def counted(x: Tensor, asked: list[Tensor] = asked) -> Tensor:
            asked.append(x)
            return quadratic(x)

        oracle = Oracle(counted)
        for point in islice(blackbox.iterate(oracle, vertex(Simplex()), ESTIMATORS[name](), update), 5):
            assert point.num_calls == at_start + point.num_steps * each == oracle.num_calls == len(asked)
        oracle = Oracle(quadratic)
        result = blackbox.minimize(oracle, vertex(Simplex()), ESTIMATORS[name](), update, max_calls=at_start + each + 1)
        assert (result.num_steps, result.num_calls, oracle.num_calls) == (1, at_start + each, at_start + each)
        with pytest.raises(ValueError, match=f"max_calls >= {at_start + each}"):
            blackbox.minimize(oracle, vertex(Simplex()), ESTIMATORS[name](), update, max_calls=at_start + each - 1)
        assert oracle.num_calls == at_start + each, "refused before anything is asked"


def test_two_points_share_a_sample_and_one_point_does_not() -> None:
    for feedback, expected in (("two_point", [0, 0, 1, 1, 2, 2]), ("one_point", [0, 1, 2, 3, 4, 5])):
        seen: list[int] = []

        def noisy(x: Tensor, xi: int, seen: list[int] = seen) -> float:
            seen.append(xi)
            return float(x.sum()) + 100.0 * (xi % 3)  # an error that only a shared sample cancels

        oracle = Oracle(noisy, samples=lambda n: n, feedback=feedback)  # type: ignore[arg-type]
        jaguar, x = JaguarD(initial="zero", tau=0.1), torch.zeros(D, dtype=torch.float64)
        jaguar.start(oracle, x)
        h = [float(jaguar.estimate(oracle, x, step).abs().max()) for step in range(3)]
        assert seen == expected
        assert (h == pytest.approx([1.0] * 3)) == (feedback == "two_point")
    full, seen_by_all = FullDifferences(), []
    oracle = Oracle(lambda x, xi: seen_by_all.append(xi) or 0.0, samples=lambda n: n)  # type: ignore[func-returns-value]
    for step in range(2):
        full.estimate(oracle, torch.zeros(D, dtype=torch.float64), step)
    assert seen_by_all == [0] * 2 * D + [1] * 2 * D


@pytest.mark.parametrize("feedback", ["two_point", "one_point"])
def test_stochastic_frank_wolfe_with_noise_converges(feedback: str) -> None:
    """f(x, xi) = f(x) + <x, xi> with samples of mean 0, and errors of every value."""
    shifts = torch.randn(512, D, generator=torch.Generator().manual_seed(2)).double()
    shifts = 0.3 * (shifts - shifts.mean(0))

    def sampled(x: Tensor, xi: Tensor) -> Tensor:
        return quadratic(x) + (x * shifts[xi].mean(0)).sum()

    samples = Minibatches(512, 8, seed=1)
    oracle = Oracle(sampled, samples=samples, feedback=feedback, noise=1e-3)  # type: ignore[arg-type]
    feasible = Simplex()
    tau = 0.3 if feedback == "one_point" else 0.03
    x = vertex(feasible)
    result = blackbox.minimize(oracle, x, Averaged(JaguarS(tau=tau)), FrankWolfe(feasible), max_calls=10_000)
    best = best_value(feasible)
    share = (float(quadratic(result.x)) - best) / (float(quadratic(x)) - best)
    assert share < 0.1


def test_errors_are_bounded_centred_and_seeded() -> None:
    x = torch.zeros(D, dtype=torch.float64)
    values = torch.tensor(Oracle(lambda x: 5.0, noise=0.5).values([x] * 3000), dtype=torch.float64)
    assert 0.49 < float((values - 5).abs().max()) <= 0.5
    assert abs(float(values.mean()) - 5) < 4 * 0.5 / math.sqrt(3 * 3000)
    assert values.tolist() == Oracle(lambda x: 5.0, noise=0.5).values([x] * 3000)
    assert values.tolist() != Oracle(lambda x: 5.0, noise=0.5, seed=1).values([x] * 3000)


def test_runs_repeat_by_seed_and_touch_no_global_generator() -> None:
    def final(seed: int) -> Tensor:
        oracle = Oracle(quadratic, noise=1e-3, seed=seed)
        jaguar = Averaged(JaguarS(tau=0.05, seed=seed))
        return blackbox.minimize(oracle, vertex(Simplex()), jaguar, FrankWolfe(Simplex()), max_calls=400).x

    before = torch.random.get_rng_state()
    assert torch.equal(final(0), final(0)) and not torch.equal(final(0), final(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    reused, update = JaguarD(), GradientDescent(0.1)
    runs = [blackbox.minimize(Oracle(quadratic), [0.0] * D, reused, update, max_calls=60).x for _ in range(2)]
    assert torch.equal(*runs), "an estimator is started anew"


def test_start_keeps_its_type_and_is_not_changed() -> None:
    start = torch.zeros(D)
    result = blackbox.minimize(Oracle(quadratic), start, JaguarD(tau=1e-2), GradientDescent(0.1), max_calls=200)
    assert result.x.dtype == torch.float32 and not start.any() and result.x.any()
    result = blackbox.minimize(Oracle(quadratic), [0] * D, JaguarD(), GradientDescent(0.1), max_calls=20)
    assert result.x.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JaguarD(tau=0.0), "tau > 0"),
        (lambda: JaguarS(initial="ones"), "zero or differences, got 'ones'"),  # type: ignore[arg-type]
        (lambda: Simplex(-1), "radius > 0"),
        (lambda: Oracle(3), "a callable"),  # type: ignore[arg-type]
        (lambda: Oracle(quadratic, feedback="three_point"), "two_point or one_point"),  # type: ignore[arg-type]
        (lambda: Oracle(quadratic, feedback="one_point"), "samples with one_point"),
        (lambda: Oracle(quadratic, noise=-1.0), "noise >= 0"),
        (lambda: Minibatches(0, 1), "num_examples >= 1"),
        (lambda: descend([[0.0]]), "a finite vector"),
        (lambda: descend([0.0, math.nan]), "a finite vector"),
        (lambda: descend("abc"), "a vector of numbers"),
        (lambda: descend([0.5, 0.6], FrankWolfe(Simplex())), r"a start in Simplex\(1\).*take project"),
        (lambda: descend([0.5, 0.5], FrankWolfe(Simplex(), 1.5)), r"step sizes in \[0, 1\], got 1.5"),
        (lambda: descend([0.5, 0.5], GradientDescent(-0.1)), "step sizes"),
        (lambda: descend([0.5, 0.5], estimator=Averaged(SPSA(), weight=lambda k: 2.0)), "weights in"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_lines_of_the_readme_and_of_the_package_run() -> None:
    from processes import ROOT

    (line,) = re.findall(r"`(blackbox\.minimize\(.*\)\.x)`", (ROOT / "README.md").read_text())
    wanted = torch.tensor([0.2, 0.8], dtype=torch.float64)
    names = {"blackbox": blackbox, "x": [1.0, 0.0], "f": lambda x: (x - wanted).square().sum()}
    torch.testing.assert_close(eval(line, names), wanted, rtol=0, atol=0.05)
    assert blackbox.__doc__ is not None
    example = [line[4:] for line in blackbox.__doc__.splitlines() if line.startswith("    ")]
    scope: dict[str, Any] = {}
    exec("\n".join(example), scope)
    torch.testing.assert_close(scope["result"].x, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.02)


def descend(
    x: object, update: blackbox.Update | None = None, estimator: GradientEstimator | None = None
) -> blackbox.Iterate:
    oracle = Oracle(lambda x: x.square().sum())
    return blackbox.minimize(oracle, x, estimator or JaguarD(), update or GradientDescent(0.1), max_calls=20)


def test_a_value_that_is_not_finite_ends_the_run() -> None:
    oracle = Oracle(lambda x: x.log().sum())
    with pytest.raises(FloatingPointError, match="outside of the feasible set"):
        blackbox.minimize(oracle, [1.0, 0.0], JaguarD(), FrankWolfe(Simplex()), max_calls=10)


@pytest.mark.parametrize("bad_call", [1, 4, 11])
def test_the_last_point_before_a_value_that_is_not_finite_is_kept(bad_call: int) -> None:
    """In the estimator's start, in the first step, later: what was reached is what a shorter run returns."""
    oracle = Oracle(lambda x: math.nan if oracle.num_calls == bad_call else quadratic(x[:D]))
    start, update = torch.zeros(D), GradientDescent(0.1)
    estimator = JaguarD(initial="differences") if bad_call == 1 else JaguarD(initial="zero")
    with pytest.raises(blackbox.NotFiniteError, match="got nan in call") as caught:
        blackbox.minimize(oracle, start, estimator, update, max_calls=100)
    last = pickle.loads(pickle.dumps(caught.value)).last
    assert last.num_steps == (bad_call // 2 if bad_call > 1 else 0)
    run = blackbox.iterate(Oracle(quadratic), start, JaguarD(initial="zero"), update)
    assert torch.equal(last.x, next(islice(run, last.num_steps, None)).x)

"""The oracle is itself checked: published vectors, moments, the papers' claims, convergence on quadratics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference as ref
import torch

Array = npt.NDArray[Any]
SHAPES: list[tuple[int, ...]] = [(7, 5), (6,), (3, 2, 4), (4, 9)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: str) -> None:
    assert " ".join(f"{int(word):08x}" for word in ref.philox(counter, key)) == expected


def test_stream_layout() -> None:
    """Words, keys and counters sit where the noise specification puts them; any index can be asked for."""
    stream = ref.Stream(seed=0x0123456789ABCDEF, step=11, direction=3, tensor_id=5, domain=ref.SUPPORT2)
    key = (0x89ABCDEF, 0x01234567)
    block2 = [int(w) for w in ref.philox((2, 5, 11, 3 | (2 << 24)), key)]
    assert stream.words([8, 9, 10, 11]).tolist() == block2
    assert stream.uniform([9])[0] == np.float32((block2[1] >> 8) / 2**24)
    assert stream.rademacher([9 * 32 + 7])[0] == (-1.0 if block2[1] >> 7 & 1 else 1.0)
    w0, w1 = (int(w) for w in stream.words([0, 1]))
    assert stream.big_integer(10**15) == 10**15 * (w0 << 32 | w1) >> 64
    u, t = ((block2[2] >> 8) + 1) / 2**24, (block2[3] >> 8) / 2**24 * 2 * np.pi
    pair = np.sqrt(-2 * np.log(u)) * np.array([np.cos(t), np.sin(t)])
    np.testing.assert_allclose(stream.normal([10, 11]), pair, rtol=1e-6)
    assert stream.words(2**34 + 8) == stream.words(8), "the block number is taken mod 2**32"


def test_moments() -> None:
    stream, index = ref.Stream(seed=1, step=2, direction=0, tensor_id=0), np.arange(200_000)
    normal, uniform, sign = stream.normal(index), stream.uniform(index), stream.rademacher(index)
    assert normal.dtype == uniform.dtype == sign.dtype == np.float32
    bound = 5 / np.sqrt(index.size)
    assert abs(normal.mean()) < bound and abs(normal.var() - 1) < bound * np.sqrt(2)
    assert abs((normal**4).mean() - 3) < bound * np.sqrt(96)
    assert abs(np.mean(normal[:-1] * normal[1:])) < bound
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < bound * np.sqrt(1 / 12)
    assert set(np.unique(sign)) == {-1.0, 1.0} and abs(sign.mean()) < bound


def test_choice_is_uniform_sorted_and_without_replacement() -> None:
    counts = np.zeros(10)
    for step in range(1000):
        picked = ref.Stream(0, step, 0, 0, ref.SUPPORT).choice(10, 3)
        assert np.all(np.diff(picked) > 0)
        counts[picked] += 1
    assert np.all(np.abs(counts / 1000 - 0.3) < 5 * np.sqrt(0.21 / 1000))
    stream = ref.Stream(9, 0, 0, 0, ref.DATA)
    assert sorted(stream.permutation(100)) == list(range(100))
    assert stream.choice(100, 1)[0] == stream.permutation(100)[0]


@pytest.mark.parametrize(
    ("probe", "sizes"),
    [
        (ref.Probe("gaussian"), [35, 6, 24, 36]),
        (ref.Probe("rademacher"), [35, 6, 24, 36]),
        (ref.Probe("entry"), [1, 1, 1, 1]),
        (ref.Probe("row"), [5, 1, 8, 9]),
        (ref.Probe("block", rows=0.5, cols=0.4), [3 * 2, 2, 1 * 3, 2 * 3]),
        (ref.Probe("block", rows=0.01, cols=0.01), [1, 1, 1, 1]),
    ],
)
def test_support_sizes(probe: ref.Probe, sizes: list[int]) -> None:
    zs = probe.direction(SHAPES, seed=3, step=4, k=1)
    assert [z.shape for z in zs] == SHAPES and all(z.dtype == np.float32 for z in zs)
    assert [int((z != 0).sum()) for z in zs] == sizes


def test_block_rows_and_columns_have_their_own_domains() -> None:
    z = ref.Probe("block", rows=0.5, cols=0.5).direction([(3,), (12, 12)], seed=1, step=2, k=3)
    rows, cols = (ref.Stream(1, 2, 3, 1, domain).choice(12, 6) for domain in (ref.SUPPORT, ref.SUPPORT2))
    assert np.array_equal(z[1] != 0, np.isin(np.arange(12), rows)[:, None] & np.isin(np.arange(12), cols))
    assert np.flatnonzero(z[0]).tolist() == ref.Stream(1, 2, 3, 0, ref.SUPPORT2).choice(3, 1).tolist()
    signs = ref.Stream(1, 2, 3, 1, ref.VALUE).rademacher(np.arange(144)).reshape(12, 12)
    assert np.array_equal(z[1], np.where(z[1] != 0, signs, 0))


def test_supports_over_tensors_and_signs() -> None:
    for step in range(20):
        z = ref.Probe("coordinate").direction(SHAPES, 0, step, 0)
        assert sum(int((a != 0).sum()) for a in z) == 1
        chosen = [bool(a.all()) for a in ref.Probe("tensors", fraction=0.6).direction(SHAPES, 0, step, 0)]
        assert sum(chosen) == 2
        ones = ref.Probe("block", signs="ones").direction(SHAPES, 0, step, 0)
        random = ref.Probe("block").direction(SHAPES, 0, step, 0)
        assert all(np.array_equal(a, np.abs(b)) for a, b in zip(ones, random, strict=True))


def test_scalars_are_vectors_of_one_entry() -> None:
    for kind in ["gaussian", "rademacher", "coordinate", "entry", "row", "block", "tensors"]:
        probe = ref.Probe(kind, fraction=1.0)
        (z,) = probe.direction([()], 0, 0, 0)
        assert z.shape == () and z != 0
        sign = ref.Optimizer("jaguar_muon", lr=0.1, sign_lr_scale=0.5)
        trainer = ref.DenseTrainer({"s": torch.tensor(1.0)}, lambda x: float(x["s"]), sign, probe, tau=0.1)
        trainer.step(0)
        assert trainer.params["s"].shape == () and trainer.params["s"] == 1 - np.float32(0.05)


def test_block_estimate_is_unbiased_with_random_signs_and_goes_uphill_with_ones() -> None:
    """A vector (partials -1, visited often) against a matrix (partials +0.2, visited rarely, l1 larger)."""
    gradient = [np.full((20, 20), 0.2), np.full(20, -1.0)]
    shapes = [g.shape for g in gradient]

    def f(x: list[Array]) -> float:
        return 0.5 * sum(float(((a + g) ** 2).sum()) for a, g in zip(x, gradient, strict=True))

    def mean_estimate(signs: str, num: int) -> list[Array]:
        total = [np.zeros(shape) for shape in shapes]
        for step in range(num):
            z = ref.Probe("block", rows=0.1, cols=0.1, signs=signs).direction(shapes, 0, step, 0)
            rho = (f([0.1 * a for a in z]) - f([-0.1 * a for a in z])) / 0.2
            total = [t + rho * a / num for t, a in zip(total, z, strict=True)]
        return total

    matrix, vector = mean_estimate("random", 1000)
    # Each coordinate's expectation is P(visited) times its partial derivative: 0.01 * 0.2 and 0.1 * -1.
    assert abs(matrix.mean() - 0.002) < 1e-3
    assert np.all(np.abs(vector + 0.1) < 0.07) and abs(vector.mean() + 0.1) < 0.015
    ones = mean_estimate("ones", 300)
    assert ones[0].mean() < -0.005, "the matrix receives the sum of the partials over the whole support"
    slope = sum(float((np.sign(e) * g).sum()) for e, g in zip(ones, gradient, strict=True))
    assert slope < 0, "stepping along -sign of the estimate goes uphill"


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_newton_schulz_against_svd(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    rank = min(shape)
    u = np.linalg.qr(rng.normal(size=(shape[0], rank)))[0]
    v = np.linalg.qr(rng.normal(size=(shape[1], rank)))[0]
    singular = np.geomspace(1.0, 0.03, rank)
    matrix = (u * singular) @ v.T
    assert singular.min() >= 0.01 * np.linalg.norm(matrix)
    for dtype in (np.float32, np.float64):
        o = ref.newton_schulz(matrix, dtype=dtype)
        values = np.linalg.svd(o, compute_uv=False)
        assert o.dtype == dtype and values.min() >= 0.68 and values.max() <= 1.13
        projected = u.T @ o @ v
        np.testing.assert_allclose(projected, np.diag(np.diag(projected)), atol=1e-4)
    well = (u * np.linspace(1.0, 0.5, rank)) @ v.T
    np.testing.assert_allclose(ref.newton_schulz(well, "cubic", np.float64), u @ v.T, atol=1e-3)
    assert not ref.newton_schulz(np.zeros(shape)).any()


@pytest.mark.parametrize(("adjust", "scale"), [("original", "sqrt_ratio"), ("match_rms_adamw", "match_rms")])
def test_newton_schulz_and_scales_against_torch_muon(adjust: str, scale: str) -> None:
    """One step of torch.optim.Muon, whose Newton-Schulz is in bfloat16."""
    gradient = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros(24, 10))
    weight.grad = gradient.clone()
    muon: Any = torch.optim.Muon([weight], 1.0, 0.0, 0.0, False, adjust_lr_fn=adjust)
    muon.step()
    ours = ref.SCALES[scale](24, 10) * ref.newton_schulz(gradient.numpy())
    np.testing.assert_allclose(-weight.detach().numpy(), ours, atol=0.03)


def quadratic(seed: int = 0) -> tuple[dict[str, torch.Tensor], Callable[[dict[str, torch.Tensor]], float]]:
    """f = 0.5 sum of curvature * (x - target)^2 on two matrices and a vector, and its start at 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (4, 3), "a.bias": (3,), "c.weight": (2, 3)}
    target = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    curvature = {name: 0.5 + torch.rand(shape, generator=generator) for name, shape in shapes.items()}

    def loss(x: dict[str, torch.Tensor]) -> float:
        return sum(
            float((0.5 * curvature[name].double() * (x[name].double() - target[name].double()) ** 2).sum())
            for name in shapes
        )

    return {name: torch.zeros(shape) for name, shape in shapes.items()}, loss


CONVERGE = [
    (ref.Optimizer("zo_sgd", lr=0.03), ref.Probe("gaussian"), "two_point", 1),
    (ref.Optimizer("zo_sgd", lr=0.03), ref.Probe("rademacher"), "one_sided", 4),
    (ref.Optimizer("jaguar_sign_sgd", lr=0.01, beta=0.5), ref.Probe("coordinate"), "two_point", 1),
    (ref.Optimizer("jaguar_sign_sgd", lr=0.02, beta=0.5), ref.Probe("entry"), "one_sided", 2),
    (ref.Optimizer("jaguar_sign_sgd", lr=0.02), ref.Probe("row"), "two_point", 2),
    (ref.Optimizer("jaguar_sign_sgd", lr=0.02), ref.Probe("block", rows=0.5, cols=0.7), "two_point", 2),
    (ref.Optimizer("jaguar_muon", lr=0.03), ref.Probe("tensors", fraction=0.7), "two_point", 4),
    (ref.Optimizer("jaguar_muon", lr=0.03, beta=0.5, polynomial="cubic"), ref.Probe("entry"), "two_point", 2),
    (ref.Optimizer("jaguar_muon", lr=0.03, sign_names=("c.*",)), ref.Probe("row"), "two_point", 2),
]


@pytest.mark.parametrize(("optimizer", "probe", "estimator", "q"), CONVERGE)
def test_converges_on_a_quadratic(optimizer: ref.Optimizer, probe: ref.Probe, estimator: str, q: int) -> None:
    params, loss = quadratic()
    trainer = ref.DenseTrainer(params, loss, optimizer, probe, num_directions=q, estimator=estimator)
    for t in range(200):
        trainer.step(t)
    assert loss(trainer.params) < 0.15 * loss(params)


def as_objective(loss: Callable[[dict[str, torch.Tensor]], float], names: list[str]) -> ref.Objective:
    return lambda x: loss({name: torch.from_numpy(a) for name, a in zip(names, x, strict=True)})


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_trainer_follows_the_papers_algorithms(beta: float) -> None:
    """Coordinate probe = Algorithm 1 (JAGUAR-d's overwrite at beta 0); entry probe with +1 = Algorithm 2."""
    params, loss = quadratic()

    def full(x: dict[str, torch.Tensor]) -> float:
        return loss({**params, **x})

    for optimizer, probe in [
        (ref.Optimizer("jaguar_sign_sgd", lr=0.005, beta=beta), ref.Probe("coordinate")),
        (ref.Optimizer("jaguar_muon", lr=0.005, beta=beta), ref.Probe("entry", signs="ones")),
    ]:
        start = {name: p for name, p in params.items() if p.ndim == 2} if probe.kind == "entry" else params
        trainer = ref.DenseTrainer(start, full, optimizer, probe, seed=5, tau=0.01)
        names = list(trainer.params)
        x = [trainer.params[name].numpy().copy() for name in names]
        drawn = []
        for t in range(30):
            drawn.append([np.flatnonzero(z) for z in trainer.direction(t, 0).values()])
            trainer.step(t)
        published = ref.Published(as_objective(full, names), x, lr=0.005, tau=0.01)
        if probe.kind == "entry":
            end = published.algorithm2([[int(i[0]) for i in at] for at in drawn], beta)
        else:
            sizes = np.cumsum([0] + [a.size for a in x])
            at = [next(int(o + i[0]) for o, i in zip(sizes, d, strict=False) if i.size) for d in drawn]
            end = published.algorithm1(at, beta)
            if beta == 0:
                for side, other in zip(end, published.jaguar_d_sign(at), strict=True):
                    assert all(np.array_equal(a, b) for a, b in zip(side, other, strict=True))
        for name, a, m in zip(names, *end, strict=True):
            np.testing.assert_allclose(trainer.memory[name], m, rtol=1e-3, atol=2e-5)
            np.testing.assert_allclose(trainer.params[name].numpy(), a, atol=1e-4)


def test_update_is_bitwise_the_float32_sequence() -> None:
    """The same eager float32 torch operations give the same bits; unvisited memory is untouched."""
    probe = ref.Probe("block", rows=0.6, cols=0.6)
    zs = [probe.direction([(9, 8)], 0, 0, k)[0] for k in range(3)]
    rhos = [0.3, -1.7, 0.123456789]
    rng = np.random.default_rng(0)
    x, m = (rng.normal(size=(9, 8)).astype(np.float32) for _ in range(2))
    tx, tm = torch.from_numpy(x.copy()), torch.from_numpy(m.copy())
    visits, total = torch.zeros(9, 8), torch.zeros(9, 8)
    for z, rho in zip(map(torch.from_numpy, zs), rhos, strict=True):
        total, visits = total + torch.tensor(rho) * z, visits + (z != 0)
    seen = visits > 0
    assert 0 < int(seen.sum()) < 72 and int(visits.max()) > 1
    tm[seen] = torch.tensor(0.9) * tm[seen] + torch.tensor(1 - 0.9) * (total[seen] / visits[seen])
    expected = tx - torch.tensor(0.01) * (torch.sign(tm) + torch.tensor(0.1) * tx)
    optimizer = ref.Optimizer("jaguar_sign_sgd", lr=0.01, weight_decay=0.1)
    new_x, new_m = optimizer.update("w", x, m, zs, rhos)
    assert np.array_equal(new_m, tm.numpy()) and np.array_equal(new_m[~seen], m[~seen])
    assert np.array_equal(new_x, expected.numpy())
    new_x, _ = ref.Optimizer("zo_sgd", lr=0.01).update("w", x, m, zs, rhos)
    assert np.array_equal(new_x, (tx - torch.tensor(0.01) * (total / torch.tensor(3.0))).numpy())


def test_losses_dtype_and_skipped_steps() -> None:
    params, loss = quadratic()
    seen: list[torch.dtype] = []

    def watched(x: dict[str, torch.Tensor]) -> float:
        seen.append(x["a.bias"].dtype)
        return loss(x)

    sgd, probe = ref.Optimizer("zo_sgd", lr=0.01), ref.Probe("gaussian")
    half = ref.DenseTrainer(params, watched, sgd, probe, num_directions=2, dtype=torch.bfloat16)
    losses, rhos = half.step(0)
    assert seen == [torch.bfloat16] * 4 and half.params["a.bias"].dtype == torch.float32
    assert rhos == [(losses[0] - losses[1]) / 2e-3, (losses[2] - losses[3]) / 2e-3]
    one = ref.DenseTrainer(params, loss, sgd, probe, num_directions=2, estimator="one_sided")
    losses, rhos = one.step(0)
    assert losses[0] == loss(params) and rhos == [(f - losses[0]) / 1e-3 for f in losses[1:]]
    broken = ref.DenseTrainer(params, lambda x: float("nan"), sgd, probe)
    broken.step(0)
    assert all(torch.equal(broken.params[name], p) for name, p in params.items())

"""Noise: known answers, the oracle's numbers, any slice, no collisions, no global state, the compiled kernels."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from processes import needs_compiler, run

from zoscale.noise import fused, philox
from zoscale.noise.generator import _LONG_RANGE, Domain, Key, Noise, Range, signs_at

torch.set_num_threads(1)

SEED = 0x0123456789ABCDEF
KEY = Key(step=11, direction=3, domain=Domain.SUPPORT_COLUMNS)
DISTRIBUTIONS = ["words", "uniform", "normal", "rademacher"]
SLICES = [(0, 1), (0, 4), (1, 2), (3, 5), (5, 131), (31, 33), (32, 64), (127, 128), (250, 257), (256, 611), (7, 7)]


def draw(noise: Noise, distribution: str, key: Key, ranges: list[Range]) -> list[torch.Tensor]:
    method: Callable[..., list[torch.Tensor]] = getattr(noise, distribution)
    return method(key, ranges)


def expected(distribution: str, key: Key, wanted: Range, seed: int = SEED) -> np.ndarray[Any, Any]:
    stream = ref.Stream(seed, key.step, key.direction, wanted.tensor, int(key.domain))
    numbers: np.ndarray[Any, Any] = getattr(stream, distribution)(np.arange(wanted.start, wanted.stop))
    return numbers.view(np.int32) if distribution == "words" else numbers


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
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
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: str) -> None:
    """The vectors published with Random123 (kat_vectors, philox4x32 10), and the place of each counter and key word."""
    block, tensor, step, last = counter
    where: Any = Key(step, last & 0xFFFFFF, last >> 24)  # type: ignore[arg-type]
    wanted = Range(tensor, 4 * block, 4 * block + 4)
    for ranges in ([wanted], [Range(1, 0, 9), wanted]):
        words = Noise(key[0] | key[1] << 32).words(where, ranges)[-1]
        assert words.dtype == torch.int32
        assert " ".join(f"{word & 0xFFFFFFFF:08x}" for word in words.tolist()) == answer


@pytest.mark.parametrize("seed", [0, 1, 2**32, SEED, 2**64 - 1])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_equals_the_reference(distribution: str, seed: int) -> None:
    """Integers, uniforms and signs are the same bits; normals agree to 1e-6. Ids and steps beyond int32 count too."""
    ranges = [Range(0, 0, 257), Range(5, 3, 70), Range(2**32 - 1, 1001, 1040), Range(7, 2**34 - 9, 2**34)]
    for key in [Key(0), Key(2**32 - 1, 2**24 - 1, Domain.DATA), Key(2**31, 1, Domain.SUPPORT)]:
        for wanted, drawn in zip(ranges, draw(Noise(seed), distribution, key, ranges), strict=True):
            oracle = expected(distribution, key, wanted, seed)
            assert drawn.shape == (wanted.stop - wanted.start,)
            assert drawn.numpy().dtype == oracle.dtype
            if distribution == "normal":
                np.testing.assert_allclose(drawn.numpy(), oracle, rtol=1e-6, atol=1e-6)
            else:
                assert np.array_equal(drawn.numpy(), oracle)


def test_logarithm_of_every_uniform() -> None:
    """To a relative 2e-7 on the whole domain, 0 of 1 included: radii near 0 need relative accuracy."""
    numerators = torch.arange(1, 2**24 + 1, dtype=torch.int32)
    expected = -2 * torch.log(numerators.double() * 2.0**-24)
    actual = philox._minus_two_log(numerators).double()
    torch.testing.assert_close(actual, expected, rtol=2e-7, atol=0)


def test_many_normals_equal_the_reference() -> None:
    """1e-6 holds for every angle and radius, not only for the few above: NumPy's float64 Box-Muller, rounded."""
    wanted = Range(2, 0, 2**17)
    (drawn,) = Noise(SEED).normal(KEY, [wanted])
    np.testing.assert_allclose(drawn.numpy(), expected("normal", KEY, wanted), rtol=1e-6, atol=1e-6)


def test_integers_choices_and_permutation_equal_the_reference() -> None:
    noise = Noise(SEED)
    limits = [(0, 1), (3, 7), (2**32 - 1, 10**15), (9, 2**63 - 1)]
    for key in [Key(0), KEY, Key(2**32 - 1)]:
        streams = {t: ref.Stream(SEED, key.step, key.direction, t, int(key.domain)) for t in (0, 3, 2**32 - 1, 9)}
        assert noise.integers(key, limits) == [streams[tensor].big_integer(n) for tensor, n in limits]
        wanted = [(0, 100, 7), (3, 1, 1), (9, 33, 33), (0, 50, 0), (3, 1000, 999), (9, 100, 7), (2**32 - 1, 100, 8)]
        for (tensor, n, k), chosen in zip(wanted, noise.choices(key, wanted), strict=True):
            assert chosen.dtype == torch.int64
            assert chosen.tolist() == streams[tensor].choice(n, k).tolist()
        for n in (1, 2, 333):
            assert noise.permutation(key, n).tolist() == streams[0].permutation(n).tolist()


def test_choices_of_equal_words_are_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: words as unsigned numbers, then positions; tensors of one size go together, whatever lies between."""
    words = {0: [5, -1, 5, 0, 5, 5], 1: [3, 3, 3], 2: [-1, -1, 7, -1, 7, 0], 3: [1, 1, 1], 4: [7, 6, 5, 4, 3, 2]}
    monkeypatch.setattr(Noise, "words", lambda self, key, ranges: [
        torch.tensor(words[tensor], dtype=torch.int32) for tensor, _, _ in ranges
    ])  # fmt: skip
    wanted = [(0, 6, 3), (1, 3, 2), (2, 6, 3), (3, 3, 3), (4, 6, 3), (1, 3, 0)]
    expected = [[0, 2, 3], [0, 1], [2, 4, 5], [0, 1, 2], [3, 4, 5], []]
    assert [chosen.tolist() for chosen in Noise(0).choices(Key(0), wanted)] == expected


def test_choices_and_permutation_are_uniform() -> None:
    noise, counts, firsts = Noise(0), np.zeros(10), np.zeros(5)
    for step in range(300):
        (chosen,) = noise.choices(Key(step), [(0, 10, 3)])
        counts[chosen.numpy()] += 1
        firsts[int(noise.permutation(Key(step, 1), 5)[0])] += 1
    assert np.all(np.abs(counts / 300 - 0.3) < 5 * np.sqrt(0.21 / 300))
    assert np.all(np.abs(firsts / 300 - 0.2) < 5 * np.sqrt(0.16 / 300))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_any_slice_is_the_slice_of_the_whole(distribution: str) -> None:
    """Pitfalls 4 and 5: a shard, a row or a chunk is drawn as the same numbers as the whole tensor, bit for bit."""
    noise = Noise(SEED)
    (whole,) = draw(noise, distribution, KEY, [Range(6, 0, 611)])
    for start, stop in SLICES:
        (part,) = draw(noise, distribution, KEY, [Range(6, start, stop)])
        assert torch.equal(part, whole[start:stop]), (start, stop)
    together = draw(noise, distribution, KEY, [Range(6, start, stop) for start, stop in SLICES])
    for (start, stop), part in zip(SLICES, together, strict=True):
        assert torch.equal(part, whole[start:stop]), (start, stop)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_ranges_of_several_tensors_in_one_call(distribution: str) -> None:
    noise = Noise(SEED)
    ranges = [Range(4, 3, 50), Range(0, 0, 1), Range(4, 0, 3), Range(9, 65, 65), Range(2**32 - 1, 130, 400)]
    together = draw(noise, distribution, KEY, ranges)
    for wanted, drawn in zip(ranges, together, strict=True):
        (alone,) = draw(noise, distribution, KEY, [wanted])
        assert torch.equal(drawn, alone)
    assert draw(noise, distribution, KEY, []) == []
    (empty,) = draw(noise, distribution, KEY, [Range(0, 8, 8)])
    assert empty.shape == (0,) and empty.dtype == together[0].dtype


@pytest.mark.parametrize("tensor", [5, 2**32 - 1])
def test_long_ranges_in_one_call(tensor: int) -> None:
    """Whose counters are made range by range; far into a tensor, too, where they are beyond 2**31."""
    noise = Noise(SEED)
    ranges = [Range(tensor, 2**34 - 8000, 2**34), Range(7, 1, 4000), Range(tensor, 2**33 - 2001, 2**33 + 3000)]
    assert sum(stop - start for _, start, stop in ranges) // 4 > _LONG_RANGE * len(ranges)
    for wanted, drawn in zip(ranges, noise.words(KEY, ranges), strict=True):
        (alone,) = noise.words(KEY, [wanted])
        assert torch.equal(drawn, alone)
        assert np.array_equal(drawn[-9:].numpy(), expected("words", KEY, wanted._replace(start=wanted.stop - 9)))


def test_signs_at_some_positions() -> None:
    noise, ranges = Noise(SEED), [Range(1, 37, 611), Range(2, 0, 5), Range(1, 64, 96)]
    indices = [
        torch.tensor([0, 1, 26, 27, 58, 573]),
        torch.tensor([[4, 0], [2, 2]]),
        torch.tensor([], dtype=torch.int64),
    ]
    words = noise.sign_words(KEY, ranges)
    for wanted, own, index, whole in zip(ranges, words, indices, noise.rademacher(KEY, ranges), strict=True):
        sign = signs_at(own, wanted, index)
        assert sign.shape == index.shape and torch.equal(sign, whole[index])


def test_no_global_generator_is_read_or_moved() -> None:
    """Pitfall 6: neither do the numbers depend on a global generator, nor do they move one."""

    def everything() -> list[Any]:
        noise, ranges = Noise(1), [Range(0, 3, 99), Range(1, 0, 7)]
        drawn: list[Any] = [part.tolist() for d in DISTRIBUTIONS for part in draw(noise, d, KEY, ranges)]
        drawn += [noise.integers(KEY, [(0, 99)]), noise.permutation(KEY, 9).tolist()]
        return [*drawn, noise.choices(KEY, [(0, 9, 4)])[0].tolist()]

    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    first = everything()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_state()) == repr(before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
    torch.manual_seed(2)
    np.random.seed(3)  # noqa: NPY002
    random.seed(4)
    assert everything() == first


def test_moments() -> None:
    noise, n = Noise(7), 2**17
    (normal,), (uniform,) = noise.normal(Key(1), [Range(0, 0, n)]), noise.uniform(Key(2), [Range(0, 0, n)])
    (sign,) = noise.rademacher(Key(3), [Range(0, 0, n)])
    z, u, bound = normal.double(), uniform.double(), 5 / n**0.5
    assert abs(z.mean()) < bound and abs(z.var() - 1) < bound * 2**0.5
    assert abs((z**3).mean()) < bound * 15**0.5 and abs((z**4).mean() - 3) < bound * 96**0.5
    assert 4 < float(z.abs().max()) < 5.77
    for lag in (1, 2, 3, 4):
        assert abs((z[lag:] * z[:-lag]).mean()) < 1.1 * bound, "neighbours are independent"
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(u.mean() - 0.5) < bound / 12**0.5 and abs(u.var() - 1 / 12) < bound * 0.08
    assert set(sign.unique().tolist()) == {-1.0, 1.0} and abs(sign.double().mean()) < bound
    assert abs((sign[32:] * sign[:-32]).double().mean()) < 1.1 * bound


def test_tensors_steps_and_directions_are_uncorrelated() -> None:
    """Pitfall 1: same-shaped tensors, other steps, other directions, other seeds and domains share nothing."""
    n = 4096
    wanted = [Range(0, 0, n), Range(1, 0, n), Range(2, 0, n)]
    keys = [Key(0), Key(1), Key(0, 1), Key(1, 1), Key(0, 0, Domain.SUPPORT)]
    for distribution in ("normal", "rademacher"):
        rows = [z for seed in (0, 1) for key in keys for z in draw(Noise(seed), distribution, key, wanted)]
        correlation = torch.corrcoef(torch.stack(rows).double()) - torch.eye(len(rows), dtype=torch.float64)
        assert float(correlation.abs().max()) < 5.5 / n**0.5


def test_no_collisions_over_a_grid_of_small_integers() -> None:
    """Pitfall 2: (seed, step, direction, tensor, domain) are separate words, so sums of them do not collide."""
    seen: set[int] = set()
    count = 0
    ranges = [Range(tensor, 0, 8) for tensor in (0, 1, 2, 3, 256)]
    for seed, step, k, domain in itertools.product((0, 1, 2, 2**32, 2**32 + 1), (0, 1, 2, 3, 2**24), (0, 1, 2), Domain):
        for words in Noise(seed).words(Key(step, k, domain), ranges):
            pairs = words.view(torch.int64).tolist()
            seen.update(pairs)
            count += len(pairs)
    assert count == 5 * 5 * 3 * 4 * 5 * len(Domain)
    assert len(seen) == count


FRESH = """
import json, torch
from zoscale.noise.generator import _LONG_RANGE, Domain, Key, Noise, Range, signs_at
from zoscale.shards import trainable_specs
noise, key = Noise(0x0123456789ABCDEF), Key(11, 3, Domain.SUPPORT_COLUMNS)
wanted = [Range(5, 3, 40)]
model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("q_proj", "head", "b", "a")})
print(json.dumps([
    noise.words(key, wanted)[0].tolist(), noise.rademacher(key, wanted)[0].tolist(),
    noise.normal(key, wanted)[0].tolist(), [(spec.id, spec.name) for spec, _ in trainable_specs(model)],
]))
"""


def test_the_same_numbers_and_ids_in_another_process() -> None:
    """Pitfall 3: nothing depends on Python's `hash`, which differs per process."""
    env = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", FRESH], env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    words, signs, normals, ids = json.loads(out.stdout.strip().splitlines()[-1])
    wanted = Range(5, 3, 40)
    assert words == expected("words", KEY, wanted).tolist()
    assert signs == expected("rademacher", KEY, wanted).tolist()
    assert normals == Noise(SEED).normal(KEY, [wanted])[0].tolist()
    names = sorted(f"{layer}.{part}" for layer in ("q_proj", "head", "b", "a") for part in ("weight", "bias"))
    assert ids == [[index, name] for index, name in enumerate(names)]


@pytest.fixture
def fresh_compiled() -> Iterator[None]:
    """Forget which kernels were compiled, before and after."""
    fused.compiled.cache_clear()
    yield
    fused.compiled.cache_clear()


def broken_compiler(*args: object, **kwargs: object) -> Any:
    raise RuntimeError("no C++ compiler\nlong story")


@pytest.mark.usefixtures("fresh_compiled")
@pytest.mark.parametrize(
    "compiler", [lambda *args, **kwargs: broken_compiler, broken_compiler], ids=["fails when called", "fails at once"]
)
def test_without_a_compiler_noise_is_eager_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, compiler: Callable[..., Any]
) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    noise, eager, wanted = Noise(SEED, compiled=True), Noise(SEED), [Range(5, 3, 40), Range(1, 0, 9)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            drawn = noise.normal(Key(step), wanted)
            assert all(torch.equal(a, b) for a, b in zip(drawn, eager.normal(Key(step), wanted), strict=True))
    assert [w.category for w in caught] == [UserWarning]
    text = str(caught[0].message)
    assert "eager" in text and "no C++ compiler" in text and "long story" not in text
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for distribution in DISTRIBUTIONS:
            (drawn,) = draw(noise, distribution, KEY, [Range(5, 3, 40)])
            (same,) = draw(eager, distribution, KEY, [Range(5, 3, 40)])
            assert torch.equal(drawn, same)
    assert len(caught) == 1, "the same text for the other kernels is shown once"


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiled")
def test_compiled_equals_eager() -> None:
    """Pitfall 4 for the fused kernels: integers as in eager mode, and slices of them the bits of the whole."""
    needs_compiler()
    compiled, eager = Noise(SEED, compiled=True), Noise(SEED)
    whole = Range(6, 0, 1111)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for distribution in DISTRIBUTIONS:
            (fused,) = draw(compiled, distribution, KEY, [whole])
            (plain,) = draw(eager, distribution, KEY, [whole])
            if distribution == "normal":
                torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(fused, plain)
            for start, stop in [*SLICES, (0, 1111), (5, 1110), (1023, 1111)]:
                (part,) = draw(compiled, distribution, KEY, [Range(6, start, stop)])
                assert torch.equal(part, fused[start:stop]), (distribution, start, stop)
            together = draw(compiled, distribution, KEY, [Range(3, 1, 77), Range(6, 129, 700)])
            assert torch.equal(together[1], fused[129:700])
    assert compiled.integers(KEY, [(3, 10**12)]) == eager.integers(KEY, [(3, 10**12)])
    assert torch.equal(compiled.permutation(KEY, 100), eager.permutation(KEY, 100))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_refused_seeds(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed in \[0, 2\*\*64\), got"):
        Noise(seed)


@pytest.mark.parametrize(
    ("key", "match"),
    [
        (Key(-1), "step"),
        (Key(2**32), "step"),
        (Key(0, -1), "direction"),
        (Key(0, 2**24), "direction"),
    ],
)
def test_refused_keys(key: Key, match: str) -> None:
    with pytest.raises(ValueError, match=f"expected 0 <= {match}"):
        Noise(0).words(key, [Range(0, 0, 4)])


@pytest.mark.parametrize("wanted", [(-1, 0, 4), (2**32, 0, 4), (0, -1, 4), (0, 5, 4), (0, 0, 2**34 + 1)])
def test_refused_ranges(wanted: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="tensor id and elements"):
        Noise(0).uniform(Key(0), [Range(0, 0, 1), Range(*wanted)])


@pytest.mark.parametrize(("n", "k"), [(3, 4), (3, -1), (0, 1)])
def test_refused_choices(n: int, k: int) -> None:
    with pytest.raises(ValueError, match="0 <= k <= n"):
        Noise(0).choices(Key(0), [(0, 5, 2), (1, n, k)])


@pytest.mark.measured
@pytest.mark.slow
def test_noise_benchmark_meets_its_bound(tmp_path: Path) -> None:
    """Compiled normals cost at most 1.25 x torch.randn per thread, best of three runs; every pass has a share."""
    passes, probes = ("perturb", "zo_sgd", "jaguar_sign_sgd"), ("gaussian", "rademacher", "block 0.5 x 0.5")
    ratios = []
    for what in ([], ["generators"], ["generators"]):
        command = ["launch/benchmark_noise.py", *what, "--json", str(tmp_path / "figures.json"), "--repeats", "15"]
        run([sys.executable, *command])
        figures = json.loads((tmp_path / "figures.json").read_text())
        if not what:
            assert all(0 < figures[f"{name}, {probe}"] < 2 for name in passes for probe in probes)
        ratios.append(figures["normal, compiled"])
        if ratios[-1] <= 1.25:
            return
    raise AssertionError(f"normal, compiled: {ratios} x torch.randn")

"""Probes: every row of the table against the dense oracle, whole, cut into pieces and sharded; realised supports."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from reference import portion as oracle_portion
from reference_methods import oracle_probe
from torch import nn

from zoscale.noise import fused
from zoscale.noise import generator as noise
from zoscale.noise.generator import Noise
from zoscale.noise.segments import Segment
from zoscale.probes import (
    PROBES,
    Block,
    Coordinate,
    Direction,
    Entry,
    JaguarProbe,
    Layers,
    Orthogonal,
    Probe,
    Rademacher,
    Row,
    Subspace,
    Tensors,
    pieces,
)
from zoscale.probes.jaguar import Signs, portion
from zoscale.shards import CHUNK, ShardedParam, TensorSpec

torch.set_num_threads(1)

SHAPES: list[tuple[int, ...]] = [(7,), (5, 3), (1, 9), (64, 33), (3, 4, 5), (1,)]
SEED = 2**40 + 5
SUPPORTED = sorted(name for name, probe in PROBES.items() if issubclass(probe, JaguarProbe))


def specs_of(shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[TensorSpec]:
    return [TensorSpec(i, name_of(i), shape) for i, shape in enumerate(shapes)]


def name_of(number: int) -> str:
    """Names of a model: an embedding, then two tensors in each layer."""
    return f"model.layers.{number // 2}.weight_{number}" if number else "model.embed"


def whole(spec: TensorSpec) -> ShardedParam:
    return ShardedParam(nn.Parameter(torch.zeros(spec.shape)), spec)


def slice_of(spec: TensorSpec, rank: int, world_size: int) -> ShardedParam:
    """The shard that ZeRO-3 gives a rank: the flat tensor cut into equal parts, the last ones padded."""
    param: Any = nn.Parameter(torch.empty(0))
    param.ds_tensor = torch.zeros(-(-spec.numel // world_size))
    param.ds_zero_partition_rank = rank
    return ShardedParam(param, spec)


def densified(direction: Direction, shards: list[ShardedParam], limit: int = CHUNK) -> list[torch.Tensor]:
    """z on the local slices, put together from pieces of at most `limit` elements."""
    out = {id(shard): torch.full((len(shard),), math.nan) for shard in shards}
    for group in pieces(shards, limit):
        for piece, segment in zip(group, direction.segments(group), strict=True):
            z = torch.zeros(piece.stop - piece.start)
            if segment is not None:
                assert segment.value.dtype == torch.float32
                assert segment.index is None or segment.index.dtype == torch.int64
                segment.add_to(z, 1.0)
            out[id(piece.shard)][piece.start : piece.stop] = z
    return [out[id(shard)] for shard in shards]


def dense(probe: Probe, shapes: Iterable[tuple[int, ...]], step: int, k: int, seed: int = SEED) -> list[torch.Tensor]:
    specs = specs_of(shapes)
    direction = probe.draw(Noise(seed), specs, step, k)
    flat = densified(direction, [whole(spec) for spec in specs])
    return [z.view(spec.shape) for z, spec in zip(flat, specs, strict=True)]


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "block": [{"rows": 0.34, "columns": 0.7}, {"rows": 1.0, "columns": 0.01}],
    "tensors": [{"share": 0.5}],
    "orthogonal": [{"rank": 2}],
    "subspace": [{"rank": 3, "resample_every": 2}],
    "layers": [{"share": 0.5, "inner": {"name": "block", "rows": 0.34}}],
}


def variants(name: str) -> list[tuple[Probe, Any]]:
    """A probe of the table with its defaults, other options and signs, each with the oracle's counterpart."""
    options = [{}, *OPTIONS.get(name, []), *([{"signs": "ones"}] if name in SUPPORTED else [])]
    names = [name_of(i) for i in range(len(SHAPES))]
    return [(PROBES[name](**given), oracle_probe(name, names, **given)) for given in options]


BITS = [
    Rademacher(), Block(rows=0.5, columns=0.3), Block(rows=1.0, columns=0.3, signs="ones"), Tensors(share=1.0),
    Layers(share=1.0, inner={"name": "block", "rows": 0.5, "columns": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize("probe", BITS, ids=lambda probe: type(probe).__name__)
@pytest.mark.parametrize("world_size", [1, 3])
def test_signs_as_bits_are_those_in_memory(probe: Probe, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is done with them, on slices that begin and end anywhere; short ones and odd rows stay in memory."""
    monkeypatch.setattr(noise, "_LONG", 64)
    monkeypatch.setattr(fused, "compiled", lambda function, *_, **_options: function)
    monkeypatch.setattr(noise, "compiled", lambda function: function)
    specs = specs_of([(40, 96), (64, 33), (128,), (3, 32), (7, 5)])
    shards = [slice_of(spec, rank, world_size) for spec in specs for rank in range(world_size)]
    packed, plain = (probe.draw(Noise(SEED, compiled=is_compiled), specs, 3, 1) for is_compiled in (True, False))
    sources = set()
    for group in pieces(shards, 960):
        for piece, one, other in zip(group, packed.segments(group), plain.segments(group), strict=True):
            assert (one is None) <= (other is None or not other.value.any())
            if one is not None:
                sources.add(one.source.dtype if isinstance(one.source, torch.Tensor) else None)
                size = piece.stop - piece.start
                for first, second in zip(uses(one, size), uses(other, size), strict=True):
                    assert torch.equal(first, second)
    assert sources >= {torch.int32, torch.float32}


def uses(segment: Segment | None, size: int) -> list[torch.Tensor]:
    """What every way to use a segment leaves in slices of this size."""
    start = torch.linspace(-1, 1, size)
    total, visited, visits, memory = (start.clone() for _ in range(4))
    live = torch.cat([start, start]).bfloat16()
    if segment is not None:
        segment.add_to(total, 0.3)
        segment.visit(visited, visits, -0.7)
        segment.remember(memory, 1.7, 0.9)
        segment.write(live, live.clone(), size, 1e-2)
    return [total, visited, visits, memory, live]


@pytest.mark.parametrize("name", PROBES)
def test_equals_the_oracle(name: str) -> None:
    """Every row of the table, on awkward shapes, several steps and directions, both signs."""
    for probe, oracle in variants(name):
        for step, k in [(0, 0), (1, 0), (0, 1), (12345, 7)]:
            expected = oracle.direction(SHAPES, SEED, step, k)
            for z, want in zip(dense(probe, SHAPES, step, k), expected, strict=True):
                if not probe.is_elementwise or name in ("gaussian", "layers"):
                    tolerance = 1e-6 if probe.is_elementwise else 2e-5
                    np.testing.assert_allclose(z.numpy(), want, rtol=tolerance, atol=tolerance)
                else:
                    assert np.array_equal(z.numpy(), want), (oracle, step, k)


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("limit", [1, 7, 32, 100, 2113])
def test_pieces_are_slices_of_the_whole(name: str, limit: int) -> None:
    """Pitfall 4: drawn piece by piece it is the same z."""
    few = SHAPES if limit >= 32 else [(7,), (5, 3), (1, 9), (4, 33), (3, 4, 5), (1,)]
    for probe, _ in variants(name)[:2]:
        for step in (0, 3):
            direction = probe.draw(Noise(SEED), specs_of(few), step, 1)
            shards = [whole(spec) for spec in specs_of(few)]
            cut = densified(direction, shards, limit)
            assert all(torch.equal(a, b) for a, b in zip(cut, densified(direction, shards), strict=True))


PATCHED: list[Probe] = [
    Entry(),
    Row(signs="ones"),
    Block(rows=0.1, columns=0.3),
    Block(rows=0.25, columns=0.25),
    Layers(share=0.5, inner={"name": "block", "rows": 0.1, "columns": 0.1}),
]


@pytest.mark.parametrize("probe", PATCHED, ids=lambda probe: type(probe).__name__)
def test_patches_are_all_of_z(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoscale.probes.jaguar._ROWS", 5)
    shapes = [(64, 32), (32,), (40, 64), (3, 4, 24), (64, 32), (640, 32)]
    specs = specs_of(shapes)
    direction = probe.draw(Noise(SEED), specs, 3, 1)
    patched = [spec for spec in specs if direction.is_patch(spec)]
    assert patched and all(direction.touches(spec) for spec in patched)
    whole_z = dense(probe, shapes, 3, 1)
    for spec, patch in zip(patched, direction.patches(patched, torch.device("cpu")), strict=True):
        z = torch.zeros(spec.rows, spec.columns)
        z[patch.rows[:, None], patch.columns] = patch.values
        assert torch.equal(z.view(-1), whole_z[spec.id].view(-1)) and z.count_nonzero() == patch.values.numel()


def test_what_is_large_is_no_patch() -> None:
    specs = specs_of([(64, 32)])
    for probe in (Block(rows=0.3, columns=0.3), Tensors(share=1.0), Rademacher()):
        direction = probe.draw(Noise(SEED), specs, 0, 0)
        assert not direction.is_patch(specs[0])
    with pytest.raises(ValueError, match="few rows and columns, got _Dense"):
        direction.patches(specs, torch.device("cpu"))


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_shards_are_slices_of_the_whole(name: str, world_size: int) -> None:
    """Pitfall 5: the ranks' slices together are the one-rank z, padding and empty slices included."""
    specs = specs_of()
    for probe, _ in variants(name)[:2]:
        direction = probe.draw(Noise(SEED), specs, 4, 2)
        parts = [densified(direction, [slice_of(s, rank, world_size) for s in specs], 50) for rank in range(world_size)]
        for i, z in enumerate(densified(direction, [whole(spec) for spec in specs])):
            assert torch.equal(torch.cat([part[i] for part in parts]), z)


@pytest.mark.parametrize("name", PROBES)
def test_directions_differ_and_are_reproducible(name: str) -> None:
    """Pitfalls 1 and 2: steps, directions, seeds and same-shaped tensors have z of their own."""
    shapes = [(40, 30), (40, 30), (40, 30), (40, 30)]
    probe = PROBES[name]()
    draws = {
        at: torch.cat([z.view(-1) for z in dense(probe, shapes, *at)])
        for at in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]
    }
    flat = list(draws.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])
    again = torch.cat([z.view(-1) for z in dense(probe, shapes, 1, 1, 0)])
    assert torch.equal(again, draws[1, 1, 0])
    tensors = [[z for z in dense(probe, shapes, step, 0) if bool(z.any())] for step in range(3)]
    for found in tensors:
        if name not in ("coordinate", "tensors", "row", "entry", "layers"):
            assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize(
    ("probe", "sizes"),
    [
        (Coordinate(), None),
        (Entry(), [1, 1, 1, 1, 1, 1]),
        (Row(), [1, 3, 9, 33, 20, 1]),
        (Block(rows=0.5, columns=0.34), [2, 2 * 1, 1 * 3, 32 * 11, 1 * 6, 1]),
        (Block(rows=1.0, columns=1.0), [7, 15, 9, 2112, 60, 1]),
        (Block(rows=0.01, columns=0.01), [1, 1, 1, 1, 1, 1]),
    ],
)
def test_realised_supports_are_exactly_the_asked_ones(probe: Probe, sizes: list[int] | None) -> None:
    """Pitfall 20: counts, not thresholds: the visited share is the asked one at every step."""
    for step in range(10):
        visited = [int((z != 0).sum()) for z in dense(probe, SHAPES, step, 0)]
        assert sum(visited) == 1 if sizes is None else visited == sizes


def test_block_is_rows_times_columns_without_replacement() -> None:
    counts = torch.zeros(20, 10)
    for step in range(150):
        (z,) = dense(Block(rows=0.25, columns=0.3), [(20, 10)], step, 0)
        seen = z != 0
        assert int(seen.any(1).sum()) == 5 and int(seen.any(0).sum()) == 3 and int(seen.sum()) == 15
        counts += seen
    assert float((counts / 150 - 0.075).abs().max()) < 5 * (0.075 * 0.925 / 150) ** 0.5


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 1), (0.5, 3), (0.7, 4), (1.0, 6)])
def test_tensors_takes_whole_tensors(share: float, count: int) -> None:
    """Pitfall 20 for the share of the tensors."""
    chosen = set()
    for step in range(30):
        zs = dense(Tensors(share=share), SHAPES, step, 0)
        full = [i for i, z in enumerate(zs) if bool((z != 0).all())]
        assert len(full) == count and all(not bool(z.any()) for i, z in enumerate(zs) if i not in full)
        chosen.update(full)
    assert chosen == set(range(6)), "every tensor is chosen sooner or later"


def test_a_portion_of_decimals_is_not_rounded_down() -> None:
    """0.29 * 100 is below 29 in float64; what is further from a whole number is the floor, as the oracle has it."""
    for n in (1, 2, 3, 10, 50, 64, 100, 768, 3072, 50272):
        for percent in range(1, 101):
            assert portion(percent / 100, n) == oracle_portion(percent / 100, n) == max(1, percent * n // 100)
    assert [portion(share, 3000) for share in (1 / 3, 2 / 3, 0.9999, 1 - 1e-13)] == [1000, 2000, 2999, 3000]


@pytest.mark.parametrize("name", SUPPORTED)
def test_signs(name: str) -> None:
    """`rademacher` takes both signs on the support that `ones` gives +1."""
    seen = set()
    for step in range(20):
        random = dense(PROBES[name](), SHAPES, step, 0)  # type: ignore[arg-type]
        ones = dense(PROBES[name](signs="ones"), SHAPES, step, 0)  # type: ignore[call-arg]
        assert all(torch.equal(a.abs(), b) for a, b in zip(random, ones, strict=True))
        seen.update(torch.cat([z[z != 0] for z in random]).tolist())
    assert seen == {-1.0, 1.0}
    assert set(get_args(Signs)) == {"rademacher", "ones"}


def test_coordinate_is_uniform_over_all_elements() -> None:
    hits = torch.zeros(3)
    for step in range(250):
        hits += torch.tensor([float((z != 0).any()) for z in dense(Coordinate(), [(2,), (2, 3), (4,)], step, 0)])
    expected = torch.tensor([2.0, 6.0, 4.0]) / 12
    assert torch.all((hits / 250 - expected).abs() < 5 * (expected * (1 - expected) / 250).sqrt())


def test_only_the_rows_of_tensors_that_a_rank_holds_are_touched() -> None:
    """A sparse direction stays sparse: an index, not a dense buffer, and None where there is nothing."""
    spec = TensorSpec(0, "w", (100, 100))
    shard = whole(spec)
    direction = Row().draw(Noise(0), [spec], 0, 0)
    found = [(g[0], direction.segments(g)[0]) for g in pieces([shard], 1000)]
    touched = [(piece, segment) for piece, segment in found if segment is not None]
    assert len(touched) == 1
    assert touched[0][1].value.numel() in (100, 1000)
    (narrow,) = [s for g in pieces([shard]) for s in direction.segments(g) if s is not None]
    assert narrow.index is not None and narrow.value.numel() == narrow.index.numel() == 100


@pytest.mark.parametrize("limit", [1, 3, 10, 1000])
def test_pieces_cover_every_element_once(limit: int) -> None:
    shards = [whole(spec) for spec in specs_of([(7,), (5, 3), (0,), (1, 9), (1,)])]
    counts = {id(shard): torch.zeros(len(shard)) for shard in shards}
    order = []
    for group in pieces(shards, limit):
        assert 0 < sum(piece.stop - piece.start for piece in group) <= limit
        for piece in group:
            counts[id(piece.shard)][piece.start : piece.stop] += 1
            order.append((piece.shard.spec.id, piece.start))
    assert all(bool((count == 1).all()) for count in counts.values())
    assert order == sorted(order)
    assert list(pieces([])) == []


def test_what_is_streamed_is_cut_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is larger than a chunk, and no tensor that is drawn shares its group: it would be drawn with it."""
    monkeypatch.setattr("zoscale.shards.CHUNK", 10)
    monkeypatch.setattr("zoscale.probes.base.STREAMED", 1000)
    shards = [whole(spec) for spec in specs_of([(4,), (1100,), (4,), (5,), (25,), (9,)])]

    def cut(streamed: set[int]) -> list[list[tuple[int, int]]]:
        found = pieces(shards, stream=lambda piece: piece if piece.shard.spec.id in streamed else None)
        return [[(piece.shard.spec.id, piece.stop - piece.start) for piece in group] for group in found]

    assert cut({1, 3, 5}) == [
        [(0, 4)],
        [(1, 1000)],
        [(1, 100)],
        [(2, 4), (3, 5)],
        [(4, 10)],
        [(4, 10)],
        [(4, 5)],
        [(5, 9)],
    ]
    assert cut(set()) == [[(p.shard.spec.id, p.stop - p.start) for p in group] for group in pieces(shards)]


def test_piece_range_is_in_the_whole_tensor() -> None:
    shard = slice_of(TensorSpec(3, "w", (5, 4)), rank=1, world_size=3)
    (group,) = pieces([shard])
    assert (shard.offset, len(shard)) == (7, 7) and group[0].range == (3, 7, 14)
    last = slice_of(TensorSpec(3, "w", (5, 4)), rank=2, world_size=3)
    assert (last.offset, len(last)) == (14, 6), "without the padding"
    empty = slice_of(TensorSpec(3, "b", (2,)), rank=3, world_size=4)
    assert (empty.offset, len(empty)) == (2, 0)


def test_segment_arithmetic() -> None:
    """One float32 multiplication and one addition per element; visits count where z is not zero."""
    value, index = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([4, 0, 2])
    for segment in (Segment(value, index), Segment(torch.tensor([-1.0, 0.0, 0.0, 0.0, 1.0]))):
        total, again, visits = torch.full((5,), 0.5), torch.full((5,), 0.5), torch.zeros(5)
        segment.add_to(total, 0.1)
        assert total.tolist() == torch.tensor([0.5 - 0.1, 0.5, 0.5, 0.5, 0.5 + 0.1]).tolist()
        segment.visit(again, visits, 0.1)
        assert torch.equal(again, total)
        assert visits[[0, 4]].tolist() == [1, 1] and visits[[1, 3]].tolist() == [0, 0]


@pytest.mark.parametrize("value", [0.0, -0.1, 1.0001, math.nan])
@pytest.mark.parametrize(("probe", "option"), [(Block, "rows"), (Block, "columns"), (Tensors, "share")])
def test_refused_shares(probe: type[Probe], option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"expected {option} in \(0, 1\], got"):
        probe(**{option: value})


@pytest.mark.parametrize("name", PROBES)
def test_a_direction_says_which_tensors_it_leaves_alone(name: str) -> None:
    """A forward may skip the layers before the first tensor that is touched."""
    specs = specs_of()
    for probe, _ in variants(name):
        for step in range(4):
            direction = probe.draw(Noise(SEED), specs, step, 0)
            for spec, z in zip(specs, densified(direction, [whole(spec) for spec in specs]), strict=True):
                assert direction.touches(spec) == bool(z.any())


def test_orthogonal_directions_have_orthonormal_factors() -> None:
    for rank, (full, low) in {None: (5, 8), 3: (3, 3)}.items():
        zs = dense(Orthogonal(rank=rank), [(5, 9), (30, 8), (7,)], 2, 1)
        for z, expected in zip(zs[:2], (full, low), strict=True):
            values = torch.linalg.svdvals(z)
            torch.testing.assert_close(values[:expected], torch.ones(expected), atol=1e-5, rtol=0)
            assert float(values[expected:].abs().sum()) < 1e-5
        torch.testing.assert_close(torch.linalg.vector_norm(zs[2]), torch.tensor(1.0))


def test_subspace_is_kept_for_some_steps() -> None:
    """One basis for all directions of a window of steps, another in the next."""
    draws = {
        (step, k): dense(Subspace(rank=2, resample_every=3), [(9, 8)], step, k)[0]
        for step in range(5)
        for k in range(2)
    }
    ranks = {
        window: int(torch.linalg.matrix_rank(torch.cat([draws[step, k] for step in window for k in range(2)], dim=1)))
        for window in ((0, 1, 2), (3, 4), (2, 3))
    }
    assert ranks == {(0, 1, 2): 2, (3, 4): 2, (2, 3): 4}
    assert torch.linalg.matrix_rank(torch.cat([draws[0, 0], draws[0, 1]])) == 4, "Psi is every direction's own"


def test_layers_takes_whole_layers_and_everything_outside() -> None:
    """LeZO: the asked share of the layers, the same for all directions of a step, another at the next."""
    specs = [TensorSpec(i, name, (3, 4)) for i, name in enumerate([
        "base.h.0.a", "base.h.0.experts.1.b", "base.h.1.a", "base.h.1.b", "base.h.10.a", "base.h.2.a", "lm_head", "wte",
    ])]  # fmt: skip
    seen = set()
    for step in range(12):
        active = []
        for k in range(2):
            direction = Layers(share=0.5).draw(Noise(1), specs, step, k)
            active.append([spec.name for spec in specs if direction.touches(spec)])
        assert active[0] == active[1]
        layers = {".".join(name.split(".")[:3]) for name in active[0] if ".h." in name}
        assert len(layers) == 2 and {"lm_head", "wte"} <= set(active[0])
        assert active[0] == [s.name for s in specs if ".h." not in s.name or ".".join(s.name.split(".")[:3]) in layers]
        seen.add(frozenset(layers))
    assert len(seen) > 2
    outside = Layers(share=0.1).draw(Noise(1), [TensorSpec(0, "wte", (2, 2))], 0, 0)
    assert outside.touches(TensorSpec(0, "wte", (2, 2))), "without layers everything is active"


@pytest.mark.parametrize(
    ("probe", "options", "match"),
    [
        (Layers, {"share": 0.0}, r"share in \(0, 1\]"),
        (Layers, {"inner": {"name": "gausian"}}, "gaussian"),
        (Layers, {"inner": {"name": "block", "row": 0.5}}, "rows"),
        (Layers, {"inner": {"name": "block", "rows": "x"}}, "inner.rows to be float"),
        (Layers, {"inner": {"name": "layers"}}, "inner.name to be one of"),
        (Subspace, {"rank": 0}, "rank >= 1"),
        (Subspace, {"resample_every": 0}, "resample_every >= 1"),
        (Orthogonal, {"rank": -1}, "rank >= 1"),
    ],
)
def test_refused_options(probe: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        probe(**options)

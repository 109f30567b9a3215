"""The highest point of a step's memory against that of the bare forward of the same rows, counted by the allocator."""

import gc
import sys
from typing import Any

import pytest
import torch
from allocations import highest_point
from processes import ROOT

sys.path.insert(0, str(ROOT / "launch"))

from bench.cells import SHAPES, Cell
from bench.variants import PROBES, build

from zoscale.probes import Block

WIDE: dict[str, Any] = SHAPES["opt-125m"] | {"num_hidden_layers": 4}
"""Large beside the buffers of the noise, which are a few of CHUNK elements whatever the size of the model."""


def test_a_product_is_counted() -> None:
    x = torch.ones(500, 500)
    assert highest_point(lambda: x @ x + x) == 2 * 10**6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "probe", "q"),
    [
        ("lora", "block", 1),
        ("lora", "block", 4),
        ("full", "block", 1),
        ("full", "quarter", 1),
        ("full", "rademacher", 1),
        ("full", "gaussian", 1),
        ("full", "gaussian", 4),
    ],
)
def test_a_step_adds_little_to_the_bare_forward(
    scheme: str, probe: str, q: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 15 % of the weights and what the bare forward holds; noise and update are included."""
    monkeypatch.setitem(SHAPES, "wide", WIDE)
    monkeypatch.setitem(PROBES, "quarter", Block(rows=0.25, columns=0.25))
    bench = build(Cell(model="wide", scheme=scheme, probe=probe, q=q, batch=4, tokens=32))
    weights = sum(parameter.nbytes for parameter in bench.engine.model.parameters())
    for name in ("bare", "fan_out"):  # compilation, the optimizer's state
        bench.steps[name]()
    peaks = {name: highest_point(bench.steps[name]) for name in ("bare", "fan_out")}
    del bench
    gc.collect()
    assert peaks["bare"] > 0
    assert weights + peaks["fan_out"] <= 1.15 * (weights + peaks["bare"]), (weights, peaks)

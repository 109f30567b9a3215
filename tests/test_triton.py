"""Triton's kernels: against the eager definition, in the interpreter and on a GPU; and compiled for an absent GPU."""

import importlib.util
import sys
import warnings
from collections import defaultdict
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from packaging.version import Version
from processes import run

from zoscale.noise.generator import Key, Noise, Range
from zoscale.noise.kernels import kernels_on, stream_of

DEFINITION = [sys.executable, "tests/triton_worker.py", "numbers", "steps", "rehearses", "together"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def has_interpreter() -> bool:
    """Triton's interpreter takes arrays for numbers before 3.7, and numpy refuses to since 2.4."""
    return Version(numpy.__version__) < Version("2.4") or Version(version("triton")) >= Version("3.7")


@pytest.mark.slow
@needs_triton
def test_kernels_equal_the_definition() -> None:
    """Signs, momenta and updates bit for bit, normals to 1e-6; memory, perturbations and whole steps."""
    if not has_interpreter():
        pytest.skip("the interpreter of Triton before 3.7 needs numpy before 2.4")
    run(DEFINITION, TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_triton
def test_kernels_equal_the_definition_on_a_gpu() -> None:
    assert torch.cuda.is_available()
    run(DEFINITION)


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_a_gpu() -> None:
    """Nothing is contracted, values are taken at once, and no size or step needs another variant."""
    run([sys.executable, "tests/triton_worker.py", "compiles"])


@pytest.mark.slow
@needs_triton
def test_no_kernel_is_compiled_within_a_step() -> None:
    run([sys.executable, "tests/triton_worker.py", "rehearses_kernels"])


NAMES = ("perturb", "mean", "remember", "descend", "remember_and_descend_sign")
IDLE = SimpleNamespace(
    UNIT=128, SIZE=2048, SLICES=3, **{name: defaultdict(lambda: lambda *_, **__: None) for name in NAMES}
)


@pytest.mark.parametrize(("kernels", "reason"), [(None, "triton_kernels"), (IDLE, "expected the normals")])
def test_without_right_kernels_noise_is_drawn_to_memory_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, kernels: Any, reason: str
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "zoscale.noise.triton_kernels", kernels)
    kernels_on.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(2):
            wanted = (Key(0, k), Range(0, 0, 9), "normal", torch.device("cpu"))
            assert stream_of(Noise(0, compiled=True), *wanted) is None  # type: ignore[arg-type]
    kernels_on.cache_clear()
    (warning,) = caught
    assert "drawn to memory, slower" in str(warning.message) and reason in str(warning.message)

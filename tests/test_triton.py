"""Triton's kernels, without a GPU: in the interpreter against the eager definition, and compiled for a GPU."""

import importlib.util
import sys

import pytest
from processes import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["numbers", "steps"])
def test_interpreted_kernels_equal_the_definition(scenario: str) -> None:
    """Signs, momenta and updates bit for bit, normals to 1e-6; memory, perturbations and whole steps."""
    run([sys.executable, "tests/triton_worker.py", scenario], TRITON_INTERPRET="1")


@pytest.mark.slow
def test_kernels_compile_for_a_gpu() -> None:
    run([sys.executable, "tests/triton_worker.py", "gpu"])

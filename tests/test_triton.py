"""Triton's kernels: against the eager definition, in the interpreter and on a GPU; and compiled for an absent GPU."""

import importlib.util
import sys

import pytest
import torch
from processes import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
DEFINITION = [sys.executable, "tests/triton_worker.py", "numbers", "steps"]


def test_kernels_equal_the_definition() -> None:
    """Signs, momenta and updates bit for bit, normals to 1e-6; memory, perturbations and whole steps."""
    run(DEFINITION, TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_kernels_equal_the_definition_on_a_gpu() -> None:
    assert torch.cuda.is_available()
    run(DEFINITION)


def test_kernels_compile_for_a_gpu() -> None:
    """Nothing is contracted, values are taken at once, and no size or step needs another variant."""
    run([sys.executable, "tests/triton_worker.py", "compiles"])

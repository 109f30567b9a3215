"""Options shared by all tests: long and GPU tests are skipped visibly."""

import pytest
import torch

ALONE = {
    "test_benchmark", "test_compare_command", "test_doctor", "test_faults", "test_launchers", "test_mesh",
    "test_meters", "test_methods", "test_noise", "test_phases", "test_plan", "test_recipes", "test_recovery",
    "test_release", "test_replay", "test_schemes", "test_shipped_files", "test_slurm", "test_task_runs",
    "test_tracking", "test_training", "test_untrusted", "test_watchdog", "test_zero3",
}  # fmt: skip
"""Files that start several processes, or compare times or memory: nothing runs beside them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hour", action="store_true", help="run tests that take an hour or more")
    parser.addoption("--kill-rounds", type=int, default=25, help="how often test_recovery.py kills a job")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "hour": None if config.getoption("--hour") else "takes an hour or more; run with --hour",
    }
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # quick tests first
    for item in items:
        if item.path.stem in ALONE:
            item.add_marker("alone")
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))

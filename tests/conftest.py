"""Options shared by all tests: long and GPU tests are skipped visibly."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import tiny
import torch
from jobs import JobServer

from zoscale.data import batch

JOBS = (
    "test_recovery", "test_training", "test_zero3", "test_slurm", "test_launchers", "test_mesh", "test_plan",
    "test_played_gpu", "test_replay", "test_release", "test_compare_command", "test_methods", "test_schemes",
    "test_recipes", "test_task_runs", "test_doctor", "test_untrusted", "test_reproduction", "test_weight_lora",
    "test_benchmark", "test_shipped_files",
)  # fmt: skip
"""Files that start several processes and mostly wait for them, the longest first: three files run side by side."""

DEADLINES = {"test_faults", "test_watchdog"}
"""Files whose jobs must end within so many seconds, and mostly sleep: nothing that keeps the cores busy beside them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hour", action="store_true", help="run tests that take an hour or more")
    parser.addoption("--kill-rounds", type=int, default=25, help="how often test_recovery.py kills a job")


def pytest_configure(config: pytest.Config) -> None:
    """All tests but those that are marked so run on CPUs, also where there are GPUs."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of another stage than the one that is asked for are not imported: with all of them it takes 20 seconds."""
    wanted = config.getoption("markexpr")
    other = wanted in ("quick", "jobs", "deadlines") and stage(collection_path) != wanted
    return True if other and collection_path.suffix == ".py" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device; run with -m gpu",
        "hour": None if config.getoption("--hour") else "takes an hour or more; run with --hour",
    }
    items.sort(key=order)
    for item in items:
        if not item.get_closest_marker("measured"):
            item.add_marker(stage(item.path))
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where everything must run (`.ci/run`), a test that lacks a tool fails."""
    report = yield
    if os.environ.get("ZOSCALE_TEST_ALL") == "1" and report.skipped and "apt-get install" in str(report.longrepr):
        report.outcome, report.longrepr = "failed", str(report.longrepr)
    return report


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in rows of few tokens those behind the last attention are left out, if no answer is read from them."""
    monkeypatch.setattr(batch, "FEW", tiny.FEW)


def stage(path: Path) -> str:
    """In which call of pytest a file's tests run in `tests/run.sh`, except for those that run alone."""
    if path.stem in JOBS:
        return "jobs"
    return "deadlines" if path.stem in DEADLINES else "quick"


def order(item: pytest.Item) -> tuple[int, bool]:
    """Long jobs first, so that all workers end together; else quick tests first."""
    place = JOBS.index(item.path.stem) if item.path.stem in JOBS else len(JOBS)
    return place, item.get_closest_marker("slow") is not None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> JobServer:
    """Starts training jobs quickly; their logs are in a folder of the module."""
    return JobServer(tmp_path_factory.mktemp("jobs"))

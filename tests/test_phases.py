"""The split of a step's time: hand-driven moments, moments that have not passed yet, wrapped methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_weight_fan import model_of

from zoscale.config.sections import ForwardName
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import Estimator, ForwardGrad, OneSided
from zoscale.phases import PHASES, HostMark, PhaseTimer, timed
from zoscale.run_meters import RunMeters


class Clock:
    """Moments made by hand; those after `passed` have not come yet."""

    def __init__(self) -> None:
        self.now = 100.0
        self.passed = float("inf")

    def mark(self) -> Moment:
        return Moment(self)


class Moment:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds = clock, clock.now

    def query(self) -> bool:
        return self.seconds <= self.clock.passed

    def elapsed_time(self, end: Moment) -> float:
        assert self.query() and end.query(), "an event must not be read before it has passed"
        return 1e3 * (end.seconds - self.seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def spent(timer: PhaseTimer) -> dict[str, float]:
    return {name: pytest.approx(value) for name, value in timer.take().items() if value}


def test_a_moment_counts_for_the_innermost_phase(clock: Clock) -> None:
    timer = PhaseTimer(now=clock.mark)
    clock.now += 1
    with timer.phase("noise"):
        clock.now += 2
        with timer.phase("forward"):
            clock.now += 4
            with pytest.raises(RuntimeError), timer.phase("gather"):
                clock.now += 8
                raise RuntimeError
            clock.now += 16
        clock.now += 32
    clock.now += 64
    assert spent(timer) == {"other": 65, "noise": 34, "forward": 20, "gather": 8}
    clock.now += 1
    assert timer.take() == dict.fromkeys(PHASES, 0.0) | {"other": pytest.approx(1)}


def test_a_pause_is_left_out_with_all_phases_in_it(clock: Clock) -> None:
    timer = PhaseTimer(now=clock.mark)
    with timer.phase("update"):
        clock.now += 1
        with timer.pause():
            clock.now += 10
            with timer.phase("forward"):
                clock.now += 10
                with timer.pause():
                    clock.now += 10
                clock.now += 10
            clock.now += 10
        clock.now += 2
        with timer.phase("gather"):
            clock.now += 4
    assert spent(timer) == {"update": 3, "gather": 4}


def test_work_that_is_still_queued_counts_later(clock: Clock) -> None:
    timer = PhaseTimer(now=clock.mark)
    with timer.phase("forward"):
        clock.now += 3
    clock.passed = clock.now
    with timer.phase("update"):
        clock.now += 5
    timer.settle()
    assert spent(timer) == {"forward": 3}
    clock.passed = clock.now
    assert spent(timer) == {"update": 5}


def test_settling_keeps_no_moments(clock: Clock) -> None:
    timer = PhaseTimer(now=clock.mark)
    for _ in range(1000):
        with timer.phase("forward"):
            clock.now += 1
        timer.settle()
    assert len(timer._marks) == 1
    assert spent(timer) == {"forward": 1000}


class Model:
    def forward(self, seconds: float) -> float:
        self.clock.now += seconds
        return seconds

    def __init__(self, clock: Clock) -> None:
        self.clock = clock


def test_methods_of_an_object_and_of_a_class_are_wrapped_and_put_back(clock: Clock) -> None:
    timer, model, original = PhaseTimer(now=clock.mark), Model(clock), Model.forward
    with timed(timer, "forward", model, "forward"):
        assert model.forward(2) == 2
        with timed(timer, "gather", Model, "forward"):
            Model(clock).forward(3)
        Model(clock).forward(100)
    assert "forward" not in vars(model) and Model.forward is original
    model.forward(100)
    assert spent(timer) == {"forward": 2, "gather": 3, "other": 200}
    model.forward = mine = lambda seconds: None  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError), timed(timer, "forward", model, "forward"):
        raise ZeroDivisionError
    assert model.forward is mine, "what an object had of its own is put back"


def test_the_host_s_marks_measure_seconds() -> None:
    timer = PhaseTimer("cpu")
    with timer.phase("data"):
        time.sleep(0.05)
    assert 0.05 <= timer.take()["data"] < 0.2
    assert HostMark().query()


@contextmanager
def nothing(_name: str) -> Iterator[None]:
    yield


def seconds(phase: Callable[[str], AbstractContextManager[None]], settle: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(1000):
        with phase("forward"):
            pass
    settle()
    return time.perf_counter() - started


@pytest.mark.measured
def test_a_phase_costs_as_little_as_entering_and_leaving_something() -> None:
    """Less than six contexts that do nothing, in the best of ten rounds of each."""
    timer = PhaseTimer("cpu")
    rounds = [(seconds(timer.phase, timer.settle), seconds(nothing, int)) for _ in range(10)]
    measured, base = (min(times) for times in zip(*rounds, strict=True))
    assert measured < 6 * base


@pytest.mark.gpu
def test_a_gpu_s_work_counts_where_it_runs() -> None:
    """The host only queues the products, and does not wait for them."""
    a = torch.randn(4096, 4096, device="cuda")
    (a @ a).sum().item()
    timer = PhaseTimer("cuda")
    started = time.perf_counter()
    with timer.phase("forward"):
        for _ in range(50):
            b = a @ a
    with timer.phase("update"):
        b.add_(1)
    timer.settle()
    queued = time.perf_counter() - started
    torch.cuda.synchronize()
    total, taken = time.perf_counter() - started, timer.take()
    assert queued < 0.5 * total
    assert 0.5 * total < taken["forward"] <= total
    assert taken["update"] < 0.1 * taken["forward"]


@pytest.mark.parametrize(
    ("estimator", "forward", "compile"),
    [(OneSided(), "sequential", "off"), (OneSided(), "fan_out", "blocks"), (ForwardGrad(), "auto", "off")],
)
def test_the_model_runs_in_the_phase_forward(
    estimator: Estimator, forward: ForwardName, compile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever calls it: its own answers, compiled ones, or those of a model with tangents."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = get_peft_model(model_of("opt"), LoraConfig(task_type="CAUSAL_LM", **tiny.LORA))
    engine = ZeroOrderEngine(model, estimator=estimator, forward=forward, compile=compile)
    meters, seen = RunMeters(engine), []
    with meters.training():
        model.register_forward_pre_hook(lambda *_: seen.append(meters.phases._open[-1]))
        engine.step(tiny.batch(0))
    assert set(seen) == {"forward"}


def test_a_run_that_is_resumed_after_its_last_step_keeps_its_totals() -> None:
    """This session has trained nothing; the run has."""
    earlier = {"train/seconds": 50.0, "train/device_hours": 2.0, "train/tokens": 4000.0, "train/loss": 1.0}
    meters = RunMeters(ZeroOrderEngine(model_of("opt")), earlier)
    with meters.training():
        pass
    found = meters.summary(7.0)
    assert found["training_seconds"] == pytest.approx(50.0, abs=0.5)
    assert (found["device_hours"], found["tokens_per_second"]) == (pytest.approx(2.0), pytest.approx(80.0, rel=0.01))
    assert (found["session"]["steps"], found["session"]["seconds"]) == (0, 7.0)
    assert found["session"]["steps_per_second"] == found["session"]["tokens_per_second"] == 0.0


@pytest.mark.parametrize(("world_size", "named"), [(64, 64), (65, 33), (1024, 64)])
def test_of_very_many_ranks_some_are_logged_and_the_extremes_of_all(
    world_size: int, named: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ZeroOrderEngine(model_of("opt"))
    meters, (slowest, fullest) = RunMeters(engine), (world_size - 3, world_size - 2)

    def gathered(value: tuple[dict[str, float], int]) -> list[Any]:
        own, tokens = value
        rows = [own | {"tokens_per_second": 9.0, "peak_memory_bytes": 5.0} for _ in range(world_size)]
        rows[slowest]["tokens_per_second"], rows[fullest]["peak_memory_bytes"] = 1.0, 7.0
        return [(row, tokens) for row in rows]

    monkeypatch.setattr(engine.mesh, "gather_objects", gathered)
    found = meters.take()
    assert sum(name.endswith("/memory_bytes") for name in found) == named
    assert found["train/tokens_per_second"] == 9.0 * (world_size - 1) + 1.0
    extremes = (found.get("train/slowest_rank"), found.get("train/peak_memory_bytes"))
    assert extremes == ((None, None) if world_size == 64 else (slowest, 7.0))

"""Signals to stop: when they end a run, and when they leave the mark by which a job script knows."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch

from zoscale import preemption
from zoscale.mesh import Mesh
from zoscale.noise.fused import _compile
from zoscale.preemption import Preempted, end_on_signals, stop_on_signals
from zoscale.tasks.sources import Source


@pytest.fixture(autouse=True)
def from_a_terminal() -> Iterator[None]:
    """Where tests run in the background, Ctrl-C is ignored, and ignored signals stay so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "left"), [(signal.SIGTERM, False), (signal.SIGUSR1, True), (signal.SIGINT, False)])
def test_outside_the_steps_a_signal_ends_the_run_at_once(number: int, left: bool, tmp_path: Path) -> None:
    """A launcher that ends the ranks beside one that failed sends SIGTERM: no mark, no start again."""
    mark, before = tmp_path / "mark", signal.getsignal(number)
    with pytest.raises(Preempted, match="told to stop between its steps"), end_on_signals(mark):
        os.kill(os.getpid(), number)
        signal.pause()
    assert mark.exists() == left
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("what", ["load_dataset", "compile"])
def test_what_a_signal_interrupts_does_not_take_it_for_an_error_of_its_own(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(datasets if what == "load_dataset" else torch, what, interrupted)
    with pytest.raises(Preempted), end_on_signals(tmp_path / "mark"):
        if what == "load_dataset":
            Source("someone/rows").records("train")
        else:
            _compile(abs, [], {})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_within_the_steps_all_must_agree_to_stop(number: int, tmp_path: Path) -> None:
    mesh, mark = Mesh(ranks=(0, 1)), tmp_path / "mark"
    with pytest.raises(Preempted), end_on_signals(tmp_path / "no"), stop_on_signals(mesh, mark):
        os.kill(os.getpid(), number)
        assert mesh.stop_wanted
        raise Preempted(3)
    assert mark.exists()
    assert not (tmp_path / "no").exists()


def test_a_second_interrupt_ends_the_process_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a launcher hands on at once, as it got it itself, is not a second."""
    mesh = Mesh(ranks=(0, 1))
    with pytest.raises(KeyboardInterrupt), stop_on_signals(mesh, tmp_path / "mark"):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            assert mesh.stop_wanted
        monkeypatch.setattr(preemption, "_ECHO", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    assert not (tmp_path / "mark").exists()


def test_an_interrupt_that_is_handed_on_does_not_disturb_the_end(tmp_path: Path) -> None:
    """The run may be closing its files by then."""
    done = []
    with pytest.raises(Preempted), end_on_signals(tmp_path / "mark"):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            done.append("closed")
    assert done == ["closed"]


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As Ctrl-C by what runs in the background."""
    mesh = Mesh(ranks=(0, 1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signals(mesh, tmp_path / "mark"):
        os.kill(os.getpid(), signal.SIGINT)
    assert not mesh.stop_wanted


def test_a_failure_after_sigterm_leaves_no_mark(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(RuntimeError), stop_on_signals(Mesh(ranks=(0, 1)), mark):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("another rank is gone")
    assert not mark.exists()


def test_a_mark_that_cannot_be_left_is_no_error(tmp_path: Path) -> None:
    """A new run has no folder yet."""
    with pytest.raises(Preempted), end_on_signals(tmp_path / "nowhere" / "mark"):
        os.kill(os.getpid(), signal.SIGUSR1)
        signal.pause()

"""Being told to stop: SIGTERM, SIGUSR1 (SLURM's preemption) or SIGINT (Ctrl-C) ends a run after the current step.

A launcher hides the exit status of its ranks, so the run also leaves a mark in its folder: a job script that finds it
may start the run again. A rank that fails makes its launcher send SIGTERM to the others; they cannot agree on a stop
then, and leave none. SIGUSR1 comes from nobody but a scheduler or a person, and leaves it at once. A second SIGINT ends
the process where it is; those that come within `_ECHO` seconds of the first are a launcher's that hands it on.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zoscale.mesh import Mesh

REQUEUE = 75
"""Exit status of a run that was told to stop and can be continued (EX_TEMPFAIL: try again)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ECHO = 2.0


class Preempted(BaseException):
    """The run was told to stop; it can be continued.

    No `Exception`, for a signal may come wherever errors are caught: reading data, compiling, trying again.

    Args:
        step: steps taken, all of them kept; None if it was not the time to take steps.
    """

    def __init__(self, step: int | None) -> None:
        when = "between its steps" if step is None else f"after step {step}"
        super().__init__(f"told to stop {when}; the same command continues the run")


@contextmanager
def end_on_signals(mark: Path) -> Iterator[None]:
    """Within, a signal ends this process at once: while it starts and ends there is no step to finish.

    The main thread enters it. Signals that are ignored stay ignored.

    Args:
        mark: the file to leave, if its folder is there.

    Raises:
        Preempted: wherever the process is.
    """

    def end() -> None:
        raise Preempted(None)

    with _heeding(mark, end):
        yield


@contextmanager
def stop_on_signals(mesh: Mesh, mark: Path) -> Iterator[None]:
    """Within, a signal to any rank makes all ranks agree to stop, with the next exchange of losses.

    Args:
        mesh: where they agree; what raises `Preempted` then is the caller.
        mark: the file to leave, as in `end_on_signals`.
    """

    def wish() -> None:
        mesh.stop_wanted = True

    with _heeding(mark, wish):
        try:
            yield
        except Preempted:
            _leave(mark)
            raise


@contextmanager
def _heeding(mark: Path, what: Callable[[], None]) -> Iterator[None]:
    interrupts: list[float] = []

    def heed(number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            _leave(mark)
        if number == signal.SIGINT:
            interrupts.append(time.monotonic())
            if interrupts[-1] > interrupts[0] + _ECHO:
                raise KeyboardInterrupt
            if len(interrupts) > 1:
                return
        what()

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, heed)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(mark: Path) -> None:
    with suppress(OSError):
        mark.touch()

"""Being told to stop: SIGTERM or SIGUSR1 (SLURM's preemption) ends a run after the current step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from zoscale.mesh import Mesh

REQUEUE = 75
"""Exit status of a run that was told to stop and can be continued (EX_TEMPFAIL: try again)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run was told to stop; it can be continued.

    Args:
        step: steps taken, all of them kept.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"told to stop after step {step}; the same command continues the run")
        self.step = step


@contextmanager
def stop_on_signals(mesh: Mesh) -> Iterator[None]:
    """Within, a signal to any rank makes all ranks agree to stop, with the next exchange of losses.

    The main thread enters it. Signals that are ignored stay ignored.
    """

    def wish(number: int, frame: object) -> None:
        mesh.stop_wanted = True

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, wish)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

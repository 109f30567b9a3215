"""Where the time of a step goes: every moment of a rank belongs to one phase.

Nothing here is known to what is measured: `timed` wraps the methods that a phase consists of while it is entered.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch

PHASES = ("data", "noise", "forward", "gather", "exchange", "update", "other")
"""Making the batch; drawing and applying perturbations; the model; waiting for gathered tensors; exchanging the losses,
which waits for the slowest rank; the update rule; what is left, such as the journal."""


class Mark(Protocol):
    """A moment that may not have come yet; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether it has come."""

    def elapsed_time(self, end: Self) -> float:
        """Milliseconds until `end`, once both have come."""


class HostMark:
    """Now, on the host."""

    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        """True: it has come."""
        return True

    def elapsed_time(self, end: "HostMark") -> float:
        """Milliseconds until `end`."""
        return 1e3 * (end._seconds - self._seconds)


def _device_mark() -> Any:
    """The moment at which the current stream gets here; work of another stream counts where this one waits for it."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class PhaseTimer:
    """Seconds by phase: a moment counts for the innermost phase that is open, for `other` if none is.

    On a GPU the moments are events on the compute stream, so that queued work counts where it runs; they are read when
    they have passed, and the host never waits for them. On the CPU they are the host's.

    Args:
        device: where this rank computes.
        now: makes a mark; None = by the device.
    """

    def __init__(self, device: torch.device | str = "cpu", *, now: Callable[[], Mark] | None = None) -> None:
        self._now: Callable[[], Any] = now or (_device_mark if torch.device(device).type == "cuda" else HostMark)
        self._open = ["other"]
        self._paused = False
        self._seconds: dict[str, float] = {}
        self._marks: deque[tuple[str, Any]] = deque()
        self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The body is in this phase, but for phases within."""
        if self._paused:
            yield
            return
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the body out, with all phases in it."""
        with self.phase(""):
            paused, self._paused = self._paused, True
            try:
                yield
            finally:
                self._paused = paused

    def settle(self) -> None:
        """Count what has passed. Call it once per step, so that marks do not pile up; it never waits."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            name, begin = self._marks.popleft()
            seconds = begin.elapsed_time(self._marks[0][1]) / 1e3
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds by name of `PHASES` since the last call; on a GPU, work that is still queued counts next time."""
        self._mark()
        self.settle()
        taken, self._seconds = self._seconds, {}
        return {name: taken.get(name, 0.0) for name in PHASES}

    def _mark(self) -> None:
        self._marks.append((self._open[-1], self._now()))


@contextmanager
def timed(timer: PhaseTimer, name: str, owner: object, *methods: str) -> Iterator[None]:
    """Within, calls of these methods of an object (or of all objects of a class) count for a phase."""
    own = {method: vars(owner).get(method) for method in methods}
    for method in methods:
        setattr(owner, method, _timed(timer, name, getattr(owner, method)))
    try:
        yield
    finally:
        for method, before in own.items():
            if before is None:
                delattr(owner, method)
            else:
                setattr(owner, method, before)


def _timed(timer: PhaseTimer, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with timer.phase(name):
            return function(*args, **kwargs)

    return inside

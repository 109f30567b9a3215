"""`Lanes`: forward passes side by side, so that ZeRO-3 gathers each part of the model once for all of them.

The first pass drives ZeRO-3's hooks as any forward does. When it has run a block, and holds its weights still, the
others run that block too, one after the other, and wait behind it for the next one. Each pass keeps its own rows and
shapes, so its results have the bits that it has alone; what is added is the hidden state of each pass between blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, Generic, TypeVar, cast

from greenlet import getcurrent, greenlet
from torch import nn

T = TypeVar("T")

_LANE: ContextVar[int | None] = ContextVar("lane", default=None)


def lane() -> int | None:
    """Number of the pass that runs, of several side by side: 0 is the one that drives ZeRO-3. None = it is alone."""
    return _LANE.get()


class Lanes:
    """Runs passes of a model side by side.

    Args:
        module: what is called for the model.
        model: the model within.
        blocks: its transformer blocks, which ZeRO-3 gathers as a whole.
    """

    def __init__(self, module: nn.Module, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        zero: Any = getattr(module, "optimizer", None)
        self._zero = getattr(zero, "parameter_offload", zero)
        inside = {inner for block in blocks for inner in block.modules()}
        owners = [m for m in model.modules() if m not in inside and any(True for _ in m.parameters(recurse=False))]
        self._stations = [*blocks, *owners]
        """What ZeRO-3 gathers at a time: blocks, and modules outside that have weights of their own."""
        is_flat = not any(inner in inside for owner in owners for inner in owner.modules())
        self.share = self._zero is not None and bool(blocks) and is_flat
        """Whether passes share what is gathered; else they run one after the other."""

    def run(self, passes: Sequence[Callable[[], T]]) -> list[T]:
        """The results of the passes. With `share` they must enter the same modules in the same order.

        Raises:
            RuntimeError: if they do not.
        """
        if not self.share or len(passes) < 2:
            return [run() for run in passes]
        others = [_Follower(number, run) for number, run in enumerate(passes[1:], start=1)]
        with ExitStack() as stack:
            stack.enter_context(_silent_for_followers(self._zero))
            for follower in others:
                stack.callback(follower.end)
            for station in self._stations:
                handle = station.register_forward_hook(_turn(others), prepend=True)  # before ZeRO-3 lets go
                stack.callback(handle.remove)
            stack.callback(_LANE.reset, _LANE.set(0))
            first = passes[0]()
            return [first, *(follower.finish() for follower in others)]


class _Follower(Generic[T]):
    """A pass that uses what the first one has gathered.

    Args:
        number: its lane.
        run: the pass.
    """

    def __init__(self, number: int, run: Callable[[], T]) -> None:
        self._number = number
        self._pass = run
        self._results: list[T] = []
        self._greenlet = greenlet(self._run)
        self._greenlet.gr_context = copy_context()

    def _run(self) -> None:
        _LANE.set(self._number)
        self._results.append(self._pass())

    def advance(self, station: nn.Module) -> None:
        """Run to the end of the module at which the first pass is."""
        if (reached := self._greenlet.switch()) is not station:
            self._refuse(reached, station)

    def finish(self) -> T:
        """Run to the end, once the first pass is there."""
        if (reached := self._greenlet.switch()) is not None:
            self._refuse(reached, None)
        return self._results[0]

    def end(self) -> None:
        """Give up, if it is not at its end."""
        if self._greenlet:
            self._greenlet.throw()

    @staticmethod
    def _refuse(reached: object, station: object) -> None:
        names = [type(module).__name__ if module is not None else "its end" for module in (station, reached)]
        raise RuntimeError(
            f"expected the passes of a step to enter the same modules in the same order, got one at {names[0]} and "
            f"another at {names[1]}: set forward.name=sequential"
        )


def _turn(others: Sequence[_Follower[Any]]) -> Callable[..., None]:
    """What follows a module's forward: the first pass lets the others run it, each of them waits."""

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if lane():
            cast(greenlet, getcurrent().parent).switch(module)
            return
        for follower in others:
            follower.advance(module)

    return after


@contextmanager
def _silent_for_followers(zero: Any) -> Iterator[None]:
    """Within, ZeRO-3 sees the first pass only."""
    handles = [*zero.forward_hooks, zero.fwd_pre_hook]
    tables = [(handle.hooks_dict_ref(), handle.id) for handle in handles]
    hooks = [table[number] for table, number in tables]
    for (table, number), hook in zip(tables, hooks, strict=True):
        table[number] = _of_the_first(hook)
    try:
        yield
    finally:
        for (table, number), hook in zip(tables, hooks, strict=True):
            table[number] = hook


def _of_the_first(hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: None if lane() else hook(*args)

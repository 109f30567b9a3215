"""`Lanes`: forward passes side by side, so that ZeRO-3 gathers each part of the model once for all of them.

The first pass drives ZeRO-3's hooks as any forward does. When it holds the weights of a block, the others run that
block before it does, one after the other, and wait where the next one begins; after the last one they run to their
end. Each pass keeps its own rows and shapes, so its results have the bits that it has alone; what is added is the
hidden state of each pass between blocks.
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
        closed: modules in which no other pass may run before this one is at their end.
    """

    def __init__(
        self, module: nn.Module, model: nn.Module, blocks: Sequence[nn.Module], closed: Sequence[nn.Module] = ()
    ) -> None:
        zero: Any = getattr(module, "optimizer", None)
        self._zero = getattr(zero, "parameter_offload", zero)
        inside = {inner for block in blocks for inner in block.modules()}
        owners = [m for m in model.modules() if m not in inside and any(True for _ in m.parameters(recurse=False))]
        self._stations = [*blocks, *owners]
        """What ZeRO-3 gathers at a time: blocks, and modules outside that have weights of their own."""
        is_flat = not any(inner in inside for owner in owners for inner in owner.modules())
        waiting = {*self._stations}
        stops = any(inner in waiting for module in closed for inner in module.modules() if inner is not module)
        self.share = self._zero is not None and bool(blocks) and is_flat and not stops
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
                stack.enter_context(station.register_forward_pre_hook(_turn(others)))  # after ZeRO-3's, which gathers
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
        self._waits_at: nn.Module | None = None
        self._greenlet = greenlet(self._run)
        self._greenlet.gr_context = copy_context()

    def _run(self) -> None:
        _LANE.set(self._number)
        self._results.append(self._pass())

    def advance(self, station: nn.Module) -> None:
        """Run the module whose weights the first pass holds, and on to the next one, or to the end."""
        if not self._greenlet and not self._results:
            self._waits_at = self._greenlet.switch()
        self._check(station)
        self._waits_at = self._greenlet.switch()

    def finish(self) -> T:
        """The result, once the first pass is at its end."""
        self._check(None)
        return self._results[0]

    def end(self) -> None:
        """Give up, if it is not at its end."""
        if self._greenlet:
            self._greenlet.throw()

    def _check(self, station: nn.Module | None) -> None:
        if self._waits_at is not station:
            names = ["its end" if m is None else type(m).__name__ for m in (station, self._waits_at)]
            raise RuntimeError(
                f"expected the passes of a step to enter the same modules in the same order, got one at {names[0]} and "
                f"another at {names[1]}: set forward.name=sequential"
            )


def _turn(others: Sequence[_Follower[Any]]) -> Callable[..., None]:
    """What precedes a module's forward: the first pass lets the others run it, each of them waits for that."""

    def before(module: nn.Module, args: Any) -> None:
        if lane():
            cast(greenlet, getcurrent().parent).switch(module)
            return
        for follower in others:
            follower.advance(module)

    return before


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

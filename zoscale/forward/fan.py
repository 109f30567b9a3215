"""`Fan`: makes modules treat the rows of one forward as belonging to several candidates, each with its own weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zoscale.config import ConfigError
from zoscale.estimators import Candidate
from zoscale.lanes import lane

SEQUENTIAL = "set forward.name=sequential"
"""What helps where a model cannot give every candidate its own weights within one forward."""


@dataclass(frozen=True)
class Rows:
    """What one pass holds: the same rows once per candidate, one candidate after the other.

    Args:
        copies: candidates K.
        rows: rows R of each.
        positions: answer positions P of each, which the head is computed for.
        shared: modules that see one copy of the rows, because no candidate differs yet.
        tokens: gives int64 [R, T] on the host, what the input embedding looks up for each candidate; None = not known.
    """

    copies: int
    rows: int
    positions: int
    shared: frozenset[nn.Module] = frozenset()
    tokens: Callable[[], Tensor] | None = field(default=None, compare=False)

    def seen_by(self, module: nn.Module) -> "Rows":
        """The rows that reach a module."""
        return Rows(1, self.rows, self.positions) if module in self.shared else self

    def by_candidate(self, x: Tensor) -> Tensor:
        """[K, n, features] of a module's input [K R, ..., features], or [1, K P, features] at the head.

        Raises:
            ConfigError: if the rows are not those of the candidates in order (a router moved them).
        """
        if not (self._in_order(x) or (x.shape[0] == 1 and x.shape[1] == self.copies * self.positions)):
            raise self.error(x)
        return x.reshape(self.copies, -1, x.shape[-1])

    def split(self, value: Any) -> list[Any]:
        """One value per candidate: the parts of a tensor of K R rows, else the same value."""
        if isinstance(value, Tensor) and value.dim() and self._in_order(value):
            return list(value.chunk(self.copies))
        return [value] * self.copies

    def split_call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[tuple[list[Any], dict[str, Any]]]:
        """The arguments of a module's forward, per candidate.

        Raises:
            ConfigError: if they hold activations and none has K R rows.
        """
        values = [*args, *kwargs.values()]
        activations = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        if activations and not any(self._in_order(value) for value in activations):
            raise self.error(activations[0])
        parts = list(zip(*map(self.split, values), strict=True)) if values else [()] * self.copies
        named = len(args)
        return [(list(part[:named]), dict(zip(kwargs, part[named:], strict=True))) for part in parts]

    def join(self, results: Sequence[Any]) -> Any:
        """The candidates' results, one after the other; a result without rows stands for all R of its candidate.

        Args:
            results: per candidate, tensors or nested structures of tensors.
        """

        def joined(*parts: Any) -> Any:
            if not isinstance(parts[0], Tensor):
                return parts[0]
            whole = parts[0].shape[0] != 1 or self.rows == 1
            return torch.cat(parts if whole else [part.expand(self.rows, *part.shape[1:]) for part in parts])

        return pytree.tree_map(joined, *results)

    def _in_order(self, x: Tensor) -> bool:
        return x.shape[0] % (self.copies * self.rows) == 0

    def error(self, x: Tensor) -> ConfigError:
        """What is raised where a module's input is not the rows of the candidates."""
        expected = f"{self.copies} x {self.rows} rows in the order of the candidates"
        got = f"a tensor of shape {tuple(x.shape)}"
        return ConfigError(expected, got, f"this model moves rows between modules; {SEQUENTIAL}")


class Fan(Protocol):
    """A way to give every candidate its own weights within one forward.

    Attributes:
        closed: modules whose weights are a candidate's while they run, so that no other pass may run meanwhile.
    """

    closed: Sequence[nn.Module]

    def prepare(self, candidates: Sequence[Candidate]) -> Callable[[slice, Rows], AbstractContextManager[None]]:
        """Get ready for the candidates of a step; a collective.

        Returns:
            (which candidates, their rows) -> a context in which a forward takes these rows.
        """


@contextmanager
def replaced_forward(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within, the module runs another forward in this pass, made of the one that it had; its hooks stay."""
    number, before = lane(), vars(module).get("forward")
    if number is None:
        module.forward = wrap(module.forward)
        try:
            yield
        finally:
            _restore(module, before)
        return
    switch = before if isinstance(before, _Switch) else _Switch(module.forward, before)
    own = switch.forwards.get(number)
    switch.forwards[number] = wrap(own or switch.original)
    module.forward = switch
    try:
        yield
    finally:
        switch.forwards.pop(number)
        if own is not None:
            switch.forwards[number] = own
        if not switch.forwards:
            _restore(module, switch.before)


class _Switch:
    """The forward of a module that passes side by side have replaced, each for itself.

    Args:
        original: of those that have not.
        before: the module's own attribute; None = it had its class's.
    """

    def __init__(self, original: Callable[..., Any], before: Any) -> None:
        self.original = original
        self.before = before
        self.forwards: dict[int, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forwards.get(lane() or 0, self.original)(*args, **kwargs)


def _restore(module: nn.Module, before: Any) -> None:
    if before is None:
        del module.forward
    else:
        module.forward = before

"""`AnswerRows`: in the last block, what follows the attention runs on the tokens that answers are read from, no others.

Keys and values need all tokens; behind them every token goes its own way to the head, which is computed for answers
only. Of OPT's blocks that is three quarters of the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zoscale.data.batch import MicroBatch
from zoscale.forward.fan import replaced_forward

_SHORTEST = 4  # tokens of rows in whose middle some can be told from those around them
_ROUNDING = 1e-2  # of bf16; what reads other tokens shows by NaN already
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)  # of modules that take no other rows


@dataclass(frozen=True)
class _Columns:
    """Some columns of hidden states, [R, T, features] or [R T, features]; virtual tokens may come before the T.

    Args:
        index: int64 [R, p], the same number in every row.
        width: T.
    """

    index: Tensor
    width: int
    _known: dict[int, Tensor] = field(default_factory=dict)

    def are_of(self, value: Any) -> bool:
        """Whether a value is hidden states of these rows."""
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (2, 3)):
            return False
        per_row, rest = divmod(value[..., 0].numel(), len(self.index))
        return rest == 0 and per_row >= self.width and (value.dim() == 2 or len(value) == len(self.index))

    def among(self, value: Any) -> list[Tensor]:
        """The hidden states in arguments or results."""
        return [leaf for leaf in pytree.tree_leaves(value) if self.are_of(leaf)]

    def number(self, value: Any) -> bool:
        """Whether arguments hold integers or flags of all tokens, which would not fit fewer (experts chosen before)."""
        found = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim()]
        return any(not leaf.is_floating_point() and leaf.numel() >= self.width for leaf in found)

    def taken(self, value: Any) -> Any:
        """These columns of hidden states; any other value as it is."""
        if not self.are_of(value):
            return value
        features = value.shape[-1]
        kept = value.reshape(-1, features).index_select(0, self._places(value))
        return kept if value.dim() == 2 else kept.view(len(self.index), -1, features)

    def put(self, kept: Tensor, like: Tensor, fill: float) -> Tensor:
        """Hidden states with as many columns as `like`, with `kept` in these."""
        features = kept.shape[-1]
        whole = kept.new_full((like[..., 0].numel(), features), fill)
        whole.index_copy_(0, self._places(like), kept.reshape(-1, features))  # scatter_ would take thrice the memory
        return whole if kept.dim() == 2 else whole.view(len(self.index), -1, features)

    def spoilt(self, value: Any) -> Any:
        """Hidden states that are NaN in all other columns; any other value as it is."""
        return self.put(self.taken(value), value, torch.nan) if self.are_of(value) else value

    def _places(self, hidden: Tensor) -> Tensor:
        """int64 [R p], the numbers of these columns' tokens among all of hidden states."""
        width = hidden[..., 0].numel() // len(self.index)
        if width not in self._known:
            firsts = torch.arange(len(self.index), device=self.index.device)[:, None] * width
            self._known[width] = (firsts + self.index + (width - self.width)).view(-1)
        return self._known[width]


class AnswerRows:
    """Knows which modules of the last block may leave out the tokens that no answer is read from.

    What a module may is seen, not looked up: once, its input is NaN at all other tokens. Nothing of them may reach
    what is read.

    Args:
        blocks: the transformer blocks; without any, no module may.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._block = blocks[-1] if blocks else None
        self.modules: tuple[nn.Module, ...] = ()

    def learn(
        self, trial: MicroBatch, answer: Callable[[MicroBatch], Tensor], first: AbstractContextManager[None]
    ) -> None:
        """Find the modules, by three passes; by one if there are none. A collective.

        Args:
            trial: at least two rows with answers in their middle, as many in each.
            answer: makes a pass of them, which gives log-probabilities.
            first: entered for the first pass, which is one of the model as it is.
        """
        rows, width = trial.input_ids.shape
        if self._block is None or width < _SHORTEST:
            with first:
                answer(trial)
            return
        columns = _Columns(trial.position_column.view(rows, -1), width)
        found: list[nn.Module] = []
        with first, replaced_forward(self._block, partial(_searched, self._block, columns, found)):
            plain = answer(trial)
        if found and _are_enough(found, columns, partial(answer, trial), plain):
            self.modules = tuple(found)

    @contextmanager
    def only(self, batch: MicroBatch) -> Iterator[None]:
        """Within, a pass of these rows runs the modules at their answers only; what they give elsewhere is zero."""
        if batch.answer_columns is None:
            yield
            return
        with _restricted(self.modules, _Columns(batch.answer_columns, batch.input_ids.shape[1]), fill=0.0):
            yield


@contextmanager
def _restricted(modules: Sequence[nn.Module], columns: _Columns, fill: float, *, spoil: bool = False) -> Iterator[None]:
    """Within, modules run at some columns only, and give `fill` elsewhere; with `spoil`, NaN everywhere."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = columns.among((args, kwargs))
            if not hidden:  # rows that are the same for all candidates, once
                return forward(*args, **kwargs)
            args, kwargs = pytree.tree_map(columns.taken, (args, kwargs))
            kept = forward(*args, **kwargs)
            return columns.put(kept * torch.nan if spoil else kept, hidden[0], fill)

        return run

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced_forward(module, wrap))
        yield


def _are_enough(modules: Sequence[nn.Module], columns: _Columns, answer: Callable[[], Tensor], plain: Tensor) -> bool:
    """Whether answers are what they were without the other tokens, and are made of what the modules give.

    They are not if a model only cuts rows by it (BLT), or if modules run elsewhere, too.
    """
    try:
        with _restricted(modules, columns, torch.nan):
            again = answer()
        with _restricted(modules, columns, torch.nan, spoil=True):
            spoilt = answer()
    except torch.OutOfMemoryError:
        raise
    except _ERRORS:
        return False
    return _is_close(again, plain) and bool(spoilt.isnan().all())


def _searched(
    block: nn.Module, columns: _Columns, found: list[nn.Module], forward: Callable[..., Any]
) -> Callable[..., Any]:
    """The block's own forward, which fills `found` before."""

    def run(*args: Any, **kwargs: Any) -> Any:
        def call() -> Any:  # on copies: some blocks add to their input in place
            own_args, own_kwargs = pytree.tree_map(lambda x: x.clone() if columns.are_of(x) else x, (args, kwargs))
            return forward(*own_args, **own_kwargs)

        found[:] = _found(block, columns, call)
        return forward(*args, **kwargs)

    return run


def _found(block: nn.Module, columns: _Columns, call: Callable[[], Any]) -> list[nn.Module]:
    """The outermost modules that the block runs by token; of one that mixes tokens, the last one within it.

    Not those before it: what they give to other tokens may be read in longer rows (sparse attention).
    """
    called = _called(block, columns, call)
    found = []
    for child in block.children():
        inside = set(child.modules())
        inner = [module for module in called if module in inside and module is not child]
        tried = ([child] if child in called else []) + inner[-1:]
        found += [module for module in tried if _is_by_token(module, columns, call)][:1]
    return found


def _called(block: nn.Module, columns: _Columns, call: Callable[[], Any]) -> list[nn.Module]:
    """Modules with matrices that make hidden states of hidden states and nothing else by token, as they end."""
    called: list[nn.Module] = []

    def note(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if columns.are_of(result) and columns.among((args, kwargs)) and not columns.number((args, kwargs)):
            called.append(module)

    with ExitStack() as stack:
        for module in block.modules():
            if module is not block and any(param.dim() > 1 for param in module.parameters()):
                stack.enter_context(module.register_forward_hook(note, with_kwargs=True))
        call()
    return [module for module in called if called.count(module) == 1]


def _is_by_token(module: nn.Module, columns: _Columns, call: Callable[[], Any]) -> bool:
    """Whether what is read is finite, of the module and of the block, when its input is NaN at all other tokens."""
    given: list[Any] = []

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = pytree.tree_map(columns.spoilt, (args, kwargs))
            given.append(forward(*args, **kwargs))
            return given[-1]

        return run

    try:
        with replaced_forward(module, wrap):
            read = columns.among(call())
    except torch.OutOfMemoryError:
        raise
    except _ERRORS:
        return False
    return bool(read) and all(bool(columns.taken(x).isfinite().all()) for x in (read[0], *given))


def _is_close(x: Tensor, y: Tensor) -> bool:
    """To rounding, of the largest; never if one is not finite."""
    return bool((x - y).abs().max() <= _ROUNDING * y.abs().max())

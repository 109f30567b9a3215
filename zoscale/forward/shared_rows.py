"""Rows before the first perturbed module are the same for every candidate: their blocks are run once, not K times."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zoscale.estimators import Candidate
from zoscale.forward.fan import Rows, replaced_forward
from zoscale.models.sizes import blocks_of
from zoscale.shards import trainable_specs


class SharedRows:
    """Knows which blocks come before the first perturbed module.

    Which modules come first is seen in one pass; until then, none. A block that a pass runs again (HRM) gets other rows
    then, and is not shared. Nothing is where blocks take more than hidden states and what goes with their rows: a bias
    of each head (BLOOM, MPT), several streams (Gemma 3n), keys of other blocks in a dict (Gemma 4).

    Args:
        model: with transformer blocks; without any, nothing is shared.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trainable = {param: spec for spec, param in trainable_specs(model)}
        self._blocks = blocks_of(model)
        around = [m for m in model.modules() if m not in self._blocks and any(b in self._blocks for b in m.modules())]
        beside = [child for module in around for child in module.children() if child not in (*around, *self._blocks)]
        owners = [module for module in around if self._specs(module, recurse=False)]
        self._watched = [*self._blocks, *owners, *(module for module in beside if self._specs(module))]
        self._order: list[nn.Module] | None = None

    def blocks(self, candidates: Sequence[Candidate]) -> list[nn.Module]:
        """The blocks that run before any module that the candidates' directions touch."""
        directions = [candidate.direction for candidate in candidates if candidate.direction is not None]

        def is_touched(module: nn.Module) -> bool:
            return any(direction.touches(spec) for spec in self._specs(module) for direction in directions)

        order = self._order or []
        unseen = set(self._watched).difference(order)  # they may come first
        if len(candidates) < 2 or any(map(is_touched, unseen)):
            return []
        return [module for module in takewhile(lambda m: not is_touched(m), order) if module in self._blocks]

    def may_share(self, candidates: Sequence[Candidate]) -> bool:
        """Whether candidates of this kind leave tensors as they are, or a block has none of its own."""
        directions = [candidate.direction for candidate in candidates if candidate.direction is not None]
        own = [self._specs(block) for block in self._blocks]
        return not all(specs and all(any(d.touches(s) for d in directions) for s in specs) for specs in own)

    @contextmanager
    def once(self, blocks: Sequence[nn.Module], rows: Rows) -> Iterator[None]:
        """Within, these blocks run on one copy of the rows, and what the last one gives is repeated."""
        with ExitStack() as stack:
            for block in blocks:
                repeat = rows.copies if block is blocks[-1] else 1
                stack.enter_context(replaced_forward(block, partial(_run_once, rows, repeat)))
            yield

    @contextmanager
    def learning(self, num_rows: int) -> Iterator[None]:
        """Within, a pass of so many rows shows which modules come first."""
        order, again = dict[nn.Module, None](), set[nn.Module]()
        are_rows = True

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal are_rows
            if module in order:
                again.add(module)
            order.setdefault(module)
            are_rows &= module not in self._blocks or _are_rows((args, kwargs), num_rows)

        with ExitStack() as stack:
            for module in self._watched:
                stack.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
            yield
        self._order = list(takewhile(lambda module: module not in again, order)) if are_rows else []

    def _specs(self, module: nn.Module, *, recurse: bool = True) -> list[Any]:
        return [self._trainable[param] for param in module.parameters(recurse) if param in self._trainable]


def _are_rows(arguments: tuple[tuple[Any, ...], dict[str, Any]], num_rows: int) -> bool:
    """Whether a block takes hidden states [rows, T, features], and beside them only what is of each row or of all."""
    if any(isinstance(value, MutableMapping) for value in (*arguments[0], *arguments[1].values())):
        return False
    tensors = [value for value in pytree.tree_leaves(arguments) if isinstance(value, Tensor) and value.dim() > 1]
    if not tensors or tensors[0].dim() != 3 or tensors[0].shape[0] != num_rows:
        return False
    width = tensors[0].shape[1]
    return all(x.shape[0] in (1, num_rows) and (x.dim() != 3 or x.shape[1] == width) for x in tensors)


def _run_once(rows: Rows, repeat: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    def first_copy(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows.copies * rows.rows
        return value[: rows.rows] if whole else value

    def repeated(value: Any) -> Any:
        is_rows = isinstance(value, Tensor) and value.dim() and value.shape[0] == rows.rows
        return value.repeat(repeat, *[1] * (value.dim() - 1)) if is_rows else value

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(first_copy, (args, kwargs))
        return pytree.tree_map(repeated, forward(*args, **kwargs))

    return run

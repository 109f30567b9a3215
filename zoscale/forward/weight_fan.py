"""`WeightFan`: any trainable weights; a module that owns some runs once per candidate, on that candidate's rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from zoscale.config import ConfigError
from zoscale.estimators import Candidate
from zoscale.forward.fan import SEQUENTIAL, Rows, replaced_forward
from zoscale.forward.scratch import Draws
from zoscale.forward.units import LinearUnit, LookupUnit, Unit, Weights
from zoscale.lanes import lane
from zoscale.models.sizes import blocks_of
from zoscale.models.wide_head import WideHead
from zoscale.shards import trainable_specs

_OWN_WAYS = frozenset(
    {
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fuyu", "gemma3n", "gemma3n_text", "git",
        "got_ocr2", "gpt_neox_japanese", "lfm3", "marian", "mbart", "moss_transcribe_diarize", "mvp", "pegasus",
        "plbart", "reformer", "trocr", "whisper", "zamba2",
    }
)  # fmt: skip
"""Model types that leave modules uncalled, read their weights in another way, or count the rows for themselves."""


def find_units(model: nn.Module) -> list[Unit] | None:
    """The smallest modules with a forward of their own that hold all trainable weights, in the model's order.

    None if the model is known to use some in a way of its own; if such a module holds blocks, or runs on other rows
    than those of the batch in their order: experts that take the tokens routed to them, DoRA, aLoRA (some tokens only),
    virtual tokens, `nn.MultiheadAttention`; or has weights of another too, as PEFT's `trainable_token_indices` has of a
    tied head.
    """
    if getattr(getattr(model, "config", None), "model_type", None) in _OWN_WAYS:
        return None
    trainable = {param: spec for spec, param in trainable_specs(model)}
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if any(param in trainable for param in module.parameters(recurse=False)):
            while name and type(modules[name]).forward is nn.Module.forward:
                name = name.rpartition(".")[0]
            found[name] = modules[name]
    blocks = frozenset(blocks_of(model))
    if any(_is_out_of_order(modules, name, blocks) for name in found):
        return None
    outer = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    table = getattr(model, "get_input_embeddings", lambda: None)()
    inputs = set(table.modules()) if isinstance(table, nn.Module) else set()
    return [_unit(found[n], {p: trainable[p] for p in found[n].parameters() if p in trainable}, inputs) for n in outer]


def _is_out_of_order(modules: Mapping[str, nn.Module], name: str, blocks: frozenset[nn.Module]) -> bool:
    path = name.split(".")
    above = [modules[".".join(path[:depth])] for depth in range(len(path) + 1)]
    return (
        not name
        or not blocks.isdisjoint(modules[name].modules())
        or any(isinstance(module, nn.MultiheadAttention) or getattr(module, "lora_variant", None) for module in above)
        or not {"experts", "prompt_encoder", "token_adapter"}.isdisjoint(path)
    )


def _unit(module: nn.Module, weights: Weights, inputs: Set[nn.Module]) -> Unit:
    """The cheapest way to run a module; `inputs` are those that look up the rows' tokens."""
    if isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, WideHead.forward):
        return LinearUnit(module, weights)
    is_table = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    if is_table and module.max_norm is None and module in inputs:
        return LookupUnit(module, weights)
    return Unit(module, weights)


class WeightFan:
    """See `Fan`; for any trainable weights.

    Args:
        units: from `find_units`.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self.closed: Sequence[nn.Module] = [unit.module for unit in units]

    def prepare(self, candidates: Sequence[Candidate]) -> Callable[[slice, Rows], AbstractContextManager[None]]:
        """See `Fan`."""
        return lambda which, rows: self._fanned(candidates[which], rows)

    @contextmanager
    def _fanned(self, candidates: Sequence[Candidate], rows: Rows) -> Iterator[None]:
        """Within, every unit that the candidates touch runs once per candidate.

        Raises:
            ConfigError: if the model uses the weights of one in another way than by calling it.
        """
        directions = [candidate.direction for candidate in candidates if candidate.direction is not None]
        touched = [
            unit.suited(directions)
            for unit in self.units
            if any(direction.touches(spec) for spec in unit.weights.values() for direction in directions)
        ]
        outlines = [outline for unit in touched for outline in unit.outlines]
        draws = Draws(candidates, outlines, [spec for unit in touched for spec in unit.patched])
        idle, running = {unit.module for unit in touched}, set[nn.Module]()
        with ExitStack() as stack:
            for unit in touched:
                stack.enter_context(
                    replaced_forward(unit.module, partial(_fanned_forward, idle, running, unit, rows, draws))
                )
                if any(owner is not unit.module for owner, _ in unit.places):
                    stack.enter_context(_used_within(unit, running))
            yield
        if idle:
            names = ", ".join(sorted({type(module).__name__ for module in idle}))
            remedy = f"the model has no use for them here, or reads their weights in another way; {SEQUENTIAL}"
            raise ConfigError("every trained module to be called", f"none of {names}", remedy)


@contextmanager
def _used_within(unit: Unit, running: Set[nn.Module]) -> Iterator[None]:
    """Within, this pass calls the modules inside a unit in its forward only: elsewhere no candidate would differ."""
    own = lane()

    def check(module: nn.Module, args: Any) -> None:
        if lane() == own and unit.module not in running:
            expected = f"{type(module).__name__} to be called by the forward of {type(unit.module).__name__} only"
            raise ConfigError(expected, "a call from elsewhere", SEQUENTIAL)

    owners = {owner for owner, _ in unit.places if owner is not unit.module}
    with ExitStack() as stack:
        for module in owners:
            stack.enter_context(module.register_forward_pre_hook(check))
        yield


def _fanned_forward(
    idle: set[nn.Module], running: set[nn.Module], unit: Unit, rows: Rows, draws: Draws, original: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        idle.discard(unit.module)
        running.add(unit.module)
        try:
            return unit.forward(original, rows, draws, *args, **kwargs)
        finally:
            running.discard(unit.module)

    return forward

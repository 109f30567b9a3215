"""`AdapterChoice`: which weighted adapters of a model are connected, and at which rank; a function of their weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from zoscale.adapters.selection import Selection, expanded, strongest
from zoscale.adapters.weighted_lora import Slot, allowed, find_slots
from zoscale.mesh import Mesh
from zoscale.noise.generator import Domain, Key, Noise, Range
from zoscale.shards import ShardedParam

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Change:
    """A choice of adapters that was made.

    Args:
        step: steps taken before.
        weights: w of every adapter that was connected, by the name of its layer in the base model.
        kept: rank of those that still are.
        shapes: of the tensors that are trained from here on, by name.
        values: whole tensors of those that are new or have new values, float32.
    """

    step: int
    weights: Mapping[str, float]
    kept: Mapping[str, int]
    shapes: Shapes
    values: Mapping[str, Tensor] = field(repr=False, compare=False)

    @property
    def metrics(self) -> dict[str, float]:
        """The weights, as metrics."""
        return {f"adapters/weight/{name}": weight for name, weight in self.weights.items()}

    def __str__(self) -> str:
        ranks = ", ".join(sorted({str(rank) for rank in self.kept.values()}))
        names = ", ".join(f"{name} ({self.weights[name]:.4f})" for name in self.kept)
        return f"kept {len(self.kept)} of {len(self.weights)} adapters, of rank {ranks}: {names}"


class AdapterChoice:
    """The weighted adapters of one model and when they are chosen among.

    The choice after a step is a function of the weights then: every rank makes it for itself, and a replay makes it
    again.

    Args:
        model: a PEFT model after `weigh_adapters`.
        selection: how many are kept, and from when.
        noise: of the run's seed; new rows of A are drawn from it on the CPU.
        mesh: the ranks.

    Raises:
        ValueError: for a model without weighted adapters.
    """

    def __init__(self, model: nn.Module, selection: Selection, noise: Noise, mesh: Mesh) -> None:
        self.slots = find_slots(model)
        if not self.slots:
            raise ValueError("expected a model with weighted adapters, got none: call weigh_adapters before")
        self.selection = selection
        self.noise = noise
        self.mesh = mesh
        self._changes: list[Change] = []
        self._device, self._dtype = self.slots[0].a.weight.device, self.slots[0].a.weight.dtype

    @property
    def connected(self) -> list[Slot]:
        """The adapters that layers apply."""
        return [slot for slot in self.slots if slot.is_connected]

    def after(self, step: int, shards: Sequence[ShardedParam]) -> Change | None:
        """The choice that is due after so many steps; None if none is. A collective; the model is as before.

        Args:
            step: steps taken.
            shards: this rank's slices of all trainable tensors.
        """
        expansions = self.selection.expansions_at(step)
        if expansions is None:
            return None
        own = {shard.spec.name: shard for shard in shards}
        slots = {slot.own_name: slot for slot in self.connected}
        factors = self._whole([own[slot.names[2]] for slot in slots.values()])
        weights = {name: float(factors[slot.names[2]]) for name, slot in slots.items()}
        names = strongest(weights, self.selection.kept_at(expansions))
        kept = {name: slots[name].rank * (2 if expansions else 1) for name in names}
        shapes = {key: shape for name in names for key, shape in slots[name].shapes(kept[name]).items()}
        values = self._expanded(step, [slots[name] for name in names], own) if expansions else {}
        change = Change(step, weights, kept, dict(sorted(shapes.items())), values)
        self._changes.append(replace(change, values={}))
        return change

    def take_changes(self) -> list[Change]:
        """The choices that were made since the last call, without values."""
        taken, self._changes = self._changes, []
        return taken

    def allows(self, shapes: Shapes) -> bool:
        """Whether the adapters can be arranged so."""
        return allowed(self.slots, shapes, self.selection.expansions)

    def arrange(self, shapes: Shapes, prepare: Callable[[nn.Parameter], None]) -> None:
        """Connect and disconnect adapters until these tensors are trained; new ones are zero.

        Args:
            shapes: that `allows` finds possible.
            prepare: is called with every new parameter.
        """

        def new(shape: tuple[int, ...]) -> nn.Parameter:
            param = nn.Parameter(torch.zeros(shape, dtype=self._dtype, device=self._device))
            prepare(param)
            return param

        for slot in self.slots:
            wanted = shapes.get(slot.names[0])
            if wanted is None and slot.is_connected:
                slot.disconnect()
            elif wanted is not None and not (slot.is_connected and slot.rank == wanted[0]):
                slot.connect(wanted[0], new)

    def _whole(self, shards: Sequence[ShardedParam]) -> dict[str, Tensor]:
        """Whole truths by name. A collective."""
        wholes = self.mesh.gather_flats([(shard.truth, shard.spec.numel) for shard in shards])
        return {
            shard.spec.name: whole.view(shard.spec.shape).float() for shard, whole in zip(shards, wholes, strict=True)
        }

    def _expanded(self, step: int, slots: Sequence[Slot], own: Mapping[str, ShardedParam]) -> dict[str, Tensor]:
        """A and B of twice the rank."""
        shards = [own[name] for slot in slots for name in slot.names[:2]]
        wholes, specs = self._whole(shards), {shard.spec.name: shard.spec for shard in shards}
        ranges = [Range(specs[slot.names[0]].id, 0, specs[slot.names[0]].numel) for slot in slots]
        drawn = self.noise.normal(Key(step, 0, Domain.EXPANSION), ranges)
        values: dict[str, Tensor] = {}
        for slot, noise in zip(slots, drawn, strict=True):
            a, b, _ = slot.names
            values[a], values[b] = expanded(wholes[a], wholes[b], noise.view(wholes[a].shape))
        return values

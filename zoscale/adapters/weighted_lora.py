"""LoRA adapters that carry a trained weight each, and of which only some are connected (WeightLoRA).

y = W x + scaling w B A x. A weight is the parameter `factor` of the module B, 1 at first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zoscale.adapters.selection import Selection
from zoscale.config import ConfigError

_PREFIX = "base_model.model."  # of PEFT's names of a model's own modules


class WeightedLinear(nn.Linear):
    """w B: a linear layer without bias, times a trained number.

    Args:
        linear: whose weight it takes over.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.factor = nn.Parameter(torch.ones(1, dtype=linear.weight.dtype, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


@dataclass(frozen=True, eq=False)
class Slot:
    """An adapter's place in a layer, whether it is connected or not.

    Args:
        name: of the layer in the PEFT model.
        adapter: name of the adapter in PEFT.
        layer: the PEFT layer.
        a: module of A [r, in].
        b: module of B [out, r] and w [1].
        start_rank: r before any expansion.
    """

    name: str
    adapter: str
    layer: Any
    a: nn.Linear
    b: WeightedLinear
    start_rank: int

    @property
    def own_name(self) -> str:
        """Of the layer in the model without PEFT."""
        return self.name.removeprefix(_PREFIX)

    @property
    def is_connected(self) -> bool:
        """Whether the layer applies the adapter."""
        return self.adapter in self.layer.lora_A

    @property
    def rank(self) -> int:
        """r, as it is or was last."""
        return self.a.out_features

    @property
    def names(self) -> tuple[str, str, str]:
        """Of A, B and w among the model's parameters."""
        a, b = (f"{self.name}.lora_{matrix}.{self.adapter}" for matrix in "AB")
        return f"{a}.weight", f"{b}.weight", f"{b}.factor"

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """By name, the shapes of A, B and w at a rank."""
        shapes = (rank, self.a.in_features), (self.b.out_features, rank), (1,)
        return dict(zip(self.names, shapes, strict=True))

    def disconnect(self) -> None:
        """Take the adapter out of the layer, which is then as fast as the base layer."""
        del self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]
        self.a.weight = self.b.weight = self.b.factor = None  # type: ignore[assignment]

    def connect(self, rank: int, new: Callable[[tuple[int, ...]], nn.Parameter]) -> None:
        """Give the layer an adapter of this rank with new parameters; w stays if the adapter was there."""
        a, b, factor = self.shapes(rank).values()
        self.a.weight, self.b.weight = new(a), new(b)
        if not self.is_connected:
            self.b.factor = new(factor)
            self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter] = self.a, self.b
        self.a.out_features = self.b.in_features = rank
        self.layer.r[self.adapter] = rank


def find_slots(model: nn.Module) -> list[Slot]:
    """The weighted adapters of a model, in the order of its modules."""
    from peft.tuners.lora import Linear

    return [
        Slot(name, adapter, layer, layer.lora_A[adapter], b, layer.lora_A[adapter].out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, Linear)
        for adapter, b in layer.lora_B.items()
        if isinstance(b, WeightedLinear)
    ]


def weigh_adapters(model: nn.Module, selection: Selection) -> None:
    """Give every LoRA adapter of a PEFT model its weight.

    Raises:
        ConfigError: if anything but LoRA matrices of linear layers is trained, or the selection does not fit them.
    """
    from peft.tuners.lora import Linear

    for layer in [module for module in model.modules() if isinstance(module, Linear)]:
        for adapter, b in layer.lora_B.items():
            if b.bias is None:
                layer.lora_B[adapter] = WeightedLinear(b)
    slots = find_slots(model)
    known = {name for slot in slots for name in slot.names}
    others = [name for name, param in model.named_parameters() if param.requires_grad and name not in known]
    if others or any(slot.layer.lora_variant for slot in slots):
        got = others[0] if others else "a variant of LoRA"
        remedy = "train nothing else, and name the layers in adapter.target_modules: all-linear takes experts too"
        raise ConfigError("only plain LoRA of linear layers with peft_type weight_lora", got, remedy)
    if selection.keep >= len(slots):
        got = f"{selection.keep} of {len(slots)}"
        raise ConfigError("adapter.keep to be fewer than the model's adapters", got, "lower it, or use lora")
    for slot in slots:
        if (rank := slot.rank * 2**selection.expansions) > slot.a.in_features:
            got = f"{rank} after {selection.expansions} expansions"
            raise ConfigError(f"a rank of at most {slot.a.in_features} at {slot.own_name}", got, "lower adapter.r")


def allowed(slots: Sequence[Slot], shapes: Mapping[str, Sequence[int]], expansions: int) -> bool:
    """Whether tensors of these names and shapes are some of the adapters, after at most so many expansions."""
    left = {name: tuple(shape) for name, shape in shapes.items()}
    for slot in slots:
        found = {name: left.pop(name) for name in slot.names if name in left}
        if found and found not in [slot.shapes(slot.start_rank * 2**number) for number in range(expansions + 1)]:
            return False
    return bool(shapes) and not left


def plain(model: Any, slots: Sequence[Slot], state: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The connected adapters as PEFT knows them: their configuration, and A and B with w in B.

    Rank and alpha grow alike in expansions, which leaves PEFT's scaling as it is; where it goes by the root of the rank
    (`use_rslora`), B makes up for the difference.

    Args:
        model: the PEFT model.
        slots: its adapters.
        state: whole tensors by name.
    """
    kept = [slot for slot in slots if slot.is_connected]
    config = model.active_peft_config
    growth = kept[0].rank // kept[0].start_rank
    correction = growth**-0.5 if config.use_rslora else 1.0
    folded: dict[str, Tensor] = {}
    for slot in kept:
        a, b, factor = (state[name] for name in slot.names)
        folded |= {slot.names[0]: a, slot.names[1]: (b.double() * factor.double() * correction).to(b.dtype)}
    changes: dict[str, Any] = {
        "target_modules": {slot.own_name for slot in kept},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "r": config.r * growth,
        "lora_alpha": config.lora_alpha * growth,
        "rank_pattern": {key: rank * growth for key, rank in config.rank_pattern.items()},
        "alpha_pattern": {key: alpha * growth for key, alpha in config.alpha_pattern.items()},
    }
    return replace(config, **changes), folded

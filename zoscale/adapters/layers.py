"""Layers with an adapter: that they can have one, and that PEFT loads it again."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from zoscale.config import ConfigError

_NOT_LINEAR = ("DeepseekV4GroupedLinear", "Llama4Router", "PhimoeTopKRouter")
"""Subclasses of `nn.Linear` in transformers that do more than multiply: an adapter's output does not fit theirs."""


def check_adapted(adapted: nn.Module) -> None:
    """Refuse an adapter of layers that cannot have one, or that would be lost between saving and loading it.

    Raises:
        ConfigError: with the names of the layers.
    """
    _check_kinds(adapted)
    _check_loads(adapted)


def _check_kinds(adapted: nn.Module) -> None:
    kinds = {name: type(layer.base_layer).__name__ for name, layer in _layers(adapted).items()}
    unfit = {name: kind for name, kind in kinds.items() if kind in _NOT_LINEAR}
    if unfit:
        got = f"{_shown(unfit)} ({', '.join(dict.fromkeys(unfit.values()))})"
        raise ConfigError("an adapter of layers that only multiply", got, _leave_out(unfit))


def _check_loads(adapted: Any) -> None:
    """Load the adapter's values into itself, as PEFT will.

    It renames them as transformers renames the weights of older checkpoints, and says nothing of names that the model
    does not have then.
    """
    if adapted.active_peft_config.is_prompt_learning:
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    trained = {name for name, param in adapted.named_parameters() if param.requires_grad}
    saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    lost = trained & set(set_peft_model_state_dict(adapted, saved).missing_keys)
    if lost:
        layers = [layer for layer in _layers(adapted) if any(name.startswith(f"{layer}.") for name in lost)]
        expected = f"an adapter of {type(adapted.get_base_model()).__name__} that PEFT loads as it was saved"
        got = f"{_shown(layers or lost)}, which it renames and loses"
        raise ConfigError(expected, got, _leave_out(layers))


def _leave_out(names: Iterable[str]) -> str:
    """The remedy for some layers: their last names, with that of what they are in."""
    ends = [[part for part in name.split(".")[-2:] if not part.isdigit()] for name in names]
    excluded = ",".join(dict.fromkeys(".".join(end) for end in ends))
    return f"set adapter.exclude_modules=[{excluded}], or other adapter.target_modules"


def _layers(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter of PEFT, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _shown(names: Iterable[str]) -> str:
    """Names of layers as a user knows them, those that differ in numbers as one, and of many the first few."""
    found = {re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix("base_model.model.")): None for name in sorted(names)}
    first, others = list(found)[:6], len(found) - 6
    return ", ".join(first) + (f" and {others} others" if others > 0 else "")

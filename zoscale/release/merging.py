"""An adapter's values added to the weights of its base model."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoscale.adapters.layers import adapted_layers, uncalled
from zoscale.adapters.schemes import quiet_peft
from zoscale.config import ConfigError, first_line

_TOKENS = 8  # of the row that shows which layers a model calls


def merge(base: Any, adapter: Path) -> Any:
    """The base model with an adapter in its weights.

    Args:
        base: the model; it is used up.
        adapter: folder of the adapter, in PEFT's format.

    Raises:
        ConfigError: for an adapter that weights cannot take up.
    """
    from peft import PeftModel

    try:
        with quiet_peft():
            adapted = PeftModel.from_pretrained(base, adapter, is_trainable=True)
            _untie(base)
            _check_unshared(base)
            _drop_uncalled(adapted)
            return adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:  # a bias for layers that have none, values that are not finite
        if type(error) not in (RuntimeError, ValueError):
            raise
        expected = "an adapter that PEFT can merge"
        raise ConfigError(expected, first_line(error), "export it with --adapter") from error


def _untie(base: Any) -> None:
    """Part a tied embedding and head if one has an adapter: what is merged into a weight of both would reach both.

    Args:
        base: the model, with PEFT's layers in it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    if is_tied and any(isinstance(end, BaseTunerLayer) for end in (embedding, head)):
        layer: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        base.config.tie_word_embeddings = False


def _check_unshared(base: nn.Module) -> None:
    """Refuse adapters of layers that share their weights: what is merged for one of them would reach all.

    Raises:
        ConfigError: with the names of such layers.
    """
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in base.named_modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(param, []).append(name.removesuffix(".base_layer"))
    for layer in adapted_layers(base).values():
        for param in layer.get_base_layer().parameters():
            if len(names := owners[param]) > 1:
                got = f"adapters of layers that share their weights: {', '.join(names)}"
                raise ConfigError("an adapter that weights can take up", got, "export it with --adapter")


@torch.no_grad()
def _drop_uncalled(adapted: Any) -> None:
    """Take adapters off layers that the model does not call: they change nothing, but merged, they would."""
    with uncalled(adapted) as idle:
        ids = torch.arange(_TOKENS)[None] % len(adapted.get_input_embeddings().weight)
        adapted.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for name in idle:
        adapted.set_submodule(name, adapted.get_submodule(name).get_base_layer())

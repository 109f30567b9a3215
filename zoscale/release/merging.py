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

    was_tied = _is_tied(base)
    try:
        with quiet_peft():
            adapted = PeftModel.from_pretrained(base, adapter, is_trainable=True)
            if _adapts_tied_weights(base):
                _untie(base)
            _drop_uncalled(adapted)
            merged = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:  # a bias for layers that have none, values that are not finite
        if type(error) not in (RuntimeError, ValueError):
            raise
        expected = "an adapter that PEFT can merge"
        raise ConfigError(expected, first_line(error), "export it with --adapter") from error
    if was_tied and not _is_tied(merged):  # PEFT has trained a copy of the head or of the embedding
        _untie(merged)
    return merged


def _is_tied(model: Any) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _adapts_tied_weights(base: nn.Module) -> bool:
    """Whether a layer with an adapter shares its matrix with another one: what is merged into it would reach both."""
    shared = _places(base)
    layers = adapted_layers(base).values()
    return any(param.dim() > 1 and param in shared for layer in layers for param in layer.get_base_layer().parameters())


def _untie(model: Any) -> None:
    """Give each layer weights of its own, and say so in the configuration, which is about all that are tied."""
    for param, places in _places(model).items():
        for module, name in places[1:]:
            setattr(module, name, nn.Parameter(param.detach().clone()))
    model.config.tie_word_embeddings = False


def _places(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """The modules that hold a weight, and its name there, of weights that several modules hold."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            places.setdefault(param, []).append((module, name))
    return {param: found for param, found in places.items() if len(found) > 1}


@torch.no_grad()
def _drop_uncalled(adapted: Any) -> None:
    """Take adapters off layers that the model does not call: they change nothing, but merged, they would."""
    with uncalled(adapted) as idle:
        ids = torch.arange(_TOKENS)[None] % len(adapted.get_input_embeddings().weight)
        adapted.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for name in idle:
        adapted.set_submodule(name, adapted.get_submodule(name).get_base_layer())

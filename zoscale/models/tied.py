"""Weights that are one by the model's configuration: whether its checkpoint agrees."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from zoscale.config import ConfigError, ModelConfig


def check_tied(config: ModelConfig, model: Any) -> None:
    """Refuse a checkpoint with two values for weights that the configuration ties, as a head and an embedding.

    Transformers parts them then, but under ZeRO-3 the value that is read last would be that of both.

    Args:
        config: of the model.
        model: as it was loaded.

    Raises:
        ConfigError: if there are two.
    """
    for name, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if (value := _stored(config, name)) is None or (second := _stored(config, other)) is None:
            continue
        if not torch.equal(value, second):
            remedy = "set model.untie_head=true to use both, or remove one from the checkpoint"
            raise ConfigError(f"one value for tied weights in {config.id}", f"two, of {other} and {name}", remedy)


def _stored(config: ModelConfig, name: str) -> Tensor | None:
    """A weight of the checkpoint; None if it is not there, or pickled."""
    index = _file(config, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        file = _file(config, SAFE_WEIGHTS_NAME)
    else:
        files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        key = _key(name, files)
        file = None if key is None else _file(config, files[key])
    if file is None:
        return None
    with safe_open(file, framework="pt") as weights:
        key = _key(name, weights.keys())
        found: Tensor | None = None if key is None else weights.get_tensor(key)
        return found


def _key(name: str, keys: Any) -> str | None:
    """A weight's name in a checkpoint, which may be that of the model without its head."""
    return next((key for key in keys if name == key or name.endswith(f".{key}")), None)


def _file(config: ModelConfig, name: str) -> str | None:
    found: str | None = cached_file(
        str(config.id), name, revision=config.revision, _raise_exceptions_for_missing_entries=False
    )
    return found

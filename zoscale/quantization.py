"""A frozen base in 4 bits (QLoRA, arXiv 2305.14314), by bitsandbytes through transformers."""

import importlib.util
from typing import Any

import torch

from zoscale.config import ConfigError, ModelConfig, RunConfig


def check_quantization(config: RunConfig) -> None:
    """Refuse what a base in 4 bits cannot be combined with.

    Raises:
        ConfigError: what was expected, and why.
    """
    if config.model.quantization is None:
        return
    beside = f"beside model.quantization={config.model.quantization}"
    if config.adapter is None:
        remedy = "set adapter: weights in 4 bits cannot be trained"
        raise ConfigError(f"an adapter {beside}", "none", remedy)
    if config.model.id is None:
        raise ConfigError(f"model.id {beside}", "random weights", "name a model, or remove model.quantization")
    if config.mesh.shard_size != 1:
        got = "null" if config.mesh.shard_size is None else str(config.mesh.shard_size)
        remedy = "set it to 1: ZeRO-3 cannot cut up weights that share their scales in blocks"
        raise ConfigError(f"mesh.shard_size 1 {beside}", got, remedy)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"the package bitsandbytes {beside}", "none", "pip install 'zoscale[quantization]'")


def loading_options(config: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` needs to quantize the linear layers while it loads them; nothing for other models.

    The scales of the blocks are quantized too. The embedding and the head keep their type.
    """
    if config.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    chosen = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": chosen}

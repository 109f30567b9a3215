"""A frozen base in 4 bits (QLoRA, arXiv 2305.14314), by bitsandbytes through transformers."""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from zoscale.config import ConfigError, ModelConfig, RunConfig

_BLOCK, _BLOCK_OF_SCALES = 64, 256  # bitsandbytes' own


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
    kind, dtype = config.adapter.get("peft_type", "lora"), config.model.dtype
    if kind == "weight_lora":
        raise ConfigError(f"adapter.peft_type lora or another {beside}", kind, "it weighs plain layers: choose lora")
    if kind == "ia3" and dtype != "float32":
        remedy = "set model.dtype, or choose lora: what PEFT scales with ia3 stays in float32, which others do not take"
        raise ConfigError(f"model.dtype float32 for adapter.peft_type ia3 {beside}", dtype, remedy)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"the package bitsandbytes {beside}", "none", "pip install 'zoscale[quantization]'")


def layers_in_4_bits(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers whose weights transformers cuts to 4 bits; the model itself is in any type."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    in_fp32 = model._keep_in_fp32_modules
    whole = HfQuantizer.get_modules_to_not_convert(model, None, None if in_fp32 is None else list(in_fp32))
    linear = (name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D))
    return [name for name in linear if should_convert_module(name, whole)]


def bytes_in_4_bits(numel: int) -> int:
    """Of a weight with its constants: two values per byte; per 64 values a scale in 8 bits; per 256 scales one in fp32,
    and one mean of all of them; the table of the 16 values (QLoRA, section 3)."""
    scales = -(-numel // _BLOCK)
    return -(-numel // 2) + scales + 4 * -(-scales // _BLOCK_OF_SCALES) + 4 + 4 * 16


def bytes_of_constants(model: nn.Module) -> int:
    """What a loaded model's weights in 4 bits have beside them, tables that all share left out."""
    states = [getattr(weight, "quant_state", None) for weight in model.parameters()]
    own = [(state.absmax, state.code, state.offset, state.state2.absmax) for state in states if state is not None]
    return sum(tensor.nbytes for tensors in own for tensor in tensors)


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


def keep_packing(model: nn.Module) -> None:
    """Compute with the weights as they were loaded, in the type that was asked for.

    On CPUs with bf16 instructions bitsandbytes repacks weights at their first use, rounds scales and inputs to bf16
    (fp32 ones too) and looks for a kernel to load from the hub: losses would depend on the processor, and differ by
    more than the steps of a perturbation.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

"""Sizes of a causal language model: its parameters, its blocks, its positions, the tokens of one pass."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from zoscale.config import ConfigError, first_line
from zoscale.shards import true_numel

_WIDTHS = ("hidden_size", "n_embd", "d_model")
_INNER_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")
_LIVE_WIDTHS, _LIVE_INNER = 8, 2
"""Activations of a block that live at once: residual, norm, q, k, v, output and others; inner ones twice."""
_CAUSAL_IN_ANY_CASE = ("gpt_neox", "gpt_neox_japanese")
"""Model types that are causal whatever `is_decoder` says."""
_NEVER_CAUSAL = ("cpmant", "prophetnet", "xlnet")
"""Model types of AutoModelForCausalLM of which a token's output depends on those after it, or predicts several."""
_POSITIONS = re.compile(r"(^|[._])(pos|wpe)")
"""Found in the names of tables with a row for each position."""


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, counted without memory, and of positions.

    Args:
        total: all parameters, tied ones once.
        largest_block: of the largest transformer block.
        outside_blocks: embeddings, head and final norm.
        largest_in_block: of the largest tensor of a block.
        matrices_in_block: number of matrices of the block that has most.
        matrices_outside: number of matrices outside of blocks.
        positions: see `num_positions`.
        vocabulary: tokens that the input embedding has; None = it is no table.
    """

    total: int
    largest_block: int
    outside_blocks: int
    largest_in_block: int = 0
    matrices_in_block: int = 0
    matrices_outside: int = 0
    positions: int | None = None
    vocabulary: int | None = None


def count_parameters(architecture: Any, *, trust_remote_code: bool = False) -> ModelSize:
    """Sizes of the model that an architecture describes, built on the meta device.

    Raises:
        ConfigError: if it is no causal language model, as encoders (BERT) are not, or its options do not go together.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_model().from_config(architecture, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises any type at all: ZeroDivisionError for a hidden_size of 0
        got = f"{architecture.model_type} ({first_line(error)[:300]})"
        raise ConfigError("a causal language model of transformers", got, "correct model.id or model.config") from error
    if not _is_causal(model.config):
        remedy = "choose a decoder"
        if _has_choice(model.config):
            remedy += "; if the weights were trained as one, set is_decoder true in its config.json"
        raise ConfigError("a model whose tokens do not see those after them", architecture.model_type, remedy)
    model.tie_weights()
    weights = list(model.parameters())
    total = sum(param.numel() for param in weights)
    inside = [list(block.parameters()) for block in blocks_of(model)]
    blocks = [sum(param.numel() for param in block) for block in inside]
    matrices = [sum(param.dim() > 1 for param in block) for block in inside]
    outside = set(weights).difference(*inside)
    return ModelSize(
        total,
        max(blocks, default=total),
        sum(param.numel() for param in outside),
        max(param.numel() for block in inside or [weights] for param in block),
        max(matrices, default=sum(param.dim() > 1 for param in weights)),
        sum(param.dim() > 1 for param in outside),
        num_positions(model),
        _vocabulary(model),
    )


def _vocabulary(model: PreTrainedModel) -> int | None:
    table = model.get_input_embeddings()
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _is_causal(config: Any) -> bool:
    """Whether outputs depend on earlier tokens only, by the model's type and configuration."""
    kind = config.model_type
    if kind in _NEVER_CAUSAL or (kind == "xlm" and not config.causal):
        return False
    if kind == "reformer" and "lsh" in config.attn_layers:  # sorted, at random, with the tokens behind
        return False
    text = config.get_text_config()
    if getattr(text, "is_causal", None) is False or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return False  # embedding models that were made of decoders
    return kind in _CAUSAL_IN_ANY_CASE or not _has_choice(config) or config.is_decoder is not False


def _has_choice(config: Any) -> bool:
    """Whether models of this type look ahead, by `is_decoder`; for others a value in config.json says nothing."""
    return hasattr(type(config), "is_decoder") and config.model_type not in _NEVER_CAUSAL


def num_positions(model: nn.Module) -> int | None:
    """Most tokens of a sequence for a model that looks positions up in a table (OPT, GPT-2, GPT-J); None for others.

    Where positions are computed (rotary, ALiBi), a longer sequence is no error, whatever the configuration says; but
    MPT's code makes its biases for `max_seq_len` tokens and no more, and positions that stretch with the longest row
    of a batch (LongRoPE, dynamic scaling) would let other rows and padding change the losses of a row.
    """
    config: Any = model.config
    if config.model_type == "mpt":
        return int(config.max_seq_len)
    most: int | None = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    learned = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)  # RoBERTa counts from it
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name) and module.num_embeddings >= most
    ]
    fixed = [len(table) for name, table in model.named_buffers() if _POSITIONS.search(name) and table.dim() == 2]
    limits = [*learned, *(rows for rows in fixed if rows == most), *_unstretched(config)]
    return min(most, *limits) if limits else None


def _unstretched(config: Any) -> list[int]:
    """Tokens of a row up to which rotary positions are not stretched, by kinds of layers; none where they never are."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    options = [rope, *(own for own in rope.values() if isinstance(own, dict))]
    longrope = [own["original_max_position_embeddings"] for own in options if own.get("rope_type") == "longrope"]
    return [*longrope, *(config.max_position_embeddings for own in options if own.get("rope_type") == "dynamic")]


def hidden_size(model: nn.Module) -> int:
    """Features of a token between two blocks."""
    config = getattr(model, "config", None)
    return next((size for name in _WIDTHS if (size := getattr(config, name, None))), 1024)


def tokens_per_pass(model: nn.Module) -> int:
    """Tokens of one forward whose activations stay small beside the weights: an eighth of them, or 1 GiB.

    A function of the model alone, so that every rank and every machine cuts a batch alike.
    """
    config, weights = getattr(model, "config", None), list(model.parameters())
    total = sum(true_numel(weight) for weight in weights)
    hidden = hidden_size(model)
    inner = next((size for name in _INNER_WIDTHS if (size := getattr(config, name, None))), 4 * hidden)
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # one for each block (Gemma 3n)
    per_token = _LIVE_WIDTHS * hidden + _LIVE_INNER * inner
    return int(max(total // 8, 2**30 // weights[0].element_size()) // per_token)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, by the model's own list of modules that are not split; the outer one of two (Mamba)."""
    names = getattr(model, "_no_split_modules", None) or ()
    found = [module for module in model.modules() if type(module).__name__ in names]
    inside = {inner for block in found for inner in block.modules() if inner is not block}
    return [block for block in found if block not in inside]


def auto_model() -> Any:
    """The class that makes causal language models; its factory methods are untyped."""
    return AutoModelForCausalLM

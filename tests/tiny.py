"""Tiny models and batches, the same in every process: shared by tests and their workers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from zoscale.data.batch import MicroBatch
from zoscale.data.prefixes import Row, share_prefixes

FEW = 4 / 3
"""Tokens per answer, for `zoscale.data.batch.FEW`: rows here are short."""
LORA = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt", "vocab_size": 211, "hidden_size": 36, "word_embed_proj_dim": 36, "num_hidden_layers": 2,
        "ffn_dim": 50, "num_attention_heads": 4, "max_position_embeddings": 40, "dropout": 0.0,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 211, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 40, "tie_word_embeddings": False,
    },
}  # fmt: skip
_LLAMA_LIKE = {
    "vocab_size": 211, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 40,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "gpt2": {"model_type": "gpt2", "vocab_size": 211, "n_embd": 36, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "qwen2": {"model_type": "qwen2", **_LLAMA_LIKE},
    "mistral": {"model_type": "mistral", **_LLAMA_LIKE},
}
TARGETS: dict[str, Any] = {
    "opt": ["q_proj", "v_proj", "fc1", "out_proj"],
    "llama": ["q_proj", "v_proj", "lm_head"],
    "gpt2": ["c_attn", "c_proj"],
    "qwen2": ["q_proj", "k_proj", "down_proj"],
    "mistral": "all-linear",
}
"""Layers with an adapter each."""


def save_model(name: str, folder: Path) -> Path:
    """A model with seeded random weights, large enough that losses differ."""
    options = dict(FAMILIES[name])
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return folder


def values(name: str, shape: tuple[int, ...], scale: float = 0.1) -> torch.Tensor:
    """Starting values of a trainable tensor, by its name."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) * scale


def batch(step: int, num_micro_batches: int = 3) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of different widths, with padding, labels on the last tokens."""
    generator = torch.Generator().manual_seed(1000 + step)
    made = []
    for number in range(num_micro_batches):
        width = 7 + number
        ids = torch.randint(4, 200, (2, width), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, width - number - 1 :] = 0
        ids[mask == 0] = 1
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def options(*, merged: bool, num_micro_batches: int = 3) -> list[MicroBatch]:
    """Two examples with options of 1 to 5 tokens each, of which some begin alike; a row for each, or merged."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 200, (count,), generator=generator).tolist())

    made = []
    for number in range(num_micro_batches):
        rows = []
        for example in range(2):
            prompt, start = draw(9 + number + 2 * example), draw(2)
            texts = [draw(4), (*start, *draw(3)), (*start, *draw(1)), draw(1)]
            whole = [(prompt + text, len(prompt), option) for option, text in enumerate(texts)]
            own = [Row(t[:-1], tuple((c - 1, t[c], o) for c in range(first, len(t))), example) for t, first, o in whole]
            rows += share_prefixes(own, 40, branching=True) if merged else own
        made.append(MicroBatch.from_rows(rows, [[False, True, False, False], [True, False, False, False]], 0))
    return made

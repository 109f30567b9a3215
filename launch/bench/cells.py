"""`Cell`: one setting in which all variants are measured side by side."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from zoscale.config import ConfigError, at_least

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PROBES_OF = {"lora": ("block",), "full": ("block", "rademacher", "gaussian")}
"""Probes that are measured with each scheme."""
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "full": None,
}


def _opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "dropout": 0.0,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _opt(32, 2, 4) | {"vocab_size": 211, "max_position_embeddings": 64},
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
}
"""Architectures by name; their weights are random."""


@dataclass(frozen=True)
class Cell:
    """One setting.

    Args:
        model: a name in `SHAPES`.
        scheme: what is trained: `lora` (r 8 on q_proj and v_proj) or `full` (all weights).
        probe: directions of the engine's variants.
        dtype: of the frozen weights: fp32, bf16 or fp16.
        ranks: processes that hold the model together by ZeRO-3; 1 = the plain model on one device.
        q: two-point directions per step.
        batch: rows of one rank's micro-batch.
        tokens: tokens of every row.
        repetitions: timed steps of each variant.
        threads: CPU threads of a rank.
        master: truth of the trained weights: fp32, or none.
        compile: of the engine's variants: `off`, or their blocks compiled, `cuda_graphs` replayed too.
        seed: of weights, tokens and directions.
    """

    model: str = "opt-125m"
    scheme: str = "lora"
    probe: str = "block"
    dtype: str = "fp32"
    ranks: int = 1
    q: int = 1
    batch: int = 16
    tokens: int = 48
    repetitions: int = 5
    threads: int = 1
    master: str = "fp32"
    compile: str = "off"
    seed: int = 0

    @classmethod
    def read(cls, text: str) -> "Cell":
        """From `text()`."""
        return cls(**json.loads(text))

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that select cells."""
    parser.add_argument("--model", default="opt-125m", choices=SHAPES, help="shapes; the weights are random")
    parser.add_argument("--schemes", nargs="+", default=list(PROBES_OF), choices=PROBES_OF)
    parser.add_argument("--probes", nargs="+", default=PROBES_OF["full"], choices=PROBES_OF["full"],
                        help="of full; lora has block only")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--ranks", nargs="+", type=at_least(1), default=[1, 2])
    parser.add_argument("--q", nargs="+", type=at_least(1), default=[1, 4])
    parser.add_argument("--batch", type=at_least(1), default=16, help="rows per rank")
    parser.add_argument("--tokens", type=at_least(2), default=48, help="tokens per row")
    parser.add_argument("--repetitions", type=at_least(1), default=5, help="timed steps of each variant")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads per rank; default: cores / ranks")
    parser.add_argument("--master", default="fp32", choices=["fp32", "none"], help="truth of the trained weights")
    parser.add_argument("--compile", default="off", choices=["off", "blocks", "cuda_graphs"],
                        help="of the engine's variants; needs --schemes lora --ranks 1")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)


def select(options: argparse.Namespace) -> list[Cell]:
    """All cells that the options name; on GPUs, those of as many ranks as there are.

    Raises:
        ConfigError: for options that do not go together.
    """
    if options.compile != "off" and (options.schemes != ["lora"] or options.ranks != [1]):
        got = f"--schemes {' '.join(options.schemes)} --ranks {' '.join(map(str, options.ranks))}"
        raise ConfigError(f"--schemes lora --ranks 1 beside --compile {options.compile}", got, "leave others out")
    longest = SHAPES[options.model].get("max_position_embeddings", 2048)
    if options.tokens > longest:
        raise ConfigError(f"at most {longest} tokens for {options.model}", str(options.tokens), "lower --tokens")
    shared = {
        name: getattr(options, name)
        for name in ("model", "batch", "tokens", "repetitions", "master", "compile", "seed")
    }  # fmt: skip
    return [
        Cell(
            scheme=scheme, probe=probe, dtype=dtype, ranks=ranks, q=q,
            threads=options.threads or max(1, (os.cpu_count() or 1) // ranks), **shared,
        )
        for ranks, dtype, scheme, q in product(_possible(options.ranks), options.dtypes, options.schemes, options.q)
        for probe in _probes(scheme, options.probes)
    ]  # fmt: skip


def _possible(wanted: Sequence[int]) -> list[int]:
    """Without the numbers of ranks for which there are too few GPUs, if there is any."""
    from torch.cuda import device_count

    possible = [ranks for ranks in wanted if not device_count() or ranks <= device_count()]
    if len(possible) < len(wanted):
        print(f"{device_count()} GPUs: left out {sorted(set(wanted) - set(possible))} ranks", file=sys.stderr)
    return possible


def _probes(scheme: str, wanted: Sequence[str]) -> list[str]:
    return [probe for probe in PROBES_OF[scheme] if probe in wanted or scheme == "lora"]


def deepspeed_config(on_gpu: bool) -> Path:
    """The shipped ZeRO-3 file of the device."""
    name = "zero3.json" if on_gpu else "zero3_cpu.json"
    return Path(__file__).parents[2] / "ds_configs" / name

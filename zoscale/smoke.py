"""A few ZeRO-3 steps of a model made on the spot, as JSON: `torchrun --nproc_per_node 2 -m zoscale.smoke`."""

import json
import math
import time

import torch

from zoscale.config import ModelConfig
from zoscale.engine import ZeroOrderEngine
from zoscale.meters import CommMeter, count_allgathers
from zoscale.models.loading import add_adapter, load_model, read_model_config
from zoscale.models.sizes import count_parameters
from zoscale.optim import JaguarSignSGD
from zoscale.runtime import ZERO3, Runtime, start, stop

_STEPS = 4  # stale copies of edited shards show from the second on
_SHAPES = {
    "model_type": "opt", "vocab_size": 128, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2,
    "ffn_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 16, "dropout": 0.0,
}  # fmt: skip


def smoke() -> dict[str, object]:
    """Train; every rank calls it.

    Raises:
        RuntimeError: if ranks disagree, a loss is not finite, or the updates do not reach the forward pass.
    """
    started = time.monotonic()
    config = ModelConfig(config=_SHAPES, dtype="float32")
    architecture = read_model_config(config)
    accelerator = start(Runtime(deepspeed=ZERO3, timeout_minutes=4), size=count_parameters(architecture))
    torch.manual_seed(0)
    model = add_adapter(load_model(config, architecture), {"r": 4, "target_modules": ["q_proj", "v_proj"]})
    engine = ZeroOrderEngine(
        model, accelerator=accelerator, optimizer=lambda shards, mesh: JaguarSignSGD(shards, mesh, lr=0.1)
    )
    tokens = torch.arange(32).reshape(4, 8)
    batch = [{"input_ids": part, "labels": part} for part in tokens.chunk(2)]
    with count_allgathers(CommMeter()) as meter:
        losses = [engine.step(batch).loss for _ in range(_STEPS)]
    if any(other != losses for other in engine.mesh.gather_objects(losses)):
        raise RuntimeError("expected the same losses on all ranks, got different ones")
    if not all(map(math.isfinite, losses)) or len(set(losses)) < _STEPS:
        raise RuntimeError(f"expected finite losses that change with every update, got {losses}")
    report = {
        "ranks": engine.mesh.world_size,
        "device": str(engine.mesh.device.type),
        "losses": losses,
        "gathered_bytes": meter.totals.num_bytes,
        "seconds": round(time.monotonic() - started, 1),
    }
    is_main = engine.mesh.is_main
    stop()
    return report if is_main else {}


if __name__ == "__main__":
    if report := smoke():
        print(json.dumps(report))

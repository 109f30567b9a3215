"""A frozen base in 4 bits by bitsandbytes, on the CPU as on a GPU."""

import importlib.util
from typing import Any

import pytest
import torch
from peft import PeftModel
from processes import ROOT

from zoscale.assembly import build_engine
from zoscale.config import ConfigError, RunConfig
from zoscale.engine import ZeroOrderEngine
from zoscale.forward.fan_out import FanOutForward
from zoscale.forward.lora_fan import LoraFan
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.loading import load_model, read_model_config
from zoscale.models.quantization import bytes_of_constants, check_quantization
from zoscale.plan.footprint import ModelShapes
from zoscale.release.export import save_trained
from zoscale.shards import local_bytes

TREE: dict[str, Any] = {
    "model": {"id": str(ROOT / "launch/tiny_opt/model"), "dtype": "float32", "quantization": "nf4"},
    "adapter": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "fc1"]},
    "optimizer": {"name": "jaguar_sign_sgd", "lr": 1e-2},
    "mesh": {"shard_size": 1},
}


def config_of(**changes: Any) -> RunConfig:
    return RunConfig.from_dict(TREE | changes, TABLES, DEFAULTS)


def engine_of(forward: str) -> ZeroOrderEngine:
    config = config_of(forward={"name": forward})
    return build_engine(config, read_model_config(config.model), None)


def batch() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{key: torch.randint(5, 900, (3, 9), generator=generator) for key in ("input_ids", "labels")}]


def frozen(engine: ZeroOrderEngine) -> dict[str, torch.Tensor]:
    return {name: param.clone() for name, param in engine.model.named_parameters() if not param.requires_grad}


def test_steps_on_a_base_in_4_bits(tmp_path: Any) -> None:
    """Candidates share a pass with the losses of the sequential forward, the base keeps its bits, and plain PEFT gives
    the loss of the saved adapter."""
    fan, oracle = engine_of("auto"), engine_of("sequential")
    assert isinstance(fan.forward, FanOutForward) and isinstance(fan.forward.fan, LoraFan)
    before = frozen(fan)
    shapes = ModelShapes(config_of().model, read_model_config(config_of().model), TREE["adapter"])
    assert sum(w.num_bytes for w in shapes.weights) == local_bytes(fan.model) + bytes_of_constants(fan.model), "planned"
    packed = {name: param for name, param in before.items() if param.dtype == torch.uint8}
    blocks = len(fan.model.base_model.model.model.decoder.layers)  # type: ignore[union-attr,arg-type]
    assert len(packed) == 6 * blocks, "q, k, v, out, fc1, fc2 of each block; not the embedding"
    for _ in range(3):
        ours, theirs = fan.step(batch()), oracle.step(batch())
        torch.testing.assert_close(
            torch.tensor(ours.losses.values), torch.tensor(theirs.losses.values), rtol=1e-5, atol=1e-6
        )
    after = frozen(fan)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    save_trained(fan, tmp_path)
    config = config_of()
    plain = PeftModel.from_pretrained(load_model(config.model, read_model_config(config.model)), tmp_path).eval()
    inputs = batch()[0]
    with torch.no_grad():
        expected = fan.model(input_ids=inputs["input_ids"]).logits
        torch.testing.assert_close(plain(input_ids=inputs["input_ids"]).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": None}, "expected an adapter beside model.quantization=nf4"),
        ({"mesh": {"shard_size": None}}, "expected mesh.shard_size 1 beside model.quantization=nf4, got null"),
        ({"model": {"config": {"model_type": "opt"}, "quantization": "fp4"}}, "expected model.id"),
        ({"adapter": {"peft_type": "weight_lora"}}, "expected adapter.peft_type lora or another .*got weight_lora"),
        (
            {"adapter": {"peft_type": "ia3"}, "model": TREE["model"] | {"dtype": "bfloat16"}},
            "expected model.dtype float32 for adapter.peft_type ia3",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_quantization(config_of(**changes))


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'zoscale\[quantization\]'"):
        check_quantization(config_of())
    check_quantization(config_of(model=TREE["model"] | {"quantization": None}))


def test_bases_are_never_repacked_for_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU has instructions for bf16, bitsandbytes would compute in it, whatever the type asked for."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    config = config_of().model
    layers = [m for m in load_model(config, read_model_config(config)).modules() if hasattr(m, "compute_dtype")]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)

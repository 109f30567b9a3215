"""Real ZeRO-3 over gloo at 1, 2 and 3 ranks against the dense oracle in one process."""

import json
import math
import os
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from processes import ROOT, torchrun
from reference_choices import Weighted, train
from reference_methods import Method, oracle_probe
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from zoscale.optim.owners import CAPACITY

WORKER = str(Path(__file__).parent / "zero3_worker.py")
STEPS = 3
BLOCK = {"probe": "block", "probe_args": {"rows": 0.3, "columns": 0.4}}
SIGN = {"optimizer": "jaguar_sign_sgd", "optimizer_args": {"lr": 1e-3, "beta": 0.9, "weight_decay": 0.01}}
MUON = {"optimizer": "jaguar_muon", "optimizer_args": {"lr": 1e-2, "beta": 0.9, "sign_lr_scale": 0.1}}
SGD = {"optimizer": "zo_sgd", "optimizer_args": {"lr": 2e-2, "weight_decay": 0.1}}
METHODS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": "zo_sgd_momentum", "optimizer_args": {"lr": 1e-3, "momentum": 0.8, "weight_decay": 0.1}},
    "adam": {"optimizer": "zo_adam", "optimizer_args": {"lr": 1e-3, "second_moment": "max"}},
    "sign_rho": {"optimizer": "zo_sign_rho", "optimizer_args": {"lr": 1e-3}},
    "conservative": {"optimizer": "zo_sgd_conservative", "optimizer_args": {"lr": 1e-1}},
    "fzoo": {"optimizer": "fzoo", "optimizer_args": {"lr": 1e-5}, "estimator": "fzoo"},
    "power": {
        "optimizer": "zo_muon",
        "optimizer_args": {"lr": 3e-3, "beta": 0.5, "iteration": "power", "power_rank": 2},
    },
    "orthogonal": {"optimizer": "zo_muon_orthogonal", "optimizer_args": {"lr": 1e-1}},
    "subspace": {"optimizer": "zo_muon_subspace", "optimizer_args": {"lr": 1e-2}, "estimator": "one_sided"},
}
SUBSPACE = {"probe": "subspace", "probe_args": {"rank": 2, "resample_every": 2}}
LAYERS = {"probe": "layers", "probe_args": {"share": 0.5, "inner": {"name": "rademacher"}}}
TWO = {"estimator_args": {"tau": 1e-2, "num_directions": 1}}
FOUR = {"estimator_args": {"tau": 1e-2, "num_directions": 4}}
ONE_SIDED = {"estimator": "one_sided", "estimator_args": {"tau": 1e-2, "num_directions": 2}}
FULL: dict[str, Any] = {"arch": "opt", "lora": False}
LORA: dict[str, Any] = {"arch": "opt", "lora": True}
LLAMA: dict[str, Any] = {"arch": "llama", "lora": True}

TRAJECTORIES: dict[str, dict[str, Any]] = {
    "sign_full": FULL | SIGN | BLOCK | TWO,
    "sign_lora": LORA | SIGN | BLOCK | TWO,
    "sign_llama": LLAMA | SIGN | BLOCK | TWO,
    "sign_full_q4": FULL | SIGN | BLOCK | FOUR,
    "sign_lora_one_sided": LORA | SIGN | BLOCK | ONE_SIDED,
    "sign_full_rows": FULL | SIGN | {"probe": "row"} | TWO,
    "sign_full_ones": FULL | SIGN | {"probe": "block", "probe_args": {"signs": "ones"}} | TWO,
    "sign_full_rademacher": FULL | SIGN | {"probe": "rademacher"} | TWO,
    "sign_full_tensors": FULL | SIGN | {"probe": "tensors", "probe_args": {"share": 0.3}} | TWO,
    "sign_full_fan": FULL | SIGN | BLOCK | TWO | {"forward": "fan_out"},
    "sign_full_fan_one_sided": FULL | SIGN | {"probe": "rademacher"} | ONE_SIDED | {"forward": "fan_out"},
    "sgd_full_fan": FULL | SGD | {"probe": "gaussian"} | TWO | {"forward": "fan_out"},
    "muon_full": FULL | MUON | BLOCK | TWO,
    "muon_lora_q4": LORA | MUON | BLOCK | FOUR,
    "sgd_full": FULL | SGD | {"probe": "gaussian"} | TWO,
    "momentum_full": FULL | METHODS["momentum"] | {"probe": "gaussian"} | TWO,
    "adam_lora": LORA | METHODS["adam"] | {"probe": "gaussian"} | TWO,
    "layers_full": FULL | METHODS["sign_rho"] | LAYERS | TWO | {"forward": "fan_out"},
    "conservative_lora": LORA | METHODS["conservative"] | BLOCK | TWO,
    "fzoo_lora": LORA | METHODS["fzoo"] | {"probe": "rademacher"} | FOUR,
    "power_muon_lora": LORA | METHODS["power"] | {"probe": "gaussian"} | FOUR,
    "orthogonal_lora": LORA | METHODS["orthogonal"] | {"probe": "orthogonal"} | TWO,
    "subspace_full": FULL | METHODS["subspace"] | SUBSPACE | FOUR | {"forward": "fan_out"},
    "sgd_lora_q4": LORA | SGD | {"probe": "gaussian"} | FOUR,
}  # fmt: skip
FAN_OUT = {
    f"fan_{name}": TRAJECTORIES[name] | {"forward": "fan_out"}
    for name in ("sgd_lora_q4", "sign_llama", "muon_lora_q4", "conservative_lora", "orthogonal_lora")
}
ZERO_VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "sign_full_640": ("sign_full", {"stage3_param_persistence_threshold": 640}, (2, 3)),
    "sign_full_100000": ("sign_full", {"stage3_param_persistence_threshold": 100000}, (2, 3)),
    "sign_lora_100000": ("sign_lora", {"stage3_param_persistence_threshold": 100000}, (2, 3)),
    "sign_full_hpz": ("sign_full", {"zero_hpz_partition_size": 2}, (2,)),
    "sign_full_fan_100000": ("sign_full_fan", {"stage3_param_persistence_threshold": 100000}, (2, 3)),
    "sign_full_fan_hpz": ("sign_full_fan", {"zero_hpz_partition_size": 2}, (2,)),
    "sign_lora_hpz": ("sign_lora", {"zero_hpz_partition_size": 2}, (2,)),
    "sign_lora_one_sided_hpz_100000": (
        "sign_lora_one_sided",
        {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 100000},
        (2,),
    ),
}
FAN_VARIANTS = {
    f"fan_sign_llama_{key}": FAN_OUT["fan_sign_llama"] | {"zero": zero, "between": True}
    for key, zero in {
        "0": {},
        "100000": {"stage3_param_persistence_threshold": 100000},
        "hpz": {"zero_hpz_partition_size": 2},
    }.items()
}
PATCHES = {"probe": "block", "probe_args": {"rows": 0.1, "columns": 0.1}}
"""So few rows and columns that nothing is copied for them."""
TURNS = {"check": "traffic", "forward": "fan_out", "turns": 3, "max_rows": 5}
"""Three micro-batches per rank, two candidates of each in a pass."""
PLAN = {"keep": 2, "warmup_steps": 2, "expansions": 1, "expand_every": 2}
"""WeightLoRA+: two adapters of four stay after step 2, one of twice the rank after step 4."""
ADAPTER = {"peft_type": "weight_lora", "target_modules": ["v_proj", "fc1"], **PLAN}
SHAPE = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "num_hidden_layers": 4, "vocab_size": 4000}
WIDE_OPT = tiny.ARCHITECTURES["opt"] | SHAPE
CHECKS: dict[str, dict[str, Any]] = {
    "chosen": LORA | SIGN | BLOCK | TWO | {"adapter": ADAPTER, "blocks": False, "steps": 5},
    "exactness_fp32": FULL | SIGN | BLOCK | TWO | {"check": "exactness"},
    "exactness_bf16": FULL | SIGN | {"probe": "gaussian"} | TWO | {"check": "exactness", "dtype": "bfloat16"},
    "exactness_bf16_none": FULL | SIGN | BLOCK | TWO | {"check": "exactness", "dtype": "bfloat16", "master": "none"},
    "non_finite": LORA | SIGN | BLOCK | TWO | {"check": "non_finite"},
    "traffic_lora": LORA | SIGN | BLOCK | FOUR | {"check": "traffic", "forward": "fan_out"},
    "traffic_full": FULL | SIGN | BLOCK | FOUR | {"check": "traffic", "forward": "fan_out"},
    "traffic_full_one_sided": FULL | SIGN | BLOCK | ONE_SIDED | {"check": "traffic", "forward": "fan_out"},
    "traffic_lora_turns": LORA | SIGN | BLOCK | FOUR | TURNS,
    "traffic_full_turns": FULL | SIGN | BLOCK | ONE_SIDED | TURNS,
    "patched": FULL | SIGN | PATCHES | ONE_SIDED | {"check": "both_forwards", "forward": "fan_out", "config": WIDE_OPT},
    "resident": LORA | SIGN | BLOCK | TWO | {"check": "resident", "dtype": "bfloat16"},
    "merged_rows": FULL | SIGN | {"probe": "gaussian"} | FOUR | {"check": "merged_rows"},
    "merged_rows_fan_out": LLAMA | SIGN | {"probe": "gaussian"} | FOUR | {"check": "merged_rows", "forward": "fan_out"},
    "merged_rows_full_fan_out": FULL | SIGN | BLOCK | FOUR | {"check": "merged_rows", "forward": "fan_out"},
    "owners_full": FULL | MUON | BLOCK | TWO | {"check": "owners"},
    "owners_lora": LORA | MUON | BLOCK | TWO | {"check": "owners"},
}
FAMILIES: dict[str, dict[str, Any]] = {
    f"forwards_{arch}_{'lora' if lora else 'full'}_{dtype}": SIGN | {"probe": "gaussian"} | {
        "arch": arch, "lora": lora, "adapter": {"target_modules": tiny.TARGETS[arch]}, "dtype": dtype,
        "estimator_args": {"tau": 5e-2, "num_directions": 2}, "forward": "fan_out", "check": "both_forwards",
    }
    for arch in tiny.FAMILIES for lora in (True, False) for dtype in ("float32", "bfloat16")
}  # fmt: skip
TABLE = {"target_modules": ["embed_tokens"]}  # whose adapter is in a dict that is never called
FAMILIES["forwards_llama_table_float32"] = FAMILIES["forwards_llama_lora_float32"] | {"adapter": TABLE}
WIDE: dict[str, Any] = {
    "arch": "opt", "lora": True, "adapter": {"r": 1100, "target_modules": ["fc1"]}, "steps": 3, "forward": "fan_out",
    "check": "offloaded",
    "config": tiny.ARCHITECTURES["opt"]
    | {"vocab_size": 2300, "hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 1100},
}  # fmt: skip
"""Large enough for DeepSpeed to put some matrices on NVMe, and adapters and the embedding too if it were let."""
PEAKS: dict[str, dict[str, Any]] = {
    f"peak_{name}_{turns}": trained | {"config": WIDE_OPT, "check": "peak", "forward": "fan_out", "turns": turns}
    for name, trained in (("lora", LORA | SIGN | BLOCK | FOUR), ("full", FULL | SIGN | PATCHES | TWO))
    for turns in (1, 2)
}
"""Micro-batches of a rank: one, and two whose passes go side by side."""
NVME: dict[str, Any] = json.loads((ROOT / "ds_configs/zero3_nvme.json").read_text())["zero_optimization"][
    "offload_param"
]
OFFLOADS: dict[str, dict[str, Any]] = {
    "in_memory": WIDE | SIGN | {"probe": "rademacher"} | TWO,
    "cpu": WIDE | SIGN | {"probe": "rademacher"} | TWO | {"zero": {"offload_param": {"device": "cpu"}}},
    "nvme": WIDE | SIGN | {"probe": "rademacher"} | TWO | {"zero": {"offload_param": NVME}},
    "plain_nvme": WIDE | SIGN | {"probe": "rademacher"} | TWO | {"zero": {"offload_param": NVME}, "plain_aio": True},
}
ADAMW: dict[str, Any] = {
    "optimizer": "fo_adamw",
    "optimizer_args": {
        "lr": 1e-2,
        "eps": 1e-3,  # some gradients are nothing but rounding: those of the keys' biases
        "weight_decay": 0.1,
        "groups": [{"pattern": "embed", "lr_scale": 0.1}],
    },
    "check": "resumed",
    "steps": 5,
    "starts": [3],
    "decay": 0.5,  # of lr, with every step
}
MOMENTUM: dict[str, Any] = {
    "optimizer": "fo_sgd",
    "optimizer_args": {"lr": 5e-2, "momentum": 0.9, "weight_decay": 0.1, "max_grad_norm": 0.5},
    "check": "resumed",
    "steps": 5,
    "starts": [3],
    "decay": 1.0,
}


def chosen(method: dict[str, Any], *starts: int) -> dict[str, Any]:
    """A first-order method with groups of which some are empty after the choices."""
    groups = [{"pattern": "factor", "lr_scale": 2.0}, {"pattern": "layers.0", "lr_scale": 0.5}]
    changes = {"adapter": ADAPTER, "starts": starts, "steps": 6, "scale": 0.5, "decay": 1.0}
    return LORA | method | changes | {"optimizer_args": method["optimizer_args"] | {"groups": groups}}


FIRST_ORDER: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "adamw_full": (FULL | ADAMW, (1,)),
    "adamw_lora_bf16": (LORA | ADAMW | {"dtype": "bfloat16"}, (2,)),
    "adamw_full_bf16": (FULL | ADAMW | {"dtype": "bfloat16"}, (2,)),
    "adamw_full_persistent": (FULL | ADAMW | {"zero": {"stage3_param_persistence_threshold": 640}}, (2,)),
    "sgd_lora": (LORA | MOMENTUM, (1, 2, 3)),
    "sgd_chosen": (chosen(MOMENTUM, 3) | {"zero": {"stage3_param_persistence_threshold": 640}}, (1, 2, 3)),
    "adamw_chosen": (chosen(ADAMW, 1, 4), (1, 2, 3)),
    "adamw_chosen_bf16": (chosen(ADAMW) | {"dtype": "bfloat16"}, (2,)),
    "adamw_non_finite": (LORA | ADAMW | {"check": "non_finite"}, (2,)),
}
"""Backpropagation: scenarios and their world sizes."""
WORLDS = (1, 2, 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.save_model(name, folder / name) for name in tiny.FAMILIES}


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world}_ranks")
def job(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """All scenarios of one world size in one job."""
    world = request.param
    scenarios = TRAJECTORIES | FAN_OUT | CHECKS | PEAKS
    scenarios |= {name: s for name, s in FAMILIES.items() if world in families_at(s)}
    scenarios |= {
        n: TRAJECTORIES[base] | {"zero": zero} for n, (base, zero, worlds) in ZERO_VARIANTS.items() if world in worlds
    }
    scenarios |= {name: s for name, s in FAN_VARIANTS.items() if world == 2}
    scenarios |= {name: s for name, (s, worlds) in FIRST_ORDER.items() if world in worlds}
    scenarios |= {n: s for n, s in OFFLOADS.items() if world == 2 and (n != "nvme" or wants_async_io())}
    out = tmp_path_factory.mktemp(f"world{world}")
    NVME["nvme_path"] = str(out / "nvme")
    rows = [{"name": n, "model": str(models[s["arch"]]), "steps": STEPS, **s} for n, s in scenarios.items()]
    (out / "scenarios.json").write_text(json.dumps(rows))
    torchrun(world, WORKER, str(out / "scenarios.json"), str(out), timeout=420)
    return world, out


def families_at(scenario: dict[str, Any]) -> tuple[int, ...]:
    """World sizes of one of `FAMILIES`."""
    return (2, 3) if scenario["lora"] == (scenario["dtype"] == "bfloat16") else (2,)


def wants_async_io() -> bool:
    """Whether DeepSpeed's reader is wanted: it needs libaio with its header, and compiling it takes minutes."""
    return os.environ.get("ZOSCALE_TEST_NVME") == "1"


@pytest.fixture(scope="module")
def oracle(models: dict[str, Path]) -> Any:
    """Dense trajectories by scenario, each computed once."""
    known: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in known:
            torch.set_num_threads(1)
            known[name] = dense(TRAJECTORIES[name], models)
        return known[name]

    return of


def dense(scenario: dict[str, Any], models: dict[str, Path]) -> tuple[list[Any], list[Any], dict[str, torch.Tensor]]:
    """Losses, projected gradients and final weights of the oracle, which knows nothing of shards or of zoscale."""
    model: Any = AutoModelForCausalLM.from_pretrained(models[scenario["arch"]]).eval()
    if scenario["lora"]:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **tiny.LORA))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trainer = ref.DenseTrainer(
        {name: tiny.values(name, tuple(p.shape)) for name, p in trained.items()},
        lambda weights: plain_loss(model, trained, weights, trainer_batch[0]),
        rule_of(scenario),
        oracle_probe(scenario["probe"], sorted(trained), **scenario.get("probe_args", {})),
        seed=7,
        tau=scenario["estimator_args"]["tau"],
        num_directions=scenario["estimator_args"]["num_directions"],
        estimator=scenario.get("estimator", "two_point"),
    )
    trainer_batch: list[Any] = [None]
    losses, rhos = [], []
    for step in range(STEPS):
        trainer_batch[0] = tiny.batch(step)
        step_losses, step_rhos = trainer.step(step)
        losses.append(step_losses)
        rhos.append(step_rhos)
    return losses, rhos, trainer.params


def plain_model(scenario: dict[str, Any], models: dict[str, Path]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(models[scenario["arch"]]).eval()
    return model.to(getattr(torch, scenario.get("dtype", "float32")))


def backpropagated(scenario: dict[str, Any], models: dict[str, Path]) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Losses, gradient norms and final fp32 weights of plain torch in one process."""
    model = plain_model(scenario, models)
    if scenario["lora"]:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **tiny.LORA))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {n: tiny.values(n, tuple(p.shape)).requires_grad_() for n, p in trained.items()}
    limit = scenario["optimizer_args"].get("max_grad_norm", math.inf)
    optimizer = torch_optimizer(scenario, masters)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, scenario["decay"])
    losses, norms = [], []
    for step in range(scenario["steps"]):
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(masters[name])
                parameter.grad = None
        loss = mean_loss(model, tiny.batch(step, 4))
        loss.backward()
        for name, parameter in trained.items():
            masters[name].grad = parameter.grad.float()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), limit)))
        optimizer.step()
        schedule.step()
    return losses, norms, masters


def chosen_among(scenario: dict[str, Any], models: dict[str, Path]) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """`backpropagated` with WeightLoRA+."""
    lora = LoraConfig(task_type="CAUSAL_LM", **tiny.LORA | {"target_modules": ADAPTER["target_modules"]})
    model = Weighted(get_peft_model(plain_model(scenario, models), lora), mean_loss)
    names = [name for layer in model.layers for name in model.names(layer)]
    trained = {n: nn.Parameter(tiny.values(n, tuple(model.shapes.get(n, (1,))), scenario["scale"])) for n in names}
    limit = scenario["optimizer_args"].get("max_grad_norm", math.inf)
    losses, norms = train(
        model, trained, lambda step: tiny.batch(step, 4), partial(torch_optimizer, scenario), plan=PLAN,
        steps=scenario["steps"], max_grad_norm=limit, seed=7,
    )  # fmt: skip
    return losses, norms, dict(trained)


def torch_optimizer(scenario: dict[str, Any], masters: dict[str, Any]) -> torch.optim.Optimizer:
    """A first-order method of a scenario by torch alone; the first group whose pattern is in a name counts."""
    given = {key: value for key, value in scenario["optimizer_args"].items() if key != "max_grad_norm"}
    groups = given.pop("groups", [])
    rows = [
        {
            "params": [w],
            "lr": given["lr"] * next((group["lr_scale"] for group in groups if group["pattern"] in name), 1),
            "weight_decay": given["weight_decay"] if w.dim() > 1 else 0.0,
        }
        for name, w in masters.items()
    ]
    return (torch.optim.AdamW if "adamw" in scenario["optimizer"] else torch.optim.SGD)(rows, **given)


def rule_of(scenario: dict[str, Any]) -> Any:
    """The oracle's update rule."""
    name, given = scenario["optimizer"], dict(scenario["optimizer_args"])
    shared = {"sign_names": ("*embed*", "*lm_head*"), "sign_lr_scale": given.pop("sign_lr_scale", 0.1)}
    if "jaguar" in name or name == "zo_sgd":
        return ref.Optimizer(name, **shared, **given)
    if "iteration" in given:
        shared["polynomial"] = given.pop("iteration")
    return Method(name, amsgrad=given.pop("second_moment", "last") == "max", **shared, **given)


@torch.no_grad()
def plain_loss(model: Any, trained: dict[str, Any], weights: dict[str, torch.Tensor], batches: list[Any]) -> float:
    for name, parameter in trained.items():
        parameter.copy_(weights[name])
    return float(mean_loss(model, batches))


def mean_loss(model: Any, batches: list[Any]) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens: the head on their positions, sums in micro-batch order in float64."""
    body, head = (m := model.get_base_model() if hasattr(model, "get_base_model") else model).model, m.lm_head
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        row, column = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
        hidden = body(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        logits = head(hidden[row, column].unsqueeze(0))[0].float()
        target = batch["labels"][row, column + 1]
        nll = torch.logsumexp(logits, -1) - logits[torch.arange(len(target)), target]
        total = total + nll.double().sum()
        count += len(target)
    return total / count


def outcome(out: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((out / f"{name}.json").read_text()), load_file(out / f"{name}.safetensors")


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


@pytest.mark.parametrize("name", [name for name in TRAJECTORIES if name.startswith("sign")])
def test_sign_sgd_equals_the_oracle_bit_for_bit(job: Any, oracle: Any, name: str) -> None:
    """Pitfalls 4, 5, 10, 21, 22: losses, projected gradients and weights at every world size."""
    _, out = job
    report, weights = outcome(out, name)
    losses, rhos, expected = oracle(name)
    assert report["losses"] == losses
    assert report["rhos"] == rhos
    assert_same_bits(weights, expected)


@pytest.mark.parametrize("name", [name for name in TRAJECTORIES if not name.startswith("sign")])
def test_other_rules_equal_the_oracle_to_1e5(job: Any, oracle: Any, name: str) -> None:
    _, out = job
    report, weights = outcome(out, name)
    losses, _, expected = oracle(name)
    torch.testing.assert_close(torch.tensor(report["losses"]), torch.tensor(losses), rtol=1e-5, atol=1e-5)
    moved = 0.0
    for tensor_name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[tensor_name], rtol=1e-5, atol=1e-5)
        start = tiny.values(tensor_name, tuple(tensor.shape))
        moved = max(moved, float((tensor - start).abs().max()))
    assert moved > 1e-3, "nothing was trained"


@pytest.mark.parametrize("name", FAN_OUT)
def test_fan_out_equals_the_oracle_and_itself_at_any_world_size(job: Any, oracle: Any, name: str) -> None:
    """One pass for all candidates: the losses of the oracle to rounding, and the same bits on 1, 2 and 3 ranks."""
    world, out = job
    report, weights = outcome(out, name)
    losses, _, expected = oracle(name.removeprefix("fan_"))
    torch.testing.assert_close(torch.tensor(report["losses"]), torch.tensor(losses), rtol=1e-5, atol=1e-5)
    if "sgd" in name:
        for tensor_name, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[tensor_name], rtol=1e-5, atol=1e-5)
    first = FIRST_WORLD.setdefault(name, (world, report, weights))
    assert report["losses"] == first[1]["losses"], f"{first[0]} and {world} ranks"
    if "muon" not in name:
        assert_same_bits(weights, first[2])


@pytest.mark.parametrize("name", [name for name in [*TRAJECTORIES, "chosen"] if "muon" not in name])
def test_a_trajectory_has_the_same_bits_at_any_world_size(job: Any, name: str) -> None:
    """Whatever the rule multiplies to matrices, unless it gathers them (Muon)."""
    world, out = job
    report, weights = outcome(out, name)
    first = FIRST_WORLD.setdefault(name, (world, report, weights))
    assert report == first[1], f"{first[0]} and {world} ranks"
    assert_same_bits(weights, first[2])


FIRST_WORLD: dict[str, Any] = {}
"""By scenario, the outcome at the first world size that ran."""


@pytest.mark.parametrize("name", list(ZERO_VARIANTS))
def test_updates_reach_every_forward(job: Any, oracle: Any, name: str) -> None:
    """Pitfall 9: persistence thresholds and hpZ's secondary shards never leave a stale copy."""
    world, out = job
    base, _, worlds = ZERO_VARIANTS[name]
    if world not in worlds:
        pytest.skip(f"{name} is run at {worlds} ranks")
    report, weights = outcome(out, name)
    losses, _, expected = oracle(base)
    assert report["losses"] == losses
    assert_same_bits(weights, expected)


@pytest.mark.parametrize("name", FAN_VARIANTS)
def test_updates_reach_every_fanned_forward(job: Any, name: str) -> None:
    """Adapters that ZeRO-3 is told not to gather; an ordinary forward between the steps gathers them all the same."""
    world, out = job
    if world != 2:
        pytest.skip("run at 2 ranks")
    report, weights = outcome(out, name)
    expected_report, expected = outcome(out, "fan_sign_llama")
    assert report["losses"] == expected_report["losses"]
    assert len(set(report["between"])) == STEPS, "the ordinary forward reads the updated adapters"
    assert report["between"] == outcome(out, "fan_sign_llama_0")[0]["between"]
    assert_same_bits(weights, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_fan_out_has_the_losses_of_one_pass_each_on_every_architecture(job: Any, name: str) -> None:
    world, out = job
    if world not in families_at(FAMILIES[name]):
        pytest.skip("one rank: test_fan_out.py; three: adapters in bfloat16, all weights in float32")
    report, _ = outcome(out, name)
    assert report["forwards"] == ["FanOutForward", "SequentialForward"]
    fan, one = report["losses"]
    closest = min(abs(a - b) for a, b in combinations(one, 2))
    assert fan == pytest.approx(one, abs=min(closest / 2, 2e-6 if "float32" in name else 1e-3))


@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith("traffic")])
def test_a_step_gathers_the_model_once(job: Any, name: str) -> None:
    """Three to eight candidates, in one pass or several, on one micro-batch or several: no more bytes than the model
    has, one collective per block and a few."""
    world, out = job
    report, _ = outcome(out, name)
    assert len(report["steps"]) == STEPS
    for num_bytes, calls in report["steps"][1:]:
        assert num_bytes <= report["model_bytes"] if world > 1 else num_bytes == 0
        assert calls <= report["blocks"] + 6 if world > 1 else calls == 0
    assert world == 1 or report["steps"][-1][0] > 0.99 * report["model_bytes"], "the count sees the gathers"


def test_directions_of_few_rows_and_columns(job: Any) -> None:
    """Half the difference to the losses of the oracle is rounding; the same bits on 1, 2 and 3 ranks."""
    world, out = job
    report, _ = outcome(out, "patched")
    assert report["forwards"] == ["FanOutForward", "SequentialForward"]
    fan, one = report["losses"]
    assert fan == pytest.approx(one, abs=2e-6) and len(set(one)) == 3
    first = FIRST_WORLD.setdefault("patched", (world, report, {}))
    assert fan == first[1]["losses"][0], f"{first[0]} and {world} ranks"


def test_a_step_of_all_weights_takes_little_more_memory(job: Any) -> None:
    """As below. One block is gathered at a time, also while the passes of two micro-batches go side by side."""
    _, out = job
    for one, two in zip(*(outcome(out, f"peak_full_{turns}")[0]["ranks"] for turns in (1, 2)), strict=True):
        for shard, _, bare, step, _ in (one, two):
            assert shard + step <= 1.15 * (shard + bare)
        assert two[2] <= 1.05 * one[4], "nothing stays gathered after a step"


def test_a_step_takes_little_more_memory_than_the_bare_forward(job: Any) -> None:
    """At most 15 % more than a shard, the largest block and what the bare forward of the same rows holds; a micro-batch
    whose pass waits beside that adds four hidden states, as the plan says, and not what a block or the head makes."""
    world, out = job
    hidden = 9 * 4 * 32 * SHAPE["hidden_size"] * 4
    for one, two in zip(*(outcome(out, f"peak_lora_{turns}")[0]["ranks"] for turns in (1, 2)), strict=True):
        shard, block, bare, step, _ = one
        assert bare > block * (world > 1), "the gathered block is among it"
        assert shard + step <= 1.15 * (shard + bare)
        assert hidden * (world > 1) <= two[3] - step <= 4.6 * hidden


@pytest.mark.parametrize("name", [name for name, (s, _) in FIRST_ORDER.items() if s["check"] == "resumed"])
def test_backpropagation_equals_plain_torch(job: Any, models: dict[str, Path], name: str) -> None:
    """DeepSpeed's stage-3 optimizer: losses, norms, weights, at any lr; a checkpoint leads any world to the same."""
    world, out = job
    scenario, worlds = FIRST_ORDER[name]
    if world not in worlds:
        pytest.skip(f"{name} is run at {worlds} ranks")
    report, weights = outcome(out, name)
    assert report["zero"] == "DeepSpeedZeroOptimizer_Stage3" and report["dtype"] == "torch.float32"
    losses, norms, expected = (chosen_among if "adapter" in scenario else backpropagated)(scenario, models)
    close = {"rtol": 2e-2, "atol": 2e-2} if "bf16" in name else {"rtol": 1e-5, "atol": 1e-5}
    for start in (0, *scenario["starts"]):
        turn = report[str(start)]
        assert turn["losses"] == pytest.approx(losses[start:], rel=close["rtol"])
        assert turn["norms"] == pytest.approx(norms[start:], rel=10 * close["rtol"])
        assert turn["between"] == pytest.approx(report["0"]["between"][start:], rel=1e-5)
    assert len(set(report["0"]["between"])) == len(losses), "every forward reads the updated weights"
    assert weights.keys() == expected.keys()
    for tensor_name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[tensor_name].detach(), **close)
    scale = scenario.get("scale", 0.1)
    moved = [float((tensor - tiny.values(n, tuple(tensor.shape), scale)).abs().max()) for n, tensor in weights.items()]
    assert max(moved) > 1e-2, "nothing was trained"


@pytest.mark.parametrize("name", [name for name, (s, _) in FIRST_ORDER.items() if "adapter" in s])
def test_what_a_choice_leaves_is_all_that_is_trained(job: Any, models: dict[str, Path], name: str) -> None:
    """Disconnected adapters are called by no pass and in no optimizer; plain PEFT computes what the result computed."""
    world, out = job
    if world not in FIRST_ORDER[name][1]:
        pytest.skip(f"{name} is run at {FIRST_ORDER[name][1]} ranks")
    report, weights = outcome(out, name)
    numel = sum(tensor.numel() for tensor in weights.values())
    for start in (0, *FIRST_ORDER[name][0]["starts"]):
        assert report[str(start)]["elements"] == [numel, numel], "DeepSpeed keeps those that are trained and no others"
        assert sorted(report[str(start)]["calls"].values()) == [0, 0, 0, 2]
    tensors = load_file(out / name / "adapter_model.safetensors")
    assert len(tensors) == 2 and all(6 in tensor.shape for tensor in tensors.values())
    model = PeftModel.from_pretrained(plain_model(FIRST_ORDER[name][0], models), out / name)
    logprobs = -float(mean_loss(model, tiny.batch(0, 1)).detach()) * int((tiny.batch(0, 1)[0]["labels"] != -100).sum())
    assert logprobs == pytest.approx(report["0"]["between"][-1], rel=2e-2 if "bf16" in name else 1e-5)


@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith("exactness")])
def test_weights_are_bit_identical_after_the_losses(job: Any, name: str) -> None:
    """Pitfall 7: also after an exception in the forward, in fp32 and bf16, with and without a master."""
    _, out = job
    report, _ = outcome(out, name)
    assert all(row == [True, True, True] for row in report["kept"])


@pytest.mark.parametrize("name", ["non_finite", "adamw_non_finite"])
def test_non_finite_loss_on_one_rank_skips_the_step_on_all(job: Any, name: str) -> None:
    """Pitfall 15: the skipped step is reported as nan, not as 0; training goes on."""
    world, out = job
    if name != "non_finite" and world != 2:
        pytest.skip("run at 2 ranks")
    report, _ = outcome(out, name)
    assert all(row == [True, True, True, False] for row in report["ranks"])


def test_only_shards_are_resident(job: Any) -> None:
    """Pitfalls 26, 27: no DeepSpeed optimizer, no buckets, no fp32 copy of frozen weights."""
    world, out = job
    report, _ = outcome(out, "resident")
    assert report["zero"] == "DeepSpeedZeRoOffload"
    assert report["held"] == 0
    assert report["dtypes"] == ["torch.bfloat16"]
    assert report["local"] <= report["total"] / world * 1.02 + 1024


@pytest.mark.parametrize("name", ["owners_full", "owners_lora"])
def test_each_matrix_is_orthogonalised_once(job: Any, name: str) -> None:
    """By one rank, those of one shape together; the directions are those of every rank doing all of them."""
    _, out = job
    report, _ = outcome(out, name)
    wanted = sorted(map(tuple, report.pop("shapes")))
    for setting, ranks in report.items():
        given = [shape for _, calls in ranks for shape in calls]
        assert sorted((m, n) for count, m, n in given for _ in range(count)) == wanted
        assert max(difference for difference, _ in ranks) <= (1e-6 if "float32" in setting else 0.05)
    assert all(count == 1 for _, calls in report["torch.float32 1"] for count, *_ in calls), "capacity for one matrix"
    for _, calls in report[f"torch.float32 {CAPACITY}"]:
        assert len(calls) == len({tuple(shape[1:]) for shape in calls}), "one call per shape"


@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith("merged_rows")])
def test_options_merged_into_one_row(job: Any, name: str) -> None:
    """One by one and fanned out; the tokens of the prompt are run, and counted, once."""
    _, out = job
    report, _ = outcome(out, name)
    separate, merged = report["losses"]
    assert merged == pytest.approx(separate, abs=1e-5)
    assert len(set(separate)) == 8
    assert all(after < 0.7 * before for before, after in report["tokens"])


def test_a_model_in_the_host_s_memory_takes_the_same_steps(job: Any) -> None:
    world, out = job
    if world != 2:
        pytest.skip("run at 2 ranks")
    (report, weights), (expected_report, expected) = (outcome(out, name) for name in ("cpu", "in_memory"))
    assert report["steps"] == expected_report["steps"]
    assert_same_bits(weights, expected)


@pytest.mark.parametrize("name", ["nvme", "plain_nvme"])
def test_a_base_on_nvme_is_read_once_per_step_of_two_micro_batches(job: Any, name: str) -> None:
    """The bits of a base in memory; adapters stay where they can be edited, and so does what is larger than a buffer,
    an embedding; no file is left behind."""
    world, out = job
    if world != 2:
        pytest.skip("run at 2 ranks")
    if name == "nvme" and not wants_async_io():
        pytest.skip("needs ZOSCALE_TEST_NVME=1, libaio-dev and minutes of a compiler: DeepSpeed builds its reader")
    report, weights = outcome(out, name)
    expected_report, expected = outcome(out, "in_memory")
    assert report["frozen"] == expected_report["frozen"] and not expected_report["on_nvme"]
    assert len(report["on_nvme"]) == report["large_in_blocks"] >= 4 and not any(report["on_nvme"])
    assert report["large_adapters"] == 4 and report["large_outside"] == 1
    assert [losses for losses, _ in report["steps"]] == [losses for losses, _ in expected_report["steps"]]
    for _, files in report["steps"][1:]:
        assert len(files) == len(set(files)) == report["large_in_blocks"]
    assert_same_bits(weights, expected)
    assert not list((out / "nvme").iterdir())

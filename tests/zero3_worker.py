"""Runs scenarios under real ZeRO-3: `torchrun zero3_worker.py SCENARIOS.json OUT`. Rank 0 writes OUT/<name>.*"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import plain_aio
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from allocations import highest_point
from deepspeed.runtime.swap_tensor import partitioned_param_swapper
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import groups
from safetensors.torch import save_file

from zoscale.adapters.schemes import selection_of
from zoscale.assembly import build_model
from zoscale.config import ModelConfig
from zoscale.data import batch
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import ESTIMATORS
from zoscale.fingerprint import of_model
from zoscale.first_order import FirstOrderEngine
from zoscale.forward.sequential import SequentialForward
from zoscale.meters import CommMeter, Traffic, count_allgathers
from zoscale.methods import TABLES
from zoscale.models.loading import read_model_config
from zoscale.models.sizes import blocks_of, count_parameters
from zoscale.objectives import classification, language_modeling
from zoscale.optim import orthogonalize
from zoscale.optim.first_order import FIRST_ORDER
from zoscale.optim.owners import CAPACITY, on_owners
from zoscale.recovery.checkpoint import load, save
from zoscale.release.export import save_trained
from zoscale.runtime import ZERO3, Runtime, start, stop
from zoscale.shards import ShardedParam, local_bytes, true_numel
from zoscale.step import Engine, micro_batches


def model_config(scenario: dict[str, Any]) -> ModelConfig:
    """A saved model, or the architecture of one with random weights."""
    place = {"config": scenario["config"]} if "config" in scenario else {"id": scenario["model"]}
    return ModelConfig(**place, dtype=scenario.get("dtype", "float32"))


def build(scenario: dict[str, Any]) -> Engine:
    """An engine on a model loaded directly sharded, with known values in the trainable tensors."""
    if scenario.get("plain_aio"):
        plain_aio.plant()
    config = model_config(scenario)
    deepspeed = json.loads(json.dumps(ZERO3))
    deepspeed["zero_optimization"] |= scenario.get("zero", {})
    AcceleratorState._reset_state()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes it once per process
    accelerator = start(
        Runtime(
            dtype=config.dtype, deepspeed=deepspeed, shard_size=scenario.get("shard_size"), threads=1, timeout_minutes=2
        ),
        size=count_parameters(read_model_config(config)),
    )
    return engine_of(scenario, accelerator)


def engine_of(scenario: dict[str, Any], accelerator: Accelerator | None) -> Engine:
    """The same on the ranks of an accelerator, or alone in this process."""
    torch.manual_seed(5)
    config = model_config(scenario)
    adapter = tiny.LORA | scenario.get("adapter", {}) if scenario["lora"] else None
    model = build_model(config, read_model_config(config), adapter, accelerator)
    if not scenario.get("blocks", True):
        model.get_base_model()._no_split_modules = None
    num_empty = sum(param.is_meta for param in model.parameters())
    optimizer, arguments = TABLES["optimizer"][scenario["optimizer"]], scenario.get("optimizer_args", {})
    if scenario["optimizer"] in FIRST_ORDER:
        return started(
            FirstOrderEngine(
                model,
                accelerator=accelerator,
                optimizer=lambda shards, mesh: optimizer(shards, mesh, **arguments),
                seed=7,
                selection=selection_of(adapter),
            ),
            scenario.get("scale", 0.1),
        )
    engine = ZeroOrderEngine(
        model,
        accelerator=accelerator,
        optimizer=lambda shards, mesh: optimizer(shards, mesh, **arguments),
        probe=TABLES["probe"][scenario["probe"]](**scenario.get("probe_args", {})),
        estimator=ESTIMATORS[scenario.get("estimator", "two_point")](**scenario["estimator_args"]),
        seed=7,
        master=scenario.get("master", "fp32"),
        forward=scenario.get("forward", "sequential"),
        max_rows=scenario.get("max_rows"),
        candidate_parts=scenario.get("parts", 1),
        selection=selection_of(adapter),
    )
    scenario["num_empty"] = num_empty
    return engine if scenario.get("check") == "beginning" else started(engine)


def started(engine: Engine, scale: float = 0.1) -> Engine:
    """With known weights."""
    for shard in engine.shards:
        whole = tiny.values(shard.spec.name, shard.spec.shape, scale).reshape(-1)
        shard.truth.copy_(whole[shard.offset : shard.offset + len(shard)])
        shard.publish()
    return engine


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole truth tensors, on every rank."""
    gather = engine.mesh.gather_flats
    wholes = {s.spec: gather([(s.truth.contiguous(), s.spec.numel)])[0] for s in engine.shards}
    return {spec.name: whole.view(spec.shape).clone() for spec, whole in wholes.items()}


def trajectory(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    results, between = [], []
    for step in range(scenario["steps"]):
        results.append(engine.step(tiny.batch(step)))
        if scenario.get("between"):
            with torch.no_grad():
                between.append(float(engine.answers.answer_logprobs(micro_batches(tiny.batch(0, 1))[0]).sum()))
    rows = [(result.losses.values, result.estimate.projected_grads) for result in results]
    others = engine.mesh.gather_objects(rows)
    assert all(other == rows for other in others), "ranks hold different scalars"
    return {"losses": [row[0] for row in rows], "rhos": [row[1] for row in rows], "between": between}


def exactness(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    """Live slices before and after losses are taken, also when the forward raises on every rank."""
    engine.step(tiny.batch(0))
    before = [shard.live.clone() for shard in engine.shards]
    batches = micro_batches(tiny.batch(1))
    engine.losses(batches, engine.directions(1))
    kept = all(torch.equal(a, shard.live) for a, shard in zip(before, engine.shards, strict=True))
    calls = 0

    def breaks(logprobs: torch.Tensor, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("planted")
        return language_modeling(logprobs, batch)

    engine.objective = breaks
    raised = False
    try:
        engine.losses(batches, engine.directions(1))
    except RuntimeError as error:
        raised = "planted" in str(error)
    kept_after = all(torch.equal(a, shard.live) for a, shard in zip(before, engine.shards, strict=True))
    return {"kept": engine.mesh.gather_objects([kept, raised, kept_after])}


def non_finite(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    """Only the last rank's loss is not finite in step 1."""
    engine.step(tiny.batch(0))
    before = [shard.truth.clone() for shard in engine.shards]

    def poisoned(logprobs: torch.Tensor, batch: Any) -> Any:
        loss, count = language_modeling(logprobs, batch)
        return (loss * float("nan") if engine.mesh.rank == engine.mesh.world_size - 1 else loss), count

    engine.objective = poisoned
    result = engine.step(tiny.batch(1))
    unchanged = all(torch.equal(a, shard.truth) for a, shard in zip(before, engine.shards, strict=True))
    engine.objective = language_modeling
    goes_on = engine.step(tiny.batch(2))
    own = [result.skipped, unchanged, result.loss != result.loss, goes_on.skipped]
    return {"ranks": engine.mesh.gather_objects(own)}


def resident(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    """What ZeRO-3 keeps: shards only, of the given type; no optimizer, no buckets."""
    zero: Any = engine.answers.module.optimizer
    held = sum(x.numel() for x in vars(zero).values() if isinstance(x, torch.Tensor))
    dtypes = sorted({str(p.ds_tensor.dtype) for p in engine.model.parameters() if not p.requires_grad})
    total = sum(p.ds_numel * p.ds_tensor.element_size() for p in engine.model.parameters())
    return {
        "zero": type(zero).__name__,
        "held": held,
        "dtypes": dtypes,
        "local": local_bytes(engine.model),
        "total": total,
    }


def traffic(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    """What the steps gather, of some micro-batches per rank; shards as they are stored, padding included."""
    meter, steps = CommMeter(), []
    with count_allgathers(meter):
        for step in range(scenario["steps"]):
            before = Traffic(engine.mesh.gathered_bytes, engine.mesh.num_gathers)
            engine.step(tiny.batch(step, scenario.get("turns", 1) * engine.mesh.world_size))
            own = Traffic(engine.mesh.gathered_bytes, engine.mesh.num_gathers) - before
            steps.append(astuple(meter.take() + own))
    blocks = len(blocks_of(engine.model))
    return {"steps": steps, "model_bytes": local_bytes(engine.model) * engine.mesh.shard_size, "blocks": blocks}


def peak(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a shard, of the largest block, and the highest points of the bare forward and of a step beyond those.

    Of the bare forward the lowest and the highest of six: when gloo lets go of a gather's pieces is a matter of timing.
    """
    rows = {key: torch.ones(4, 32, dtype=torch.int64) for key in ("input_ids", "labels")}
    batches = micro_batches([rows] * scenario["turns"] * engine.mesh.world_size)
    copies = batches[0].repeat(engine.estimator.num_candidates)

    @torch.no_grad()
    def bare() -> None:
        engine.answers.answer_logprobs(copies)

    def step() -> None:
        engine.step(batches)

    step()
    points = {}
    for name, call, times in (("bare", bare, 6), ("step", step, 1)):
        call()  # ZeRO-3 learns the order of the modules anew
        points[name] = [highest_point(call) for _ in range(times)]
    blocks = blocks_of(engine.model)
    block = max(sum(true_numel(param) * 4 for param in module.parameters()) for module in blocks)
    return {
        "ranks": engine.mesh.gather_objects(
            [local_bytes(engine.model), block, min(points["bare"]), points["step"][0], max(points["bare"])]
        )
    }


def beginning(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    """What every rank starts from, as it was built."""
    prints = [of_model(engine.model, engine.mesh, trainable=trainable) for trainable in (False, True)]
    buffers = {name: buffer.double().sum().item() for name, buffer in engine.model.named_buffers()}
    return {"ranks": engine.mesh.gather_objects([prints, buffers, scenario["num_empty"]])}


def offloaded(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    """Where shards lie between steps, the fingerprint of the base, and which of its files each step reads."""
    read: list[str] = []
    plain = partitioned_param_swapper.swap_in_tensors

    def counted(handle: Any, buffers: Any, paths: list[str]) -> Any:
        read.extend(Path(path).name for path in paths)
        return plain(handle, buffers, paths)

    params = list(engine.model.parameters())
    large = {n: p for n, p in engine.model.named_parameters() if p.ds_tensor.ds_numel * 4 >= 2**20}
    report: dict[str, Any] = {
        "frozen": of_model(engine.model, engine.mesh, trainable=False),
        "on_nvme": [p.requires_grad for p in params if p.ds_tensor.status.name == "NOT_AVAILABLE"],
        "large_in_blocks": sum(".layers." in name for name, p in large.items() if not p.requires_grad),
        "large_outside": sum(".layers." not in name for name, p in large.items() if not p.requires_grad),
        "large_adapters": sum(p.requires_grad for p in large.values()),
        "steps": [],
    }
    partitioned_param_swapper.swap_in_tensors = counted
    for step in range(scenario["steps"]):
        read.clear()
        losses = engine.step(tiny.batch(step, 2 * engine.mesh.world_size)).losses.values
        report["steps"].append([losses, sorted(read)])
    partitioned_param_swapper.swap_in_tensors = plain
    return report


def owners(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    """Directions from the owners against every rank orthogonalising all matrices, and who was given what."""
    mesh = engine.mesh
    shards = [shard for shard in engine.shards if len(shard.spec.shape) == 2]
    wholes = {shard.spec.id: tiny.values(f"momentum of {shard.spec.name}", shard.spec.shape) for shard in shards}
    given: list[tuple[int, ...]] = []

    def recorded(matrices: torch.Tensor) -> torch.Tensor:
        given.append(tuple(matrices.shape))
        return orthogonalize(matrices)

    def part(whole: torch.Tensor, shard: ShardedParam) -> torch.Tensor:
        return whole.reshape(-1)[shard.offset : shard.offset + len(shard)]

    report: dict[str, Any] = {"shapes": [shard.spec.shape for shard in shards]}
    for dtype, capacity in (
        (torch.float32, 1),
        (torch.float32, 10_000),
        (torch.float32, CAPACITY),
        (torch.bfloat16, 10_000),
    ):
        given.clear()
        parts = on_owners(recorded, shards, lambda s: part(wholes[s.spec.id], s), mesh, dtype=dtype, capacity=capacity)
        difference = 0.0
        for shard, found in chain.from_iterable(parts):
            assert found.dtype == torch.float32 and len(found) == len(shard)
            expected = part(orthogonalize(wholes[shard.spec.id].to(dtype)), shard)
            difference = max([difference, *(found - expected).abs().tolist()])
        report[f"{dtype} {capacity}"] = mesh.gather_objects((difference, list(given)))
    return report


def merged_rows(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    """Losses of options with a row each and merged, and the tokens that this rank ran for them."""
    engine.objective = classification
    found = [engine.losses(tiny.options(merged=merged), engine.directions(0)) for merged in (False, True)]
    return {"losses": [f.values for f in found], "tokens": engine.mesh.gather_objects([f.local_tokens for f in found])}


def both_forwards(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    """The losses of the same points by one pass for all and by one pass each."""
    batches, candidates = micro_batches(tiny.batch(0, 4)), engine.estimator.candidates(engine.directions(0))
    one_by_one = SequentialForward(engine.answers, engine.shards, engine.mesh)
    forwards = (engine.forward, one_by_one)
    losses = [forward.losses(batches, candidates, language_modeling).values for forward in forwards]
    return {"losses": losses, "forwards": [type(forward).__name__ for forward in forwards]}


def resumed(engine: Engine, scenario: dict[str, Any]) -> dict[str, Any]:
    """First-order steps with evaluations between them; then the last ones again, from the checkpoints of any world."""
    folder, report = Path(scenario["model"]), dict[str, Any]()
    folders = {place: folder.with_name(f"{scenario['name']}_checkpoint_{place}") for place in scenario["starts"]}
    engine.arrange = partial(arrange_watched, engine, engine.arrange)  # type: ignore[method-assign]
    lrs = [group["lr"] for group in engine.optimizer.param_groups]
    for first in (0, *scenario["starts"]):
        if first:
            load(engine, folders[first], "hash")
        losses, norms, between, calls = [], [], [], dict[str, int]()
        for step in range(engine.num_steps, scenario["steps"]):
            if step in folders and not folders[step].exists():
                save(engine, folders[step], "hash")
            for group, lr in zip(engine.optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * scenario["decay"] ** step
            result = engine.step(tiny.batch(step, 4))
            losses.append(result.loss)
            norms.append(result.estimate.projected_grads[0])
            with torch.no_grad(), calls_counted(engine, calls):
                between.append(float(engine.answers.answer_logprobs(micro_batches(tiny.batch(0, 1))[0]).sum()))
        elements = [engine.num_trainable, elements_of_deepspeed(engine)]
        report[str(first)] = {
            "losses": losses,
            "norms": norms,
            "between": between,
            "calls": calls,
            "elements": elements,
        }
    assert all(other == report for other in engine.mesh.gather_objects(report)), "ranks hold different scalars"
    if engine.adapters is not None:
        save_trained(engine, Path(scenario["out"]) / scenario["name"])
    return report | {"zero": type(engine.answers.module.optimizer).__name__, "dtype": str(engine.shards[0].truth.dtype)}


def arrange_watched(engine: Engine, arrange: Callable[[Any], None], shapes: Any) -> None:
    """The tensors that stay keep their fp32 weights bit for bit, and their optimizer state."""
    before = {
        (shard.spec.name, shard.spec.shape): (shard.truth.clone(), engine.optimizer.state_of(shard))
        for shard in engine.shards
    }
    arrange(shapes)
    for shard in engine.shards:
        if (shard.spec.name, shard.spec.shape) in before:
            truth, state = before[shard.spec.name, shard.spec.shape]
            now = engine.optimizer.state_of(shard)
            assert torch.equal(shard.truth, truth) and now.keys() == state.keys()
            assert all(torch.equal(torch.as_tensor(now[key]), torch.as_tensor(state[key])) for key in state)


def elements_of_deepspeed(engine: Engine) -> int:
    """Elements that DeepSpeed's optimizers of a model keep fp32 weights of, all ranks together, without padding."""
    own = sum(
        flat.numel()
        for optimizer in gc.get_objects()
        if type(optimizer) is DeepSpeedZeroOptimizer_Stage3 and optimizer.module is engine.model
        for flat in optimizer.fp32_partitioned_groups_flat
    )
    padding = sum(-(-shard.spec.numel // engine.mesh.world_size) - len(shard) for shard in engine.shards)
    return sum(engine.mesh.gather_objects(own - padding))


@contextmanager
def calls_counted(engine: Engine, calls: dict[str, int]) -> Iterator[None]:
    """Count the calls of the weighted adapters' matrices within, connected or not, by layer."""
    slots = engine.adapters.slots if engine.adapters is not None else []
    calls |= {slot.own_name: 0 for slot in slots}

    def count(name: str) -> None:
        calls[name] += 1

    hooks = [
        module.register_forward_hook(lambda *_, name=slot.own_name: count(name))
        for slot in slots
        for module in (slot.a, slot.b)
    ]
    yield
    for hook in hooks:
        hook.remove()


CHECKS = {
    "resumed": resumed,
    "merged_rows": merged_rows,
    "both_forwards": both_forwards,
    "beginning": beginning,
    "trajectory": trajectory,
    "exactness": exactness,
    "non_finite": non_finite,
    "resident": resident,
    "traffic": traffic,
    "peak": peak,
    "owners": owners,
    "offloaded": offloaded,
}


def main(scenarios: str, out: str) -> None:
    for scenario in json.loads(Path(scenarios).read_text()):
        engine = build(scenario)
        report = CHECKS[scenario.get("check", "trajectory")](engine, scenario | {"out": out})
        final = weights(engine)
        if engine.mesh.is_main:
            save_file(final, Path(out) / f"{scenario['name']}.safetensors")
            (Path(out) / f"{scenario['name']}.json").write_text(json.dumps(report))
    stop()


if __name__ == "__main__":
    batch.FEW = tiny.FEW  # type: ignore[assignment]
    main(sys.argv[1], sys.argv[2])

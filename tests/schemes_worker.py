"""Trains scenarios: `torchrun schemes_worker.py SCENARIOS.json OUT` under real ZeRO-3; or in process."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from zoscale.assembly import Plan, build_engine, plan
from zoscale.config import RunConfig, parse
from zoscale.data.splits import evaluation_batches
from zoscale.data.train_batches import TrainBatches
from zoscale.evaluate import evaluate
from zoscale.methods import DEFAULTS, TABLES
from zoscale.release.export import save_trained
from zoscale.runtime import Runtime, start, stop

STEPS = 4
COMMON = [
    "model.dtype=float32", "data.num_train=null", "data.num_dev=0", "data.batch_size=3", "data.micro_batch_size=1",
    "optimizer.name=jaguar_sign_sgd", "optimizer.lr=0.02", "probe.name=block", "probe.rows=0.5", "probe.columns=0.5",
    "estimator.tau=0.05", "data.max_length=100",
]  # fmt: skip


def letters(answer: str, accepted: Any) -> float:
    """A score that hardly ever ties: for objectives of generated text."""
    return sum(map(ord, answer)) % 97 / 97


def prepare(options: list[str]) -> tuple[RunConfig, Plan]:
    """What is known before the processes join."""
    config = parse([*COMMON, *options], TABLES, DEFAULTS)
    return config, plan(config)


def play(config: RunConfig, made: Plan, folder: Path, *, sharded: bool) -> None:
    """Train, evaluate and save; rank 0 writes weights.safetensors, report.json and the trained model into a folder."""
    accelerator = None
    if sharded:
        AcceleratorState._reset_state()
        runtime = Runtime(dtype="float32", deepspeed=made.deepspeed, threads=1, timeout_minutes=2)
        accelerator = start(runtime, size=made.size)
    tokenizer = made.encoder.tokenizer
    engine = build_engine(config, made.architecture, accelerator, objective=made.objective, tokenizer=tokenizer)
    batches = TrainBatches(made.splits.train, made.encoder, config.data, config.seed, gold_only=False)
    losses = [engine.step(batches.at(step)).losses.values for step in range(STEPS)]
    generator = engine.generator if made.task.generates else None
    validation = evaluation_batches(made.splits.validation, made.encoder, 1)
    metrics = evaluate(engine.answers, validation, engine.mesh, made.task.metrics, generator=generator).flat()
    texts = [generator.texts(batch) for batch in validation] if generator else []
    save_trained(engine, folder / "trained")
    gather = engine.mesh.gather_flats
    wholes = {s.spec: gather([(s.truth.contiguous(), s.spec.numel)])[0] for s in engine.shards}
    weights = {spec.name: whole.view(spec.shape).clone() for spec, whole in wholes.items()}
    if engine.mesh.is_main:
        save_file(weights, folder / "weights.safetensors")
        report = {"losses": losses, "metrics": metrics, "texts": texts, "forward": type(engine.forward).__name__}
        (folder / "report.json").write_text(json.dumps(report))


def main(scenarios: str, out: str) -> None:
    torch.set_num_threads(1)
    prepared = {name: prepare(options) for name, options in json.loads(Path(scenarios).read_text()).items()}
    for name, (config, made) in prepared.items():
        folder = Path(out) / name
        folder.mkdir(exist_ok=True)
        play(config, made, folder, sharded=True)
    stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

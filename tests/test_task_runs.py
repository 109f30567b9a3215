"""Whole runs of tasks whose answers are generated, without any step, and by backpropagation."""

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import JobServer, largest_difference, run_dir_of
from peft import PeftModel
from processes import ROOT
from transformers import AutoModelForCausalLM

from zoscale.config import ConfigError
from zoscale.journal import Journal
from zoscale.model_card import model_card
from zoscale.replay import replay_command
from zoscale.run_record import RunRecord

MODEL = ["model.id=launch/tiny_opt/model", "model.dtype=float32", "tracking.mlflow=false"]
SMALL = ["data.num_train=null", "data.max_length=64", "data.batch_size=3", "data.micro_batch_size=1"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_objective_of_generated_text_from_training_to_replay(server: JobServer) -> None:
    """Two ranks with micro-batches of unlike length: F1 chooses the step and is in every record of the run."""
    out = server.folder / "squad"
    options = ["task.name=squad", f"task.path={ROOT}/tests/samples/squad", "task.max_new_tokens=4", "data.num_dev=1"]
    options += ["objective=schemes_worker:letters", "estimator.tau=0.5", "optimizer.name=jaguar_sign_sgd"]
    options += ["data.batch_size=2", "train.steps=3", "train.eval_every=2", "train.log_every=1"]
    text = server.run(2, *MODEL, *SMALL, *options, f"output_dir={out}")
    assert "forward: sequential, because objective schemes_worker:letters reads texts" in text
    assert "validation f1: 0." in text
    run_dir = run_dir_of(out)
    assert run_dir is not None
    names = {"count", "f1", "exact_match", "lm_loss", "schemes_worker:letters"}
    evaluations = lines(run_dir / "evaluations.jsonl")
    assert [(row["name"], row["step"]) for row in evaluations[:2]] == [("validation/before", 0), ("dev", 0)]
    assert all(set(row["result"]) == names for row in evaluations)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary["validation"]["chosen"]) == names and summary["dev"]["count"] == 1
    logged = {name for row in lines(run_dir / "metrics.jsonl") for name in row["metrics"]}
    assert {"dev/f1", "validation/final/exact_match", "validation/before/schemes_worker:letters"} <= logged
    records = Journal.read(run_dir / "journal.bin").records
    assert any(len(set(record.losses)) > 1 for record in records), "generation saw the perturbations"
    assert replay_command([str(run_dir)]) == 0, "without the function"


def test_no_steps_is_an_evaluation_with_demonstrations(server: JobServer) -> None:
    out = server.folder / "copa"
    options = ["task.name=copa", f"task.path={ROOT}/tests/samples/copa", "train.steps=0", "data.num_dev=0"]
    text = server.run(1, *MODEL, *SMALL, *options, "data.num_demonstrations=2", f"output_dir={out}")
    assert "2 train, 0 dev" in text
    run_dir = run_dir_of(out)
    assert run_dir is not None
    (row,) = lines(run_dir / "evaluations.jsonl")
    summary = json.loads((run_dir / "summary.json").read_text())["validation"]
    assert row["result"] == summary["before"] == summary["final"] == summary["chosen"]


DIES = """
import os, signal
from zoscale.engine import ZeroOrderEngine
step = ZeroOrderEngine.step
def dies(self, batch):
    if self.num_steps == {step}: os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
ZeroOrderEngine.step = dies
"""


def test_a_first_order_run_that_dies_goes_on_from_its_checkpoint(server: JobServer) -> None:
    """WeightLoRA+ killed before and after the choices, on other numbers of ranks: as a run that never stopped."""
    options = ["--config", "launch/recipes/quickstart-adamw.yaml", "data.num_train=16", "data.num_dev=4"]
    options += ["data.num_validation=4", "data.batch_size=4", "data.micro_batch_size=2", "tracking.mlflow=false"]
    options += ["train.steps=5", "train.eval_every=0", "train.log_every=1", "checkpoint.every=2"]
    options += ["adapter.peft_type=weight_lora", "adapter.keep=4", "adapter.warmup_steps=3"]
    options += ["adapter.expansions=1", "adapter.expand_every=1"]
    whole, broken = server.folder / "whole", server.folder / "broken"
    text = server.run(1, *options, f"output_dir={whole}")
    assert "method: fo_adamw, gradient probe, backpropagation, 1 forward and 1 backward pass per step" in text
    assert "step 3: kept 4 of 8 adapters, of rank 8: model." in text
    assert "step 4: kept 2 of 4 adapters, of rank 16: model." in text
    server.run(2, *options, f"output_dir={broken}", expect=-9, plant=DIES.format(step=3))
    text = server.run(3, *options, f"output_dir={broken}", expect=-9, plant=DIES.format(step=4))
    assert "resumed at step 2, the newest checkpoint; 1 steps are taken again" in text
    text = server.run(1, *options, f"output_dir={broken}")
    assert "resumed at step 4, the newest checkpoint; 0 steps are taken again" in text
    assert largest_difference(whole, broken) < 1e-6
    first, again = run_dir_of(whole), run_dir_of(broken)
    assert first is not None and again is not None
    records = [Journal.read(run_dir / "journal.bin").records for run_dir in (first, again)]
    assert len(records[0]) == len(records[1]) == 5
    for one, other in zip(*records, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5) and one.lrs == other.lrs
    summary = json.loads((again / "summary.json").read_text())
    assert (summary["forwards"], summary["backwards"], summary["resumed_at_step"]) == (5, 5, 4)
    logged: dict[str, list[float]] = {}
    for row in lines(again / "metrics.jsonl"):
        for name, value in row["metrics"].items():
            logged.setdefault(name, []).append(value)
    assert logged["train/forwards"] == logged["train/backwards"] == [1, 2, 3, 4, 5]
    assert logged["train/projected_grad_max"][4] == pytest.approx(records[0][4].losses[1], rel=1e-5)
    with pytest.raises(ConfigError, match="expected a checkpoint of the step, trained by FOAdamW"):
        replay_command([str(again)])
    card = model_card(RunRecord.read(again), summary, kind="adapter", name="me/mine", dtype="float32")
    assert "trained with zoscale by backpropagation through DeepSpeed ZeRO-3, fo_adamw." in card
    text = server.run(1, "evaluate", "--run", str(again), "--checkpoint", "last")
    assert "step 5" in text, "the last step has a checkpoint"
    kept = json.loads((again / "choices/step_00000004.json").read_text())["kept"]
    assert kept == json.loads((first / "choices/step_00000004.json").read_text())["kept"]
    base = AutoModelForCausalLM.from_pretrained(ROOT / "launch/tiny_opt/model")
    adapted = PeftModel.from_pretrained(base, again / "adapter", is_trainable=True)
    assert {name.split(".lora_")[0] for name, param in adapted.named_parameters() if param.requires_grad} == {
        f"base_model.model.{layer}" for layer in kept
    }

"""Whole runs of tasks whose answers are generated, and without any step."""

import json
from pathlib import Path
from typing import Any

from jobs import JobServer, run_dir_of
from processes import ROOT

from zoscale.journal import Journal
from zoscale.replay import replay_command

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

"""Whole runs of tasks whose answers are generated, without any step, and by backpropagation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import JobServer, largest_difference, run_dir_of
from peft import PeftModel
from processes import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from zoscale.config import ConfigError
from zoscale.recovery.journal import Journal
from zoscale.recovery.replay import replay_command
from zoscale.release.model_card import model_card
from zoscale.release.run_record import RunRecord

MODEL = ["model.id=launch/tiny_opt/model", "model.dtype=float32", "tracking.mlflow=false"]
SMALL = ["data.num_train=null", "data.max_length=64", "data.batch_size=3", "data.micro_batch_size=1"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_objective_of_generated_text_from_training_to_replay(server: JobServer) -> None:
    """Two ranks with micro-batches of unlike length: F1 chooses the step and is in every record of the run.

    Adapters are chosen after the first step; the forward that is made anew then generates too.
    """
    out = server.folder / "squad"
    options = ["task.name=squad", f"task.path={ROOT}/tests/samples/squad", "task.max_new_tokens=4", "data.num_dev=1"]
    options += ["objective=schemes_worker:letters", "estimator.tau=0.5", "optimizer.name=jaguar_sign_sgd"]
    options += ["data.batch_size=2", "train.steps=3", "train.eval_every=2", "train.log_every=1"]
    options += ["adapter.peft_type=weight_lora", "adapter.keep=2", "adapter.warmup_steps=1"]
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


def samples(name: str) -> list[str]:
    """Both splits of a task's samples."""
    folder = ROOT / "tests/samples" / name
    return [line for split in ("validation", "train") for line in (folder / f"{split}.jsonl").read_text().splitlines()]


@torch.no_grad()
def test_an_evaluation_of_two_tasks_writes_the_same_on_one_rank_and_on_two(server: JobServer) -> None:
    """One is generated; both lie where their ids on the hub say, and the ranks have unlike numbers of examples."""
    home, model = server.folder / "home", ROOT / "launch/tiny_opt/model"
    for name, place in (("squad", "rajpurkar/squad"), ("copa", "aps/super_glue")):
        (home / place).mkdir(parents=True)
        (home / place / "validation.jsonl").write_text("\n".join(samples(name)))
    options = [f"--model={model}", "squad", "copa", "model.dtype=float32", "train.eval_micro_batch_size=1"]
    for ranks in (1, 2):
        plant = f"import os; os.chdir({str(home)!r})"
        text = server.run(ranks, "evaluate", *options, f"--out={home / str(ranks)}", plant=plant)
        assert "squad validation: f1 " in text and "copa validation: accuracy " in text
    for name in ("squad.jsonl", "copa.jsonl"):
        assert (home / "1" / name).read_bytes() == (home / "2" / name).read_bytes()
    results = [json.loads((home / ranks / "results.json").read_text())["results"] for ranks in ("1", "2")]
    assert results[0] == results[1] and set(results[0]) == {"squad", "copa"}
    written = lines(home / "2/squad.jsonl")
    assert [row["index"] for row in written] == list(range(len(samples("squad"))))
    assert [row["answer"] for row in written] == [greedy(model, row["prompt"]) for row in written]
    assert any(row["answer"] for row in written) and results[0]["squad"]["count"] == len(written)
    chosen = lines(home / "2/copa.jsonl")
    assert len(chosen) == len(samples("copa"))
    assert all(row["options"][row["prediction"]].endswith(row["answer"]) for row in chosen)


def greedy(place: Path, prompt: str) -> str:
    """The answer of at most 50 tokens that transformers gives."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    row = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=50, do_sample=False)[0]
    return str(tokenizer.decode(row[tokens.shape[1] :], skip_special_tokens=True)).split("\n")[0].strip()


def test_no_steps_is_an_evaluation_with_demonstrations(server: JobServer) -> None:
    out = server.folder / "copa"
    options = ["task.name=copa", f"task.path={ROOT}/tests/samples/copa", "train.steps=0", "data.num_dev=0"]
    text = server.run(1, *MODEL, *SMALL, *options, "data.num_demonstrations=2", f"output_dir={out}")
    before, told, _ = text.partition(" prompts have fewer than data.num_demonstrations=2, without the first ones")
    assert "2 train, 0 dev" in before and told and "validation/before" not in before
    run_dir = run_dir_of(out)
    assert run_dir is not None
    (row,) = lines(run_dir / "evaluations.jsonl")
    summary = json.loads((run_dir / "summary.json").read_text())["validation"]
    assert row["result"] == summary["before"] == summary["final"] == summary["chosen"]


def test_prompts_longer_than_the_model_are_cut_and_told_before_they_are_scored(server: JobServer) -> None:
    """With the default data.max_length, in a run and in an evaluation; a model has no more positions than it has."""
    folder, out = server.folder / "long", server.folder / "long_run"
    folder.mkdir()
    for split in ("train", "validation"):
        own = [json.loads(line) for line in (ROOT / f"tests/samples/copa/{split}.jsonl").read_text().splitlines()]
        own[0]["premise"] = "the film was dull and " * 100
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, own)))
    options = ["task.name=copa", f"task.path={folder}", "data.num_train=null", "data.num_dev=0"]
    cut = "to 128 tokens: as far as the model's positions go (data.max_length=512)\n"
    text = server.run(1, *MODEL, *options, "train.steps=0", f"output_dir={out}")
    before, told, after = text.partition(f"4 rows were cut {cut}")
    assert "data: " in before and told and "validation/before" in after
    text = server.run(1, "evaluate", "--model=launch/tiny_opt/model", "model.dtype=float32", *options)
    before, told, after = text.partition(f"copa: 2 rows were cut {cut}")
    assert told and "copa validation: accuracy" in after


def test_records_that_ask_nothing_are_told_once(server: JobServer) -> None:
    """On two ranks; the run and an evaluation of it leave out the same ones."""
    folder, out = server.folder / "gaps", server.folder / "gaps_run"
    folder.mkdir()
    empty = json.dumps({"sentence": "_ sang.", "option1": "Ann", "option2": "Bo", "answer": "1"})
    for split in ("train", "validation"):
        own = (ROOT / f"tests/samples/winogrande/{split}.jsonl").read_text().splitlines()
        (folder / f"{split}.jsonl").write_text("\n".join([empty, *own] if split == "train" else own))
    options = ["task.name=winogrande", f"task.path={folder}", "train.steps=1", "data.num_dev=1", "data.batch_size=2"]
    text = server.run(2, *MODEL, *SMALL, *options, f"output_dir={out}")
    assert text.count("records that leave the task nothing to ask, left out: 1 of train\n") == 1
    assert "data: 2 train, 1 dev" in text and "2 validation" in text
    text = server.run(1, "evaluate", "--run", str(run_dir_of(out)), "--split", "dev")
    assert text.count("winogrande: records that leave the task nothing to ask, left out: 1 of train\n") == 1


DIES = """
import os, signal
from zoscale.first_order import FirstOrderEngine
step = FirstOrderEngine.step
def dies(self, batch):
    if self.num_steps == {step}: os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
FirstOrderEngine.step = dies
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
    refused = server.run(1, "evaluate", f"--run={run_dir_of(broken)}", "--checkpoint=last", expect=2)
    assert "expected a checkpoint of the step, trained by FOAdamW, got the newest of step 2 of 3" in refused
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
    assert "| peak memory of a rank, since step 4 |" in card and " 0 tokens/s" not in card
    after = model_card(
        RunRecord.read(again), summary | {"resumed_at_step": 5}, kind="adapter", name="me/mine", dtype="float32"
    )
    assert "peak memory" not in after and "gathered per rank" not in after, "it measured no step"
    text = server.run(1, "evaluate", "--run", str(again), "--checkpoint", "last")
    assert "step 5" in text, "the last step has a checkpoint"
    kept = json.loads((again / "choices/step_00000004.json").read_text())["kept"]
    assert kept == json.loads((first / "choices/step_00000004.json").read_text())["kept"]
    base = AutoModelForCausalLM.from_pretrained(ROOT / "launch/tiny_opt/model")
    adapted = PeftModel.from_pretrained(base, again / "adapter", is_trainable=True)
    assert {name.split(".lora_")[0] for name, param in adapted.named_parameters() if param.requires_grad} == {
        f"base_model.model.{layer}" for layer in kept
    }

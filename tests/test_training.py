"""The main job as a user runs it: real launchers, real ZeRO-3, the bundled model and data, MLflow in SQLite."""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from jobs import JobServer
from mlflow import MlflowClient
from peft import PeftModel
from processes import ROOT, free_port, run, status_of, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoscale
from zoscale import cli
from zoscale.config import DataConfig, parse
from zoscale.data.splits import Splits, part
from zoscale.methods import DEFAULTS, TABLES
from zoscale.run_directory import RunDirectory
from zoscale.run_report import amounts, conclude
from zoscale.tasks import Example

QUICKSTART = ["--config", "launch/recipes/quickstart.yaml"]
SHORT = ["train.steps=6", "train.eval_every=3", "train.log_every=2", "data.num_dev=48", "data.num_validation=60"]
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml",
    "--main_process_port", str(free_port()),
]  # fmt: skip


def only_run(folder: Path) -> Path:
    (found,) = [path.parent for path in folder.glob("*/config.yaml")]
    return found


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def series(run_dir: Path, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row["metrics"][name]) for row in metrics(run_dir) if name in row["metrics"]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run by `accelerate launch` on two processes."""
    out = tmp_path_factory.mktemp("launched")
    command = [*ACCELERATE, "launch/train.py", *QUICKSTART, *SHORT, f"output_dir={out}", "tracking.experiment=short"]
    return out, run(command).stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by `zoscale train`, without a launcher: one process; the tracking server is not there."""
    out = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-c", "import sys; from zoscale.cli import main; sys.exit(main())", "train"]
    options = [f"output_dir={out}", "optimizer.name=jaguar_sign_sgd", "optimizer.lr=1e-3"]
    result = run([*command, *QUICKSTART, *SHORT, *options, "tracking.uri=http://127.0.0.1:9"])
    assert "MLflow is off from here on" in result.stdout
    return out


def test_run_directory_is_complete(launched: tuple[Path, str]) -> None:
    """Pitfall 19: the folder carries the hash of the whole configuration."""
    run_dir = only_run(launched[0])
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "journal.bin", "evaluations.jsonl", "metrics.jsonl", "mlflow_run_id"} <= names
    assert {"summary.json", "adapter", "checkpoints"} <= names
    assert run_dir.name.startswith("quickstart-")
    assert not list(run_dir.rglob("*.tmp"))


def test_the_log_says_what_is_trained(launched: tuple[Path, str]) -> None:
    """Pitfall 18: real counts are printed."""
    text = launched[1]
    assert "1,027,456 parameters, float32; trainable: 16,384 in 16 tensors; ranks: 2, 2 per copy; " in text
    assert "slices: [8192, 8192]" in text
    assert "1000 train, 48 dev (held out of train; chooses the step), 60 validation" in text
    assert "expected memory per rank: 2.0 MiB shard" in text
    assert "validation accuracy:" in text
    assert "mlflow ui --backend-store-uri sqlite:///" in text


def test_summary_has_what_a_result_needs(launched: tuple[Path, str]) -> None:
    summary = json.loads((only_run(launched[0]) / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["forwards"] == 6 * 4
    assert summary["world_size"] == 2
    assert summary["validation"]["before"]["count"] == 60
    assert summary["dev"]["count"] == 48
    assert summary["versions"]["deepspeed"] != "not installed"
    assert summary["commit"]
    model_bytes = 1_027_456 * 4
    for rank in summary["ranks"]:
        assert rank["tokens_per_second"] > 0
        assert rank["peak_memory_bytes"] > model_bytes
        assert model_bytes <= rank["gathered_bytes_per_step"] <= 1.15 * model_bytes, "one gather for four candidates"


def test_mlflow_holds_parameters_and_metrics_of_each_rank(launched: tuple[Path, str]) -> None:
    out = launched[0]
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("short")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_id == (only_run(out) / "mlflow_run_id").read_text().strip()
    assert found.data.params["optimizer.lr"] == "0.015"
    assert found.data.params["adapter.r"] == "8"
    for name in ("tokens_per_second", "samples_per_second", "forwards_per_second", "memory_bytes", "peak_memory_bytes"):
        assert found.data.metrics[f"rank_0/{name}"] > 0
        assert found.data.metrics[f"rank_1/{name}"] > 0
    logged = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in logged] == series(only_run(out), "train/loss")
    assert {"adapter", "journal.bin", "summary.json"} <= {
        item.path for item in client.list_artifacts(found.info.run_id)
    }


def test_learning_rate_follows_the_schedule(launched: tuple[Path, str]) -> None:
    """Pitfall 12: the rate used at step t is the schedule's."""
    used = series(only_run(launched[0]), "train/lr")
    assert used == [(step, pytest.approx(1.5e-2 * (1 - (step - 1) / 6))) for step in (2, 4, 6)]


def test_one_process_gives_the_losses_of_two_and_no_server_is_needed(alone: Path, tmp_path: Path) -> None:
    """Pitfall 5; and a broken tracking server changes nothing but a warning."""
    options = [f"output_dir={tmp_path}", "optimizer.name=jaguar_sign_sgd", "optimizer.lr=1e-3", "tracking.mlflow=false"]
    torchrun(2, "launch/train.py", *QUICKSTART, *SHORT, *options)
    one, two = only_run(alone), only_run(tmp_path)
    for name in ("train/loss", "dev/loss", "validation/final/loss"):
        assert series(one, name) == series(two, name)
        assert all(math.isfinite(value) for _, value in series(one, name))
    assert one.name == two.name, "the number of ranks is not part of the configuration"


@torch.no_grad()
def test_adapter_scores_the_same_in_plain_peft(launched: tuple[Path, str]) -> None:
    run_dir = only_run(launched[0])
    summary = json.loads((run_dir / "summary.json").read_text())
    base = ROOT / "launch/tiny_opt/model"
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run_dir / "adapter"
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = (ROOT / "launch/tiny_opt/data/validation.jsonl").read_text().splitlines()
    rows = part([json.loads(line) for line in lines], 60)
    correct, loss = 0, 0.0
    for row in rows:
        prompt = tokenizer(f"{row['sentence']} It was", return_tensors="pt")
        scores = model.eval()(**prompt).logits[0, -1].float().log_softmax(-1)
        both = torch.stack(
            [scores[tokenizer(text, add_special_tokens=False)["input_ids"][0]] for text in (" terrible", " great")]
        )
        correct += int(both.argmax()) == row["label"]
        loss -= float(both.log_softmax(-1)[row["label"]])
    assert correct / 60 == summary["validation"]["chosen"]["accuracy"]
    assert loss / 60 == pytest.approx(summary["validation"]["chosen"]["loss"], abs=1e-5)


def test_a_rank_that_fails_takes_the_job_down_with_its_cause(tmp_path: Path) -> None:
    """Under a real launcher, one rank only, in the middle of a run: no hang, and the cause is shown."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys\nfrom zoscale.cli import train\nfrom zoscale.engine import ZeroOrderEngine\n"
        "def step(self, batch):\n    raise MemoryError('planted')\n"
        "if os.environ['RANK'] == '1':\n    ZeroOrderEngine.step = step\n"
        "sys.exit(train())\n"
    )
    options = [*QUICKSTART, *SHORT, f"output_dir={tmp_path}", "tracking.mlflow=false"]
    result = torchrun(2, str(script), *options, check=False, timeout=120)
    assert result.returncode != 0
    assert "rank 1: MemoryError: planted" in result.stdout
    assert not list(tmp_path.glob("*/told_to_stop")), "that the launcher ended rank 0 is not a wish to stop"


def test_completion_task_with_all_weights(tmp_path: Path) -> None:
    """The user's JSONL, no adapter, no dev: what is trained is reported, and the model folder loads as it is."""
    rows = [{"question": f"the film number {i} was", "reply": "good ." if i % 2 else "bad ."} for i in range(12)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = tmp_path / "own.yaml"
    config.write_text(
        "model: {id: launch/tiny_opt/model, dtype: float32}\nadapter: null\nobjective: lm\n"
        f"task: {{name: completion, path: {tmp_path}, template: '{{question}}', answer: ' {{reply}}'}}\n"
        "data: {batch_size: 4, num_train: null, num_dev: 0}\ntrain: {steps: 3, log_every: 1, eval_every: 0}\n"
        "optimizer: {name: zo_sgd, lr: 1e-5}\nprobe: {name: gaussian}\ntracking: {mlflow: false}\n"
    )
    text = run([sys.executable, "launch/train.py", "--config", str(config), f"output_dir={tmp_path / 'runs'}"]).stdout
    assert "validation lm_loss:" in text
    assert "accuracy" not in text
    run_dir = only_run(tmp_path / "runs")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "adapter", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "launch/tiny_opt/model", dtype=torch.float32)
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight), "the embedding was trained"
    assert AutoTokenizer.from_pretrained(run_dir / "adapter")("the film").input_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.lrr=1"], "optimizer.lr"),
        (["optimizer.lr=fast"], "optimizer.lr"),
        (["data.batch_size=10", "data.micro_batch_size=4"], "micro-batch"),
        (["adapter.rank=4"], "peft.LoraConfig"),
        (["probe.rows=2"], "rows in (0, 1]"),
        (["estimator.tau=-1"], "tau"),
        (["optimizer.groups=[{patern: x}]"], "patern"),
        (["model.id=/nowhere/at/all"], "/nowhere/at/all"),
        (
            ["model.id=null", "model.config={model_type: t5}", "model.tokenizer=launch/tiny_opt/model"],
            "expected a causal language model of transformers, got t5",
        ),
        (["task.name=completion"], "task.candidates"),
        (["runtime.deepspeed=README.md"], "DeepSpeed JSON"),
    ],
)  # fmt: skip
def test_mistakes_end_with_status_2_and_no_traceback(
    server: JobServer, arguments: list[str], message: str, tmp_path: Path
) -> None:
    printed = server.run(1, *QUICKSTART, f"output_dir={tmp_path}", *arguments, expect=2)
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_groups_that_no_weight_is_in_are_refused(server: JobServer, tmp_path: Path) -> None:
    options = [f"output_dir={tmp_path}", "optimizer.groups=[{pattern: q_prj, lr: 1}]"]
    printed = server.run(1, *QUICKSTART, *options, expect=2)
    assert "got 'q_prj': they are like base_model.model" in printed and "Traceback" not in printed
    assert not list(tmp_path.iterdir()), "no run that never was"


def test_the_script_ends_with_the_status_of_a_mistake(tmp_path: Path) -> None:
    result = run([sys.executable, "launch/train.py", *QUICKSTART, f"output_dir={tmp_path}", "seed=x"], check=False)
    assert result.returncode == 2, result.stdout
    assert "Traceback" not in result.stdout


def test_help_is_quick_and_complete() -> None:
    result = run([sys.executable, "launch/train.py", "--help"], timeout=60)
    for word in ("optimizer.lr", "estimator.tau", "jaguar_muon", "zo_sgd", "probe.rows", "tracking.uri", "adapter"):
        assert word in result.stdout


def words_of(example: str) -> list[str]:
    """A line of the help, without what is said beside it."""
    return re.split(" {3,}", example.strip())[0].split()


def parsed(command: str, words: list[str]) -> argparse.Namespace:
    """What a command's own parser makes of its words; the command is not run."""
    found: list[argparse.Namespace] = []

    def only(method: Callable[..., argparse.Namespace], parser: argparse.ArgumentParser, argv: list[str]) -> None:
        found.append(method(parser, argv))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("parse_args", "parse_intermixed_args"):
            method = partialmethod(partial(only, getattr(argparse.ArgumentParser, name)))
            patch.setattr(argparse.ArgumentParser, name, method)
        cli.main([command, *words])
    return found[0]


def test_help_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    """It names every command, and its own examples are right."""
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command} " in text
    section = text[text.index("from nothing to a result:") : text.index("\nA run is a folder")]
    examples = {words[1]: words[2:] for words in map(words_of, section.splitlines()[1:])}
    assert set(examples) == {"doctor", "plan", "train", "launch", "compare", "evaluate", "export"}
    config = parse(examples.pop("train"), TABLES, DEFAULTS)
    assert config.task.name == "sst2" and config.train.steps == 2000
    launch = launch_command_parser().parse_args(examples.pop("launch"))
    assert launch.module and [launch.training_script, *launch.training_script_args] == ["zoscale", "train", "..."]
    given = {name: parsed(name, words) for name, words in examples.items()}
    assert given["plan"].model == given["evaluate"].base == config.model.id
    assert given["evaluate"].run == given["export"].run and given["export"].adapter
    assert config.model.allow_pickle, "so evaluate needs --base, and export --adapter does not"
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"zoscale {zoscale.__version__}, commit ")
    assert cli.main(["trian"]) == 2
    assert "got 'trian': did you mean train? see zoscale --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate", "--run", "runs/a", "--out", ""], "got --out ''"),
        (["compare", "runs/a", "--out="], "got runs/a '--out='"),
        (["export", " ", "--merge"], "got ' '"),
        (["doctor", "--tracking-uri", ""], "got --tracking-uri ''"),
        (["submit", "--config", "launch/recipes/quickstart.yaml", "--dry-run", "--time="], "got --dry-run '--time='"),
    ],
)
def test_a_variable_that_is_not_set_is_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Not taken for an option that was left out, or for the working directory."""
    assert status_of(*words) == 2 and f"no blank words, {told}" in capsys.readouterr().err


def test_a_rank_whose_work_is_done_is_not_aborted() -> None:
    """By a thread within torch that wants Python's lock while Python goes down; what was to be done at exit is."""
    code = """if True:
        import atexit, threading, torch
        from zoscale.cli import leave
        def work(ones=torch.ones(100)):
            while True:
                ones + ones
        for _ in range(4):
            threading.Thread(target=work, daemon=True).start()
        atexit.register(print, "tidied up")
        print("done")
        leave(75)
    """
    ended = run([sys.executable, "-c", code], check=False, RANK="0")
    assert (ended.returncode, ended.stdout) == (75, "done\ntidied up\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_learns_over_three_seeds(tmp_path: Path) -> None:
    """The embedded default, whole: validation accuracy rises by at least 25 points on each seed."""
    config = [*QUICKSTART, f"output_dir={tmp_path}"]
    run([*ACCELERATE, "launch/train.py", *config], timeout=600)
    rest = [
        subprocess.Popen(
            [sys.executable, "launch/train.py", *config, f"seed={seed}", "tracking.mlflow=false", "runtime.threads=1"],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    assert [process.wait(timeout=600) for process in rest] == [0, 0]
    summaries = [json.loads(path.read_text())["validation"] for path in tmp_path.glob("*/summary.json")]
    assert len(summaries) == 3
    gains = [summary["chosen"]["accuracy"] - summary["before"]["accuracy"] for summary in summaries]
    assert min(gains) >= 0.25, gains


def test_the_start_of_a_run_tells_what_there_is() -> None:
    example = Example("the film", (" great", " terrible"))
    few = amounts(Splits([example] * 3, [], [example]), DataConfig(batch_size=8))
    assert few[0] == "data: 3 train, 0 dev (the result is the last step), 1 validation"
    assert few[1] == "a step of data.batch_size=8 takes some of the 3 examples repeatedly"
    (enough,) = amounts(Splits([example] * 8, [example] * 2, [example]), DataConfig(batch_size=8))
    assert enough == "data: 8 train, 2 dev (held out of train; chooses the step), 1 validation"


def test_the_end_of_a_run_tells_whose_weights_are_left_and_of_skipped_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse([*QUICKSTART, f"output_dir={tmp_path}"], TABLES, DEFAULTS)
    accuracy = {"accuracy": 0.5, "count": 8}
    summary = {
        "validation": {"before": accuracy, "chosen": accuracy}, "ranks": [], "session": {"steps": 0},
        "resumed_at_step": None, "steps": 6, "skipped_steps": 0, "dev": None,
    }  # fmt: skip
    made, directory = SimpleNamespace(task=SimpleNamespace(select_by="accuracy")), RunDirectory(tmp_path)
    conclude(config, summary, made, directory, "here")  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert "skipped" not in printed and "weights" not in printed
    for step, told in ((0, "weights: of step 0 of 6, the best on dev, as they were before training\n"),
                       (4, "weights: of step 4 of 6, the best on dev\n")):  # fmt: skip
        conclude(config, summary | {"dev": {"best_step": step}}, made, directory, "here")  # type: ignore[arg-type]
        assert told in capsys.readouterr().out
    conclude(config, summary | {"skipped_steps": 5}, made, directory, "here")  # type: ignore[arg-type]
    assert "skipped: 5 of 6 steps, whose loss was not finite" in capsys.readouterr().out

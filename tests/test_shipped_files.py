"""Every shipped YAML and JSON, the README's commands and its library example are used."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from processes import ROOT, run, torchrun

from zoscale.config import parse
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.sizes import ModelSize
from zoscale.runtime import ZERO3, fill_deepspeed_config, read_deepspeed_config
from zoscale.submit import submit_command

README = (ROOT / "README.md").read_text()
METHODS = (ROOT / "launch/METHODS.md").read_text()


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_a_configuration(recipe: Path) -> None:
    config = parse(["--config", str(recipe)], TABLES, DEFAULTS)
    assert config.name
    assert recipe.name in recipe.read_text() or "quickstart.sh" in recipe.read_text(), "says how to run it"
    assert not (config.model.allow_pickle and "model.id=" in recipe.read_text()), "pickles of a model that others name"


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_file_is_forward_only_zero3(file: Path) -> None:
    filled = fill_deepspeed_config(read_deepspeed_config(file), "bfloat16", ModelSize(1000, 300, 100))
    assert filled["bf16"]["enabled"] is True
    assert filled["zero_optimization"]["stage3_max_live_parameters"] == 700
    assert "auto" not in json.dumps(filled["zero_optimization"])


def test_zero3_json_is_the_default() -> None:
    assert json.loads((ROOT / "ds_configs/zero3.json").read_text()) == ZERO3


@pytest.mark.parametrize("file", sorted((ROOT / "launch/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_file_is_read_by_accelerate(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.distributed_type == "DEEPSPEED"
    assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()
    assert config.num_processes % config.num_machines == 0
    launcher = config.deepspeed_config.get("deepspeed_multinode_launcher")
    assert launcher == ("standard" if config.num_machines > 1 else None), "pdsh may let a node train alone"


def test_readme_names_only_what_is_there() -> None:
    for path in re.findall(r"\b(?:launch|tests|ds_configs)/[\w./-]+\.\w+", README):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"`(?!launch/|tests/)([a-z_/]+\.py)`", README):
        assert (ROOT / "zoscale" / module).exists(), module
    tables = {"probes": TABLES["probe"], "estimators": TABLES["estimator"], "tasks": TABLES["task"]}
    for section, names in tables.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| {section} "))
        assert set(names) <= set(re.findall(r"`(\w+)`", row)), "the support matrix is complete"


RUN_BY = {
    "bash launch/quickstart.sh": "test_training.py", "bash tests/run.sh": "run.sh",
    "accelerate launch --config_file launch/accelerate/gpu_8.yaml launch/train.py": "test_launchers.py",
    "zoscale train": "test_recipes.py", "zoscale journal": "test_journal_report.py", "zoscale replay": "test_replay.py",
    "zoscale compare": "test_compare_command.py", "python launch/reproduce.py": "test_reproduction.py",
    "zoscale submit": "test_slurm.py", "zoscale plan": "test_plan.py", "zoscale doctor": "test_doctor.py",
    "zoscale evaluate": "test_release.py", "zoscale export": "test_release.py", "lm_eval run": "test_release.py",
    "accelerate launch --config_file launch/accelerate/gpu_8.yaml -m zoscale evaluate": "test_release.py",
}  # fmt: skip
"""The beginnings of the README's commands, and where each is run."""


def test_every_command_of_the_readme_is_run_by_a_test() -> None:
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n ", "")
    for line in filter(None, blocks.splitlines()):
        (begin,) = [begin for begin in RUN_BY if line.startswith(begin)]
        what = begin.split()[1] if begin.startswith("zoscale") else Path(begin.split()[-1]).stem
        assert what in (ROOT / "tests" / RUN_BY[begin]).read_text(), line
    assert all(begin in README for begin in RUN_BY), "nothing more is named"


def test_training_commands_of_the_readme_and_the_faq_have_options_that_exist() -> None:
    """Those of eight ranks give each of them a micro-batch of its own."""
    text = (README + (ROOT / "launch/FAQ.md").read_text()).replace("\\\n ", "")
    commands = re.findall(r"^`?(.*(?:launch/train.py|zoscale train) [^`\n#]*\w=[^`\n#]*)", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        launcher, words = re.split(r"launch/train.py|zoscale train", command, maxsplit=1)
        config = parse(words.split(), TABLES, DEFAULTS)
        assert "gpu_8" in launcher and config.data.batch_size // config.data.micro_batch_size % 8 == 0, command


def test_every_method_is_listed_with_its_company() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*?\| (\S+), (\S+) \|", METHODS, re.MULTILINE)
    listed = {name: (probe, estimator) for name, probe, estimator in rows}
    assert set(listed) == set(TABLES["optimizer"])
    for name, optimizer in TABLES["optimizer"].items():
        for shown, section in zip(listed[name], ("probe", "estimator"), strict=True):
            needed = section in optimizer.needs
            assert shown == f"{'**' * needed}`{getattr(optimizer.goes_with, section)}`{'**' * needed}", name


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 335


def test_every_task_is_listed() -> None:
    table = METHODS[: METHODS.index("## Trained weights")]
    assert set(TABLES["task"]) <= set(re.findall(r"`(\w+)`", table))


def test_faq_names_only_what_is_there() -> None:
    faq = (ROOT / "launch/FAQ.md").read_text()
    for path in re.findall(r"\b(?:launch|tests|ds_configs)/[\w./-]+\.\w+", faq + METHODS):
        assert (ROOT / path).exists(), path
    options = set(re.findall(r"`([a-z]+(?:\.[a-z_]+)?=[\w.-]+)`", faq))
    assert len(options) >= 8
    for option in sorted(options):
        parse(["model.id=any", option], TABLES, DEFAULTS)


def test_readme_submits_to_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its commands as they stand, but for the last step."""
    commands = re.findall(r"^zoscale submit (.*)$", README, re.MULTILINE)
    assert len(commands) == 2
    (tmp_path / "setup.sh").touch()
    for command in commands:
        words = [str(tmp_path / word) if word == "setup.sh" else word for word in command.split()]
        assert submit_command([*words, f"output_dir={tmp_path / 'runs'}", "--dry-run"]) == 0
        assert "nothing was done (--dry-run)" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", sorted((ROOT / "launch").rglob("*.s[hb]*")), ids=lambda path: path.name)
def test_script_is_bash(script: Path) -> None:
    run(["bash", "-n", str(script)], timeout=10)


def test_library_example_trains_and_saves(tmp_path: Path) -> None:
    """The README's code as it stands, on two processes and the bundled model, but that what it prints is kept."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    script = tmp_path / "example.py"
    kept = "print = lambda loss: open('losses_' + os.environ['RANK'], 'a').write(f'{loss}\\n')\n"
    script.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{kept}{code}")
    torchrun(2, str(script))
    losses = (tmp_path / "losses_0").read_text()
    assert len(set(losses.splitlines())) == 4, "each step moves the loss"
    assert (tmp_path / "losses_1").read_text() == losses, "both ranks hold the same losses"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_muon_benchmark_counts_two_collectives(tmp_path: Path) -> None:
    (tmp_path / "shapes.yaml").write_text(json.dumps(tiny.ARCHITECTURES["opt"]))
    command = ["launch/benchmark_muon.py", "--config", str(tmp_path / "shapes.yaml"), "--full", "--repeats", "1"]
    torchrun(2, *command, "--json", str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["matrices"] == 2 * 6, "two blocks of OPT"
    assert report["owners"]["collectives"] == 2 and report["redundant"]["collectives"] == 12
    assert 0 < report["owners"]["bytes"] <= 1.2 * report["redundant"]["bytes"] and report["ratio"] > 0


def test_prefix_benchmark_counts_each_prompt_once(tmp_path: Path) -> None:
    (tmp_path / "shapes.yaml").write_text(json.dumps(tiny.ARCHITECTURES["opt"]))
    lengths = ["--prompt", "12", "--options", "3", "--option", "4"]
    command = ["launch/benchmark_prefixes.py", "--config", str(tmp_path / "shapes.yaml"), *lengths, "--repeats", "1"]
    run([sys.executable, *command, "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["separate"]["tokens"] == 4 * 3 * 15 and report["merged"]["tokens"] == 4 * (12 + 3 * 3)
    assert report["ratio_of_tokens"] == 21 / 45 and report["ratio_of_seconds"] > 0


@pytest.mark.slow
def test_memory_report_adds_up(tmp_path: Path) -> None:
    """OPT-125M shapes on two ranks: shard, and while training the largest gather (twice: gloo's all-gather copies)."""
    command = ["launch/measure_memory.py", "--steps", "3", "--deepspeed", "ds_configs/zero3_cpu.json"]
    torchrun(2, *command, "--json", str(tmp_path / "memory.json"), MALLOC_MMAP_THRESHOLD_="131072")
    report = json.loads((tmp_path / "memory.json").read_text())
    mib = 2**20
    for rank in report["ranks"]:
        assert rank["shard"] <= report["model_bytes"] / 2 + 2 * mib
        assert rank["resident_after_loading"] <= rank["shard"] + 64 * mib
        assert rank["training_peak"] <= rank["shard"] + 2 * report["largest_gather"] + 96 * mib


def test_options_of_the_quickstart_are_not_taken_for_extras(tmp_path: Path) -> None:
    """The script in an environment that is installed already, with a command in the place of `accelerate`."""
    for name in ("quickstart.sh", "environment.sh"):
        (tmp_path / "launch").mkdir(exist_ok=True)
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    (tmp_path / "pyproject.toml").touch()
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    for name, does in (("python", 'echo "${@:3}" >> asked; echo 0'), ("accelerate", 'echo "$@" > launched')):
        (tools / name).write_text(f"#!/bin/bash\n{does}\n")
        (tools / name).chmod(0o755)
    subprocess.run(["bash", "launch/quickstart.sh", "seed=3"], cwd=tmp_path, check=True)
    assert "install --quiet -e .\n" in (tmp_path / "asked").read_text()
    assert (tmp_path / "launched").read_text().endswith("overwrite=true seed=3\n")

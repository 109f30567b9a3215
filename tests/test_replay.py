"""`zoscale replay`: any step's weights from the base model and the journal alone."""

import json
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from jobs import FULL, SHORT, SIGN, JobServer, run_dir_of
from peft import PeftModel
from processes import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from zoscale.recovery.replay import _rounding

MODEL = ROOT / "launch/tiny_opt/model"
KINDS = {
    "sign": [*SIGN, "train.steps=15"],
    "muon_q2": ["optimizer.name=jaguar_muon", "estimator.num_directions=2", "train.steps=8"],
    "full_bf16": [*FULL, "model.dtype=bfloat16", "train.steps=6", "schedule.name=constant"],
    "one_sided_sgd": [
        "optimizer.name=zo_sgd", "optimizer.lr=1e-4", "estimator.name=one_sided", "probe.name=gaussian",
        "train.steps=6",
    ],
    "own": ["optimizer.name=own_methods:Clipped", "probe.name=own_methods:Draws", "train.steps=6"],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(server: JobServer) -> dict[str, Path]:
    """Finished runs of two ranks by kind; their data is gone."""
    data = server.folder / "data"
    shutil.copytree(ROOT / "launch/tiny_opt/data", data)
    recipe = (ROOT / "launch/recipes/quickstart.yaml").read_text().splitlines()
    own = server.folder / "own.yaml"  # without the methods, which each kind chooses
    own.write_text("\n".join(line for line in recipe if not line.startswith(("probe:", "optimizer:"))))
    short = [str(own) if word.endswith("quickstart.yaml") else word for word in SHORT]
    found = {}
    for kind, options in KINDS.items():
        server.run(2, *short, *options, f"task.path={data}", f"output_dir={server.folder / kind}")
        run_dir = run_dir_of(server.folder / kind)
        assert run_dir is not None
        found[kind] = run_dir
    shutil.rmtree(data)
    return found


def replay(*arguments: str, expect: int = 0) -> str:
    with TemporaryDirectory() as folder:
        text = JobServer(Path(folder)).run(1, "replay", *arguments, expect=expect)
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_are_what_the_journal_gives(kind: str, runs: dict[str, Path]) -> None:
    """On one process what two ranks trained; the same bits but for Muon."""
    text = replay(str(runs[kind]))
    assert "adapter: the same" in text
    assert "the same bits" in text or kind == "muon_q2"
    assert "bytes per step" in text and "steps/s" in text


@torch.no_grad()
def test_a_past_step_is_an_adapter_like_any_other(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "past"
    assert "replayed 5 steps of 15" in replay(str(runs["sign"]), "--until", "5", "--out", str(out))
    early, late = (
        load_file(out / "adapter_model.safetensors"),
        load_file(runs["sign"] / "adapter/adapter_model.safetensors"),
    )
    assert early.keys() == late.keys()
    assert any(not torch.equal(early[name], late[name]) for name in early)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), out)
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert "replayed 15 steps" in replay(str(runs["sign"]), "--until", "15")


def touched(run: Path, copy: Path, by: float) -> tuple[Path, str]:
    """A copy of a run in which one weight was changed, and the name of its tensor."""
    shutil.copytree(run, copy)
    path = copy / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[3]
    weights[name].view(-1)[2] += by
    save_file(weights, path)
    return copy, name


def say_it_was_on_a_gpu(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["hardware"]["gpus"] = ["NVIDIA H200"]
    (run / "summary.json").write_text(json.dumps(summary))


def test_weights_that_were_touched_are_found(runs: dict[str, Path], tmp_path: Path) -> None:
    copy, name = touched(runs["sign"], tmp_path / "run", 1e-6)
    assert f"differs from what the journal gives: by 1.0e-06 in {name}" in replay(str(copy), expect=1)
    say_it_was_on_a_gpu(copy)
    assert "adapter: the same to 1.0e-06" in replay(str(copy)), "what a GPU and a CPU may differ by"


def test_rounding_to_16_bits_is_told_from_a_change(runs: dict[str, Path], tmp_path: Path) -> None:
    """Muon on GPUs; that such a run itself passes, test_played_gpu.py shows."""
    copy, name = touched(runs["muon_q2"], tmp_path / "run", 2e-2)
    say_it_was_on_a_gpu(copy)
    assert f"differs from what the journal gives: by 2.0e-02 in {name}" in replay(str(copy), expect=1)


def test_rounding_excuses_no_infinity() -> None:
    ours = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1.0]), "c": torch.tensor([2.0])}
    theirs = {"a": torch.tensor([-0.0, 1.0]), "b": torch.tensor([math.nan]), "c": torch.tensor([2.5])}
    assert _rounding(ours, theirs) == 0.5
    assert _rounding({"b": ours["b"]}, theirs) == 0.0


def test_weights_that_are_not_numbers_are_found(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs["sign"], tmp_path / "run"))
    path = copy / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    weights[sorted(weights)[-1]].view(-1)[0] = float("nan")
    save_file(weights, path)
    assert "differs from what the journal gives: by inf" in replay(str(copy), expect=1)
    (copy / "adapter/zoscale.json").write_text(json.dumps({"step": 99}))
    assert "a journal of at least 99 steps" in replay(str(copy), expect=2)


def test_a_model_with_single_numbers_is_verified(server: JobServer, tmp_path: Path) -> None:
    """Apertus keeps two in its activation."""
    sizes = {"vocab_size": 1700, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8}
    config = AutoConfig.for_model("apertus", num_attention_heads=2, num_key_value_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = [f"model.id={tmp_path / 'model'}", f"model.tokenizer={MODEL}"]
    server.run(1, *SHORT, *FULL, *model, "train.steps=2", f"output_dir={tmp_path / 'runs'}")
    run_dir = run_dir_of(tmp_path / "runs")
    assert run_dir is not None
    assert any(value.dim() == 0 for value in load_file(run_dir / "adapter/model.safetensors").values())
    assert "adapter: the same bits" in replay(str(run_dir))


def test_another_base_model_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(MODEL, tmp_path / "model"))
    assert "the same bits" in replay(str(runs["sign"]), "--base", str(base))
    weights = load_file(base / "model.safetensors")
    weights[sorted(weights)[5]].view(-1)[0] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert "expected the base model that was trained" in replay(str(runs["sign"]), "--base", str(base), expect=2)


def test_mistakes(runs: dict[str, Path], tmp_path: Path) -> None:
    assert "--until from 0 to 15" in replay(str(runs["sign"]), "--until", "16", expect=2)
    assert "expected a run directory with journal.bin" in replay(str(tmp_path), expect=2)
    (tmp_path / "file").write_text("")
    text = replay(str(runs["sign"]), "--out", str(tmp_path / "file"), expect=2)
    assert "File exists" in text and "replayed" not in text, "told before the work"
    copy = Path(shutil.copytree(runs["sign"], tmp_path / "run"))
    result = (copy / "adapter/adapter_model.safetensors").read_bytes()
    text = replay(str(copy), "--until", "5", "--out", str(copy / "adapter/../adapter"), expect=2)
    assert "another folder for the weights of step 5" in text
    assert (copy / "adapter/adapter_model.safetensors").read_bytes() == result
    (copy / "adapter/zoscale.json").write_text(json.dumps({"step": "5"}))
    assert "expected a step in" in replay(str(copy), expect=2)


def test_a_run_that_was_killed_can_be_replayed(runs: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is saved yet, so there is nothing to verify: the weights of the last step are rebuilt."""
    copy = Path(shutil.copytree(runs["sign"], tmp_path / "run"))
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(copy / name, ignore_errors=True)
    journal = copy / "journal.bin"
    journal.write_bytes(journal.read_bytes()[:-60])
    text = replay(str(copy), "--out", str(tmp_path / "out"))
    assert "replayed 13 steps of 13" in text and "nothing to compare with" in text
    assert (tmp_path / "out/adapter_model.safetensors").exists()

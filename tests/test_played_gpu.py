"""What can be told of GPUs where there is none: where tensors are, and where the host waits (see `played_gpu.py`)."""

import json
import sys
from pathlib import Path

import played_gpu
import pytest
import torch
from jobs import JobServer
from processes import needs_compiler, run, torchrun

REFUSED = """
import torch
there, here = torch.ones(4, device="cuda"), torch.ones(4)
def refused(what):
    try:
        what()
    except RuntimeError:
        return True
first = torch.tensor([0], device="cuda")
print(refused(lambda: there + here), refused(lambda: here[first]), refused(lambda: there + here[0]))
torch.cuda.set_sync_debug_mode("error")
waits = there.sum().item, there.cpu, lambda: there[there > 0], lambda: there[torch.tensor([1])], here.cuda
print(*map(refused, waits), refused(lambda: here.pin_memory().to("cuda", non_blocking=True)))
"""
ASKED = (
    "test_no_step_waits_on_a_gpu or test_a_batch_may_be_on_the_gpu_already or test_memory_on_a_gpu_is_the_allocator_s"
    " or test_prompts_go_to_the_gpu_by_themselves"
)
LOADED = """
import torch
from accelerate import Accelerator
from zoscale.assembly import build_model
from zoscale.config import ModelConfig
from zoscale.data.batch import MicroBatch
from zoscale.models.answers import AnswerModel
from zoscale.models.loading import read_model_config
from zoscale.models.wide_head import product
from zoscale.placement import WholeAccelerator
config = ModelConfig(id="launch/tiny_opt/model", dtype="bfloat16")
accelerator = WholeAccelerator(dtype="bfloat16")
moved, to = [], torch.nn.Module.to
torch.nn.Module.to = lambda module, *where, **how: moved.append(type(module).__name__) or to(module, *where, **how)
torch.manual_seed(0)
model = build_model(config, read_model_config(config), {"r": 8, "target_modules": ["q_proj"]}, accelerator)
torch.manual_seed(0)
alone = build_model(config, read_model_config(config), {"r": 8, "target_modules": ["q_proj"]}, None)
pairs = list(zip(model.parameters(), alone.parameters(), strict=True))
print({str(own.device) for own, _ in pairs}, {str(other.device) for _, other in pairs})
print(all(own.dtype == other.dtype and torch.equal(own.cpu(), other) for own, other in pairs))
print(any("For" in name for name in moved))
ids = torch.arange(4, 16).view(2, 6)
batch = MicroBatch.from_labels({"input_ids": ids, "labels": ids}).to(accelerator.device)
with torch.no_grad():
    own = AnswerModel(model, model).answer_logprobs(batch)
    head = alone.get_output_embeddings().weight
    x = torch.randn(3, head.shape[1]).bfloat16()
    there = product(x.cuda(), head.cuda(), None).cpu()
    print(own.device, own.dtype, torch.allclose(there, product(x, head, None), atol=1e-5))
"""
JOB = [
    "--config", "launch/recipes/quickstart.yaml", "train.steps=4", "train.eval_every=0",
    "train.log_every=1", "data.num_dev=0", "data.num_validation=16", "tracking.mlflow=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of processes that see two GPUs."""
    needs_compiler()
    if torch.cuda.is_available():
        pytest.skip("there are GPUs: python -m pytest -m gpu")
    return played_gpu.build(tmp_path_factory.mktemp("played"))


def losses(out: Path) -> list[float]:
    (path,) = out.glob("*/metrics.jsonl")
    rows = [json.loads(line)["metrics"] for line in path.read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_what_a_gpu_refuses_is_refused(two: dict[str, str]) -> None:
    found = run([sys.executable, "-c", REFUSED], **two).stdout.splitlines()[-2:]
    assert found == ["True True None", "True True True True True None"]


def test_what_is_asked_of_a_gpu_holds(two: dict[str, str]) -> None:
    files = ["tests/test_synchronisation.py", "tests/test_weight_fan.py", "tests/test_meters.py"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-k", ASKED, *files]
    assert " 7 passed" in run(command, **two).stdout


def test_a_whole_model_goes_to_its_gpu_weight_by_weight(two: dict[str, str]) -> None:
    """Not as a copy in the memory of the host, of which each rank would have one; adapters begin as they do there.

    And its 16-bit head gives logits in float32, by another product than on a CPU.
    """
    found = run([sys.executable, "-c", LOADED], **two, HF_HUB_OFFLINE="1").stdout.splitlines()[-4:]
    assert found == ["{'cuda:0'} {'cpu'}", "True", "False", "cuda:0 torch.float32 True"]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (["adapter=null", "optimizer.name=jaguar_sign_sgd", "optimizer.lr=1e-3"], 1e-6),
        ([], 1e-4),
    ],
    ids=["sign_full", "muon_lora"],
)
def test_a_job_on_two_is_that_of_two_cpus(
    options: list[str], tolerance: float, two: dict[str, str], server: JobServer, tmp_path: Path
) -> None:
    """Sharded, with validation, checkpoints and the export at the end; verified on a CPU, Muon's 16 bits too."""
    server.run(2, *JOB, *options, f"output_dir={tmp_path / 'cpu'}")
    command = ["launch/train.py", *JOB, *options, f"output_dir={tmp_path / 'gpu'}"]
    assert "ranks: 2, 2 per copy" in torchrun(2, *command, **two).stdout
    on_gpus = losses(tmp_path / "gpu")
    assert on_gpus == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)
    assert len(on_gpus) == 4
    (run_dir,) = [path.parent for path in (tmp_path / "gpu").glob("*/journal.bin")]
    replay = [sys.executable, "-m", "zoscale", "replay", str(run_dir)]
    text = run(replay).stdout
    assert "replayed 4 steps of 4" in text and "adapter: the same" in text

"""Faults of one rank: the whole job ends in under a minute, and its cause and rank are named."""

import errno
import signal
import time
from pathlib import Path

import pytest
from jobs import SHORT, SIGN, Job, JobServer, result_bytes, run_dir_of, steps_done, wait_for_step

from zoscale import cli
from zoscale.preemption import Preempted
from zoscale.recovery.journal import Journal

OPTIONS = [*SHORT, *SIGN, "train.steps=300"]
FEW = [*SHORT, *SIGN, "train.steps=12"]
AT_STEP = """
from zoscale.engine import ZeroOrderEngine
step = ZeroOrderEngine.step
def planted(self, batch):
    if self.num_steps == 4 and rank == 1:
        {code}
    return step(self, batch)
ZeroOrderEngine.step = planted
"""


def end_of(job: Job) -> tuple[float, str]:
    """Seconds until all ranks have ended, and what they printed."""
    started = time.monotonic()
    job.wait()
    return time.monotonic() - started, job.log.read_text()


def test_rank_that_raises(server: JobServer) -> None:
    out = server.folder / "raises"
    job = server.start(2, *OPTIONS, f"output_dir={out}", plant=AT_STEP.format(code="raise RuntimeError('planted')"))
    wait_for_step(job, out, 4)
    seconds, text = end_of(job)
    assert seconds < 20
    assert job.statuses == [1, 1]
    assert "rank 1: RuntimeError: planted" in text


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 74, "once there is room, the same command continues"),
        (OSError(errno.EIO, "out could not be written"), 74, "once there is room, the same command continues"),
        (FileNotFoundError(errno.ENOENT, "No such file", "words.txt"), 1, "FileNotFoundError: [Errno 2] No such file"),
        (ConnectionResetError(errno.ECONNRESET, "reset by peer"), 1, "ConnectionResetError: "),
        (Preempted(None), 75, "told to stop between its steps"),
    ],
)
def test_the_status_says_what_ended_a_run(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not every file that is missing, in an objective of the user's for instance, is a full disk."""

    def run(config: object) -> None:
        raise error

    monkeypatch.setattr("zoscale.run.run", run)
    assert cli.train(OPTIONS) == status
    text = capsys.readouterr().err
    assert said in text and ("there is room" in text) == (status == 74) and ("Traceback" in text) == (status == 1)


def test_ranks_that_are_told_to_stop_while_they_read_data(server: JobServer) -> None:
    """They end at once, with the status of a run that can be started again, and have left nothing."""
    out = server.folder / "reading"
    plant = (
        "import datasets, time; datasets.load_dataset = lambda *_, **__: (print('reading', flush=True), time.sleep(60))"
    )
    job = server.start(2, *OPTIONS, f"output_dir={out}", plant=plant)
    while job.log.read_text().count("reading") < 2:
        time.sleep(0.05)
    job.kill(number=signal.SIGTERM)
    seconds, text = end_of(job)
    assert job.statuses == [75, 75] and seconds < 20
    assert "the same command continues the run" in text and "check task.path" not in text
    assert not out.exists()


def test_rank_that_is_killed(server: JobServer) -> None:
    out = server.folder / "killed"
    job = server.start(2, *OPTIONS, f"output_dir={out}")
    wait_for_step(job, out, 3)
    job.kill(1)
    seconds, text = end_of(job)
    assert seconds < 20
    assert job.statuses == [1, -9]
    assert "rank 0: " in text


@pytest.mark.slow
def test_rank_that_is_stopped(server: JobServer) -> None:
    """SIGSTOP: nothing tells the others but the watchdog."""
    out = server.folder / "stopped"
    job = server.start(2, *OPTIONS, f"output_dir={out}")
    wait_for_step(job, out, 3)
    job.kill(1, number=signal.SIGSTOP)
    seconds, text = end_of(job)
    assert seconds < 60
    assert job.statuses == [70, -9]
    assert "rank 1 (host" in text
    assert "been silent" in text


@pytest.mark.slow
def test_rank_that_hangs(server: JobServer) -> None:
    """Asleep in Python: it is named, and shows where."""
    out = server.folder / "hangs"
    code = "import time; time.sleep(600)"
    job = server.start(2, *OPTIONS, f"output_dir={out}", "runtime.stall_seconds=15", plant=AT_STEP.format(code=code))
    wait_for_step(job, out, 4)
    seconds, text = end_of(job)
    assert seconds < 60
    assert 70 in job.statuses
    assert "rank 1 (host" in text
    assert "planted" in text, "the stack of the rank that hangs"


def test_passes_of_an_evaluation_that_all_take_long(server: JobServer) -> None:
    """A base on a slow disk: where an evaluation is one pass, the first one says how long the next may take."""
    out = server.folder / "slow_passes"
    plant = """
import time
from zoscale.models.answers import AnswerModel
scored = AnswerModel.answer_logprobs
AnswerModel.answer_logprobs = lambda self, batch: (time.sleep(4), scored(self, batch))[1]
"""
    few = ["data.num_dev=8", "data.num_validation=8", "train.eval_micro_batch_size=4", "train.steps=1"]
    server.run(2, *OPTIONS, *few, "runtime.stall_seconds=2", f"output_dir={out}", plant=plant)
    assert steps_done(out) == 1


def test_loss_that_stays_not_finite(server: JobServer) -> None:
    """Pitfall 15: skipped on all ranks, counted, and the run ends with advice; the journal has the steps."""
    out = server.folder / "not_finite"
    code = "healthy, self.objective = self.objective, lambda *x: tuple(v * float('nan') for v in healthy(*x))"
    plant = AT_STEP.format(code=code)
    options = [*OPTIONS, "train.max_skipped_in_row=5", f"output_dir={out}"]
    text = server.run(2, *options, expect=1, plant=plant)
    assert "the loss was not finite for 6 steps in a row, up to step 9; lower optimizer.lr" in text
    run_dir = run_dir_of(out)
    assert run_dir is not None
    records = Journal.read(run_dir / "journal.bin").records
    assert [record.skipped for record in records] == [False] * 4 + [True] * 6
    assert "6 steps in a row" in server.run(2, *options, expect=1), "a resumed run knows"


def test_replicas_that_diverge(server: JobServer) -> None:
    """One flipped bit in one replica: the run stops and names the tensor; the same command repairs it."""
    whole, out = server.folder / "replicas", server.folder / "diverge"
    code = "self.shards[4].truth.view(__import__('torch').int32)[77] ^= 1 << 20"
    options = ["mesh.shard_size=1", "mesh.check_every=3", "checkpoint.every=2"]
    server.run(2, *FEW, f"output_dir={whole}")
    text = server.run(2, *FEW, *options, f"output_dir={out}", expect=1, plant=AT_STEP.format(code=code))
    assert "the same weights in all replicas" in text
    assert "layers.1.self_attn.q_proj.lora_A.default.weight in replica 1" in text
    assert steps_done(out) == 6
    assert "checkpoint of step 4" in server.run(2, *FEW, *options, f"output_dir={out}")
    assert result_bytes(out) == result_bytes(whole), "replicas and ZeRO-3 shards give the same bits"


def test_journal_cannot_be_read_by_another_model(server: JobServer, tmp_path: Path) -> None:
    """The base model was exchanged under a run: refused, with what differs."""
    import shutil

    from processes import ROOT
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(ROOT / "launch/tiny_opt/model", tmp_path / "model")
    out = server.folder / "exchanged"
    options = [*FEW, f"model.id={model}", f"output_dir={out}"]
    job = server.start(2, *options)
    wait_for_step(job, out, 3)
    job.kill()
    job.wait()
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[7]
    weights[name].view(-1)[3] += 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "expected the base model that" in server.run(2, *options, expect=2)

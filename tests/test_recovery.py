"""Runs that are killed, stopped, moved to other numbers of ranks and starved of disk: the trajectory stays the same.

Real processes and a real process group; `job_server.py` only spares the imports. Pitfall 17 is this file.
"""

import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import (
    FULL,
    SHORT,
    SIGN,
    Job,
    JobServer,
    is_finished,
    largest_difference,
    result_bytes,
    run_dir_of,
    steps_done,
    victims,
    wait_for_step,
)
from processes import ROOT, environment, free_port

from zoscale.config import ConfigError, parse
from zoscale.mesh import Mesh
from zoscale.methods import DEFAULTS, TABLES
from zoscale.recovery.journal import Journal, JournalWriter
from zoscale.recovery.journal_format import Header
from zoscale.recovery.resume import check_finished
from zoscale.run import _enter
from zoscale.run_directory import RunDirectory, _empty

STEPS = 24
LENGTH = [f"train.steps={STEPS}", "checkpoint.every=5"]
LONG = ["train.steps=100", "checkpoint.every=20"]  # orphans may take steps until they notice
MUON = ["optimizer.name=jaguar_muon", "optimizer.lr=1e-2"]
CHOSEN = [*SIGN, "optimizer.lr=2e-2", "seed=2", "train.eval_every=6", "data.num_dev=8", "schedule.name=linear"]
KINDS: dict[str, list[str]] = {"sign_lora": SIGN, "sign_full": FULL, "muon_lora": MUON, "chosen": CHOSEN}


@pytest.fixture(scope="module")
def whole(server: JobServer) -> Any:
    """By kind, an uninterrupted run on two ranks: its folder and the seconds it took."""
    done: dict[str, tuple[Path, float]] = {}

    def of(kind: str) -> tuple[Path, float]:
        if kind not in done:
            out, started = server.folder / f"whole_{kind}", time.monotonic()
            server.run(2, *command(kind, out))
            done[kind] = (out, time.monotonic() - started)
        return done[kind]

    return of


def command(kind: str, out: Path, *more: str) -> list[str]:
    return [*SHORT, *KINDS[kind], *LENGTH, f"output_dir={out}", *more]


@pytest.mark.parametrize("kind", ["sign_lora", "sign_full", "muon_lora"])
def test_resume_on_other_numbers_of_ranks(kind: str, server: JobServer, whole: Any) -> None:
    """2 -> 1 -> 2 replicas -> 3 -> 2 along one run: the same bytes (SignSGD), 1e-5 (Muon)."""
    reference, _ = whole(kind)
    out = server.folder / f"elastic_{kind}"
    for ranks, until, *more in ((2, 4), (1, 8), (2, 12, "mesh.shard_size=1"), (3, 16)):
        job = server.start(ranks, *command(kind, out, *map(str, more)))
        wait_for_step(job, out, until)
        job.kill()
        job.wait()
        assert until <= steps_done(out) < STEPS
    assert "steps replayed" in server.run(2, *command(kind, out))
    if kind == "muon_lora":
        assert largest_difference(out, reference) <= 1e-5
    else:
        assert result_bytes(out) == result_bytes(reference)


def test_muon_goes_on_bit_for_bit_on_the_same_ranks(server: JobServer, whole: Any) -> None:
    """Its momentum and the matrix products of all later steps included."""
    reference, _ = whole("muon_lora")
    out = server.folder / "muon_again"
    job = server.start(2, *command("muon_lora", out))
    wait_for_step(job, out, 8)
    job.kill()
    job.wait()
    assert "steps replayed" in server.run(2, *command("muon_lora", out))
    assert result_bytes(out) == result_bytes(reference)


def test_a_compiled_run_goes_on_bit_for_bit(server: JobServer) -> None:
    """Graphs are those of the whole run's shapes, also where a job does only the rest of it, on fewer ranks."""
    compiled = ["mesh.shard_size=1", "forward.compile=blocks", "data.pad_to_multiple_of=16"]
    as_it_is = (
        "import torch; plain = torch.compile\n"
        "torch.compile = lambda f, *, mode, **rest: plain(f, backend='eager', **rest)"
    )
    outs = [server.folder / f"compiled_{number}" for number in range(2)]
    server.run(2, *command("sign_lora", outs[0], *compiled), plant=as_it_is)
    job = server.start(2, *command("sign_lora", outs[1], *compiled), plant=as_it_is)
    wait_for_step(job, outs[1], 6)
    job.kill()
    job.wait()
    assert "steps replayed" in server.run(1, *command("sign_lora", outs[1], *compiled), plant=as_it_is)
    assert result_bytes(outs[1]) == result_bytes(outs[0])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_random_moments(server: JobServer, whole: Any, request: pytest.FixtureRequest) -> None:
    """SIGKILL of one rank or of all, again and again, also while starting, writing checkpoints and ending.

    Every run that ends has the journal, the evaluations and the weights of the uninterrupted one, byte for byte.
    --kill-rounds N for more rounds.
    """
    reference, seconds = whole("chosen")
    rounds = request.config.getoption("--kill-rounds")
    rng = random.Random(rounds)
    finished, killed_at = 0, []
    out = server.folder / "killed_0"
    for number in range(rounds):
        job = server.start(2, *command("chosen", out))
        wait_until(rng, job, out, seconds)
        before = time.monotonic()
        job.kill(*victims(rng.choice(["one rank", "all"]), 2, rng))
        job.wait()
        assert time.monotonic() - before < 20, "the other rank went on"
        killed_at.append(steps_done(out))
        if is_finished(out):
            assert_equal(out, reference)
            finished += 1
            out = server.folder / f"killed_{number + 1}"
    server.run(2, *command("chosen", out))
    assert_equal(out, reference)
    assert len(set(killed_at)) > min(5, rounds // 3), "the moments were not random"
    print(f"{rounds} kills after steps {killed_at}; {finished + 1} runs finished, all equal")


def wait_until(rng: random.Random, job: Job, out: Path, seconds: float) -> None:
    """Any moment of the time that a run takes, or one of the next steps, however fast they are."""
    done = steps_done(out)
    if done == STEPS:
        time.sleep(rng.uniform(0, 2 * seconds))
    elif rng.random() < 0.5:
        time.sleep(rng.uniform(0, 1.05 * seconds))
    else:
        wait_for_step(job, out, min(rng.randint(done + 1, done + STEPS // 3), STEPS))


def assert_equal(out: Path, reference: Path) -> None:
    assert result_bytes(out) == result_bytes(reference)
    ours, theirs = run_dir_of(out), run_dir_of(reference)
    assert ours is not None and theirs is not None
    assert Journal.read(ours / "journal.bin").records == Journal.read(theirs / "journal.bin").records
    assert (ours / "evaluations.jsonl").read_bytes() == (theirs / "evaluations.jsonl").read_bytes()


@pytest.mark.slow
def test_killed_launcher(server: JobServer) -> None:
    """SIGKILL of torchrun leaves no rank behind, and the next start goes on."""
    reference, out = server.folder / "launched", server.folder / "launcher"
    server.run(2, *command("sign_lora", reference, *LONG))
    for number in range(2):
        launched = launch(out, server.folder / f"launcher_{number}.log")
        deadline = time.monotonic() + 120
        while steps_done(out) < 5 + 40 * number:
            assert time.monotonic() < deadline and launched.poll() is None
            time.sleep(0.05)
        orphans = children(launched.pid)
        assert len(orphans) == 2
        launched.kill()
        launched.wait()
        started = time.monotonic()
        while any(alive(pid) for pid in orphans):
            assert time.monotonic() - started < 30, "ranks outlive their launcher"
            time.sleep(0.1)
    server.run(2, *command("sign_lora", out, *LONG))
    assert result_bytes(out) == result_bytes(reference)


def launch(out: Path, log: Path) -> "subprocess.Popen[bytes]":
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    with log.open("w") as file:
        return subprocess.Popen(
            [*launcher, str(free_port()), "launch/train.py", *command("sign_lora", out, *LONG)],
            cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_told_to_stop(number: int, server: JobServer, whole: Any) -> None:
    """One rank gets the signal: all finish the step, write a checkpoint of it and end with the requeue status."""
    reference, _ = whole("sign_lora")
    out = server.folder / f"stopped_{number}"
    job = server.start(2, *command("sign_lora", out, "checkpoint.every=0"))
    wait_for_step(job, out, 4)
    job.kill(1, number=number)
    assert job.wait() == [75, 75]
    assert "the same command continues the run" in job.log.read_text()
    run_dir = run_dir_of(out)
    assert run_dir is not None
    step = steps_done(out)
    assert (run_dir / f"checkpoints/step_{step:08d}/manifest.json").exists()
    assert (run_dir / "told_to_stop").exists()
    text = server.run(2, *command("sign_lora", out))
    assert f"resumed at step {step}: checkpoint of step {step}, 0 steps replayed" in text
    assert not (run_dir / "told_to_stop").exists()
    assert result_bytes(out) == result_bytes(reference)


def test_metrics_of_a_resumed_run_have_no_gap_and_no_duplicate(server: JobServer) -> None:
    """In `metrics.jsonl` and in MLflow, where the run goes on under its id."""
    from mlflow import MlflowClient

    out = server.folder / "tracked"
    options = command("sign_lora", out, "tracking.mlflow=true", "train.eval_every=6", "data.num_dev=8")
    for until in (7, 13):
        job = server.start(2, *options)
        wait_for_step(job, out, until)
        job.kill()
        job.wait()
    server.run(2, *options)
    run_dir = run_dir_of(out)
    assert run_dir is not None
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["step"] for row in rows if "train/loss" in row["metrics"]]
    assert losses == list(range(3, STEPS + 1, 3))
    assert [row["step"] for row in rows if "dev/loss" in row["metrics"]] == list(range(0, STEPS + 1, 6))
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "zoscale"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_id == (run_dir / "mlflow_run_id").read_text().strip()
    for name in ("train/loss", "train/lr", "dev/loss", "validation/before/loss"):
        sent = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        assert sent == [(row["step"], row["metrics"][name]) for row in rows if name in row["metrics"]]


@pytest.mark.parametrize("last", ["conclude", "write_json"])
def test_a_run_that_is_killed_as_it_ends_is_whole_in_mlflow(last: str, server: JobServer) -> None:
    """After its summary is written, or just before: what MLflow had not got yet does not stay behind."""
    from mlflow import MlflowClient

    out = server.folder / f"ended_{last}"
    options = command("sign_lora", out, "tracking.mlflow=true", "train.steps=4", "train.eval_every=4", "data.num_dev=8")
    dies = "lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    job = server.start(1, *options, plant=f"import os, signal, zoscale.run\nzoscale.run.{last} = {dies}")
    assert job.wait() == [-signal.SIGKILL]
    server.run(1, *options)
    run_dir = run_dir_of(out)
    assert run_dir is not None
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    found = client.get_run((run_dir / "mlflow_run_id").read_text().strip())
    assert found.info.status == "FINISHED"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/loss", "dev/loss", "validation/final/loss"):
        sent = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        assert sent == [(row["step"], row["metrics"][name]) for row in rows if name in row["metrics"]] != []
    artifacts = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert artifacts == {"adapter", "journal.bin", "summary.json"}
    (summary,) = out.glob("mlartifacts/**/summary.json")
    assert summary.read_bytes() == (run_dir / "summary.json").read_bytes()


def test_a_finished_run_is_left_alone(server: JobServer, whole: Any) -> None:
    """Pitfall 19: it is neither mixed nor repeated, unless told so."""
    out, _ = whole("sign_lora")
    run_dir = run_dir_of(out)
    assert run_dir is not None
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["step_00000015", "step_00000020"], "the last of checkpoint.keep, and none of the best without dev"
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert "is finished; overwrite=true starts it again" in server.run(2, *command("sign_lora", out))
    assert "a configuration that has not run yet" in server.run(1, *command("sign_lora", out, "resume=never"), expect=2)
    changed = server.run(1, *command("sign_lora", out, f"resume={run_dir}", "optimizer.lr=2e-3"), expect=2)
    assert "expected optimizer.lr=0.001, as" in changed, "its result is not that of another configuration"
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_finished_run_is_not_that_of_other_examples(tmp_path: Path) -> None:
    """The data behind an unchanged path may have changed since."""
    config = parse([*SHORT, f"output_dir={tmp_path}"], TABLES, DEFAULTS)
    numbers = {"num_losses": 2, "num_directions": 1, "num_groups": 1}
    about = {"seed": 0, "config": config.to_dict(), "config_hash": config.hash, "code": "c", "data": "rows"}
    path = tmp_path / "journal.bin"
    check_finished(path, config, "rows")
    JournalWriter.create(path, Header(**about, **numbers, model="base", trainable="lora")).close()  # type: ignore[arg-type]
    check_finished(path, config, "rows")
    with pytest.raises(ConfigError, match=r"the examples that .*journal.bin was written with \(rows\), got others"):
        check_finished(path, config, "other rows")
    with pytest.raises(ConfigError, match=r"seed=0, as .*, got 1: change it back"):
        check_finished(path, replace(config, seed=1), "rows")


def test_resume_from_a_named_checkpoint_and_a_moved_run(server: JobServer, whole: Any) -> None:
    reference, _ = whole("sign_lora")
    out = server.folder / "named"
    job = server.start(2, *command("sign_lora", out))
    wait_for_step(job, out, 12)
    job.kill()
    job.wait()
    moved = server.folder / "moved"
    run_dir = run_dir_of(out)
    assert run_dir is not None
    shutil.copytree(run_dir, moved / "elsewhere")
    text = server.run(2, *command("sign_lora", out, f"resume={moved}/elsewhere/checkpoints/step_00000005"))
    assert "checkpoint of step 5" in text
    assert result_bytes(moved) == result_bytes(reference)
    text = server.run(2, *command("sign_lora", out, f"resume={moved}/nowhere"), expect=2)
    assert "the folder of a run or of a checkpoint" in text


def test_a_run_in_a_folder_named_checkpoints_is_no_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints" / "run"
    for folder in (run, run / "checkpoints/step_00000005"):
        config = parse([*SHORT, f"resume={folder}"], TABLES, DEFAULTS)
        folder.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").touch()
        assert RunDirectory.of(config).path == run
        assert RunDirectory.of(config).chosen_checkpoint(config) == (None if folder == run else folder)


def test_a_folder_that_a_rank_does_not_see_is_refused(tmp_path: Path) -> None:
    """Each node would keep its own half of the checkpoints."""

    class Elsewhere(Mesh):
        def on_main(self, work: Any) -> Any:
            """Rank 0 works on another disk."""

    config = parse([*SHORT, f"output_dir={tmp_path}"], TABLES, DEFAULTS)
    with pytest.raises(ConfigError, match="set output_dir to a writable folder that all ranks share"):
        _enter(config, Elsewhere())
    assert _enter(config, Mesh()).config.exists()


def test_an_overwrite_that_was_cut_short_leaves_no_past(server: JobServer, whole: Any) -> None:
    """Whatever of the old run is still there: it is neither continued nor believed."""
    reference, _ = whole("chosen")
    out = server.folder / "overwritten"
    shutil.copytree(reference, out)
    run_dir = run_dir_of(out)
    assert run_dir is not None
    (run_dir / "evaluations.jsonl").write_text("damaged\n")
    for name in ("config.yaml", "journal.bin"):
        (run_dir / name).unlink()
    text = server.run(2, *command("chosen", out, "overwrite=true"))
    assert "resumed" not in text and "finished" not in text
    assert_equal(out, reference)


def test_an_overwrite_may_be_cut_short_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is left with anything but its configuration is not finished, and has evaluations without a journal."""
    names = {"config.yaml", "evaluations.jsonl", "journal.bin", "metrics.jsonl", "summary.json", "checkpoints"}
    for turn in range(len(names)):
        folder = tmp_path / str(turn)
        (folder / "checkpoints").mkdir(parents=True)
        for name in names - {"checkpoints"}:
            (folder / name).touch()
        removed = itertools.count()

        def cut(path: Path, *_: object, turn: int = turn, removed: Any = removed) -> None:
            if next(removed) == turn:
                raise OSError("cut short")
            path.rmdir() if path.is_dir() else os.unlink(path)

        monkeypatch.setattr(Path, "unlink", cut)
        monkeypatch.setattr(shutil, "rmtree", cut)
        with pytest.raises(OSError, match="cut short"):
            _empty(folder)
        left = {path.name for path in folder.iterdir()}
        assert len(left) == len(names) - turn
        assert turn == 0 or "summary.json" not in left
        assert turn < 2 or left == {"config.yaml"} or ("evaluations.jsonl" in left and "journal.bin" not in left)


def test_the_best_weights_are_rebuilt_if_their_checkpoint_is_damaged(server: JobServer, whole: Any) -> None:
    reference, _ = whole("chosen")
    out = server.folder / "best"
    shutil.copytree(reference, out)
    run_dir = run_dir_of(out)
    assert run_dir is not None
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "adapter")
    (best,) = (run_dir / "checkpoints").glob("best_*")
    text = server.run(2, *command("chosen", out, f"resume={best}"), expect=2)
    assert "a checkpoint with the optimizer's state, step_<n>" in text
    break_checkpoint(best, "bit")
    last = json.loads((reference / run_dir.name / "summary.json").read_text())["dev"]["best_step"]
    assert 5 <= last < STEPS, "choose a case where it matters"
    server.run(2, *command("chosen", out))
    assert result_bytes(out) == result_bytes(reference)


@pytest.mark.parametrize("damage", ["bit", "short", "missing", "manifest", "not json"])
def test_a_damaged_checkpoint_is_passed_over(damage: str, server: JobServer, whole: Any) -> None:
    """With a word: an older one and the journal lead to the same bits."""
    reference, _ = whole("sign_lora")
    source = server.folder / "interrupted"
    if not source.exists():
        job = server.start(2, *command("sign_lora", source))
        wait_for_step(job, source, 16)
        job.kill()
        job.wait()
    out = server.folder / f"damaged_{damage.replace(' ', '_')}"
    shutil.copytree(source, out)
    run_dir = run_dir_of(out)
    assert run_dir is not None
    newest = max((run_dir / "checkpoints").glob("step_*"))
    break_checkpoint(newest, damage)
    text = server.run(2, *command("sign_lora", out))
    assert "checkpoint passed over" in text
    assert f"checkpoint of step {int(newest.name[5:]) - 5}," in text
    assert result_bytes(out) == result_bytes(reference)


def break_checkpoint(folder: Path, damage: str) -> None:
    shard, manifest = folder / "rank_00001.safetensors", folder / "manifest.json"
    content = shard.read_bytes()
    if damage == "bit":
        shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "short":
        shard.write_bytes(content[:-1])
    elif damage == "missing":
        shard.unlink()
    elif damage == "manifest":
        tree = json.loads(manifest.read_text())
        tree["files"][1]["slices"] = {}
        manifest.write_text(json.dumps(tree))
    else:
        manifest.write_text("{")


@pytest.mark.parametrize("what", ["journal", "no journal", "a checkpoint without", "evaluations", "summary", "config"])
def test_damaged_records_are_refused_and_left_as_they_are(what: str, server: JobServer, whole: Any) -> None:
    """Exit status 2, no traceback, nothing changed."""
    reference, _ = whole("sign_lora")
    out = server.folder / f"records_{what.replace(' ', '_')}"
    shutil.copytree(reference, out)
    run_dir = run_dir_of(out)
    assert run_dir is not None
    if what != "summary":
        (run_dir / "summary.json").unlink()
    files = {"evaluations": "evaluations.jsonl", "summary": "summary.json", "config": "config.yaml"}
    path = run_dir / files.get(what, "journal.bin")
    content = path.read_bytes()
    more: list[str] = []
    if what == "config":  # another configuration in the same folder
        more = [f"resume={run_dir}", "optimizer.lr=2e-3"]
    elif what == "no journal":
        path.unlink()
    elif what == "a checkpoint without":
        path.unlink()
        (run_dir / "evaluations.jsonl").unlink()
        more = [f"resume={run_dir}/checkpoints/step_00000015"]
    else:
        place = len(content) // 2 if what == "journal" else 0
        path.write_bytes(content[:place] + b"#}" + content[place + 2 :])
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name != ".lock"}
    text = server.run(2, *command("sign_lora", out, *more), expect=2)
    assert "Traceback" not in text
    assert what != "config" or "expected optimizer.lr=0.001, as" in text
    assert str(path if what != "config" else run_dir) in text
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_second_job_in_the_same_run_directory_is_refused(server: JobServer) -> None:
    """Two processes never write one journal."""
    out = server.folder / "locked"
    job = server.start(1, *command("sign_lora", out))
    wait_for_step(job, out, 10)
    job.kill()
    job.wait()
    run_dir = run_dir_of(out)
    assert run_dir is not None
    plant = "from zoscale import run_directory; run_directory._PATIENCE = 0.5"
    with (run_dir / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process that is writing" in server.run(2, *command("sign_lora", out), expect=2, plant=plant)
    assert "resumed at step" in server.run(1, *command("sign_lora", out))


def test_ranks_that_differ_are_refused(server: JobServer) -> None:
    """The first difference is named, on all ranks, before anything is written."""
    out = server.folder / "differ"
    for name, options in {
        "optimizer.lr": ["optimizer.lr=2e-3"],
        "examples": ["task.template={sentence} It  was"],
    }.items():
        text = server.run_differing(command("sign_lora", out), [*command("sign_lora", out), *options])
        wanted = "task.template" if name == "examples" else name
        assert f"expected the same {wanted} on all ranks" in text, text
        assert not list(out.glob("*"))


def test_disk_that_fills_up(server: JobServer, whole: Any, tmp_path: Path) -> None:
    """A small file system runs full in the middle: the error says what to do, nothing older is lost, room continues."""
    reference, _ = whole("sign_lora")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        text, statuses = fill(server, disk)
        assert 74 in statuses
        assert "No space left on device" in text
        assert "once there is room, the same command continues the run" in text
        assert "Traceback" not in text.split("rank 0: ")[0]
        run_dir = run_dir_of(disk)
        assert run_dir is not None
        kept, journaled = sorted((run_dir / "checkpoints").glob("step_*/manifest.json")), steps_done(disk)
        assert kept and journaled >= 5
        (disk / "ballast").unlink()
        assert "resumed at step" in server.run(2, *command("sign_lora", disk))
        assert result_bytes(disk) == result_bytes(reference)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(server: JobServer, disk: Path) -> tuple[str, list[int]]:
    """Start a run and take the room away once there is a checkpoint."""
    job = server.start(2, *command("sign_lora", disk))
    wait_for_step(job, disk, 7)
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(b"\0" * (free.f_bavail * free.f_frsize))
    statuses = job.wait()
    return job.log.read_text(), statuses

"""`zoscale submit` on a real SLURM: two nodes on this machine, started by `launch/slurm/mini_cluster.sh`."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil
import pytest
from jobs import result_bytes, run_dir_of, steps_done
from processes import ROOT, run

from zoscale.config import ConfigError
from zoscale.slurm import Request
from zoscale.submit import submit_command

STEPS = 200
RUN = [
    "--config", str(ROOT / "launch/recipes/quickstart.yaml"), f"model.id={ROOT}/launch/tiny_opt/model",
    f"task.path={ROOT}/launch/tiny_opt/data", "data.num_train=32", "data.num_dev=0", "data.num_validation=8",
    "data.batch_size=4", "data.micro_batch_size=2", "train.eval_every=0", "train.log_every=3",
    "estimator.num_directions=1", "optimizer.name=jaguar_sign_sgd", "optimizer.lr=1e-3", "runtime.stall_seconds=10",
]  # fmt: skip
LONG = [f"train.steps={STEPS}", "tracking.mlflow=false"]
BOTH = "ranks: 2, 2 per copy; slices: [8192, 8192]"
TWO_NODES = ["--nodes", "2", "--warn-seconds", "15"]
PROGRAMS = os.environ["PATH"] + ":/usr/sbin:/sbin"
COMMAND = [sys.executable, "-c", "import sys; from zoscale.cli import main; sys.exit(main())", "submit"]


def missing() -> str:
    """Why there is no cluster here; empty if there can be one."""
    needed = ("slurmctld", "slurmd", "sbatch", "munged")
    absent = [name for name in needed if shutil.which(name, path=PROGRAMS) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "the cluster of launch/slurm/mini_cluster.sh is started as root"


def wait_until(condition: Callable[[], bool], seconds: float, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s:\n{explain()}"
        time.sleep(0.1)


class Cluster:
    """The mini cluster, and what tests ask of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.variables = folder, {"SLURM_CONF": str(folder / "slurm.conf")}
        self._control("start")

    def _control(self, action: str) -> None:
        """Daemons keep the output open: it goes to a file."""
        log = self.folder.parent / f"{action}.log"
        with log.open("w") as file:
            command = ["bash", "launch/slurm/mini_cluster.sh", action, str(self.folder)]
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=60)
        assert done.returncode == 0, log.read_text()

    def stop(self) -> None:
        self._control("stop")

    def kill(self, node: str, job: str) -> None:
        """All processes of a job on a node at once, SLURM's own among them."""
        for process in self._processes(node, job):
            process.kill()

    def _processes(self, node: str, job: str) -> list[psutil.Process]:
        """SLURM's own first."""
        wanted = {**self.variables, "SLURMD_NODENAME": node, "SLURM_JOB_ID": job}
        found: set[psutil.Process | None] = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if wanted.items() <= process.environ().items():
                    found |= {process, process.parent()}
        return sorted((process for process in found if process is not None), key=lambda process: process.pid)

    def kill_slurmd(self, node: str) -> None:
        psutil.Process(int((self.folder / f"{node}.pid").read_text())).kill()

    def start_slurmd(self, node: str) -> None:
        """Again, after it was killed."""
        with (self.folder.parent / "slurmd.log").open("w") as file:
            variables = {**os.environ, **self.variables, "PATH": PROGRAMS}
            subprocess.run(["slurmd", "-N", node], env=variables, stdout=file, stderr=file, timeout=30, check=True)

    def ask(self, *command: str) -> str:
        return run(list(command), timeout=30, **self.variables).stdout

    def submit(self, *arguments: str, command: list[str] = COMMAND, **variables: str) -> str:
        """The number of the job."""
        shown = run([*command, *arguments], timeout=120, **self.variables, **variables).stdout
        found = re.search(r"^job (\d+): ", shown, re.MULTILINE)
        assert found and "job.sbatch <==\n#!/usr/bin/env bash\n#SBATCH --job-name=quickstart\n" in shown, shown
        return found[1]

    def state(self, job: str) -> str:
        """Of one job, or of all tasks of an array where they agree."""
        states = set(re.findall(r"JobState=(\w+)", self.ask("scontrol", "show", "job", job)))
        return states.pop() if len(states) == 1 else ""

    def wait(self, job: str, out: Path, state: str = "COMPLETED") -> None:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.state(job) in ends, 300, lambda: f"{self.state(job)}\n{logs(out)}")
        assert self.state(job) == state, logs(out)


def job_log(out: Path, job: str) -> str:
    """What the batch script of a job of one run has printed."""
    (path,) = out.glob(f"*/slurm/*/logs/{job}.log")
    return path.read_text()


def logs(out: Path) -> str:
    """All that the jobs in a folder have printed."""
    return "\n".join(f"==> {path} <==\n{path.read_text()}" for path in sorted(out.glob("*/**/logs/*")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    started = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip installs it, away from the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], timeout=120)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both runs that are compared are written: a journal names its folder."""
    return tmp_path_factory.mktemp("compared") / "out"


@pytest.fixture(scope="module")
def whole(cluster: Cluster, installed: Path, out: Path) -> Path:
    """An uninterrupted run on both nodes, submitted by an installed package, and moved away."""
    job = cluster.submit(*RUN, *LONG, *TWO_NODES, f"output_dir={out}", PYTHONPATH=str(installed))
    cluster.wait(job, out)
    return out.rename(out.with_name("whole"))


@pytest.mark.slow
def test_two_nodes_train_one_model(whole: Path, installed: Path) -> None:
    run_dir = run_dir_of(whole)
    assert run_dir is not None
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == STEPS
    text = logs(whole)
    assert BOTH in text, "ZeRO-3 over both nodes"
    for node in (0, 1):
        assert f"node {node} of 2: node{node + 1}" in text
        assert (run_dir / f"slurm/1/logs/1_attempt1_node{node}.log").is_file()
    version = json.loads((run_dir / "slurm/1/version.json").read_text())
    assert version["commit"] == summary["commit"]
    frozen = run_dir / "slurm/1/code/zoscale/cli.py"
    assert frozen.read_bytes() == (installed / "zoscale/cli.py").read_bytes()
    assert not (run_dir / "told_to_stop").exists()


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_goes_on_by_itself(cluster: Cluster, whole: Path, out: Path) -> None:
    """By a job of a higher partition, then by a signal in the second attempt: the bytes of the uninterrupted run."""
    job = cluster.submit(*RUN, *LONG, *TWO_NODES, f"output_dir={out}")
    wait_until(lambda: steps_done(out) >= 10, 120, lambda: logs(out))
    cluster.ask("sbatch", "--partition=urgent", "--nodes=2", f"--output={out}/urgent", "--wrap", "true")
    wait_until(lambda: "back into the queue" in logs(out), 60, lambda: logs(out))
    stopped_at = steps_done(out)
    assert 10 <= stopped_at < STEPS
    wait_until(lambda: logs(out).count(BOTH) == 2, 120, lambda: logs(out))
    cluster.ask("scancel", "--signal=USR1", job)
    cluster.wait(job, out)
    text = logs(out)
    assert text.count("told to stop; back into the queue") == 2
    assert "attempt 3 on" in text and f"resumed at step {stopped_at}" in text
    assert result_bytes(out) == result_bytes(whole)
    ours, theirs = run_dir_of(out), run_dir_of(whole)
    assert ours is not None and theirs is not None
    assert (ours / "journal.bin").read_bytes() == (theirs / "journal.bin").read_bytes()


@pytest.mark.slow
def test_a_sweep_is_an_array_in_one_experiment(cluster: Cluster, tmp_path: Path) -> None:
    """Four runs, two at a time, by the script of the checkout; what the setup says holds on each node."""
    from mlflow import MlflowClient

    setup = tmp_path / "setup.sh"
    store = f"sqlite:///{tmp_path}/store.db"
    setup.write_text(f"echo setup for $(basename $config)\ncontainer=(env MLFLOW_TRACKING_URI={store})\n")
    job = cluster.submit(
        *RUN, "train.steps=3", "tracking.experiment=sweep", f"output_dir={tmp_path / 'runs'}",
        "--sweep", "optimizer.lr=1e-3,2e-3", "--sweep", "seed=0,1", "--setup", str(setup),
        command=[sys.executable, "launch/submit.py"],
    )  # fmt: skip
    cluster.wait(job, tmp_path)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("sweep")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert [one.info.status for one in found] == ["FINISHED"] * 4
    chosen = {(one.data.params["optimizer.lr"], one.data.params["seed"]) for one in found}
    assert chosen == {("0.001", "0"), ("0.001", "1"), ("0.002", "0"), ("0.002", "1")}
    text = logs(tmp_path)
    assert all(f"setup for {task}.yaml" in text for task in range(4))


LOST = ("Cannot communicate with node 1", "node2: task 1: Killed", "Timed out waiting for job step to complete")


@pytest.mark.slow
def test_a_node_whose_processes_die_fails_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """To SLURM the node is up; the job says what it lost and does not go back into the queue."""
    job = cluster.submit(*RUN, "train.steps=100000", "tracking.mlflow=false", *TWO_NODES, f"output_dir={tmp_path}")
    wait_until(lambda: steps_done(tmp_path) >= 3, 120, lambda: logs(tmp_path))
    cluster.kill("node2", job)
    cluster.wait(job, tmp_path, "FAILED")
    text = logs(tmp_path)
    assert "failed with status" in text
    assert "back into the queue" not in text
    assert any(words in text for words in LOST), "SLURM says that it lost the node, in the words of what it met first"
    assert "rank 0: RuntimeError" in job_log(tmp_path, job), text[-3000:]
    run_dir = run_dir_of(tmp_path)
    assert run_dir is not None and not (run_dir / "told_to_stop").exists()


@pytest.mark.slow
def test_a_node_that_slurm_finds_down_sends_the_job_back(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    """While the other node still waits for it; the job goes on when the node is back, to the same result."""
    job = cluster.submit(*RUN, *LONG, "--nodes=2", "--warn-seconds=60", f"output_dir={tmp_path}")
    wait_until(lambda: steps_done(tmp_path) >= 3, 120, lambda: logs(tmp_path))
    cluster.kill_slurmd("node2")
    try:
        cluster.kill("node2", job)
        wait_until(lambda: "ended by SLURM" in logs(tmp_path), 90, lambda: logs(tmp_path))
    finally:
        cluster.start_slurmd("node2")
    cluster.wait(job, tmp_path)
    text = job_log(tmp_path, job)
    assert "DUE TO NODE FAILURE" in text
    assert "attempt 2 on" in text
    assert "failed with status" not in text
    assert result_bytes(tmp_path) == result_bytes(whole)


@pytest.mark.slow
def test_two_ranks_per_node_and_a_cancelled_job(cluster: Cluster, tmp_path: Path) -> None:
    """On nodes with two GPUs each, in name only, of the partition that `--sbatch` says; it does not come back."""
    job = cluster.submit(
        *RUN, "train.steps=100000", "tracking.mlflow=false", "data.micro_batch_size=1", f"output_dir={tmp_path}",
        "--nodes=2", "--gpus-per-node=2", "--sbatch=--partition=urgent",
    )  # fmt: skip
    wait_until(lambda: steps_done(tmp_path) >= 3, 120, lambda: logs(tmp_path))
    told = cluster.ask("scontrol", "show", "job", job)
    assert "Partition=urgent" in told and "TresPerNode=gres:gpu:2" in told
    assert "ranks: 4, 4 per copy" in logs(tmp_path)
    cluster.ask("scancel", job)
    cluster.wait(job, tmp_path, "CANCELLED")
    assert "back into the queue" not in job_log(tmp_path, job)


@pytest.mark.slow
def test_a_job_that_slurm_refuses_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--sbatch=--partition=absent", "--sweep=seed=0,1", f"output_dir={tmp_path}/some/out"]
    refused = run([*COMMAND, *RUN, *options], check=False, **cluster.variables)
    assert refused.returncode == 2
    assert "invalid partition specified: absent" in refused.stdout
    assert "correct the options of zoscale submit" in refused.stdout
    assert not list(tmp_path.iterdir())


class Script:
    """The batch script with a stand-in for SLURM: `srun` leaves what a run would, `scontrol` notes what it is told."""

    def __init__(self, folder: Path, *, requeue: bool = True) -> None:
        self.run = folder / "run"
        run_dir = self.run
        programs = {
            "srun": f'echo "srun $*" >>{folder}/told\n[ -z "$MARK" ] || touch {run_dir}/told_to_stop\n'
            f'[ -z "$STEP" ] || echo step >>{run_dir}/journal.bin\n[ -z "$SAID" ] || echo "$SAID" >$LOGS\nexit $STATUS',
            "scontrol": f"echo NodeAddr=10.0.0.1 JobState=$STATE PreemptTime=$PREEMPTED; echo $* >>{folder}/told",
        }
        for name in ("bin", "run", "logs"):
            (folder / name).mkdir(parents=True)
        for name, text in programs.items():
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        request = Request(
            name="x", nodes=1, gpus_per_node=0, processes_per_node=1, time=None, num_runs=1, max_parallel=None,
            requeue=requeue, warn_seconds=9, more=(),
        )  # fmt: skip
        (folder / "job.sbatch").write_text(request.scripts(folder)["job.sbatch"])
        (folder / "runs").write_text(f"{self.run}\n")
        self.folder = folder

    def attempt(
        self, *, status: int = 1, mark: bool = False, step: bool = False, said: str = "", preempted: str = "None",
        state: str = "RUNNING Reason=None", task: int | None = None,
    ) -> tuple[str, bool]:  # fmt: skip
        """What it prints, and whether it asks SLURM to start again; `task` makes it one of an array."""
        array = {} if task is None else {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
        (self.folder / "told").unlink(missing_ok=True)
        done = run(
            ["bash", str(self.folder / "job.sbatch")], check=False, timeout=30, SLURM_JOB_ID="9" if array else "7",
            SLURM_JOB_NODELIST="node1", PATH=f"{self.folder}/bin:{os.environ['PATH']}", STATUS=str(status),
            MARK="x" * mark, STEP="x" * step, SAID=said, PREEMPTED=preempted,
            STATE=state, LOGS=str(self.folder / "logs/7_attempt1_node0.log"), **array,
        )  # fmt: skip
        assert done.returncode == status
        return done.stdout, f"requeue 7{'' if task is None else f'_{task}'}\n" in self.told()

    def told(self) -> str:
        """What the last attempt told SLURM."""
        return (self.folder / "told").read_text()


class TestBatchScript:
    def test_a_mark_means_again(self, tmp_path: Path) -> None:
        script = Script(tmp_path)
        assert script.attempt(mark=True, step=True)[1]
        text, again = script.attempt(status=0)
        assert "done" in text and not again
        assert not (script.run / "told_to_stop").exists(), "each attempt begins without a mark"

    def test_so_does_what_slurm_says(self, tmp_path: Path) -> None:
        assert Script(tmp_path).attempt(preempted="2026-01-01T00:00:00")[1]

    def test_a_failure_is_told_and_not_repeated(self, tmp_path: Path) -> None:
        script = Script(tmp_path)
        script.attempt(mark=True, step=True)
        text, again = script.attempt(said="100%zoscale train: rank 1: MemoryError: planted")
        assert not again and "failed with status 1" in text
        assert "zoscale train: rank 1: MemoryError: planted" in text
        text, again = script.attempt(status=3, said="another word")
        assert not again and "failed with status 3" in text and "another word" in text

    def test_attempts_without_a_step_come_to_an_end(self, tmp_path: Path) -> None:
        script = Script(tmp_path)
        told = [script.attempt(mark=True, step=step)[1] for step in (False, False, True, False, False)]
        assert told == [True] * 5
        text, again = script.attempt(mark=True)
        assert not again and "give it more --time" in text

    @pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
    def test_a_job_that_slurm_ends_is_left_to_it(self, state: str, tmp_path: Path) -> None:
        """A cancelled one is COMPLETING while its processes end, and SLURM would take it back even then."""
        text, again = Script(tmp_path).attempt(mark=True, step=True, state=f"{state} Reason=None")
        assert not again and "ended by SLURM" in text

    def test_but_not_one_that_its_time_limit_ends(self, tmp_path: Path) -> None:
        assert Script(tmp_path).attempt(mark=True, step=True, state="COMPLETING Reason=TimeLimit")[1]

    def test_a_task_of_an_array_goes_back_alone(self, tmp_path: Path) -> None:
        script = Script(tmp_path)
        (tmp_path / "runs").write_text(f"/nowhere/0\n/nowhere/1\n{script.run}\n")
        for _ in range(2):
            text, again = script.attempt(mark=True, task=2)
            assert again and f"job 7_2: attempt 1 on node1: {script.run}\n" in text
            assert f"{tmp_path}/configs/2.yaml 10.0.0.1 20009\n" in script.told()
        assert (tmp_path / "idle_2").read_text() == "7_2\n" * 2
        text, again = script.attempt(mark=True, task=2)
        assert not again and "give it more --time" in text

    def test_no_requeue(self, tmp_path: Path) -> None:
        text, again = Script(tmp_path, requeue=False).attempt(mark=True, step=True)
        assert not again and "submit it again to continue" in text


def test_dry_run_shows_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    own, passed = ["--nodes=2", "--gpus-per-node=8", "--time=1:00:00", "--no-requeue"], ["--partition=gpu", "--mem=0"]
    given = [*own, *(f"--sbatch={option}" for option in passed), "--warn-seconds=300"]
    assert submit_command([*RUN, f"output_dir={out}", *given, "--dry-run"]) == 0
    text = capsys.readouterr().out
    for option in (*own, *passed, "--signal=USR1@300"):
        assert f"#SBATCH {option}\n" in text
    assert "num_processes: 16\n" in text
    assert not out.exists()
    assert "--array" not in text
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    monkeypatch.chdir(tmp_path / "run")
    resumed = [*RUN, "resume=../run/checkpoints/step_00000005", "--dry-run"]
    assert submit_command(resumed) == 0
    assert f"runs:\n{tmp_path}/run\n" in capsys.readouterr().out, "the folder that the job will write"


def test_an_installed_package_has_its_templates(installed: Path, tmp_path: Path) -> None:
    options = [*RUN, f"output_dir={tmp_path}", "--dry-run", "--sweep", "seed=0,1,2", "--max-parallel=2"]
    text = run([*COMMAND, *options], PYTHONPATH=str(installed)).stdout
    assert "#SBATCH --array=0-2%2\n" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["overwrite=true"], "a run that SLURM may start again, got overwrite=true"),
        (["resume=never"], "a run that SLURM may start again, got resume=never"),
        (["resume=/nowhere"], "the folder of a run or of a checkpoint, got /nowhere"),
        (["--nodes=2", "mesh.shard_size=3"], "mesh.shard_size to divide the number of ranks (2), got 3"),
        (["--setup=/nowhere"], "a readable file for --setup, got /nowhere"),
        (["--gpus-per-node=2", "--processes-per-node=3"], "--processes-per-node of at most 2, the GPUs of a node"),
        (["--sweep=seed"], "--sweep key=value,value,..., got seed"),
        (["--sweep=seed=0,"], "--sweep key=value,value,..., got seed=0,"),
        (["--sweep=seed=1,1"], "different runs"),
        (["--sweep=optimizer.lrr=1,2"], "did you mean optimizer.lr"),
        (["model.id=/nowhere/at/all"], "/nowhere/at/all"),
        (["output_dir=a b"], "a path of letters, digits and"),
        ([], "sbatch on the PATH, got none"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_and_leave_nothing(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=re.escape(message)):
        submit_command([*RUN, "output_dir=out", *options])
    assert not list(tmp_path.iterdir())


def test_numbers_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        submit_command([*RUN, "--nodes=0"])
    assert end.value.code == 2
    assert "expected a whole number of at least 1, got '0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("time", "is_one"),
    [
        ("90", 1),
        ("5:00", 1),
        ("12:00:00", 1),
        ("2-12", 1),
        ("1-0:30:00", 1),
        ("UNLIMITED", 1),
        ("1h", 0),
        ("1:2:3:4", 0),
    ],
)
def test_a_time_limit_is_one_of_slurm(
    time: str, is_one: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with nullcontext() if is_one else pytest.raises(SystemExit):
        submit_command([*RUN, f"output_dir={tmp_path}", "--dry-run", f"--time={time}"])
    shown = capsys.readouterr()
    assert f"--time={time}\n" in shown.out if is_one else "a time such as 90, 12:00:00 or 2-12" in shown.err

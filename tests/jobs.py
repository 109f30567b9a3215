"""Short training jobs for the tests of recovery: started, killed, resumed."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from processes import ROOT, environment
from safetensors.torch import load_file

from zoscale.recovery.journal import Journal

SHORT = [
    "--config", "launch/recipes/quickstart.yaml", "data.num_train=32", "data.num_dev=0", "data.num_validation=8",
    "data.batch_size=4", "data.micro_batch_size=2", "train.eval_every=0", "train.log_every=3", "tracking.mlflow=false",
    "estimator.num_directions=1",
]  # fmt: skip
SIGN = ["optimizer.name=jaguar_sign_sgd", "optimizer.lr=1e-3"]
FULL = ["adapter=null", *SIGN, "optimizer.lr=1e-5"]


@dataclass
class Job:
    """Processes of one job; `wait` gives their exit statuses, in rank order."""

    server: "JobServer"
    pids: list[int]
    log: Path
    statuses: list[int] = field(default_factory=list)

    def wait(self) -> list[int]:
        if not self.statuses:
            self.statuses = self.server.answer()["statuses"]
        return self.statuses

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        for rank in ranks or range(len(self.pids)):
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(self.pids[rank], number)


@functools.cache
def forking_process() -> "subprocess.Popen[str]":
    """The one process of this session that has everything imported and forks the ranks of jobs, one job at a time."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/job_server.py")], cwd=ROOT, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert "ready\n" in iter(process.stdout.readline, ""), "it ended"  # imports may print
    return process


class JobServer:
    """Starts jobs by `forking_process`; their logs are in a folder."""

    last: ClassVar[Job | None] = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.process = forking_process()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def start(self, ranks: int, *argv: str | list[str], plant: str = "") -> Job:
        """One command line for all ranks, or a list for each; `plant` is code that each rank runs first."""
        assert self.process.stdin is not None
        if JobServer.last and not JobServer.last.statuses:  # left behind by a test that failed
            JobServer.last.kill()
            JobServer.last.wait()
        self.count += 1
        log = self.folder / f"job_{self.count}.log"
        self.process.stdin.write(
            json.dumps({"argv": list(argv), "ranks": ranks, "log": str(log), "plant": plant}) + "\n"
        )
        self.process.stdin.flush()
        JobServer.last = Job(self, self.answer()["pids"], log)
        return JobServer.last

    def run(self, ranks: int, *argv: str, expect: int = 0, plant: str = "") -> str:
        """A job to its end; returns what it printed."""
        job = self.start(ranks, *argv, plant=plant)
        statuses = job.wait()
        assert statuses == [expect] * ranks, f"{statuses}\n{job.log.read_text()[-5000:]}"
        return job.log.read_text()

    def run_differing(self, *argvs: list[str]) -> str:
        """One rank per command line, all refused as the user's mistake; returns what they printed."""
        job = self.start(len(argvs), *argvs)
        statuses = job.wait()
        assert statuses == [2] * len(argvs), job.log.read_text()[-5000:]
        return job.log.read_text()


def run_dir_of(out: Path) -> Path | None:
    """The only run directory in a folder, once it is there."""
    found = [path.parent for path in out.glob("*/config.yaml")]
    assert len(found) <= 1, found
    return found[0] if found else None


def steps_done(out: Path) -> int:
    """Steps in the journal of the only run in a folder."""
    run_dir = run_dir_of(out)
    if run_dir is None or not (run_dir / "journal.bin").exists():
        return 0
    return len(Journal.read(run_dir / "journal.bin").records)


def is_finished(out: Path) -> bool:
    run_dir = run_dir_of(out)
    return run_dir is not None and (run_dir / "summary.json").exists()


def wait_for_step(job: Job, out: Path, step: int) -> None:
    """Until the journal has so many steps."""
    deadline = time.monotonic() + 120
    while steps_done(out) < step:
        assert time.monotonic() < deadline, job.log.read_text()[-3000:]
        time.sleep(0.02)


def result_bytes(out: Path) -> bytes:
    """The weights that a finished run left."""
    run_dir = run_dir_of(out)
    assert run_dir is not None
    (path,) = (run_dir / "adapter").glob("*.safetensors")
    return path.read_bytes()


def largest_difference(a: Path, b: Path) -> float:
    """Between the weights that two finished runs left."""
    weights = []
    for out in (a, b):
        run_dir = run_dir_of(out)
        assert run_dir is not None
        (path,) = (run_dir / "adapter").glob("*.safetensors")
        weights.append(load_file(path))
    return max(float((weights[0][name].float() - weights[1][name].float()).abs().max()) for name in weights[0])


def victims(kind: str, ranks: int, rng: random.Random) -> list[int]:
    """Whom a round kills: one rank or all of them."""
    return [rng.randrange(ranks)] if kind == "one rank" else list(range(ranks))

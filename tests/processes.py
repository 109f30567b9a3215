"""Starting real multi-process jobs from tests."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from zoscale import cli

ROOT = Path(__file__).parents[1]


def status_of(*argv: str) -> int:
    """That with which a command ends in this process."""
    return ended(lambda: cli.main(list(argv)))


def ended(call: Callable[[], int]) -> int:
    """The status with which a program ends: argparse leaves by itself."""
    try:
        return call()
    except SystemExit as end:
        return int(end.code or 0)


def free_port() -> int:
    """Below the range from which the kernel gives connections theirs: one of those may take it before it is used."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port := random.SystemRandom().randrange(20_000, 32_000)))
            return port


def needs_compiler() -> None:
    """Skip a test where torch.compile has none for the CPU."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        pytest.skip("no C++ compiler for torch.compile: apt-get install g++")


def environment(**extra: str) -> dict[str, str]:
    """One thread per process, no hub, no launcher's leftovers."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MLFLOW_TRACKING_URI")
    kept = {name: value for name, value in os.environ.items() if name not in drop and "ACCELERATE" not in name}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **extra}


def run(
    command: list[str], *, timeout: float = 300, check: bool = True, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; a hung job is killed with all its children, and its output shown."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**extra), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # faulthandler prints where each process hangs
        output, _ = process.communicate(timeout=30)
        raise AssertionError(f"{command} hung for {timeout} s:\n{output[-6000:]}") from None
    if check and process.returncode != 0:
        raise AssertionError(f"{command} ended with {process.returncode}:\n{output[-6000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def torchrun(world_size: int, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a script on `world_size` processes."""
    launcher = [sys.executable, "-X", "faulthandler", "-m", "torch.distributed.run"]
    where = ["--nproc_per_node", str(world_size), "--master_port", str(free_port())]
    return run([*launcher, *where, *arguments], **options)  # type: ignore[arg-type]

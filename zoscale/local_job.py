"""Jobs of this package on this machine: some ranks of a module, started as torchrun starts them."""

import os
import re
import subprocess
import sys

import torch

_OF_LAUNCHERS = ("ACCELERATE_", "GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE")
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?(?!.*ChildFailed)([\w.]*Error: .*)$", re.MULTILINE)
"""The last line of a traceback; torch names the rank before it. The launcher's own names no cause."""


def ranks_here() -> int:
    """How many ranks have a device of their own on this machine: its GPUs, without any its cores."""
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def command_of(ranks: int, module: str, *words: str) -> list[str]:
    """What starts the module on so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, "-m", module, *words]


def run_here(
    ranks: int, module: str, *words: str, timeout: float | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the module on so many ranks, as if no launcher had started this process; `environment` is laid over its own.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds.
    """
    alone = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
    command = command_of(ranks, module, *words)
    return subprocess.run(
        command, env=alone | environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def cause_of(done: subprocess.CompletedProcess[str]) -> str:
    """The first error that a rank of a failed job printed, in a line."""
    found = _ERROR.search(done.stderr)
    return (found[1] if found else f"status {done.returncode}")[:300]

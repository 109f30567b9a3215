"""A SLURM job: what it asks for, and its scripts."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from zoscale.config import ConfigError

_PACKAGE = Path(__file__).parent
_TEMPLATES = (_PACKAGE / "_slurm", _PACKAGE.parent / "launch" / "slurm")  # of an installed package, of a checkout


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a job asks SLURM for.

    Args:
        name: of the job.
        nodes: number of nodes of a run.
        gpus_per_node: GPUs of a node; 0 computes on CPUs.
        processes_per_node: ranks on a node.
        time: limit as SLURM writes it, such as 12:00:00; None is the partition's.
        num_runs: runs; more than one become an array.
        max_parallel: of the runs of an array, how many at the same time; None is no limit.
        requeue: whether the job goes back into the queue when it is told to stop.
        warn_seconds: seconds before its time limit at which a job is told to stop, and for which its nodes wait for
            each other's end.
        more: further options of sbatch.
    """

    name: str
    nodes: int
    gpus_per_node: int
    processes_per_node: int
    time: str | None
    num_runs: int
    max_parallel: int | None
    requeue: bool
    warn_seconds: int
    more: tuple[str, ...]

    def scripts(self, folder: Path) -> dict[str, str]:
        """File name -> text of what `folder` needs so that SLURM can run it."""
        values = {
            "directives": "\n".join(f"#SBATCH {option}" for option in self._options(folder)),
            "folder": shlex.quote(str(folder)),
            "requeue": "yes" if self.requeue else "no",
            "python": shlex.quote(sys.executable),
            "warn_seconds": str(self.warn_seconds),
        }
        filled = {
            name: re.sub(r"@(\w+)@", lambda found: values[found[1]], template(name).read_text("utf-8"))
            for name in ("job.sbatch", "node.sh")
        }
        return {**filled, "accelerate.yaml": self._accelerate()}

    def _options(self, folder: Path) -> list[str]:
        array, log = self.num_runs > 1, "%A_%a" if self.num_runs > 1 else "%j"
        at_once = f"%{self.max_parallel}" if self.max_parallel else ""
        chosen = {
            f"--array=0-{self.num_runs - 1}{at_once}": array,
            f"--gpus-per-node={self.gpus_per_node}": self.gpus_per_node,
            f"--time={self.time}": self.time,
        }
        return [
            f"--job-name={self.name}",
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            *(option for option, wanted in chosen.items() if wanted),
            f"--chdir={_in_directive(Path.cwd())}",
            f"--output={_in_directive(folder)}/logs/{log}.log",
            "--open-mode=append",
            f"--signal=USR1@{self.warn_seconds}",
            "--requeue" if self.requeue else "--no-requeue",
            *self.more,
        ]

    def _accelerate(self) -> str:
        return (
            "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\n"
            "deepspeed_config: {deepspeed_multinode_launcher: standard, zero3_init_flag: true}\n"
            f"num_machines: {self.nodes}\nnum_processes: {self.nodes * self.processes_per_node}\n"
            "rdzv_backend: static\nsame_network: true\nmain_training_function: main\ndebug: false\n"
        )


def template(name: str) -> Path:
    """A file of `launch/slurm`, of which an installed package carries a copy."""
    return next(folder / name for folder in _TEMPLATES if (folder / name).is_file())


def _in_directive(path: Path) -> str:
    """A path as `#SBATCH` takes it.

    Raises:
        ConfigError: if it cannot be written there.
    """
    if bad := re.search(r"[^\w./+=,:@~-]", str(path)):
        got = f"{bad[0]!r} in {path}"
        raise ConfigError("a path of letters, digits and ./+=,:@~-_ for SLURM", got, "use another folder")
    return str(path)


def sbatch(script: Path) -> str:
    """Queue a job.

    Returns:
        Its number.

    Raises:
        ConfigError: if SLURM does not take it.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch on the PATH", "none", "submit on a login node of a SLURM cluster, or use --dry-run")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError("a job that SLURM takes", done.stderr.strip(), "correct the options of zoscale submit")
    return done.stdout.strip().partition(";")[0]

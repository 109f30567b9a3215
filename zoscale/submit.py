"""`zoscale submit`: freeze runs and the code that trains them in a folder, and queue the SLURM job that does it."""

import argparse
import itertools
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from zoscale import provenance, slurm
from zoscale.config import ConfigError, RunConfig, at_least, parse
from zoscale.methods import DEFAULTS, TABLES
from zoscale.run_directory import RunDirectory, write_json, write_text

_TRAIN = "from zoscale.cli import leave, train\n\nleave(train())\n"
"""A script that trains with the package beside it, whatever else is installed."""


def submit_command(argv: Sequence[str]) -> int:
    """The command.

    Raises:
        ConfigError: for a run that cannot be trained, or a job that SLURM does not take; nothing is left then.
    """
    options, rest = _parser().parse_known_args(argv)
    runs = [_frozen(parse(line, TABLES, DEFAULTS)) for line in _lines(rest, options.sweep)]
    from zoscale.assembly import check  # here: --help need not wait for them
    from zoscale.runtime import whole_groups

    check(runs)
    if options.setup is not None and not options.setup.is_file():
        raise ConfigError("a readable file for --setup", str(options.setup), "correct the path")
    request, folder = _request(options, runs), _next_folder(runs)
    for run in runs:
        RunDirectory.of(run).check_resume(run)
        if isinstance(run.mesh.shard_size, int):
            whole_groups(run.mesh.shard_size, request.nodes * request.processes_per_node)
    scripts = request.scripts(folder)
    print("\n".join(f"==> {folder / name} <==\n{text}" for name, text in scripts.items()))
    print("\n".join(["runs:", *(str(RunDirectory.of(run).path) for run in runs)]))
    if options.dry_run:
        print("nothing was done (--dry-run)")
        return 0
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    _freeze(folder, runs, scripts, options.setup)
    try:
        number = slurm.sbatch(folder / "job.sbatch")
    except ConfigError:
        _remove(made)
        raise
    print(f"job {number}: {len(runs)} run{'s' * (len(runs) > 1)}; logs in {folder / 'logs'}")
    return 0


def _time_limit(text: str) -> str:
    """For `argparse`: a time as sbatch takes it."""
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|unlimited|infinite", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"expected a time such as 90, 12:00:00 or 2-12 (days-hours), got {text!r}")
    return text


def _request(options: argparse.Namespace, runs: Sequence[RunConfig]) -> slurm.Request:
    ranks, gpus = options.processes_per_node, options.gpus_per_node
    if ranks and 0 < gpus < ranks:
        remedy = "lower it, or leave it out: NCCL takes one rank per GPU"
        raise ConfigError(f"--processes-per-node of at most {gpus}, the GPUs of a node", str(ranks), remedy)
    return slurm.Request(
        name=runs[0].name,
        nodes=options.nodes,
        gpus_per_node=gpus,
        processes_per_node=ranks or gpus or 1,
        time=options.time,
        num_runs=len(runs),
        max_parallel=options.max_parallel,
        requeue=not options.no_requeue,
        warn_seconds=options.warn_seconds,
        more=tuple(options.sbatch),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoscale submit",
        usage="zoscale submit [--config FILE]... [key=value]... [options]",
        description="Train on a SLURM cluster. --config and key=value are those of `zoscale train`.",
        epilog="The configuration and the code are copied into RUN/slurm/N (a sweep: OUTPUT_DIR/sweep-NAME/N) before "
        "the job is queued; later changes do not reach it, except those of files that the configuration names, such as "
        "runtime.deepspeed. Logs are in its folder `logs`, one file for the job and one per node. A job that is "
        "preempted or comes near its time limit finishes the step, writes a checkpoint and goes back into the queue, "
        "as does one of which SLURM finds a node down before the other nodes give up; one that fails or is cancelled "
        "stays out.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=at_least(1), default=1, metavar="N", help="nodes of a run (default: 1)")
    add("--gpus-per-node", type=at_least(0), default=0, metavar="G", help="GPUs of a node (default: 0, CPUs only)")
    add("--processes-per-node", type=at_least(1), metavar="P", help="ranks on a node (default: G, or 1)")
    add("--time", type=_time_limit, metavar="LIMIT",
        help="time limit as SLURM writes it, such as 12:00:00 (default: the partition's)")  # fmt: skip
    add("--sweep", action="append", default=[], metavar="KEY=V1,V2,...",
        help="train with each of the values, as a job array; given more than once: all combinations")  # fmt: skip
    add("--max-parallel", type=at_least(1), metavar="N", help="runs of a sweep at the same time (default: no limit)")
    add("--setup", type=Path, metavar="FILE",
        help="bash file that each node sources first: modules, environment variables; it may set python=... and, to "
        "run in a container, container=(apptainer exec --nv image.sif)")  # fmt: skip
    add("--sbatch", action="append", default=[], metavar="OPTION",
        help="any option of sbatch, such as --sbatch=--partition=gpu, or --sbatch=--cpus-per-task=64 for the CPUs of a "
        "node; may be given more than once")  # fmt: skip
    add("--warn-seconds", type=at_least(1), default=120, metavar="S",
        help="seconds before the time limit at which the job is told to stop (default: 120)")  # fmt: skip
    add("--no-requeue", action="store_true", help="a job that is told to stop stays out of the queue")
    add("--dry-run", action="store_true", help="print what would be submitted, and do nothing")
    return parser


def _lines(line: Sequence[str], sweep: Sequence[str]) -> list[list[str]]:
    """The command line of each run of a sweep: all combinations, the last key fastest."""
    axes = []
    for axis in sweep:
        key, _, values = axis.partition("=")
        if not key or not all(values.split(",")):
            raise ConfigError("--sweep key=value,value,...", axis, "give every value once, without spaces")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [[*line, *chosen] for chosen in itertools.product(*axes)]


def _frozen(config: RunConfig) -> RunConfig:
    """The configuration as a job may run it again and again, from any folder."""
    if config.overwrite or config.resume == "never":
        got = "overwrite=true" if config.overwrite else "resume=never"
        raise ConfigError("a run that SLURM may start again", got, "drop it; change seed or name for a new run")
    resume = config.resume if config.resume == "auto" else str(Path(config.resume).resolve())
    return replace(config, output_dir=str(Path(config.output_dir).resolve()), resume=resume)


def _next_folder(runs: Sequence[RunConfig]) -> Path:
    """The folder of this submission: of the run, or of a sweep beside its runs; every one has a new number."""
    folders = {RunDirectory.of(run).path for run in runs}
    if len(folders) < len(runs):
        raise ConfigError("different runs", "the same run twice in the sweep", "give every value once")
    first = runs[0]
    home = folders.pop() / "slurm" if len(runs) == 1 else Path(first.output_dir) / f"sweep-{first.name}"
    taken = [int(path.name) for path in home.glob("*") if path.name.isdecimal()]
    return home / str(max(taken, default=0) + 1)


def _freeze(folder: Path, runs: Sequence[RunConfig], scripts: dict[str, str], setup: Path | None) -> None:
    """Write everything that the job will read."""
    for name in ("configs", "logs", "code"):
        (folder / name).mkdir(parents=True)
    for task, run in enumerate(runs):
        write_text(folder / "configs" / f"{task}.yaml", run.to_yaml())
    write_text(folder / "runs", "".join(f"{RunDirectory.of(run).path}\n" for run in runs))
    provenance.copy_code(folder / "code")
    write_text(folder / "code" / "train.py", _TRAIN)
    version = {"code": provenance.code(), "commit": provenance.commit(), "libraries": provenance.libraries()}
    write_json(folder / "version.json", version)
    if setup is not None:
        shutil.copyfile(setup, folder / "setup.sh")
    for name, text in scripts.items():
        write_text(folder / name, text)


def _remove(made: Sequence[Path]) -> None:
    """Remove a folder and those above it that were made for it, as far as nobody else uses them by now."""
    shutil.rmtree(made[0])
    for path in made[1:]:
        with suppress(OSError):
            path.rmdir()

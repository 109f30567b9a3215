"""The command line: `zoscale COMMAND ...`."""

import atexit
import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from zoscale.config import ConfigError, parse

MISTAKE, EX_IOERR = 2, 74
_DISK = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ESTALE}
_LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")  # which the `deepspeed` launcher adds to every command
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # tells of a package that few need
_BLANK = re.compile(r"(--[\w-]+=)?\s*")
_USAGE = """usage: zoscale COMMAND ...          zoscale COMMAND --help: every option of a command
       zoscale --version

commands:
  train     train as configured, or go on; `zoscale train --help` documents every option
  submit    train on a SLURM cluster: one node or several, one run or a sweep
  evaluate  score a checkpoint of a run, or a Hugging Face model, on tasks, with the prediction of every example
  compare   which of some runs is better per forward equivalent, per second and per device hour: tables and a report
  export    write a finished run as a PEFT adapter or a merged model with its model card, and push it
  replay    rebuild the weights of any step from the journal alone, and verify the saved ones
  journal   print or plot the steps of a run
  plan      memory and time that a run will take of each GPU, and the shard size to use
  doctor    check this machine: versions, devices, network, disk, MLflow, compiler, and a step under ZeRO-3

from nothing to a result:
  zoscale doctor
  zoscale plan --model facebook/opt-1.3b --gpus 2
  zoscale train model.id=facebook/opt-1.3b model.allow_pickle=true task.name=sst2 train.steps=2000
  accelerate launch --use_deepspeed --num_processes 2 -m zoscale train ...    the same on two GPUs, sharded by ZeRO-3
  zoscale compare runs/run-*
  zoscale evaluate --run runs/run-HASH --base facebook/opt-1.3b    --base: you trust the pickles of that model
  zoscale export runs/run-HASH --adapter

A run is a folder runs/NAME-HASH; the same command again continues it. MLflow is in runs/mlflow.db, or where
MLFLOW_TRACKING_URI says. Exit status: 0 done, 1 failed, 2 a mistake in the command, 70 a rank stood still, 74 the disk,
75 told to stop (the same command continues).
"""


def train(argv: Sequence[str] | None = None, *, command: str = "zoscale train") -> int:
    """Train as the command line says.

    Returns:
        0 when done, 1 if training failed, 2 for a mistake of the user, 74 if the disk is full or fails, 75 (`REQUEUE`)
        if the job was told to stop.
    """
    from zoscale.methods import DEFAULTS, TABLES

    words = [word for word in (sys.argv[1:] if argv is None else argv) if not _LOCAL_RANK.fullmatch(word)]
    try:
        config = parse(words, TABLES, DEFAULTS, command=command)
    except ConfigError as error:
        return _mistake(error, command)
    from zoscale.fingerprint import Diverged
    from zoscale.preemption import REQUEUE, Preempted
    from zoscale.run import run

    try:
        run(config)
    except ConfigError as error:
        return _mistake(error, command)
    except Preempted as stopped:
        return _end(command, stopped, REQUEUE)
    except (FloatingPointError, Diverged) as error:
        return _end(command, error, 1)
    except Exception as error:
        if _is_of_disk(error):
            remedy = f"every step in {config.run_dir} is safe; once there is room, the same command continues the run"
            return _end(command, f"{error}: {remedy}", EX_IOERR)
        traceback.print_exc()
        return _end(command, f"{type(error).__name__}: {error}", 1)
    return 0


def leave(status: int) -> NoReturn:
    """End the process as `sys.exit` does; a rank of a job, of one rank too, does so without Python's finalization.

    Meanwhile threads of torch's process groups may ask for Python's lock and abort a rank whose work is done
    (pytorch/pytorch issues 38228 and 190489).
    """
    if "RANK" not in os.environ:
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _mistake(error: ConfigError, command: str) -> int:
    """Print `error` as the user's; returns its status."""
    print(f"{command}: error: {error}", file=sys.stderr)
    return MISTAKE


def _end(command: str, what: object, status: int) -> int:
    notes = getattr(what, "__notes__", [])
    print(f"{command}: rank {os.environ.get('RANK', 0)}: {' '.join([str(what), *notes])}", file=sys.stderr)
    return status


COMMANDS = {
    "train": "zoscale.cli:train",
    "submit": "zoscale.submit:submit_command",
    "evaluate": "zoscale.evaluation_job:evaluate_command",
    "compare": "zoscale.comparison.command:compare_command",
    "export": "zoscale.release.publish:export_command",
    "replay": "zoscale.recovery.replay:replay_command",
    "journal": "zoscale.recovery.journal_report:journal_command",
    "plan": "zoscale.plan.report:plan_command",
    "doctor": "zoscale.doctor:doctor_command",
}
"""`module:function` of each, imported when it is called: what others need takes seconds."""


def _call(name: str, words: Sequence[str]) -> int | None:
    module, _, function = COMMANDS[name].partition(":")
    status: int | None = getattr(import_module(module), function)(words)
    return status


def _version() -> str:
    from zoscale import __version__
    from zoscale.provenance import commit

    return f"zoscale {__version__}, commit {commit()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("--help", "-h", "help"):
        print(_USAGE, end="")
        return 0
    if name == "--version":
        print(_version())
        return 0
    if name not in COMMANDS:
        got = f"got {name!r}" if name else "got nothing"
        near = "".join(f"did you mean {word}? " for word in get_close_matches(name, COMMANDS, 1))
        remedy = f"{near}see zoscale --help"
        print(f"zoscale: error: expected one of {', '.join(COMMANDS)}, {got}: {remedy}", file=sys.stderr)
        return MISTAKE
    return guarded(f"zoscale {name}", lambda: _call(name, rest), rest if name != "train" else ())


def guarded(command: str, work: Callable[[], int | None], words: Sequence[str]) -> int:
    """The exit status of a command, which tells mistakes of the user and errors of files in one line.

    Args:
        command: its name in that line.
        work: the command; None is 0.
        words: of its command line, none of which may be blank: a variable of a shell may not be set.
    """
    try:
        for place, word in enumerate(words):
            if _BLANK.fullmatch(word):
                got = " ".join([*words[max(0, place - 1) : place], repr(word)])
                raise ConfigError("no blank words", got, "give the value, or leave the option out")
        return work() or 0
    except ConfigError as error:
        return _mistake(error, command)
    except OSError as error:
        remedy, status = _remedy(error)
        return _end(f"{command}: error", f"{error}{remedy}", status)
    except ValueError as error:
        return _end(f"{command}: error", error, MISTAKE)


def _is_of_disk(error: Exception) -> bool:
    """Whether the disk is full or fails."""
    return isinstance(error, OSError) and error.errno in _DISK


def _remedy(error: OSError) -> tuple[str, int]:
    """What to do about an error, and the exit status: that of the disk, or of a mistake."""
    if _is_of_disk(error):
        return ": make room on the disk or mend it, and run the same command again", EX_IOERR
    return (": check the path" if error.filename is not None else ""), MISTAKE

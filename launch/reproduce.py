"""The seed paper's tables (arXiv 2506.04430) with our runs beside them.

    python launch/reproduce.py accuracy    --preset small [options] [key=value ...]
    python launch/reproduce.py memory      --preset small [options] [key=value ...]
    python launch/reproduce.py sensitivity --preset small [options] [key=value ...]

`accuracy` trains every method with every scheme (all weights, LoRA) for the same number of forwards, a backward pass
counted as two: all learning rates with the first seed, then the one that was best on dev with the other seeds.
`memory` weighs a few steps of each.
`sensitivity` varies tau, beta, block size and signs of JAGUAR one at a time. Each cell is a run of `launch/train.py`
with its own folder and MLflow run. The same command goes on where it was stopped: finished runs are kept, a killed one
continues. At the end OUT/COMMAND.md and its pictures are written, and put into the runs' MLflow experiment; `--report`
writes them from what there is and runs nothing. A preset is a file in launch/reproduction/presets, or one of yours.
Options `key=value` are those of `zoscale train`; what the study sets itself, as seeds and learning rates, has a flag.
"""

import argparse
import signal
import sys
from pathlib import Path

from reproduction import accuracy, memory, sensitivity
from reproduction.runner import Runner
from reproduction.study import Study

from zoscale.cli import guarded
from zoscale.comparison.report_run import FOLDER, log_report
from zoscale.comparison.runs import open_experiment
from zoscale.tracking.mlflow_store import store_uri

COMMANDS = {"accuracy": accuracy, "memory": memory, "sensitivity": sensitivity}


def words(text: str) -> list[str]:
    """`A,B`."""
    return text.split(",")


def numbers(text: str) -> list[int]:
    """`0,1`."""
    return [int(word) for word in text.split(",")]


def learning_rates(text: str) -> tuple[str, list[float]]:
    """`METHOD=LR[,LR...]`, each once."""
    method, _, values = text.partition("=")
    return method, list(dict.fromkeys(float(value) for value in values.split(",")))


def read(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs="*", metavar="key=value", help="of every run, as for zoscale train")
    parser.add_argument("--preset", default="small", help="small, paper, smollm2 or a YAML file")
    parser.add_argument("--out", type=Path, help="folder of runs and report; default: runs/reproduce-PRESET")
    parser.add_argument("--methods", type=words, metavar="A,B", help="default: those of the preset")
    parser.add_argument("--schemes", type=words, metavar="ft,lora", help="default: those of the preset")
    parser.add_argument("--seeds", type=numbers, metavar="0,1", help="the first one chooses the learning rate")
    parser.add_argument("--forwards", type=int, help="forward equivalents of a training batch, per run")
    parser.add_argument("--lr", type=learning_rates, default=[], action="append", metavar="METHOD=LR,LR",
                        help="instead of the preset's; may be repeated")  # fmt: skip
    parser.add_argument("--model", help="Hugging Face id or folder")
    parser.add_argument("--task", help="one of zoscale's; its other options are key=value")
    parser.add_argument("--data", help="the task's dataset id or folder")
    parser.add_argument("--jobs", type=int, help="runs at a time, which share the cores")
    parser.add_argument("--launch", metavar="COMMAND", help="that starts launch/train.py, as in accelerate launch")
    parser.add_argument("--report", action="store_true", help="write the report and run nothing")
    given = parser.parse_intermixed_args(argv)
    given.lrs = dict(given.lr)
    if len(given.lrs) < len(given.lr):
        parser.error("expected each method once in --lr, got one twice: give all its values together, METHOD=LR,LR")
    given.out = given.out or Path("runs") / f"reproduce-{Path(given.preset).stem}"
    return given


def log(study: Study, command: str, report: Path) -> str:
    """Put the report and its pictures into the experiment of the runs; returns what was done."""
    config = study.cell(next(iter(study.schemes)), next(iter(study.methods)), 1.0, 0).config
    if not config.tracking.mlflow:
        return "not logged to MLflow: tracking.mlflow=false"
    uri = store_uri(config.run_dir, config.tracking.uri)
    is_local = uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()
    store = None if is_local else open_experiment(config.tracking.experiment, uri)
    if store is None:
        return "not logged to MLflow: no run is there yet"
    files = [(file, FOLDER) for file in (report, report.with_suffix(".png"))]
    files += [(file, f"{FOLDER}/{name}") for name in study.schemes for file in sorted((study.out / name).glob("*.*"))]
    remedy = f"the report is in {study.out}; tracking.mlflow=false leaves MLflow alone"
    return log_report(store, f"reproduction {command}", command, files, remedy)


def main(argv: list[str]) -> int:
    """Run what is not finished, and write the report; 1 if a run has failed.

    Raises:
        ConfigError: for a mistake of the user.
    """
    given = read(argv)
    command, logs = COMMANDS[given.command], given.out / "logs"
    study = Study.of(given)
    runner = Runner(study.launch, study.jobs, logs)
    if not given.report:
        command.run(study, runner)
    given.out.mkdir(parents=True, exist_ok=True)
    path = command.report(study, logs)
    print(f"report: {path}")
    print(log(study, given.command, path))
    if runner.failed:
        print(f"{len(runner.failed)} runs have failed; what they printed is in {logs}", file=sys.stderr)
    return 1 if runner.failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the commands that run
    sys.exit(guarded("launch/reproduce.py", lambda: main(sys.argv[1:]), sys.argv[1:]))

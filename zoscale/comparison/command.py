"""`zoscale compare`: the table, the JSON and the report."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from zoscale.comparison import tables
from zoscale.comparison.comparison import Comparison, compare
from zoscale.comparison.report_run import FOLDER, log_report
from zoscale.comparison.runs import read_runs
from zoscale.config import ConfigError
from zoscale.tracking.mlflow_store import store_uri

_WHAT = "Which method is better per forward equivalent, per second and per device hour: a table, and a report."
_SHOWN = 3  # names in a title


def compare_command(argv: Sequence[str]) -> int:
    """`zoscale compare NAME... [--metric M] [--uri URI] [--out FOLDER] [--json] [--no-log | --no-report]`.

    Returns:
        0.

    Raises:
        ConfigError: for a mistake of the user.
        OSError: if the report cannot be written.
    """
    parser = argparse.ArgumentParser(prog="zoscale compare", description=_WHAT)
    parser.add_argument("names", metavar="NAME", nargs="+", help="MLflow experiment, run id, or run directory")
    parser.add_argument("--metric", help="evaluation metric that decides; default: the one that chose the weights")
    parser.add_argument("--uri", help="MLflow store; default: MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db")
    parser.add_argument("--out", default="report", metavar="FOLDER", help="where the report is put; default: report")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--no-log", action="store_true", help="do not put the report into MLflow")
    parser.add_argument("--no-report", action="store_true", help="only print")
    given = parser.parse_intermixed_args(argv)
    if not given.no_report:
        _check_libraries()
    runs, store = read_runs(given.names, store_uri(Path("runs/any"), given.uri))
    comparison = compare(runs, _title(given.names), given.metric)
    if given.json:
        print(json.dumps(comparison.to_dict(), indent=2))
    else:
        _print(comparison)
    if not given.no_report:
        folder = Path(given.out)
        files = [(file, FOLDER) for file in _write(comparison, folder)]
        _say(f"report: {folder / 'report.html'}")
        if store is not None and not given.no_log:
            remedy = f"the report is in {folder}; --no-log leaves MLflow alone"
            _say(log_report(store, " ".join(given.names), _title(given.names), files, remedy))
    return 0


def _title(names: Sequence[str]) -> str:
    shown = ", ".join(Path(name).name for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _say(text: str) -> None:
    """To the user, not into the JSON."""
    print(text, file=sys.stderr)


def _check_libraries() -> None:
    missing = [name for name in ("plotly", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "pip install 'zoscale[report]', or --no-report for the tables alone"
        raise ConfigError("plotly and matplotlib for the report", f"no {' and no '.join(missing)}", remedy)


def _print(comparison: Comparison) -> None:
    made = [tables.verdict_table(comparison), tables.result_table(comparison), tables.time_table(comparison)]
    titles = ["", "", "milliseconds per step", "what differs"]
    for title, rows in zip(titles, [*made, tables.difference_table(comparison)], strict=True):
        if len(rows) > 1:
            print("\n".join([*([title] if title else []), *tables.align(rows), ""]))
    for line in (*tables.explanations(comparison), *comparison.notes):
        print(line)


def _write(comparison: Comparison, folder: Path) -> list[Path]:
    """The files of the report."""
    from zoscale.comparison.page import render
    from zoscale.comparison.pictures import write_pictures

    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / "report.html", folder / "comparison.json"
    page.write_text(render(comparison), encoding="utf-8")
    numbers.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")
    return [page, numbers, *write_pictures(comparison, folder)]

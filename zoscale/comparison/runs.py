"""Runs as they were logged: read from an MLflow store, or from run directories without one."""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoscale.config import ConfigError, first_line
from zoscale.tracking.mlflow_store import Card, check_database, short_waits, shown
from zoscale.tracking.tracker import read_metrics, status_of

Series = Mapping[int, float]
"""Values of a metric by step, ascending."""

REPORT_TAG = "zoscale.report"
"""Marks the MLflow run that carries an experiment's report; it is no run to compare."""

_LATEST_IS_ENOUGH = re.compile(r"rank_\d+/(?!tokens_per_second$|seconds_per_step/)")
_READERS = 8  # requests to a server at a time
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        id: MLflow's run id, or the path of the run directory.
        name: what the user knows it by.
        status: MLflow's: FINISHED, FAILED, KILLED, RUNNING; of a run directory UNFINISHED, unless it says more.
        params: the configuration, dotted names.
        tags: of the run.
        metrics: by name.
    """

    id: str
    name: str
    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, Series]

    @property
    def seed(self) -> str:
        """As the configuration says."""
        return self.params.get("seed", "?")


@dataclass(frozen=True)
class Store:
    """An MLflow store and the experiment whose runs were read.

    Args:
        client: an `MlflowClient`.
        uri: of the store.
        experiment_id: None if the runs are of several experiments.
    """

    client: Any
    uri: str
    experiment_id: str | None


def read_runs(names: Sequence[str], uri: str) -> tuple[list[Run], Store | None]:
    """All runs that the names mean, and the store they are from; None if all are run directories.

    Args:
        names: run directories, MLflow run ids, or names of experiments. A run that several names mean is read once.
            Beside run directories, other paths are left out with a warning.
        uri: of the MLflow store.

    Raises:
        ConfigError: for a name that is none of these, or a store that cannot be read.
    """
    folders = [name for name in names if (Path(name) / "metrics.jsonl").is_file()]
    others = [name for name in names if name not in folders and _is_path(name)] if folders else []
    if others:
        _log.warning("left out, no run directories: %s", ", ".join(others))
    tracked = [name for name in names if name not in folders and name not in others]
    unique: dict[Path, Path] = {}
    for folder in map(Path, folders):
        unique.setdefault(folder.resolve(), folder)
    runs = [_from_directory(folder) for folder in unique.values()]
    if not tracked:
        return runs, None
    with _reading(uri):
        client = _open(uri)
        found = [item for name in tracked for item in _find(client, name, uri)]
        known = {_id_in_store(folder) for folder in unique}
        new = {item.info.run_id: item for item in found if item.info.run_id not in known}
        runs += [_from_store(client, item) for item in new.values()]
    experiments = {item.info.experiment_id for item in found}
    return runs, Store(client, uri, experiments.pop() if len(experiments) == 1 else None)


def open_experiment(name: str, uri: str) -> Store | None:
    """The store with an experiment; None if it has none of that name.

    Raises:
        ConfigError: for a store that cannot be read.
    """
    with _reading(uri):
        client = _open(uri)
        found = client.get_experiment_by_name(name)
    return None if found is None else Store(client, uri, found.experiment_id)


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Tell every error of a store, which may be of any type, as one of its address."""
    try:
        with short_waits():
            yield
    except ConfigError:
        raise
    except Exception as error:
        got = shown(first_line(error))[:300]
        raise ConfigError(f"an MLflow store at {shown(uri)}", got, "check --uri") from error


def _is_path(name: str) -> bool:
    """Whether a name is of something on disk that no experiment is called by: `runs/*` means more than runs."""
    return Path(name).is_file() or (os.sep in name and Path(name).exists())


def _from_directory(path: Path) -> Run:
    try:
        card = Card(**json.loads((path / "tracking.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"tracking.json in the run directory {path}", str(error), "restore the file") from error
    metrics: dict[str, dict[int, float]] = {}
    for record in read_metrics(path):
        for name, value in record.metrics.items():
            metrics.setdefault(name, {})[record.step] = value
    ordered = {name: dict(sorted(series.items())) for name, series in metrics.items()}
    return Run(str(path), card.run_name, status_of(path) or "UNFINISHED", card.params, card.tags, ordered)


def _id_in_store(folder: Path) -> str:
    """The MLflow run of a run directory; empty if it has none."""
    try:
        return (folder / "mlflow_run_id").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _open(uri: str) -> Any:
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///"):
        check_database(path)
        if not path.exists():  # MLflow would make an empty one
            remedy = "name the store with --uri, or give run directories"
            raise ConfigError("an MLflow store", f"no file {path}", remedy)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _find(client: Any, name: str, uri: str) -> list[Any]:
    """The active runs that a name means, oldest first, without reports."""
    if re.fullmatch(r"[0-9a-f]{32}", name):
        return [client.get_run(name)]
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = ", ".join(sorted(item.name for item in client.search_experiments()))
        remedy = f"the experiments of {shown(uri)} are: {known}"
        raise ConfigError("an experiment, a run id or a run directory", name, remedy)
    found = list(_pages(client, experiment.experiment_id))
    runs = [item for item in reversed(found) if REPORT_TAG not in item.data.tags]
    if not runs:
        raise ConfigError(f"at least one run in the experiment {name}", "none", "train first")
    return runs


def _pages(client: Any, experiment_id: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment_id], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _from_store(client: Any, item: Any) -> Run:
    def history(name: str) -> tuple[str, Series]:
        if _LATEST_IS_ENOUGH.match(name):
            return name, {0: float(item.data.metrics[name])}
        rows = client.get_metric_history(item.info.run_id, name)
        return name, {row.step: float(row.value) for row in sorted(rows, key=lambda row: (row.step, row.timestamp))}

    with ThreadPoolExecutor(_READERS) as pool:
        metrics = dict(pool.map(history, item.data.metrics))
    info = item.info
    return Run(info.run_id, info.run_name, info.status, item.data.params, item.data.tags, metrics)

"""Reports in MLflow: each is a run of its experiment, known by a tag, that holds files and no metrics."""

from collections.abc import Iterable
from pathlib import Path

from zoscale.comparison.runs import REPORT_TAG, Store
from zoscale.config import ConfigError
from zoscale.tracking.mlflow_store import short_waits, shown

FOLDER = "report"
"""Of the artifacts."""
_LONGEST_TAG = 5000  # characters that every MLflow store takes


def log_report(store: Store, what: str, title: str, files: Iterable[tuple[Path, str]], remedy: str) -> str:
    """Put files into the run that carries a report, made if there is none.

    Args:
        store: with the experiment.
        what: names the report; an earlier one of that name is replaced file by file.
        title: of a new run.
        files: each with the folder of the artifacts that it goes to.
        remedy: what to do if the store does not take them.

    Returns:
        What was done, as a line for the user.

    Raises:
        ConfigError: if the store does not take them.
    """
    if store.experiment_id is None:
        return "not logged to MLflow: the runs are of several experiments"
    from mlflow.exceptions import MlflowException

    try:
        with short_waits():
            run_id = _run(store, what[:_LONGEST_TAG], title)
            for file, folder in files:
                store.client.log_artifact(run_id, str(file), folder)
            store.client.set_terminated(run_id)
    except (MlflowException, OSError) as error:
        expected = f"an MLflow store {shown(store.uri)} that takes artifacts"
        raise ConfigError(expected, shown(str(error))[:300], remedy) from error
    return f"logged to MLflow: run {run_id}, artifacts {FOLDER}/"


def _run(store: Store, what: str, title: str) -> str:
    for run in store.client.search_runs([store.experiment_id], f"tags.`{REPORT_TAG}` LIKE '%'"):
        if run.data.tags[REPORT_TAG] == what:
            return str(run.info.run_id)
    run = store.client.create_run(store.experiment_id, run_name=f"report {title}", tags={REPORT_TAG: what})
    return str(run.info.run_id)

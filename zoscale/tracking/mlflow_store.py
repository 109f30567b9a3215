"""An MLflow store: opening runs in it, and sending in the sizes that it takes."""

import logging
import os
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THREAD = "zoscale-mlflow"
_MARK = "zoscale.mark"
_TRIES = 6
_MAX_PARAMS, _MAX_METRICS = 100, 1000  # MLflow's limits per request
_MAX_NAME, _MAX_PARAM, _MAX_TAG = 250, 6000, 8000  # ... and in characters
_DATABASE = b"SQLite format 3\0"  # how every such file begins that is not empty
_OPENING = {  # shorter waits while the run is being opened; what the user has set stays
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


@dataclass(frozen=True)
class Record:
    """The metrics of one step; `time` in seconds since 1970, to the millisecond."""

    step: int
    time: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Card:
    """What a store is told about a run when it is created; kept in `tracking.json` for a later import."""

    experiment: str
    run_name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]


def store_uri(run_dir: Path, uri: str | None) -> str:
    beside = run_dir.resolve().parent / "mlflow.db"
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{beside}"


def check_database(path: Path) -> None:
    """Refuse to take something else for a SQLite database: SQLite itself takes a file of a few bytes for a new one.

    Raises:
        ValueError: if there is something at the path, and it is no database.
        OSError: if it cannot be read.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with path.open("rb") as file:
        if file.read(len(_DATABASE)) not in (b"", _DATABASE):
            raise ValueError(f"{path} is not a database of SQLite")


def shown(text: str) -> str:
    """The text without passwords in addresses."""
    return re.sub(r"://[^/@\s]*@", "://***@", text)


def _name(name: str) -> str:
    """A name that MLflow accepts: few characters, and a clean relative path."""
    return posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name)).lstrip("/.")[:_MAX_NAME] or "_"


def accepted(params: Mapping[str, object]) -> dict[str, str]:
    """Parameters with names and values that MLflow accepts."""
    return {_name(name): str(value)[:_MAX_PARAM] for name, value in params.items()}


@contextmanager
def short_waits() -> Iterator[None]:
    """Bound MLflow's HTTP retries, minutes by default, except where the user has set them."""
    added = {name: value for name, value in _OPENING.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _not_from_our_thread(record: logging.LogRecord) -> bool:
    return record.threadName != THREAD


def open_run(run_dir: Path, uri: str, card: Card) -> tuple[Any, Any]:
    """The client and the run: the one in `mlflow_run_id` if the store has it, else a new one."""
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # the creation of the tables
    logging.getLogger("urllib3.connectionpool").addFilter(_not_from_our_thread)  # a line per retry
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow.tracking.context.registry import resolve_tags

    client, experiment_id = _open_experiment(uri, card.experiment)
    id_file = run_dir / "mlflow_run_id"
    run = _find_run(client, id_file.read_text().strip()) if id_file.exists() else None
    if run is None:
        run = _create_run(client, experiment_id, run_dir, card.run_name)
        id_file.write_text(run.info.run_id + "\n")
    else:
        client.update_run(run.info.run_id, status="RUNNING")
    known = run.data.params
    send(client, run.info.run_id, params={k: v for k, v in card.params.items() if k not in known})
    # MLflow's parameters are final: what a resumed run has changed is shown as tags.
    changed = {f"resumed.{k}": v for k, v in card.params.items() if known.get(k, v) != v}
    send(client, run.info.run_id, tags=resolve_tags(card.tags) | changed)
    return client, run


def _create_run(client: Any, experiment_id: str, run_dir: Path, name: str) -> Any:
    """A new run; or the one that was created just before a kill, found by a mark that was put down before."""
    mark_file = run_dir / "mlflow_mark"
    if not mark_file.exists():
        mark_file.write_text(uuid.uuid4().hex + "\n")
        return client.create_run(experiment_id, run_name=name, tags={_MARK: mark_file.read_text().strip()})
    mark = mark_file.read_text().strip()
    found = client.search_runs([experiment_id], f"tags.`{_MARK}` = '{re.sub(r'[^0-9a-f]', '', mark)}'")
    return found[0] if found else client.create_run(experiment_id, run_name=name, tags={_MARK: mark})


def _open_experiment(uri: str, name: str) -> tuple[Any, str]:
    """The client and the experiment's id. Another process may be creating the store or the experiment too."""
    from mlflow import MlflowClient

    artifacts = None
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///")).resolve()
        check_database(database)
        artifacts = (database.parent / "mlartifacts").as_uri()
        if not database.exists():
            _create_database(database, artifacts)
    for attempt in range(_TRIES):
        try:
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(name)
            if found is not None:
                return client, found.experiment_id
            return client, client.create_experiment(name, artifact_location=artifacts)
        except Exception as error:
            raced = artifacts or getattr(error, "error_code", "") == "RESOURCE_ALREADY_EXISTS"
            if not raced or attempt == _TRIES - 1:
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable: the last try returns or raises")


def _create_database(path: Path, artifacts: str) -> None:
    """Make the file under another name, then link it into place complete.

    Two processes that let MLflow create the tables in one file together leave it broken for good.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        SqlAlchemyStore(f"sqlite:///{draft}", artifacts).engine.dispose()
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was first: its file is as good
    except OSError:
        if not path.exists():  # a file system without hard links
            draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def _find_run(client: Any, run_id: str) -> Any | None:
    """The run if the store has it and nobody has deleted it."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def send(
    client: Any,
    run_id: str,
    *,
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Parameters and tags, a hundred a request."""
    from mlflow.entities import Param, RunTag

    for row in _chunks([Param(name, value) for name, value in (params or {}).items()], _MAX_PARAMS):
        client.log_batch(run_id, params=row)
    rows = [RunTag(_name(name), str(value)[:_MAX_TAG]) for name, value in (tags or {}).items()]
    for row in _chunks(rows, _MAX_PARAMS):
        client.log_batch(run_id, tags=row)


def _chunks(rows: list[Any], size: int) -> Iterator[list[Any]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def sent_before(client: Any, run: Any) -> set[tuple[int, str]]:
    """(step, name) of every value that a run has."""
    return {(m.step, name) for name in run.data.metrics for m in client.get_metric_history(run.info.run_id, name)}


def send_records(
    client: Any,
    run_id: str,
    records: Iterable[Record],
    *,
    known: Container[tuple[int, str]] = (),
    sent: Callable[[int], object] = lambda _: None,
) -> None:
    """Send all values but those that are known; `sent` is told the number of each request's."""
    from mlflow.entities import Metric

    rows = [
        Metric(_name(k), v, round(r.time * 1000), r.step)
        for r in records
        for k, v in r.metrics.items()
        if (r.step, _name(k)) not in known
    ]
    for chunk in _chunks(rows, _MAX_METRICS):
        client.log_batch(run_id, metrics=chunk)
        sent(len(chunk))

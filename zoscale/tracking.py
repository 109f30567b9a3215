"""Experiment tracking: `metrics.jsonl` in the run directory always, MLflow for as long as it works.

Training only appends a line to a file and puts a record into a queue. One daemon thread does all of MLflow's
work (opening the store, metrics, artifacts, the final status), so that a slow, hanging or dead server can
neither stop nor stall training. The first error turns MLflow off with one warning; `import_run` catches up.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import posixpath
import queue
import re
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
_THREAD = "zoscale-mlflow"
_QUEUE_LIMIT = 20_000  # records waiting for the server before we stop waiting for it
_SEND_EVERY = 1.0  # seconds; records that come faster share a request ...
_MAX_ITEMS = 200  # ... but not more than this
_TRIES = 6
_MAX_PARAMS, _MAX_METRICS = 100, 1000  # MLflow's limits per request
_MAX_NAME, _MAX_PARAM, _MAX_TAG = 250, 6000, 8000  # ... and in characters
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


@dataclass(frozen=True)
class _Call:
    what: str
    do: Callable[[Any, str], object]  # of the client and the run id


def read_metrics(run_dir: Path) -> Iterator[Record]:
    """The records of `metrics.jsonl`, non-finite values as floats; a line cut off by a crash is left out."""
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            yield Record(row["step"], row["time"], {k: float(v) for k, v in row["metrics"].items()})


def import_run(run_dir: Path, *, uri: str | None = None, status: str = "FINISHED") -> str:
    """Send a run's parameters and all of `metrics.jsonl` to MLflow; returns the run id.

    A run that was partly sent is completed, without duplicates, if the store is the same. Artifacts are not
    sent. Raises whatever MLflow raises.
    """
    card = Card(**json.loads((run_dir / "tracking.json").read_text(encoding="utf-8")))
    client, run = _open_run(run_dir, _store_uri(run_dir, uri), card)
    _send_records(client, run.info.run_id, read_metrics(run_dir))
    client.set_terminated(run.info.run_id, status)
    return str(run.info.run_id)


class Tracker:
    """One training run's tracking, on rank 0; the other ranks hold a `NullTracker`.

    As a context manager it finishes the run as FINISHED, FAILED (error) or KILLED (interrupt, exit).
    """

    def __init__(self, run_dir: Path, sender: _Sender | None, *, patience: float) -> None:
        self._run_dir = run_dir
        self._sender = sender
        self._patience = patience
        path = run_dir / "metrics.jsonl"
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)  # the line that a crash cut off
        self._file = path.open("a", buffering=1, encoding="utf-8")

    @classmethod
    def start(
        cls,
        run_dir: Path,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        enabled: bool = True,
        patience: float = 15.0,
    ) -> Tracker:
        """Open `metrics.jsonl` and the MLflow run; the run that `run_dir/mlflow_run_id` names is continued.

        The store is `uri`, else MLFLOW_TRACKING_URI, else the SQLite file `mlflow.db` beside `run_dir`.
        `params` may be nested (names are joined by dots). Without `enabled` only the file is written.
        `patience`: the longest time in seconds that `start`, and `finish` without any progress, wait for the
        server; one that has not answered by the end of `start` is awaited in the background.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        card = Card(experiment, run_name, _flat(params), dict(tags))
        (run_dir / "tracking.json").write_text(json.dumps(asdict(card), indent=1), encoding="utf-8")
        sender = _Sender(run_dir, _store_uri(run_dir, uri), card) if enabled else None
        tracker = cls(run_dir, sender, patience=patience)
        if sender is not None:
            sender.start()
            if not sender.opened.wait(patience):
                _log.warning("MLflow at %s is slow; training goes on, still connecting", _shown(sender.uri))
        return tracker

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None while there is none."""
        return self._sender.run_id if self._sender is not None else None

    @property
    def mlflow_on(self) -> bool:
        """Whether metrics still go to MLflow."""
        return self._sender is not None and not self._sender.failed

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step. Never waits for MLflow."""
        record = Record(step, round(time.time(), 3), {name: float(v) for name, v in metrics.items()})
        values = {k: v if math.isfinite(v) else str(v) for k, v in record.metrics.items()}
        row = {"step": step, "time": record.time, "metrics": values}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._put(record)

    def log_artifact(self, path: Path) -> None:
        """Store a file with the run. It is read in the background: leave it in place until `finish`."""
        self._upload(path, lambda client, run_id: client.log_artifact(run_id, str(path)))

    def log_artifacts(self, directory: Path, name: str) -> None:
        """Store a directory's content under `name`. As `log_artifact`."""
        self._upload(directory, lambda client, run_id: client.log_artifacts(run_id, str(directory), name))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags to the run or overwrite them."""
        frozen = dict(tags)
        self._put(_Call("set_tags", lambda client, run_id: _send(client, run_id, tags=frozen)))

    def finish(self, status: str = "FINISHED") -> None:
        """Send what is waiting, close the run with FINISHED, FAILED or KILLED, close the file. Idempotent."""
        if self._file.closed:
            return
        self._file.close()
        if self._sender is not None:
            self._put(_Call("finish", lambda client, run_id: client.set_terminated(run_id, status)))
            self._sender.drain(self._patience)

    def how_to_open(self) -> str:
        """For the user: the run's page on a server, the command that opens a local store, or the file."""
        if self._sender is None or not self.mlflow_on:
            return str(self._run_dir / "metrics.jsonl")
        uri = _shown(self._sender.uri)
        if uri.startswith("http"):
            return f"{uri.rstrip('/')}/#/experiments/{self._sender.experiment_id}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {uri}"

    def _put(self, item: Record | _Call) -> None:
        if self._sender is not None:
            self._sender.put(item)

    def _upload(self, path: Path, do: Callable[[Any, str], object]) -> None:
        if path.exists():
            self._put(_Call(f"upload of {path.name}", do))
        else:
            _log.warning("artifact %s does not exist; it is not logged", path)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        failed = "FAILED" if isinstance(error, Exception) else "KILLED"
        self.finish("FINISHED" if error is None else failed)


class NullTracker(Tracker):
    """The tracker of all ranks but the first: does nothing."""

    def __init__(self) -> None:
        self._sender = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def log_artifacts(self, directory: Path, name: str) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def finish(self, status: str = "FINISHED") -> None: ...

    def how_to_open(self) -> str:
        return ""


class _Sender(threading.Thread):
    """The thread that owns the MLflow client. `failed` is final; `opened`: the run is open, or it failed."""

    def __init__(self, run_dir: Path, uri: str, card: Card) -> None:
        super().__init__(name=_THREAD, daemon=True)
        self.uri = uri
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.failed = False
        self.opened = threading.Event()
        self._run_dir = run_dir
        self._card = card
        self._queue: queue.Queue[Record | _Call | None] = queue.Queue(_QUEUE_LIMIT)
        self._draining = threading.Event()
        self._num_done = 0
        self._lock = threading.Lock()

    def put(self, item: Record | _Call | None) -> None:
        """Queue an item; never blocks."""
        if not self.failed:
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                self._give_up("keeping up", f"{_QUEUE_LIMIT} records are waiting")

    def drain(self, patience: float) -> None:
        """End the thread when all has been sent, or give up when nothing moved for `patience` seconds."""
        self.put(None)
        self._draining.set()
        seen, deadline = -1, 0.0
        while self.is_alive() and not self.failed:
            if self._num_done != seen:
                seen, deadline = self._num_done, time.monotonic() + patience
            if time.monotonic() > deadline:
                self._give_up("finish", f"no progress for {patience:g} s, {self._queue.qsize()} items unsent")
            self.join(0.02)

    def run(self) -> None:
        what = "start"
        try:
            with _short_waits():
                client, run = _open_run(self._run_dir, self.uri, self._card)
            self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
            self.opened.set()
            while not self.failed:
                what, items = "metrics", self._take()
                records = [item for item in items if isinstance(item, Record)]
                self._num_done += _send_records(client, run.info.run_id, records)
                for call in (item for item in items if isinstance(item, _Call)):
                    what = call.what
                    call.do(client, run.info.run_id)
                    self._num_done += 1
                if items[-1] is None:
                    return
        except Exception as error:  # whatever it is, it must not reach training
            self._give_up(what, error)
        finally:
            self.opened.set()

    def _take(self) -> list[Record | _Call | None]:
        """At least one item, and what comes within the sending period, up to a limit."""
        items = [self._queue.get()]
        if self._queue.qsize() < _MAX_ITEMS:
            self._draining.wait(_SEND_EVERY)
        while not self._queue.empty() and len(items) < _MAX_ITEMS:
            items.append(self._queue.get())
        return items

    def _give_up(self, what: str, error: object) -> None:
        with self._lock:
            first, self.failed = not self.failed, True
        if first:
            command = shlex.join(["python", "-m", "zoscale.tracking", str(self._run_dir), _shown(self.uri)])
            _log.warning(
                "MLflow is off from here on: %s failed at %s: %s. Training and metrics.jsonl go on; "
                "import them later: %s",
                *(what, _shown(self.uri), _shown(str(error))[:400], command),
            )


def _store_uri(run_dir: Path, uri: str | None) -> str:
    beside = run_dir.resolve().parent / "mlflow.db"
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{beside}"


def _shown(text: str) -> str:
    """The text without passwords in addresses."""
    return re.sub(r"://[^/@\s]*@", "://***@", text)


def _name(name: str) -> str:
    """A name that MLflow accepts: few characters, and a clean relative path."""
    return posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name)).lstrip("/.")[:_MAX_NAME] or "_"


def _flat(params: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[_name(prefix + name)] = str(value)[:_MAX_PARAM]
    return flat


@contextmanager
def _short_waits() -> Iterator[None]:
    """Bound MLflow's HTTP retries, minutes by default, except where the user has set them."""
    added = {name: value for name, value in _OPENING.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _not_from_our_thread(record: logging.LogRecord) -> bool:
    return record.threadName != _THREAD


def _open_run(run_dir: Path, uri: str, card: Card) -> tuple[Any, Any]:
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
        run = client.create_run(experiment_id, run_name=card.run_name, tags={})
        id_file.write_text(run.info.run_id + "\n")
    else:
        client.update_run(run.info.run_id, status="RUNNING")
    known = run.data.params
    _send(client, run.info.run_id, params={k: v for k, v in card.params.items() if k not in known})
    # MLflow's parameters are final: what a resumed run has changed is shown as tags.
    changed = {f"resumed.{k}": v for k, v in card.params.items() if known.get(k, v) != v}
    _send(client, run.info.run_id, tags=resolve_tags(card.tags) | changed)
    return client, run


def _open_experiment(uri: str, name: str) -> tuple[Any, str]:
    """The client and the experiment's id. Another process may be creating the store or the experiment too."""
    from mlflow import MlflowClient

    artifacts = None
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///")).resolve()
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


def _send(
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


def _send_records(client: Any, run_id: str, records: Iterable[Record]) -> int:
    """Returns the number of values sent."""
    from mlflow.entities import Metric

    rows = [Metric(_name(k), v, round(r.time * 1000), r.step) for r in records for k, v in r.metrics.items()]
    for chunk in _chunks(rows, _MAX_METRICS):
        client.log_batch(run_id, metrics=chunk)
    return len(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Send a run's metrics.jsonl to MLflow.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("uri", nargs="?")
    arguments = parser.parse_args()
    print(import_run(arguments.run_dir, uri=arguments.uri))

"""Experiment tracking: `metrics.jsonl` in the run directory always, MLflow for as long as it works.

Training only appends a line to a file and puts a record into a queue. One daemon thread does all of MLflow's
work (opening the store, metrics, artifacts, the final status), so that a slow, hanging or dead server can
neither stop nor stall training. The first error turns MLflow off with one warning; `import_run` catches up.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from zoscale.tracking.mlflow_sender import Call, Sender
from zoscale.tracking.mlflow_store import (
    Card,
    Record,
    accepted,
    open_run,
    send_records,
    sent_before,
    short_waits,
    shown,
    store_uri,
)

_log = logging.getLogger(__name__)


def read_metrics(run_dir: Path) -> Iterator[Record]:
    """The records of `metrics.jsonl`, non-finite values as floats; lines that a crash has damaged are left out."""
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            try:
                row = json.loads(line)
                record = Record(int(row["step"]), float(row["time"]), {k: float(v) for k, v in row["metrics"].items()})
            except (ValueError, KeyError, TypeError, AttributeError):
                _log.warning("a damaged line of %s is left out: %r", run_dir / "metrics.jsonl", line[:60].strip())
                continue
            yield record


def _past(path: Path) -> list[Record]:
    """What is in `metrics.jsonl`, less a line that a crash cut off, which goes."""
    if not path.exists():
        return []
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    return list(read_metrics(path.parent))


def status_of(run_dir: Path) -> str | None:
    """How a run ended, as MLflow has it: FINISHED, KILLED (it was told to stop) or None (it goes on, or broke off)."""
    marks = {"summary.json": "FINISHED", "told_to_stop": "KILLED"}
    return next((status for name, status in marks.items() if (run_dir / name).exists()), None)


def import_run(run_dir: Path, *, uri: str | None = None) -> str:
    """Send a run's parameters and all of `metrics.jsonl` to MLflow; returns the run id.

    A run that was partly sent is completed, without duplicates, if the store is the same, and ended there if it has
    ended. Artifacts are not sent. Raises whatever MLflow raises.
    """
    card = Card(**json.loads((run_dir / "tracking.json").read_text(encoding="utf-8")))
    with short_waits():
        client, run = open_run(run_dir, store_uri(run_dir, uri), card)
    send_records(client, run.info.run_id, read_metrics(run_dir), known=sent_before(client, run))
    if (status := status_of(run_dir)) is not None:
        client.set_terminated(run.info.run_id, status)
    return str(run.info.run_id)


class Tracker:
    """One training run's tracking, on rank 0; the other ranks hold a `NullTracker`.

    `past` has the last value of every metric that the run had logged when it was stopped.
    """

    def __init__(self, run_dir: Path, past: Sequence[Record], sender: Sender | None, *, patience: float) -> None:
        self._run_dir = run_dir
        self._sender = sender
        self._patience = patience
        self._logged = {(record.step, name) for record in past for name in record.metrics}
        self.past = {name: value for record in past for name, value in record.metrics.items()}
        self._file = (run_dir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")

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
    ) -> Self:
        """Open `metrics.jsonl` and the MLflow run; the run that `run_dir/mlflow_run_id` names is continued.

        Of a run that is continued, MLflow gets what `metrics.jsonl` has and it lacks, and nothing twice.

        The store is `uri`, else MLFLOW_TRACKING_URI, else the SQLite file `mlflow.db` beside `run_dir`.
        Without `enabled` only the file is written. `patience`: the longest time in seconds that `start`, and
        `finish` without any progress, wait for the server; one that has not answered by the end of `start` is
        awaited in the background.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        card = Card(experiment, run_name, accepted(params), dict(tags))
        (run_dir / "tracking.json").write_text(json.dumps(asdict(card), indent=1), encoding="utf-8")
        past = _past(run_dir / "metrics.jsonl")
        sender = Sender(run_dir, store_uri(run_dir, uri), card, past) if enabled else None
        tracker = cls(run_dir, past, sender, patience=patience)
        if sender is not None:
            sender.start()
            if not sender.opened.wait(patience):
                _log.warning("MLflow at %s is slow; training goes on, still connecting", shown(sender.uri))
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
        """Append the metrics of a step, but for those that a resumed run has logged before. Never waits for MLflow."""
        new = {name: float(value) for name, value in metrics.items() if (step, name) not in self._logged}
        if not new:
            return
        record = Record(step, round(time.time(), 3), new)
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

    def log_text(self, text: str, name: str) -> None:
        """Store a text with the run, as a file of that name."""
        self._put(Call(f"upload of {name}", lambda client, run_id: client.log_text(run_id, text, name)))

    def finish(self, status: str = "FINISHED") -> None:
        """Send what is waiting, close the run with FINISHED, FAILED or KILLED, close the file. Idempotent."""
        if self._file.closed:
            return
        self._file.close()
        if self._sender is not None:
            self._put(Call("finish", lambda client, run_id: client.set_terminated(run_id, status)))
            self._sender.drain(self._patience)

    def how_to_open(self) -> str:
        """For the user: the run's page on a server, the command that opens a local store, or the file."""
        if self._sender is None or not self.mlflow_on:
            return str(self._run_dir / "metrics.jsonl")
        uri = shown(self._sender.uri)
        if uri.startswith("http"):
            return f"{uri.rstrip('/')}/#/experiments/{self._sender.experiment_id}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {uri}"

    def _put(self, item: Record | Call) -> None:
        if self._sender is not None:
            self._sender.put(item)

    def _upload(self, path: Path, do: Callable[[Any, str], object]) -> None:
        if path.exists():
            self._put(Call(f"upload of {path.name}", do))
        else:
            _log.warning("artifact %s does not exist; it is not logged", path)


class NullTracker(Tracker):
    """The tracker of all ranks but the first: does nothing."""

    def __init__(self) -> None:
        self._sender = None
        self.past = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def log_artifacts(self, directory: Path, name: str) -> None: ...

    def log_text(self, text: str, name: str) -> None: ...

    def finish(self, status: str = "FINISHED") -> None: ...

    def how_to_open(self) -> str:
        return ""

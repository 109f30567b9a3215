"""`Sender`: the thread that does all of MLflow's work, so that a slow or dead server cannot stall training."""

import logging
import queue
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoscale.tracking.mlflow_store import THREAD, Card, Record, open_run, send_records, sent_before, short_waits, shown

_log = logging.getLogger(__name__)
_QUEUE_LIMIT = 20_000  # records waiting for the server before we stop waiting for it
_SEND_EVERY = 1.0  # seconds; records that come faster share a request ...
_MAX_ITEMS = 200  # ... but not more than this


@dataclass(frozen=True)
class Call:
    what: str
    do: Callable[[Any, str], object]  # of the client and the run id


class Sender(threading.Thread):
    """The thread that owns the MLflow client. `failed` is final; `opened`: the run is open, or it failed.

    `past`: what a run that is continued has logged; sent as far as the store lacks it.
    """

    def __init__(self, run_dir: Path, uri: str, card: Card, past: Sequence[Record] = ()) -> None:
        super().__init__(name=THREAD, daemon=True)
        self.uri = uri
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.failed = False
        self.opened = threading.Event()
        self._run_dir = run_dir
        self._card = card
        self._past = past
        self._queue: queue.Queue[Record | Call | None] = queue.Queue(_QUEUE_LIMIT)
        self._draining = threading.Event()
        self._num_done = 0
        self._lock = threading.Lock()

    def put(self, item: Record | Call | None) -> None:
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
            with short_waits():
                client, run = open_run(self._run_dir, self.uri, self._card)
            self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
            self.opened.set()
            known = sent_before(client, run)
            send_records(client, self.run_id, self._past, known=known, sent=self._count)
            while not self.failed:
                what, items = "metrics", self._take()
                records = [item for item in items if isinstance(item, Record)]
                send_records(client, run.info.run_id, records, known=known, sent=self._count)
                for call in (item for item in items if isinstance(item, Call)):
                    what = call.what
                    call.do(client, run.info.run_id)
                    self._count(1)
                if items[-1] is None:
                    return
        except Exception as error:  # whatever it is, it must not reach training
            self._give_up(what, error)
        finally:
            self.opened.set()

    def _count(self, number: int) -> None:
        self._num_done += number

    def _take(self) -> list[Record | Call | None]:
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
            command = shlex.join(["python", "-m", "zoscale.tracking", str(self._run_dir), shown(self.uri)])
            _log.warning(
                "MLflow is off from here on: %s failed at %s: %s. Training and metrics.jsonl go on; "
                "import them later: %s",
                *(what, shown(self.uri), shown(str(error))[:400], command),
            )

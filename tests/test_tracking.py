"""Tracking against real stores: a SQLite file, a server on loopback, one that dies, one that is not there."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zoscale.tracking import mlflow_sender, mlflow_store
from zoscale.tracking.tracker import NullTracker, Record, Tracker, import_run, read_metrics

mlflow = pytest.importorskip("mlflow")
REPO = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.measured  # what a store takes is compared with the patience of a tracker


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", *mlflow_store._OPENING):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setattr(mlflow_sender, "_SEND_EVERY", 0.05)


def start(run_dir: Path, **changes: Any) -> Tracker:
    given: dict[str, Any] = {
        "uri": None,
        "experiment": "sst2",
        "run_name": "jaguar",
        "params": {},
        "tags": {},
    }
    return Tracker.start(run_dir, **(given | changes))


def sqlite(run_dir: Path) -> Any:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{run_dir.parent}/mlflow.db")


def history(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, name)]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("zoscale.tracking.")]


# --- a SQLite store -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of run directories that share one store (its creation takes seconds)."""
    return tmp_path_factory.mktemp("runs") / "with space"


def test_everything_arrives_in_sqlite(store: Path, tmp_path: Path) -> None:
    run_dir = store / "one"
    wide = {f"wide.p{i}": i for i in range(230)}
    params = {"optim.lr": 1e-6, "optim.names": "x" * 7000, "optim.empty": "{}", "none": None, "": "", **wide}
    (tmp_path / "plot.txt").write_text("plot")
    (tmp_path / "adapter" / "deep").mkdir(parents=True)
    (tmp_path / "adapter" / "deep" / "a.bin").write_bytes(b"a")
    tracker = start(run_dir, params=params, tags={"commit": "abc"})
    assert tracker.mlflow_on and tracker.run_id
    for step in range(3):
        tracker.log(step, {"loss": 2.0 - step, "rank_0/tokens_per_second": 10.0 * step, "../acc@1 (dev)//x": 0.5})
    tracker.log_artifact(tmp_path / "plot.txt")
    tracker.log_artifacts(tmp_path / "adapter", "adapter")
    tracker.log_artifact(tmp_path / "absent")
    tracker.finish()
    client = sqlite(run_dir)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "jaguar")
    assert client.get_experiment(run.info.experiment_id).name == "sst2"
    assert run.data.params["optim.lr"] == "1e-06" and run.data.params["none"] == "None"
    assert run.data.params["wide.p229"] == "229" and len(run.data.params) == 235
    assert run.data.params["optim.names"] == "x" * 6000
    assert run.data.tags["commit"] == "abc"
    assert history(client, tracker.run_id, "loss") == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert history(client, tracker.run_id, "rank_0/tokens_per_second")[2] == (2, 20.0)
    assert history(client, tracker.run_id, "acc_1 _dev_/x")[0] == (0, 0.5), "an odd name must not end the tracking"
    assert {a.path for a in client.list_artifacts(tracker.run_id)} == {"plot.txt", "adapter"}
    assert (store / "mlartifacts" / tracker.run_id / "artifacts" / "adapter" / "deep" / "a.bin").exists()
    assert tracker.how_to_open() == f"mlflow ui --backend-store-uri sqlite:///{store}/mlflow.db"
    tracker.finish()  # a second time: nothing


def test_a_resumed_run_is_the_same_run(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = store / "resumed"
    first = start(run_dir, experiment="resume", params={"steps": 10, "lr": 1})
    first.log(1, {"loss": 3.0})
    first.finish("KILLED")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ti')  # killed while writing
    second = start(run_dir, experiment="resume", params={"steps": 20, "lr": 1, "new": 5})
    assert second.run_id == first.run_id and sqlite(run_dir).get_run(first.run_id).info.status == "RUNNING"
    second.log(2, {"loss": 2.0})
    second.finish()
    client = sqlite(run_dir)
    run = client.get_run(first.run_id)
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert history(client, first.run_id, "loss") == [(1, 3.0), (2, 2.0)]
    assert run.data.params == {"steps": "10", "lr": "1", "new": "5"} and run.data.tags["resumed.steps"] == "20"
    assert "resumed.lr" not in run.data.tags
    assert [(r.step, r.metrics) for r in read_metrics(run_dir)] == [(1, {"loss": 3.0}), (2, {"loss": 2.0})]
    client.delete_run(first.run_id)
    third = start(run_dir, experiment="resume")
    third.finish()
    assert third.mlflow_on and third.run_id != first.run_id
    assert (run_dir / "mlflow_run_id").read_text().strip() == third.run_id
    assert not warnings_of(caplog)


def test_non_finite_values(store: Path) -> None:
    run_dir = store / "nan"
    tracker = start(run_dir)
    tracker.log(0, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1})
    tracker.finish()
    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(line, parse_constant=refuse)["metrics"] == {
        "a": "nan",
        "b": "inf",
        "c": "-inf",
        "d": 1.0,
    }
    (record,) = read_metrics(run_dir)
    assert math.isnan(record.metrics["a"]) and record.metrics["c"] == -math.inf
    metrics = sqlite(run_dir).get_run(tracker.run_id).data.metrics
    assert tracker.mlflow_on and math.isnan(metrics["a"]) and metrics["b"] > 1e300 and metrics["d"] == 1.0


def test_lines_are_on_disk_at_once_and_errors_are_a_status(store: Path) -> None:
    run_dir = store / "failed"
    tracker = start(run_dir)
    tracker.log(7, {"loss": 1.0})
    assert [r.step for r in read_metrics(run_dir)] == [7]
    tracker.finish("FAILED")
    assert sqlite(run_dir).get_run(tracker.run_id).info.status == "FAILED"
    assert history(sqlite(run_dir), tracker.run_id, "loss") == [(7, 1.0)]


def test_log_does_not_wait_for_the_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_sender, "send_records", lambda *_, **__: time.sleep(0.3) or 1)
    tracker = start(store / "slow")
    begin = time.perf_counter()
    for step in range(100):
        tracker.log(step, {"loss": 1.0})
    assert time.perf_counter() - begin < 0.25
    tracker.finish()
    assert tracker.mlflow_on


def test_a_store_that_is_slow_is_not_given_up(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request is progress: many that wait for one end come within `patience` one by one."""
    import mlflow

    requests: list[int] = []

    def log_batch(client: object, run_id: str, metrics: tuple[object, ...] = (), **others: object) -> None:
        if metrics:
            time.sleep(0.3)
            requests.append(len(metrics))

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    monkeypatch.setattr(mlflow_store, "_MAX_METRICS", 10)
    tracker = start(store / "late", patience=1.5)
    assert tracker._sender is not None and tracker._sender.opened.wait(60)
    for step in range(10):
        tracker.log(step, {f"rank_{rank}/loss": 1.0 for rank in range(10)})
    tracker.finish()
    assert tracker.mlflow_on and requests == [10] * 10


def test_import_completes_a_run_without_duplicates(store: Path) -> None:
    run_dir = store / "imported"
    tracker = start(run_dir, experiment="import", tags={"commit": "abc"})
    tracker.log(1, {"loss": 3.0, "nan": float("nan")})
    tracker.finish()
    offline = start(run_dir, experiment="import", enabled=False)
    offline.log(2, {"loss": 2.0})
    offline.finish()
    assert offline.run_id is None and offline.how_to_open() == str(run_dir / "metrics.jsonl")
    command = [sys.executable, "-m", "zoscale.tracking", str(run_dir)]
    for _ in range(2):
        out = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == tracker.run_id
    assert history(sqlite(run_dir), tracker.run_id, "loss") == [(1, 3.0), (2, 2.0)]
    assert len(history(sqlite(run_dir), tracker.run_id, "nan")) == 1
    for wrong, status, message in (
        ([str(store / "none")], 2, f"expected the folder of a run, got {store / 'none'} without tracking.json"),
        ([str(run_dir), "nowhere://me:secret@x"], 1, "run it again: nowhere://***@x: "),
    ):
        refused = subprocess.run([*command[:3], *wrong], cwd=REPO, capture_output=True, text=True)
        assert refused.returncode == status and message in refused.stderr
        assert "Traceback" not in refused.stderr and "secret" not in refused.stderr


def test_import_tells_how_a_run_ended(store: Path) -> None:
    """One that goes on, or was killed, is not ended by sending what there is."""
    run_dir = store / "ended"
    tracker = start(run_dir, experiment="ends", enabled=False)
    tracker.log(1, {"loss": 3.0})
    tracker.finish()
    client = sqlite(run_dir)
    for mark, status in ((None, "RUNNING"), ("told_to_stop", "KILLED"), ("summary.json", "FINISHED")):
        if mark is not None:
            (run_dir / mark).write_text("{}")
        assert client.get_run(import_run(run_dir)).info.status == status


def test_disabled_and_null_trackers_write_no_store(tmp_path: Path) -> None:
    tracker = start(tmp_path / "runs" / "off", enabled=False)
    tracker.log(0, {"loss": 1.0})
    tracker.finish()
    assert not tracker.mlflow_on and list(read_metrics(tmp_path / "runs" / "off"))[0].step == 0
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["off"]
    public = {n for n, f in vars(Tracker).items() if callable(f) and not n.startswith("_")}
    assert public <= set(vars(NullTracker)), "a method that NullTracker does not silence"
    null = NullTracker()
    null.log(0, {"loss": 1.0})
    null.log_artifact(tmp_path / "absent")
    null.log_artifacts(tmp_path, "all")
    null.log_text("text", "file")
    null.finish()
    assert null.run_id is None and not null.mlflow_on and null.how_to_open() == ""


PROCESS = """
import sys, time
from pathlib import Path
from zoscale.tracking.tracker import Tracker
import mlflow, mlflow.store.tracking.sqlalchemy_store  # so that both begin together
print("ready", flush=True); sys.stdin.readline()
tracker = Tracker.start(Path(sys.argv[1]), uri=None, experiment="same", run_name="r", params={"a": 1}, tags={},
                        patience=120.0)
tracker.log(0, {"loss": 1.0})
tracker.finish()
print("on" if tracker.mlflow_on else "off")
"""


@pytest.mark.slow
def test_two_processes_create_the_store_and_the_experiment_together(tmp_path: Path) -> None:
    """Also: the creation of the store says nothing on the terminal."""
    runs = tmp_path / "runs"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(runs / name)],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            out, err = process.communicate(timeout=180)
            assert (process.returncode, out, err) == (0, "on\n", "")
    finally:
        for process in processes:
            process.kill()
    client = sqlite(runs / "a")
    experiment = client.get_experiment_by_name("same")
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert {p.name for p in runs.iterdir()} == {"a", "b", "mlflow.db"}, "a draft was left behind"


def test_another_process_creates_the_experiment_in_between(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    winner = start(store / "winner", experiment="race")
    winner.finish()
    find, calls = mlflow.MlflowClient.get_experiment_by_name, []

    def first_look_too_early(client: Any, name: str) -> Any:
        calls.append(name)
        return find(client, name) if len(calls) > 1 else None

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", first_look_too_early)
    loser = start(store / "loser", experiment="race")
    loser.finish()
    assert loser.mlflow_on and calls == ["race", "race"] and not warnings_of(caplog)
    runs = [sqlite(store / "loser").get_run(run_id).info for run_id in (loser.run_id, winner.run_id)]
    assert runs[0].experiment_id == runs[1].experiment_id


# --- servers ------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """An `mlflow server` on loopback with a SQLite store, in its own process group."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--backend-store-uri", f"sqlite:///{directory}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(directory / "artifacts")]
        self._log = (directory / "server.log").open("w")
        self._process = subprocess.Popen(
            command, cwd=directory, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, seconds: float = 180.0) -> Server:
        import requests

        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if requests.get(f"{self.uri}/health", timeout=2).ok:
                    return self
            except requests.RequestException:
                time.sleep(0.3)
        raise AssertionError(Path(self._log.name).read_text()[-3000:])

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server")
    try:
        yield server.wait()
    finally:
        server.kill()


@pytest.mark.slow
def test_a_real_server_and_its_death(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    (tmp_path / "adapter.bin").write_bytes(b"a" * 100_000)
    run_dir = tmp_path / "runs" / "one"
    tracker = start(run_dir, params={f"p{i}": "v" * 600 for i in range(120)})
    for step in range(50):
        tracker.log(step, {"rank_0/loss": float(step), "nan": float("nan"), "inf": float("inf")})
    tracker.log_artifact(tmp_path / "adapter.bin")
    tracker.finish()
    client = mlflow.MlflowClient(tracking_uri=server.uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and len(run.data.params) == 120 and math.isnan(run.data.metrics["nan"])
    assert history(client, tracker.run_id, "rank_0/loss") == [(s, float(s)) for s in range(50)]
    assert [a.path for a in client.list_artifacts(tracker.run_id)] == ["adapter.bin"]
    assert tracker.how_to_open().startswith(server.uri) and tracker.run_id in tracker.how_to_open()
    assert not (tmp_path / "runs" / "mlflow.db").exists() and not warnings_of(caplog)

    # A failing request in the middle turns MLflow off; with MLflow's long retries, finish gives up in time.
    quick = start(tmp_path / "runs" / "quick", patience=3.0)
    stuck = start(tmp_path / "runs" / "stuck", patience=3.0)
    for name in ("MAX_RETRIES", "TIMEOUT"):
        assert f"MLFLOW_HTTP_REQUEST_{name}" not in os.environ, "only the opening has short waits"
    server.kill()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    check_survives(quick, tmp_path / "runs" / "quick", wait=True)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    check_survives(stuck, tmp_path / "runs" / "stuck", wait=False)
    first, second = warnings_of(caplog)
    assert "metrics failed" in first and "metrics.jsonl" in first and "-m zoscale.tracking " in first
    assert "finish failed" in second and "no progress for 3 s" in second


def check_survives(tracker: Tracker, run_dir: Path, *, wait: bool) -> None:
    """Steps never wait; what is lost to the server is in the file; `finish` is bounded."""
    slowest = 0.0
    for step in range(200):
        begin = time.perf_counter()
        tracker.log(step, {"loss": float(step)})
        slowest = max(slowest, time.perf_counter() - begin)
        time.sleep(0.001)
    assert slowest < 0.2
    deadline = time.monotonic() + 20.0
    while wait and tracker.mlflow_on and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tracker.mlflow_on != wait
    tracker.log(200, {"loss": 200.0})
    tracker.log_artifact(run_dir / "metrics.jsonl")
    begin = time.monotonic()
    tracker.finish()
    assert time.monotonic() - begin < 6.0 and not tracker.mlflow_on
    assert [r.step for r in read_metrics(run_dir)] == list(range(201))


def test_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir, begin = tmp_path / "runs" / "alone", time.monotonic()
    tracker = start(run_dir, uri=f"http://user:secret@127.0.0.1:{free_port()}")
    assert time.monotonic() - begin < 20.0 and not tracker.mlflow_on
    tracker.log(0, {"loss": 1.0})
    tracker.finish()
    (warning,) = warnings_of(caplog)
    assert "start failed" in warning and "-m zoscale.tracking " in warning and "secret" not in warning
    assert list(read_metrics(run_dir)) == [Record(0, pytest.approx(time.time(), abs=60), {"loss": 1.0})]
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_a_server_that_never_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(50)
        begin = time.monotonic()
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        tracker = start(tmp_path / "runs" / "deaf", uri=uri, patience=2.0)
        tracker.log(0, {"loss": 1.0})
        assert time.monotonic() - begin < 4.0
        tracker.finish()
        assert time.monotonic() - begin < 8.0 and not tracker.mlflow_on
    assert [w.split(";")[0].split(":")[0] for w in warnings_of(caplog)] == [
        "MLflow at http",
        "MLflow is off from here on",
    ]


def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    with mlflow_store.short_waits():
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "5"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "4"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "5"
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_a_full_queue_gives_up(store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(mlflow_sender, "_QUEUE_LIMIT", 5)
    monkeypatch.setattr(mlflow_sender, "_SEND_EVERY", 60.0)
    tracker = start(store / "full")
    for step in range(20):
        tracker.log(step, {"loss": 1.0})
    assert not tracker.mlflow_on and len(warnings_of(caplog)) == 1
    begin = time.monotonic()
    tracker.finish()
    assert time.monotonic() - begin < 2.0 and len(list(read_metrics(store / "full"))) == 20

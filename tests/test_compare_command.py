"""`zoscale compare` on real runs: from a server, the default store and run directories, into a browser and back."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import page, screenshot, share_of
from jobs import JobServer
from mlflow import MlflowClient
from processes import ROOT, environment, free_port, status_of
from test_tracking import Server

from zoscale import cli
from zoscale.comparison.runs import REPORT_TAG, Run, read_runs
from zoscale.phases import PHASES
from zoscale.tracking.tracker import import_run, read_metrics

SHORT = [
    "--config", "launch/recipes/quickstart.yaml", "data.num_train=64", "data.num_dev=24", "data.num_validation=24",
    "data.batch_size=8", "data.micro_batch_size=4", "train.steps=8", "train.eval_every=4", "train.log_every=2",
    "estimator.num_directions=1",
]  # fmt: skip
SIGN = ["optimizer.name=jaguar_sign_sgd", "optimizer.lr=1e-3"]
STOP = """
import os, signal
from zoscale.engine import ZeroOrderEngine
step = ZeroOrderEngine.step
def stop(self, batch):
    result = step(self, batch)
    if result.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return result
ZeroOrderEngine.step = stop
"""
FILES = {"report.html", "comparison.json", "learning.png", "loss.png", "time.png", "ranks.png"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    try:
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def home(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs`: Muon with two seeds and SignSGD with one, stopped and resumed; all in both stores."""
    folder = tmp_path_factory.mktemp("home")
    options = [*SHORT, f"output_dir={folder / 'runs'}", f"tracking.uri={server.uri}"]
    jobs = JobServer(folder)
    server.wait()
    jobs.run(2, *options, "seed=0")
    jobs.run(2, *options, "seed=1")
    jobs.run(2, *options, *SIGN, "seed=0", expect=75, plant=STOP)
    assert "step 4" in jobs.run(2, *options, *SIGN, "seed=0")
    for run_dir in run_dirs(folder):
        import_run(run_dir, uri=f"sqlite:///{folder}/runs/mlflow.db")
    return folder


@pytest.fixture(scope="module")
def report(home: Path, server: Server) -> Path:
    """The report of the runs on the server."""
    folder = home / "from_server"
    assert cli.main(["compare", "zoscale", "--uri", server.uri, "--out", str(folder)]) == 0
    return folder


def run_dirs(home: Path) -> list[Path]:
    found = sorted(path.parent for path in home.glob("runs/*/config.yaml"))
    assert len(found) == 3
    return found


def shell(command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """A command as a user types it, in the folder that holds `runs`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=home, env=environment(PATH=path, PYTHONPATH=str(ROOT)), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def without_ids(text: str) -> dict[str, Any]:
    """What two stores must agree on."""
    comparison: dict[str, Any] = json.loads(text)
    for group in comparison["groups"]:
        group["runs"] = sorted(run["name"] for run in group["runs"])
    comparison["groups"].sort(key=lambda group: group["label"])
    comparison["differences"] = {name: dict(sorted(row.items())) for name, row in comparison["differences"].items()}
    return {**comparison, "title": ""}


# --- what runs log -------------------------------------------------------------------------------------------


def test_every_moment_of_training_is_in_one_phase(home: Path) -> None:
    """The phases add up to the time of training, which rank 0 measures; each of them takes time on each rank."""
    for run_dir in run_dirs(home):
        summary = json.loads((run_dir / "summary.json").read_text())
        for rank in summary["ranks"]:
            phases = rank["seconds_by_phase"]
            assert list(phases) == list(PHASES)
            assert all(phases[name] > 0 for name in PHASES)
            assert phases["forward"] + phases["gather"] > 0.2 * sum(phases.values())
        total = sum(summary["ranks"][0]["seconds_by_phase"].values())
        assert total == pytest.approx(summary["session"]["training_seconds"], rel=0.01)
        logged = {name: value for record in read_metrics(run_dir) for name, value in record.metrics.items()}
        assert all(logged[f"{split}/seconds"] > 0 for split in ("dev", "validation/before", "validation/final"))
        assert {f"rank_{rank}/seconds_per_step/{name}" for rank in (0, 1) for name in PHASES} <= set(logged)


def test_running_totals_go_on_when_a_run_is_resumed(home: Path) -> None:
    """In the metrics and in the summary, whose session is that which finished the run."""
    resumed, tokens = 0, dict[str, float]()
    for run_dir in run_dirs(home):
        totals = [record.metrics for record in read_metrics(run_dir) if "train/seconds" in record.metrics]
        seconds = [metrics["train/seconds"] for metrics in totals]
        assert seconds == sorted(seconds) and len(set(seconds)) == len(seconds)
        for metrics in totals:
            assert metrics["train/device_hours"] == pytest.approx(metrics["train/seconds"] * 2 / 3600)
        assert [m["train/forwards"] for m in totals] == [4.0, 8.0, 12.0, 16.0]
        summary = json.loads((run_dir / "summary.json").read_text())
        whole, session = summary["training_seconds"], summary["session"]
        assert whole == pytest.approx(seconds[-1], rel=0.1) and whole >= seconds[-1], "the time before the stop counts"
        assert summary["device_hours"] == pytest.approx(whole * 2 / 3600)
        assert summary["tokens_per_second"] == pytest.approx(totals[-1]["train/tokens"] / whole)
        assert session["steps_per_second"] == pytest.approx(session["steps"] / session["training_seconds"])
        assert session["seconds"] > session["training_seconds"]
        (seed,) = re.findall(r"^seed: (\d)$", (run_dir / "config.yaml").read_text(), re.MULTILINE)
        assert tokens.setdefault(seed, totals[-1]["train/tokens"]) == totals[-1]["train/tokens"] > 0, "stopped or not"
        if summary["resumed_at_step"]:
            resumed += 1
            assert session["steps"] == 4 and session["training_seconds"] < 0.9 * whole
        else:
            assert session["steps"] == 8 and session["training_seconds"] == pytest.approx(whole)
    assert resumed == 1


# --- the command ---------------------------------------------------------------------------------------------


def test_three_sources_one_answer(home: Path, report: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The server, the default store with the README's commands, and run directories without any store."""
    readme = (ROOT / "README.md").read_text()
    experiment, folders = re.findall(r"^zoscale compare [^#\n]+", readme, re.MULTILINE)
    printed = shell(experiment, home)
    assert printed.stdout.startswith("per ") and "report: report/report.html" in printed.stderr
    assert {path.name for path in (home / "report").iterdir()} == FILES
    assert "logged to MLflow: run " in printed.stderr
    loss = shell(f"{folders} --json --out by_loss", home)
    assert json.loads(loss.stdout)["metric"] == "dev/loss" and "MLflow" not in loss.stderr
    directories = shell("zoscale compare runs/quickstart-* --json --no-report", home)
    assert directories.stderr == ""
    expected = without_ids((report / "comparison.json").read_text())
    assert without_ids((home / "report/comparison.json").read_text()) == expected
    assert without_ids(directories.stdout) == expected
    everything = shell("zoscale compare runs/* --json --no-report", home)
    assert without_ids(everything.stdout) == expected
    assert everything.stderr == "left out, no run directories: runs/mlartifacts, runs/mlflow.db\n"
    ids = [run.info.run_id for run in trained(MlflowClient(server.uri))]
    capsys.readouterr()
    assert cli.main(["compare", *ids, "--uri", server.uri, "--json", "--no-report"]) == 0
    assert without_ids(capsys.readouterr().out) == expected


def trained(client: MlflowClient) -> list[Any]:
    """The experiment's runs but for reports."""
    experiment = client.get_experiment_by_name("zoscale")
    assert experiment is not None
    return [run for run in client.search_runs([experiment.experiment_id]) if REPORT_TAG not in run.data.tags]


def test_a_run_with_several_names_is_read_once(home: Path) -> None:
    folders = run_dirs(home)
    local = f"sqlite:///{home}/runs/mlflow.db"
    for names in ([*folders, f"{folders[0]}/", folders[0] / ".." / folders[0].name], [*folders, "zoscale"]):
        runs, _ = read_runs([str(name) for name in names], local)
        assert sorted(run.id for run in runs) == sorted(map(str, folders))


def test_the_answer_names_groups_seeds_and_costs(report: Path) -> None:
    found = json.loads((report / "comparison.json").read_text())
    groups = {group["label"]: group for group in found["groups"]}
    assert {label: group["seeds"] for label, group in groups.items()} == {
        "jaguar_muon": ["0", "1"],
        "jaguar_sign_sgd": ["0"],
    }
    assert found["metric"] == "dev/accuracy"
    assert [verdict["per"] for verdict in found["verdicts"]] == ["forward equivalent", "second", "device (GPU) hour"]
    assert {verdict["certainty"] for verdict in found["verdicts"]} <= {"one seed only", "tie"}
    assert found["differences"]["optimizer.name"] == {label: label for label in groups}
    assert not {"seed", "output_dir", "data.batch_size"} & set(found["differences"])
    for group in groups.values():
        assert group["totals"]["forward_equivalents"]["mean"] == 16.0
        assert len(group["ranks"]) == 2
        assert all(rank["gathered_bytes_per_step"] > 4e6 for rank in group["ranks"])
        assert {*PHASES, "evaluation"} == set(group["seconds_per_step"])


def test_the_report_is_in_mlflow_once_and_is_no_run_to_compare(
    home: Path, report: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    client = MlflowClient(server.uri)
    again = home / "again"
    assert cli.main(["compare", "zoscale", "--uri", server.uri, "--out", str(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((again / "comparison.json").read_text())
    experiment = client.get_experiment_by_name("zoscale")
    assert experiment is not None
    (carrier,) = client.search_runs([experiment.experiment_id], f"tags.`{REPORT_TAG}` = 'zoscale'")
    assert carrier.info.status == "FINISHED" and carrier.info.run_name == "report zoscale"
    names = {Path(item.path).name for item in client.list_artifacts(carrier.info.run_id, "report")}
    assert names == FILES
    groups = json.loads((again / "comparison.json").read_text())["groups"]
    assert sum(len(group["runs"]) for group in groups) == 3
    fetched = Path(client.download_artifacts(carrier.info.run_id, "report/report.html", str(again)))
    assert fetched.read_bytes() == (again / "report.html").read_bytes()


def test_hand_made_runs_in_a_store(home: Path) -> None:
    """Deleted runs are gone, failed ones are told, values that are no numbers harm nothing, and old steps are kept."""
    uri = f"sqlite:///{home}/runs/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("by hand")

    def add(name: str, seed: int, values: list[float], status: str = "FINISHED") -> str:
        run_id = client.create_run(experiment, run_name=name, tags={"select_by": "score"}).info.run_id
        client.log_param(run_id, "seed", seed)
        client.log_param(run_id, "optimizer.name", name)
        for step, value in enumerate(values):
            client.log_metric(run_id, "dev/score", value, step=step)
            client.log_metric(run_id, "train/forwards", 2.0 * step, step=step)
        client.set_terminated(run_id, status)
        return str(run_id)

    kept = [add("a", 0, [0.1, float("nan"), 0.5]), add("a", 1, [0.2, 0.3, 0.4]), add("b", 0, [0.1], "FAILED")]
    client.delete_run(add("b", 1, [0.9]))
    runs, store = read_runs(["by hand"], uri)
    assert store is not None and store.experiment_id == experiment
    assert [run.id for run in runs] == kept, "in the order in which they were made"
    assert runs[1].metrics["dev/score"] == {0: 0.2, 1: 0.3, 2: 0.4}
    text = shell(f"zoscale compare 'by hand' --uri {uri} --no-report", home).stdout
    assert "FAILED: b." in text and "forward equivalent" in text and "dev/score there" in text


def test_mistakes_are_refused_with_a_remedy(
    home: Path, report: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        status = status_of("compare", *arguments)
        out, err = capsys.readouterr()
        assert status == 2 and out == "" and "Traceback" not in err
        assert err.startswith("zoscale compare: error: expected ")
        return err

    local = f"sqlite:///{home}/runs/mlflow.db"
    assert "are: Default, " in refused("absent", "--uri", local)
    assert "choose with --metric, of: dev/accuracy" in refused("zoscale", "--uri", local, "--metric", "f1")
    assert "check --uri" in refused("0" * 32, "--uri", local)
    assert "check --uri" in refused("zoscale", "--uri", f"http://me:secret@127.0.0.1:{free_port()}")
    assert "at least one run" in refused("Default", "--uri", local)
    absent = home / "absent.db"
    assert "no file" in refused("zoscale", "--uri", f"sqlite:///{absent}") and not absent.exists()
    (home / "notes").write_text("x")  # so short that SQLite would take it for a new database
    assert "not a database" in refused("zoscale", "--uri", f"sqlite:///{home}/notes")
    assert (home / "notes").read_text() == "x"
    for uri in ("ftp://nowhere", "postgresql://nowhere", str(home / "mlruns")):
        assert "check --uri" in refused("zoscale", "--uri", uri)
    broken = home / "broken"
    broken.mkdir()
    (broken / "metrics.jsonl").write_text("")
    assert "tracking.json" in refused(str(broken))
    assert "tracking.json" in refused(str(run_dirs(home)[0]), "--metric", "loss", str(broken)), "names on both sides"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else find(name))
    assert "pip install 'zoscale[report]', or --no-report" in refused("zoscale", "--uri", local)


# --- in a browser --------------------------------------------------------------------------------------------


def test_the_report_in_a_browser(report: Path, tmp_path: Path) -> None:
    """One file, no network, no errors; answers first, then plots that are drawn and react."""
    with page(offline=True) as tab:
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((report / "report.html").as_uri())
        tab.wait_for_selector("#chart-ranks .main-svg")
        headings = tab.locator("h2").all_inner_texts()
        assert headings[0] == "Which is better"
        assert tab.locator("#verdict tbody tr").count() == 3
        assert "one seed" in tab.locator("#verdict + ul").inner_text()
        assert tab.locator(".js-plotly-plot").count() == 4
        assert tab.locator("#chart-learning .scatterlayer .js-fill").count() == 3, "the group with two seeds has a band"
        assert tab.locator("#chart-learning .scatterlayer .js-line").count() == 3 + 2 * 3
        assert tab.locator("#chart-time .barlayer path").count() == 2 * 8
        assert tab.locator("#chart-ranks .scatterlayer .js-line").count() == 2 * 3
        for chart, colour in {"learning": "#0072B2", "loss": "#D55E00", "time": "#E69F00", "ranks": "#0072B2"}.items():
            pixels = screenshot(tab, tmp_path / f"{chart}.png", f"#chart-{chart}")
            assert share_of(pixels, "#ffffff") < 0.98 and share_of(pixels, colour) > 5e-5, chart
        title = tab.locator("#chart-learning .ytitle")
        assert title.text_content() == "dev/accuracy"
        tab.locator("#chart-learning .updatemenu-header").click()
        tab.locator("#chart-learning .updatemenu-dropdown-button", has_text="dev/lm_loss").click()
        tab.wait_for_function("document.querySelector('#chart-learning .ytitle').textContent === 'dev/lm_loss'")
        buttons = tab.locator("[data-title]").evaluate_all("found => found.map(one => one.dataset.title.toLowerCase())")
        assert any("png" in button for button in buttons) and not any("cloud" in button for button in buttons)
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off"
        screenshot(tab, tmp_path / "whole.png")
        assert tab.problems == []
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_names_from_a_store_are_only_text(home: Path, tmp_path: Path) -> None:
    evil = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
    folder = tmp_path / "evil"
    folder.mkdir()
    for source in ("metrics.jsonl", "tracking.json"):
        (folder / source).write_bytes((run_dirs(home)[0] / source).read_bytes())
    card = json.loads((folder / "tracking.json").read_text())
    card["run_name"] = card["params"]["optimizer.name"] = card["tags"]["git_commit"] = evil
    (folder / "tracking.json").write_text(json.dumps(card))
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("an earlier one")
    assert cli.main(["compare", str(folder), str(run_dirs(home)[1]), "--out", str(out)]) == 0
    with page(offline=True) as tab:
        tab.goto((out / "report.html").as_uri())
        tab.wait_for_selector("#chart-ranks .main-svg")
        assert tab.evaluate("window.hacked") is None
        assert evil in tab.locator("#runs").inner_text()
        assert tab.problems == []


def test_mlflow_shows_the_runs(report: Path, home: Path, server: Server, tmp_path: Path) -> None:
    """The UI lists the finished runs by name; the report run opens as a page within it."""
    client = MlflowClient(server.uri)
    runs = trained(client)
    experiment_id = runs[0].info.experiment_id
    (carrier,) = client.search_runs([experiment_id], f"tags.`{REPORT_TAG}` = 'zoscale'")
    with page() as tab:
        tab.goto(f"{server.uri}/#/experiments/{experiment_id}/runs")
        for run in runs:
            assert run.info.status == "FINISHED"
            tab.get_by_text(run.info.run_name).first.wait_for(timeout=60_000)
        assert screenshot(tab, tmp_path / "runs.png").std() > 5, "the page is blank"
        tab.goto(f"{server.uri}/#/experiments/{experiment_id}/runs/{carrier.info.run_id}/artifacts/report/report.html")
        inside = tab.frame_locator("iframe").first
        inside.locator("#chart-learning .main-svg").first.wait_for(timeout=60_000)
        assert inside.locator("h2").first.inner_text() == "Which is better"
        screenshot(tab, tmp_path / "artifact.png")


def test_a_run_is_what_it_says() -> None:
    assert Run("1", "a", "FINISHED", {}, {}, {}).seed == "?"

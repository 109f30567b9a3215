"""`launch/reproduce.py`: shipped presets, what is chosen and counted, and a small study stopped and taken up again."""

import json
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import yaml
from jobs import JobServer, wait_for_step
from mlflow import MlflowClient
from processes import ROOT, environment

sys.path.insert(0, str(ROOT / "launch"))

import reproduce
from reproduction import memory, sensitivity
from reproduction.accuracy import lr_text
from reproduction.convergence import Paid, forwards_text
from reproduction.markdown import percent
from reproduction.results import Choice, Results, choose
from reproduction.runner import Runner, summary_of
from reproduction.study import HERE, PRESETS, Cell, Study, cost_of_step, merge

from zoscale.assembly import check_methods
from zoscale.comparison.numbers import Spread
from zoscale.comparison.runs import REPORT_TAG, Run
from zoscale.comparison.verdict import Goal
from zoscale.config import ConfigError, read_yaml
from zoscale.methods import TABLES

ACCURACY, LOSS = Goal("dev/accuracy"), Goal("dev/lm_loss")
METHODS = read_yaml(HERE / "methods.yaml")
COMMANDS = set(reproduce.COMMANDS)
SMALL = ["--methods", "zo_sgd,jaguar_muon", "--schemes", "lora", "--lr", "zo_sgd=1e-2", "--lr", "jaguar_muon=1e-2"]


def study(*argv: str) -> Study:
    return Study.of(reproduce.read([*argv]))


def shipped() -> list[tuple[str, str]]:
    """(preset, command), as far as a preset has the command's section."""
    trees = {path.stem: read_yaml(path) for path in sorted(PRESETS.glob("*.yaml"))}
    return [(name, command) for name, tree in trees.items() for command in ("accuracy", *sorted(COMMANDS & set(tree)))]


@pytest.mark.parametrize(("preset", "command"), shipped())
def test_every_run_of_a_preset_can_be_configured(preset: str, command: str) -> None:
    made = study(command, "--preset", preset)
    if command == "memory":
        cells = [*memory.cells(made).values(), memory.empty(made)]
        assert {cell.config.train.steps for cell in cells} == {made.tree["steps"]}
    elif command == "sensitivity":
        cells = [cell for row in sensitivity.variants(made).values() for _, own in row for cell in own]
        assert {what: len(row) for what, row in made.tree["vary"].items()} == {
            what: len({str(own[0].config.run_dir) for _, own in row})
            for what, row in sensitivity.variants(made).items()
        }, "every value is another run"
    else:
        cells = Results(made).tuning()
        for cell in cells:
            paid = cell.config.train.steps * cost_of_step(cell.config)
            assert made.forwards - cost_of_step(cell.config) < paid <= made.forwards, "equal forwards"
            evaluations = -(-cell.config.train.steps // cell.config.train.eval_every)
            assert evaluations == made.tree["evaluations"], "equal chances to be the best"
        assert {scheme for scheme, _ in Results(made).pairs()} == set(made.schemes)
    for cell in {cell.method + cell.scheme: cell for cell in cells}.values():
        check_methods(cell.config)


def test_costs_are_the_engine_s() -> None:
    made = study("accuracy", *(word for method in METHODS for word in ("--lr", f"{method}=1e-3")))
    cells = {method: made.cell("lora", method, 1e-3, 0) for method in METHODS}
    assert {method: cost_of_step(cell.config) for method, cell in cells.items()} == dict.fromkeys(METHODS, 2) | {
        "zo_sgd_cons": 5, "fo_sgd": 3, "fo_adamw": 3, "fzoo": 9, "zo_muon_subspace": 5,
    }  # fmt: skip
    for cell in cells.values():
        check_methods(cell.config)
    assert {cell.config.optimizer.name for cell in cells.values()} == set(TABLES["optimizer"]), "all can be compared"
    assert cells["zo_sgd_cons"].config.train.steps == 160
    taus = {method: cell.config.estimator.args.get("tau") for method, cell in cells.items()}
    assert taus["forward_grad"] is None and taus["fo_sgd"] is None and taus["lezo"] == 1e-2
    assert study("accuracy").cell("ft", "lezo", 1e-3, 0).config.estimator.args["tau"] == 1e-3


def test_published_numbers_are_of_our_methods() -> None:
    published = read_yaml(HERE / "published.yaml")
    tables = [published["accuracy"], *published["memory"].values()]
    for table in tables:
        assert "arXiv" in table["source"]
        for scheme in ("ft", "lora"):
            assert set(table.get(scheme, {})) <= set(METHODS)
    assert published["accuracy"]["lora"]["jaguar_muon"] == 94.0 and published["memory"]["opt-13b"]["ft"]["zo_sgd"] == 51


def test_options_of_the_command_line(tmp_path: Path) -> None:
    options = ["--model", "M", "--task", "sst2", "--data", "D", "--seeds", "3,4", "--forwards", "100", "data.num_dev=7"]
    made = study("accuracy", *SMALL, *options, "--out", str(tmp_path))
    cells = [
        cell for pair in Results(made).pairs() for cell in made.cells(*pair, made.seeds, made.lrs[pair[0]][pair[1]])
    ]
    assert [(cell.method, cell.config.seed, cell.lr) for cell in cells] == [
        ("zo_sgd", 3, 1e-2), ("zo_sgd", 4, 1e-2), ("jaguar_muon", 3, 1e-2), ("jaguar_muon", 4, 1e-2),
    ]  # fmt: skip
    config = cells[0].config
    assert (config.model.id, config.task.name, config.task.args["path"]) == ("M", "sst2", "D")
    assert (config.train.steps, config.train.eval_every, config.data.num_dev) == (50, 7, 7)
    assert config.run_dir.parent == tmp_path / "runs"
    for wrong, message in (
        (["--methods", "nothing"], "nothing"), (["--forwards", "1"], "got 1 where a step takes 3"),
        (["--preset", "none"], "small"), (["--seeds", "1,1"], "seeds"), (["data.num_dv=3"], "num_dev"),
        (["data.num_dev=0"], "dev examples"), (["--lr", "zo_sdg=1"], "zo_sdg"),
        (["--preset", "smollm2", "--methods", "fzoo"], "needs --lr"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Results(study("accuracy", *wrong)).tuning()
    more = study("accuracy", "--preset", "smollm2", "--methods", "jaguar_muon,fzoo", "--lr", "fzoo=1e-4")
    assert list(more.methods) == ["fzoo", "jaguar_muon"], "one that the preset has no learning rates for"
    assert "fzoo" not in study("accuracy").methods, "one that is left out unless it is named"
    assert list(study("accuracy", "--methods", "fzoo").methods) == ["fzoo"]
    assert "fzoo" in study("accuracy", "--lr", "fzoo=1e-4").methods
    with pytest.raises(ConfigError, match="sensitivity"):
        study("sensitivity", "--preset", "smollm2")


def test_what_sensitivity_varies_keeps_its_method_scheme_and_learning_rate() -> None:
    found = sensitivity.variants(study("sensitivity", "--lr", "jaguar_sign_sgd=5e-3", "--schemes", "lora"))
    cells = [cell for row in found.values() for _, own in row for cell in own]
    assert {(cell.scheme, cell.method, cell.lr) for cell in cells} == {("lora", "jaguar_sign_sgd", 5e-3)}
    for wrong, message in (
        (["--methods", "zo_sgd"], "--methods with jaguar_sign_sgd, which is varied, got zo_sgd"),
        (["--schemes", "ft"], "--schemes with lora, which is varied, got ft"),
        (["--lr", "zo_sgd=5e-3"], "--lr jaguar_sign_sgd=LR, .* got zo_sgd=0.005"),
        (["--lr", "jaguar_sign_sgd=5e-3,1e-2"], "one for the method that is varied, got jaguar_sign_sgd=0.005,0.01"),
    ):
        with pytest.raises(ConfigError, match=message):
            study("sensitivity", *wrong)


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ("seed=3", "--seeds"), ("name=a", "leave it out"), ("output_dir=a", "--out"), ("model.id=a", "--model"),
        ("optimizer.name=zo_sgd", "--methods"), ("optimizer.lr=1e-4", "--lr"), ("train.steps=5", "--forwards"),
        ("train.eval_every=1", "evaluations"), ("tracking.experiment=a", "--out"), ("optimizer={lr: 1e-4}", "--lr"),
    ],
)  # fmt: skip
def test_options_leave_the_protocol_alone(option: str, flag: str) -> None:
    key = option.replace("={", ".").partition(":")[0].partition("=")[0]
    for command in COMMANDS:
        with pytest.raises(ConfigError, match=rf"got {re.escape(key)}=.*: .*{flag}"):
            study(command, "tracking.mlflow=false", option)


def test_options_leave_the_schemes_alone() -> None:
    """An adapter's options are for schemes that have one."""
    for option, scheme in (("adapter.r=4", "ft"), ("adapter=null", "lora")):
        with pytest.raises(ConfigError, match=rf"adapter in the scheme {scheme}, .* --schemes"):
            Results(study("accuracy", option)).tuning()
    cell = Results(study("accuracy", "--schemes", "lora", "adapter.r=4")).tuning()[0]
    assert cell.config.adapter is not None and cell.config.adapter["r"] == 4
    assert study("accuracy", "--lr", "zo_sgd=1e-2,1e-2").lrs["lora"]["zo_sgd"] == [1e-2], "tried once"


def test_a_preset_changes_methods(tmp_path: Path) -> None:
    """Parts of one method's configuration, over those that all presets share; the others stay."""
    made = study("accuracy", "--preset", "smollm2")
    cells = {method: made.cell("lora", method, 1e-3, 0).config for method in made.methods}
    ours, theirs = cells["jaguar_sign_sgd"], cells["zo_sgd"]
    assert (ours.estimator.name, ours.estimator.args["num_directions"], theirs.estimator.name) == (
        "one_sided",
        7,
        "two_point",
    )
    assert ours.probe.args["rows"] == 0.25 and ours.optimizer.args["beta"] == 0.5
    assert ours.estimator.args["tau"] == 1e-2 and made.methods["jaguar_sign_sgd"]["title"] == "JAGUAR SignSGD"
    assert (ours.train.steps, theirs.train.steps) == (50, 200), "equal forwards"
    tree = merge(read_yaml(PRESETS / "smollm2.yaml"), {"methods": {"zo_sdg": {"config": {}}}})
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"methods in the preset .* got zo_sdg"):
        study("accuracy", "--preset", str(tmp_path / "own.yaml"))


def test_the_learning_rate_is_the_best_on_dev() -> None:
    grid = [1e-3, 1e-2, 1e-1]
    assert choose({1e-1: 0.7, 1e-2: 0.8, 1e-3: 0.6}, grid, ACCURACY) == Choice(1e-2, 3, 3, at_edge=False)
    assert choose({1e-1: 0.8, 1e-2: 0.8}, grid, ACCURACY) == Choice(1e-2, 2, 3, at_edge=False), "the smaller of equals"
    assert choose({1e-1: 0.7, 1e-2: 0.8, 1e-3: 0.6}, grid, LOSS) == Choice(1e-3, 3, 3, at_edge=True)
    assert choose({1e-2: 0.7}, [1e-2], ACCURACY) == Choice(1e-2, 1, 1, at_edge=False), "one has no edge"
    assert choose({}, grid, ACCURACY) is None
    assert lr_text(Choice(1e-3, 2, 3, at_edge=True)) == "0.001 * (2 of 3 tried)"


def test_forwards_until_a_target() -> None:
    metrics = {"dev/accuracy": {0: 0.5, 10: 0.7, 20: 0.6, 30: 0.9}}
    paid = Paid(Run("", "", "FINISHED", {}, {}, metrics), 3)
    assert [paid.forwards_until(target, ACCURACY) for target in (0.4, 0.6, 0.7, 0.8, 0.95)] == [0, 30, 30, 90, None]
    assert forwards_text([30, 90]) == "60" and forwards_text([30, None]) == "1 of 2 runs"
    assert forwards_text([None]) == "not reached"
    assert percent(Spread.of([0.5, 0.75])) == "62.5 (50.0 to 75.0, 2 seeds)"
    assert percent(Spread.of([0.5, 0.75]), 3) == "62.5 (50.0 to 75.0, 2 of 3 seeds)"
    assert [percent(Spread.of([0.5]), asked) for asked in (None, 1, 3)] == ["50.0", "50.0", "50.0 (1 of 3 seeds)"]


def leave(cell: Cell, accuracy: float, *, ended: bool = True) -> None:
    """What a run leaves: an evaluation in the middle and one at the end; of one that diverged the first is all."""
    steps, params = cell.config.train.steps, {"seed": str(cell.config.seed), "optimizer.name": cell.method}
    folder = cell.config.run_dir
    folder.mkdir(parents=True)
    tags = {"select_by": "accuracy"}
    card = {"experiment": "e", "run_name": f"{cell.method}-{cell.config.seed}", "params": params, "tags": tags}
    (folder / "tracking.json").write_text(json.dumps(card))
    rows = [
        {"step": step, "time": 0, "metrics": {"dev/accuracy": accuracy if step else 0.5, "train/forwards": 2.0 * step}}
        for step in ((0, steps // 2, steps) if ended else (0, steps // 2))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"commit": "abc", "hardware": {"gpus": [], "cpus": 1, "machine": "x"}, "world_size": 1}
    scores = {when: {"accuracy": accuracy} for when in ("before", "chosen")}
    if ended:
        summary = found | {"dev": {"accuracy": accuracy}, "validation": scores}
        (folder / "summary.json").write_text(json.dumps(summary))


def test_seeds_that_diverged_are_told(tmp_path: Path) -> None:
    """Beside every mean that they are not in, and in the verdicts, which are not clear then."""
    command = ["accuracy", *SMALL, "--seeds", "0,1,2,3", "--out", str(tmp_path), "tracking.mlflow=false"]
    made = study(*command)
    for method, lr in (("zo_sgd", 1e-2), ("jaguar_muon", 1e-2)):
        for cell in made.cells("lora", method, made.seeds, [lr]):
            is_good = method == "jaguar_muon"
            leave(cell, 0.8 if is_good else 0.6, ended=is_good or cell.config.seed < 3)
    assert reproduce.main([*command, "--report"]) == 0
    text = (tmp_path / "accuracy.md").read_text()
    assert "| 60.0 (60.0 to 60.0, 3 of 4 seeds) |" in text and "| 80.0 (80.0 to 80.0, 4 seeds) |" in text
    assert "| ZO-SGD (MeZO) | 60.0 (3 of 4 seeds) |" in text and "| failed seeds |" in text
    page = (tmp_path / "lora/report.html").read_text()
    assert "zo_sgd has 3 of 4 seeds, seed 3 failed: its figures are of those that did not." in page


def test_reports_say_what_is_missing(tmp_path: Path) -> None:
    """Before anything has run; the plan of memory by arithmetic on shapes."""
    shapes = {"dtype": "float32", "tokens": 8, "rows": 2, "layers": 2, "width": 32, "heads": 4}
    tree = merge(read_yaml(PRESETS / "small.yaml"), {"memory": {"planned": {"opt-1.3b": shapes}}})
    tree["memory"]["planned"].pop("opt-13b")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    options = ["--preset", str(tmp_path / "own.yaml"), "--out", str(tmp_path), "--report"]
    assert reproduce.main(["memory", *options]) == 0
    text = (tmp_path / "memory.md").read_text()
    lr = tree["lrs"]["lora"]["jaguar_muon"][0]
    assert re.search(rf"^- lora-jaguar_muon-\w+, lr {lr}, seed 0$", text.split("## Missing")[1], re.MULTILINE)
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
            for row in text.split("## opt-1.3b")[1].splitlines() if row.startswith("|")}  # fmt: skip
    assert rows["ZO-AdaMM"][::2] == ["9.05", "9.05", "4.13"], "published"
    assert rows["Forward-Grad"][1::2] == ["-"] * 3, "not planned"
    assert rows["FO-AdamW"][3] == "-", "has a master always"
    config = study("memory", *options).cell("ft", "zo_sgd", 1e-3, 0).config
    muon, adam = ({**config.to_dict(), "optimizer": {"name": name}} for name in ("jaguar_sign_sgd", "zo_adam"))
    plain = memory.planned(config, shapes)
    plan = memory.plan_of(json.dumps({"adapter": None, "master": "fp32", **shapes, "candidates": 2}))
    trained = plan["trainable"]
    from_dict = lambda tree: type(config).from_dict(tree, memory.TABLES, memory.DEFAULTS)  # noqa: E731
    assert memory.planned(from_dict(muon), shapes) - plain == 4 * trained, "a momentum"
    assert memory.planned(from_dict(adam), shapes) - plain == 8 * trained, "two moments"
    by_gradient = {"probe": {"name": "gradient"}, "estimator": {"name": "backpropagation"}}
    sgd, adamw = (
        from_dict({**config.to_dict(), **by_gradient, "optimizer": {"name": n}}) for n in ("fo_sgd", "fo_adamw")
    )
    assert memory.planned(adamw, shapes) == plan["first_order"]["total"] > plain
    assert memory.planned(sgd, shapes) == plan["first_order"]["total"] - 8 * trained, "no moments"
    assert reproduce.main(["sensitivity", *options]) == 0
    text = (tmp_path / "sensitivity.md").read_text()
    assert "| block | 0.25 | - | - |" in text and text.count("lr 0.001, seed 0\n", text.index("## Missing")) > 3


def test_the_picture_of_memory_has_the_published_figures_beside_the_planned() -> None:
    """A panel per model of a published size, in GB; in a row each scheme has its line."""
    made = study("memory", "--methods", "fo_sgd,zo_sgd,zo_muon")
    published = read_yaml(HERE / "published.yaml")["memory"]
    shapes = {"dtype": "float16", "tokens": 8, "rows": 2, "layers": 2, "width": 32, "heads": 4}
    pairs = {name: memory.pairs_of(made, published[name], shapes) for name in made.tree["planned"]}
    figure = memory.picture(made, memory.cells(made), memory.empty(made), pairs)
    panels = {axes.get_title(): {line.get_label(): line.get_xydata().round(3).tolist() for line in axes.lines}
              for axes in figure.axes}  # fmt: skip
    assert list(panels)[len(made.schemes) :] == ["opt-1.3b", "opt-13b"]
    small, large = panels["opt-1.3b"], panels["opt-13b"]
    assert small["all weights: published"] == [[12.2, -0.333], [4.17, 0.667]], "none of ZO-Muon"
    assert small["LoRA: published"] == [[5.9, 0.333], [4.13, 1.333]]
    assert [x for x, _ in large["all weights: published"]] == [97, 51] and "LoRA: published" not in large
    planned = [memory.planned(made.cell("ft", method, 1e-3, 0).config, shapes) for method in made.methods]
    assert small["all weights: planned"] == [
        [round(size / 1e9, 3), round(place - 1 / 3, 3)] for place, size in enumerate(planned)
    ]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_reports(server: JobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled OPT: SIGKILL in the first run, the command that goes on, and once more with nothing to do."""
    monkeypatch.chdir(ROOT)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    options = ["--seeds", "0", "--forwards", "120", "--out", str(tmp_path), "data.num_dev=20", "data.num_validation=20"]
    command, runs = ["accuracy", *SMALL, *options], tmp_path / "runs"
    first = study(*command).cell("lora", "zo_sgd", 1e-2, 0)
    (tmp_path / "first.yaml").write_text(first.config.to_yaml())
    job = server.start(1, "--config", str(tmp_path / "first.yaml"), "tracking.mlflow=false")
    wait_for_step(job, runs, 3)
    job.kill()
    job.wait()
    assert summary_of(first) is None and reproduce.main(command) == 0
    summaries = {path.parent.name.split("-")[1]: json.loads(path.read_text()) for path in runs.glob("*/summary.json")}
    assert set(summaries) == {"zo_sgd", "jaguar_muon"}
    assert {summary["forwards"] for summary in summaries.values()} == {120}
    assert summaries["zo_sgd"]["resumed_at_step"] and not summaries["jaguar_muon"]["resumed_at_step"], "continued"
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(tmp_path.name)
    (logged,) = client.search_runs([experiment.experiment_id], f"tags.`{REPORT_TAG}` = 'reproduction accuracy'")
    names = {item.path for item in client.list_artifacts(logged.info.run_id, "report")}
    assert {"report/accuracy.md", "report/accuracy.png", "report/lora"} <= names
    text = (tmp_path / "accuracy.md").read_text()
    ours = f"{100 * summaries['jaguar_muon']['validation']['chosen']['accuracy']:.1f}"
    assert f"| JAGUAR Muon | 94 | {ours} | 0.01 (fixed) |" in text and "Missing" not in text
    assert "| JAGUAR Muon | LoRA | 60 | `two_point`, tau 0.01, num_directions 1 | `block`, rows 0.5" in text
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "lora/report.html").exists() and "forward equivalent" in text
    times = {path: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}
    assert reproduce.main(command) == 0
    assert times == {path: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}, "finished: kept"


def test_a_method_has_one_list_of_learning_rates(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["accuracy", "--report", "--lr", "zo_sgd=1", "--lr", "zo_sgd=2"])
    assert "each method once in --lr" in capsys.readouterr().err


def test_runs_that_fail_are_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["accuracy", *SMALL, "--out", str(tmp_path)]
    assert reproduce.main([*command, "--launch", "false"]) == 1
    assert f"4 runs have failed; what they printed is in {tmp_path}/logs" in capsys.readouterr().err
    assert (tmp_path / "accuracy.md").exists(), "the report says which"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("jobs: 2", "jobs: x", "a preset like small.yaml in"),
        ("{title: all weights,", "{titel: all weights,", "KeyError: 'title'"),
        ("evaluations: 8", "evaluations: 0", "evaluations of at least 1"),
        ("    zo_sgd: [", "    zo_sdg: [", "lrs in the preset"),
        ("lrs:\n", "lrs: [\n", "valid YAML"),
    ],
)
def test_mistakes_in_a_preset_are_told(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = (PRESETS / "small.yaml").read_text()
    assert old in text
    (tmp_path / "own.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        reproduce.main(["accuracy", "--preset", f"{tmp_path}/own.yaml", "--out", f"{tmp_path}/o", "--report"])
    assert message in str(caught.value)


def test_a_failure_is_reported_and_an_interrupt_ends_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = study("accuracy", *SMALL, "--out", str(tmp_path))
    cells = Results(made).tuning()
    fail = Runner(("sh", "-c", "echo no memory; exit 1"), 2, tmp_path / "logs")
    fail.run(cells)
    assert capsys.readouterr().out.count("FAILED: no memory") == 2
    assert reproduce.main(["accuracy", *SMALL, "--out", str(tmp_path), "--report"]) == 0
    assert "seed 0: no memory" in (tmp_path / "accuracy.md").read_text().split("## Missing")[1]
    mark = tmp_path / "ended"
    wait = Runner(
        ("sh", "-c", f"trap 'touch {mark}; exit 75' TERM; while :; do sleep 0.05; done"), 1, tmp_path / "logs"
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(1.0, signal.raise_signal, (signal.SIGINT,)).start()
            wait.run(cells)
    finally:
        signal.signal(signal.SIGINT, before)
    assert mark.exists(), "it was told to stop, and waited for"

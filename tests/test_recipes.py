"""The configurations of launch/recipes, the research recipes of launch/ and the checks for a GPU, run small."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from jobs import JobServer
from processes import ROOT, needs_compiler, run

from zoscale.cli import guarded
from zoscale.tasks import Example

PNG = b"\x89PNG"
TASKS_FROM_THE_HUB = {path.name for path in (ROOT / "tests/samples").iterdir()}


def recipe(name: str) -> ModuleType:
    """A script of launch/ as a module."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / f"launch/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def main(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    if status := guarded("recipe", module.main, arguments):
        raise SystemExit(status)


@pytest.fixture(scope="module")
def comparison() -> ModuleType:
    return recipe("blackbox")


@pytest.fixture(scope="module")
def repeated() -> ModuleType:
    return recipe("repeated_learning")


FEW = [
    "model.id=launch/tiny_opt/model", "model.allow_pickle=false", "data.batch_size=2", "data.micro_batch_size=1",
    "data.num_train=2", "data.num_dev=1", "data.num_validation=2", "data.max_length=120", "train.steps=2",
    "train.eval_every=1", "train.log_every=1", "tracking.mlflow=false",
]  # fmt: skip
"""What is changed in a recipe so that it runs here."""


@pytest.mark.parametrize("file", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_trains(file: Path, server: JobServer, tmp_path: Path) -> None:
    """Its own task on a few records, method, adapter and sharding, with the bundled model on two ranks."""
    tree = yaml.safe_load(file.read_text())
    few = [*FEW, f"output_dir={tmp_path / 'runs'}"]
    if tree["task"]["name"] in TASKS_FROM_THE_HUB:
        few.append(f"task.path=tests/samples/{tree['task']['name']}")
    if file.stem == "own-jsonl":
        rows = [{"text": f"number {n}", "label": ("spam", "ham")[n % 2]} for n in range(8)]
        for split in ("train", "validation"):
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        few.append(f"task.path={tmp_path}")
    if tree.get("mesh", {}).get("shard_size") == 8:
        few.append("mesh.shard_size=2")
    if tree.get("adapter") and "keep" in tree["adapter"]:
        few += ["adapter.keep=4", "adapter.warmup_steps=1", "adapter.expand_every=1", "train.steps=3"]
    text = server.run(2, "--config", str(file.relative_to(ROOT)), *few)
    (summary,) = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/summary.json")]
    assert summary["steps"] >= 2 and f"method: {tree['optimizer']['name']}, " in text


def test_blackbox_compares(comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--dimension", "6", "--calls", "120", "--seeds", "2")
    main(comparison, monkeypatch, "--out", str(tmp_path), *small)
    report = json.loads((tmp_path / "comparison.json").read_text())
    table = (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "comparison.png").read_bytes().startswith(PNG)
    for name, setting in comparison.SETTINGS.items():
        outcomes = [outcome for outcome in report["outcomes"] if outcome["setting"] == name]
        published = ["JAGUAR, published steps"] if setting.frank_wolfe else []
        assert [o["method"] for o in outcomes] == [*published, "JAGUAR", "full differences", "SPSA"]
        for outcome in outcomes:
            assert f"| {name} | {outcome['method']} |" in table
            assert len(outcome["curves"]) == 2
            for curve, final in zip(outcome["curves"], outcome["final_errors"], strict=True):
                assert curve[-1][1] == final > -1e-6, "nothing is better than the optimum"
                assert all(calls <= 120 for calls, _ in curve)
                assert curve[0][1] == pytest.approx(1) and curve[0][0] in (0, 12)
            if outcome["tuning"]:
                assert outcome["tuning"][str(outcome["choice"])] == min(outcome["tuning"].values())


def test_blackbox_repeats_and_refuses(
    comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "logistic, l2 ball, FW, two-point"
    runs = [comparison.compare(name, 4, 60, 2, 3) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len({tuple(map(tuple, curve)) for curve in runs[0][0].curves}) == 2, "seeds differ"
    with pytest.raises(SystemExit, match="2"):
        main(comparison, monkeypatch, "--out", str(tmp_path), "--dimension", "10", "--calls", "20")
    assert "--calls >= 4 * dimension" in capsys.readouterr().err


def test_blackbox_keeps_what_is_finished(
    comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupt, the same command again, a part of it, and other options."""
    first, second, *others = comparison.SETTINGS
    small = ("--out", str(tmp_path), "--dimension", "4", "--calls", "60", "--seeds", "1", "--tuning-seeds", "1")
    asked = []

    def interrupted(name: str, *arguments: int, **options: int) -> Any:
        asked.append(name)
        if asked == [first, second]:
            raise KeyboardInterrupt
        return [comparison.Outcome(name, "SPSA", 1.0, {}, [0.5], [[(0, 1.0), (60, 0.5)]])]

    monkeypatch.setattr(comparison, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(comparison, monkeypatch, *small)
    assert f"| {first} | SPSA |" in (tmp_path / "comparison.md").read_text()
    main(comparison, monkeypatch, *small)
    assert asked == [first, second, second, *others], "the first is not run again"
    full = (tmp_path / "comparison.json").read_text(), (tmp_path / "comparison.md").read_text()
    assert list(json.loads(full[0])["runs"]) == list(comparison.SETTINGS)
    main(comparison, monkeypatch, *small, "--settings", second)
    with pytest.raises(SystemExit, match="2"):
        main(comparison, monkeypatch, *small, "--settings", second, "--seeds", "2")
    assert "expected --seeds 1 as in" in capsys.readouterr().err
    assert full == ((tmp_path / "comparison.json").read_text(), (tmp_path / "comparison.md").read_text())
    for text in ("", "[]", '{"outcomes": [{}]}', '{"outcomes": [], "runs": {}}'):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(SystemExit, match="2"):
            main(comparison, monkeypatch, *small)
        assert f"results in {tmp_path}/comparison.json, got" in capsys.readouterr().err


def test_the_optimum_of_the_comparison_is_one(comparison: ModuleType) -> None:
    """No feasible point is lower: the Frank-Wolfe gap is zero."""
    for name, setting in comparison.SETTINGS.items():
        problem, start = setting.problem(8), torch.zeros(8, dtype=torch.float64)
        x = comparison.minimizer(problem, setting.feasible, start)
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(problem.value(x), x)
        x = x.detach()
        gap = float(gradient @ (x - setting.feasible.linear_minimizer(gradient)))
        assert -1e-12 <= gap < 1e-8, name
        indices = torch.arange(comparison.NUM_EXAMPLES)
        assert float(problem.sampled(x, indices)) == pytest.approx(float(problem.value(x)), rel=1e-12)


TINY = ("--rounds", "2", "--warmup", "2", "--steps", "2", "--users", "40")


def test_repeated_learning_runs_repeats_and_keeps(
    repeated: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loop(folder: str, *arguments: str) -> dict[str, Any]:
        main(repeated, monkeypatch, "--out", str(tmp_path / folder), "--loops", "1,0.5", *TINY, *arguments)
        (found,) = json.loads((tmp_path / folder / "repeated_learning.json").read_text())["loops"]
        return dict(found)

    first = loop("a")
    assert capsys.readouterr().out.count("  round ") == 3
    assert len(first["rounds"]) == 3 and len(first["rounds"][0]["residuals"]) == 16
    assert (tmp_path / "a/repeated_learning.png").read_bytes().startswith(PNG)
    assert loop("a") == first and "round 1" not in capsys.readouterr().out, "a finished loop is kept"
    assert loop("b")["rounds"] == first["rounds"], "a function of the seed"
    assert loop("c", "--seed", "1")["rounds"] != first["rounds"]


def test_repeated_learning_keeps_the_loops_of_a_folder(
    repeated: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of other commands are reported too; other settings are refused."""
    for pair in ("1,0.5", "0.5,0.5"):
        main(repeated, monkeypatch, "--out", str(tmp_path), "--loops", pair, *TINY)
    loops = json.loads((tmp_path / "repeated_learning.json").read_text())["loops"]
    assert [loop["settings"]["usage"] for loop in loops] == [0.5, 1.0]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="2"):
        main(repeated, monkeypatch, "--out", str(tmp_path), "--loops", "1,0.5", *TINY, "--seed", "1")
    assert re.search(r"expected --seed 0 as in .*json, got 1: choose another --out", capsys.readouterr().err)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    for text in ("", "[]", '{"settings": {}}'):
        (tmp_path / "loop_1_0.5.json").write_text(text)
        with pytest.raises(SystemExit, match="2"):
            main(repeated, monkeypatch, "--out", str(tmp_path), "--loops", "1,0.5", *TINY)
        assert "loop_1_0.5.json, got" in capsys.readouterr().err


def test_repeated_learning_refuses(
    repeated: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (("--loops", "1.5,1"), "0 <= P <= 1"),
        (("--loops", "1,0.5", "1,0.5000001"), "at most six digits in --loops, got 1.0,0.5000001"),
        (("--loops", "1"), "two numbers P,S in --loops, got '1'"),
        (("--rounds", "0"), "rounds"),
        (("--lr", "nan"), "all finite"),
        (("--noise", "inf"), "all finite"),
        (("--seed", "-1"), "seed >= 0"),
        (("--out", "/dev/null/x"), "/dev/null"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(repeated, monkeypatch, "--out", str(tmp_path), *arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("benchmark_noise", ["--repeats", "0"], "whole number of at least 1, got '0'"),
        ("benchmark_noise", ["--directions", "0"], "whole number of at least 1, got '0'"),
        ("benchmark_noise", ["--device", "tpu"], "'tpu'"),
        ("benchmark_prefixes", ["--config", "/nowhere.yaml"], "a readable YAML file, got '/nowhere.yaml'"),
        ("benchmark_prefixes", ["--prompt", "2040"], "prompt and options of up to 2048 tokens, got 2060"),
        ("benchmark_muon", ["--config", "LIST"], "to hold a mapping"),
        ("benchmark_muon", ["--capacity", "0"], "whole number of at least 1, got '0'"),
        ("measure_memory", ["--rows", "16", "--micro-batches", "3"], "divide --rows, got 3 for 16 rows"),
        ("measure_memory", ["--tokens", "1"], "whole number of at least 2, got '1'"),
        ("measure_memory", ["--model", "/nowhere"], "there is no folder /nowhere"),
        ("measure_memory", ["--json="], "no blank words"),
    ],
)
def test_mistakes_of_a_measurement_are_told_in_a_line(
    name: str, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "LIST").write_text("[1, 2]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(recipe(name), monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_residuals_that_collapse_to_a_point(
    repeated: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that hardly moves and users who adopt its predictions as they are: the delta function."""
    main(repeated, monkeypatch, "--out", str(tmp_path), "--loops", "1,0", "--lr", "1e-9", *TINY)
    text = (tmp_path / "repeated_learning.json").read_text()
    (loop,) = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["loops"]
    last = loop["rounds"][-1]
    assert (last["std"], last["excess_kurtosis"], set(last["residuals"])) == (0, None, {0})
    assert loop["verdict"]["loop"].startswith("positive") and loop["verdict"]["change"] == 0


def test_the_factor_of_a_loop_is_the_mean_of_its_changes(repeated: ModuleType) -> None:
    """A random walk without drift: two standard errors cover 0 as often as they should, and few rounds have none."""
    walks = (
        torch.randn(400, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(0.1).cumsum(1).exp()
    )
    found = [repeated.verdict([{"std": std} for std in walk.tolist()]) for walk in walks]
    bounds = [2.447 * one["standard_error_of_log"] for one in found]
    covered = [abs(math.log(one["factor_per_round"])) <= bound for one, bound in zip(found, bounds, strict=True)]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.03)
    of = lambda *stds: repeated.verdict([{"std": std} for std in stds])  # noqa: E731
    steady = of(8.0, 2.0, 1.0, 0.5)
    assert steady["factor_per_round"] == pytest.approx(0.5) and steady["loop"].startswith("positive")
    assert steady["standard_error_of_log"] == pytest.approx(0, abs=1e-12) and steady["num_changes"] == 2
    assert of(1.0, 2.0, 4.0, 12.0)["loop"].startswith("neither"), "two changes that differ show nothing"
    two, one = of(8.0, 2.0, 1.0), of(8.0, 2.0)
    assert (two["factor_per_round"], two["standard_error_of_log"]) == (0.5, None) and two["loop"].startswith("neither")
    assert one["factor_per_round"] is one["standard_error_of_log"] is None


def test_moments_of_small_residuals(repeated: ModuleType) -> None:
    """Their fourth power is none in float64."""
    found = repeated.describe(1e-90 * torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert found["excess_kurtosis"] == pytest.approx(-2)


def test_what_is_recorded(repeated: ModuleType) -> None:
    """Usage p of the users takes m(x) + s * scale * noise, the others say the truth; round 0 is true."""
    numbers = {"rounds": 1, "warmup": 1, "steps": 1, "lr": 1e-3, "users": 2000, "noise": 0.0, "seed": 3}
    world = repeated.World(repeated.Settings(usage=0.3, adherence=2.0, **numbers))
    world.predict = lambda examples: torch.full((len(examples),), 10.0, dtype=torch.float64)
    examples = [Example("", ("", ""), gold=1)] * 2000
    assert torch.equal(world.recorded(0, examples, 0.5), torch.ones(2000, dtype=torch.float64))
    scores = world.recorded(1, examples, 0.5)
    taken = scores[scores != 1]
    assert abs(len(taken) / 2000 - 0.3) < 4 * math.sqrt(0.21 / 2000)
    assert abs(float(taken.mean()) - 10) < 4 / math.sqrt(len(taken))
    assert abs(float(taken.std()) - 1) < 4 / math.sqrt(2 * len(taken)), "s * scale = 1"


def test_the_objective_is_the_squared_error_of_the_prediction(repeated: ModuleType) -> None:
    world = repeated.World(repeated.Settings(1.0, 1.0, 1, 1, 1, 1e-3, 40, 0.5, 0))
    examples, target = world.train[:5], torch.linspace(-1, 1, 5, dtype=torch.float64)
    batch = world.batch(examples, target)
    directions = world.engine.directions(0)
    losses = world.engine.losses([batch], directions)
    residuals = world.predict(examples) - target
    assert losses.count == 5
    assert losses.values[0] == pytest.approx(float(residuals.square().mean()), rel=0.05), "tau away from it"
    logprobs = world.engine.answers.answer_logprobs(batch).view(5, 2).double()
    torch.testing.assert_close(world.predict(examples), (logprobs[:, 1] - logprobs[:, 0]) / 2)


@pytest.mark.parametrize(("factor", "name"), [(0.5, "positive"), (1.6, "negative"), (1.0, "neither")])
def test_verdict(repeated: ModuleType, factor: float, name: str) -> None:
    rounds = [{"std": factor**number * (1 + 0.02 * (-1) ** number)} for number in range(8)]
    found = repeated.verdict(rounds)
    assert found["loop"].startswith(name)
    assert found["factor_per_round"] == pytest.approx(factor, rel=0.03)
    assert repeated.verdict(rounds[:2])["standard_error_of_log"] is None, "one round has no error"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository without an environment."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("launch", "tests", "zoscale", "ds_configs", "pyproject.toml"):
        (copy / name).symlink_to(ROOT / name)
    return copy


def interpreter(checkout: Path, script: str) -> None:
    """Something in the place of the environment's python."""
    tools = checkout / ".venv/bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text(f"#!/bin/bash\n{script}\n")
    (tools / "python").chmod(0o755)


@pytest.mark.slow
def test_the_checks_for_a_gpu_run_at_a_toy_size(checkout: Path, tmp_path: Path) -> None:
    """With the interpreter that is there; all that needs a GPU is skipped by name, and what is left out not judged."""
    needs_compiler()
    out = tmp_path / "out"
    command = ["bash", str(checkout / "launch/gpu_checks.sh"), str(out)]
    parts = "passes opt-13b opt-13b-blocks tests"
    printed = run(command, SMALL="1", PARTS=parts, PYTHON=sys.executable).stdout
    assert printed.startswith(f"as it is: {sys.executable}, torch") and printed.endswith(f"results: {out}\n")
    reports = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert reports.keys() == {"passes", "opt-13b", "opt-13b-blocks"}
    for name, compiled in (("opt-13b", "off"), ("opt-13b-blocks", "blocks")):
        assert [row["compile"] for row in reports[name]["rows"]] == 4 * [compiled]
    assert "fan_out" in (out / "opt-13b.txt").read_text()
    told = printed[printed.index("== verdicts") :]
    assert "not measured  opt-13b, bf16 LoRA: at least 18 steps/s\n" in told, "a toy is not OPT-13B"
    assert "FAIL          passes over weights: at least 80% of a copy's bandwidth: " in told
    assert "not measured  opt-13b-cuda_graphs, bf16 LoRA: at least 18 steps/s\n" in told
    if not torch.cuda.is_available():
        number = sum(path.read_text().count("\n@pytest.mark.gpu") for path in (ROOT / "tests").glob("*.py"))
        assert told.count("needs a CUDA device") == number > 5
    assert run([*command[:2], str(out)], PARTS="opt-14b", PYTHON=sys.executable, check=False).returncode == 2


def test_no_environment_is_taken_for_installed_that_is_not(checkout: Path, tmp_path: Path) -> None:
    """Pip fails: the checks end there, and the next call installs again."""
    interpreter(checkout, 'echo "$@" >> "$(dirname "$0")/../asked"; exit 1')
    for calls in (1, 2):
        found = run(["bash", str(checkout / "launch/gpu_checks.sh"), str(tmp_path)], check=False)
        assert found.returncode == 1 and "no environment" in found.stdout
        assert (checkout / ".venv/asked").read_text() == calls * "-m pip install --quiet -e .[test]\n"


def test_no_interpreter_is_taken_as_it_is_that_lacks_a_dependency(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "greenlet.py").write_text("raise ImportError\n")
    interpreter(checkout, "exit 1")
    command = ["bash", str(checkout / "launch/gpu_checks.sh"), str(tmp_path / "out")]
    found = run(command, PARTS="passes", SMALL="1", PYTHON=sys.executable, PYTHONPATH=str(tmp_path), check=False)
    assert found.returncode == 1 and "no environment" in found.stdout and "as it is" not in found.stdout


def test_verdicts_on_a_gpu(tmp_path: Path) -> None:
    verdicts = recipe("gpu_verdicts").verdicts
    assert [verdict.is_reached for verdict in verdicts(tmp_path)] == 19 * [None]
    row = {"variant": "fan_out", "ranks": 1, "seconds_per_step": 0.05, "peak_bytes": 2.9e9, "model_bytes": 2.6e9}
    slow = {"seconds_per_step": 0.06}
    for name, dtype, changes in (("opt-13b", "bf16", {}), ("opt-1.3b", "fp16", {}), ("opt-13b-blocks", "bf16", slow)):
        rows = [own | {"dtype": dtype} for own in (row | {"variant": "bare", "peak_bytes": 1.0}, row | changes)]
        report = {"model": name.removesuffix("-blocks"), "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    (tmp_path / "passes.json").write_text(json.dumps({"perturb, gaussian": 0.7, "zo_sgd, gaussian": 0.9}))
    cell = row | {"scheme": "lora", "probe": "block", "q": 1, "dtype": "fp32", "ratio_to_bare": 1.04}
    changes = [{}, {"variant": "mezo", "ratio_to_bare": 1.5}, {"scheme": "full", "ratio_to_bare": 1.3}, {"q": 4}]
    report = {"model": "opt-125m", "rows": [cell | own for own in changes]}
    (tmp_path / "opt-125m-fp32.json").write_text(json.dumps(report))
    assert [str(verdict)[:12].strip() for verdict in verdicts(tmp_path)] == [
        "FAIL", "pass", "FAIL", "FAIL", "FAIL", "not measured", "not measured", "pass",
        *5 * ["not measured"],
        "pass", "FAIL", "not measured", "not measured", "pass",
        "not measured",
    ]  # fmt: skip
    assert str(verdicts(tmp_path)[-2]).endswith("opt-125m, fp32 lora: at most 0.7 x mezo: 0.69")
    assert "perturb, gaussian 70.0%" in str(verdicts(tmp_path)[0])

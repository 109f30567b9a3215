"""Comparing runs: grouping, bands and verdicts on hand-made runs whose answer is known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoscale.comparison import tables
from zoscale.comparison.comparison import Comparison, compare
from zoscale.comparison.groups import AXES, group_runs, smooth
from zoscale.comparison.numbers import Spread, mebibytes, short, spread
from zoscale.comparison.runs import Run, read_runs
from zoscale.comparison.verdict import chance_of_separation
from zoscale.config import ConfigError

STEPS = (0, 10, 20, 30, 40)
FORWARDS, SECONDS, HOURS = AXES


def run(
    name: str,
    seed: int,
    accuracy: tuple[float, ...],
    *,
    per_step: float = 0.1,
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, dict[int, float]] | None = None,
    status: str = "FINISHED",
) -> Run:
    """A run of 2 ranks that is evaluated every 10 steps, logs every 5 and takes 4 forwards a step."""
    own = {"optimizer.name": name, "optimizer.lr": "0.001", "seed": str(seed), "output_dir": f"/{name}/{seed}"}
    steps = STEPS[: len(accuracy)]
    logged = range(5, steps[-1] + 1, 5)
    made = {
        "dev/accuracy": dict(zip(steps, accuracy, strict=True)),
        "dev/loss": {step: 1 - value for step, value in zip(steps, accuracy, strict=True)},
        "dev/seconds": dict.fromkeys(steps, 1.0),
        "validation/before/accuracy": {0: accuracy[0]},
        "validation/final/accuracy": {steps[-1]: accuracy[-1]},
        "train/loss": {step: 1.0 / step for step in logged},
        "train/forwards": {step: step * 4.0 for step in logged},
        "train/seconds": {step: step * per_step for step in logged},
        "train/device_hours": {step: step * per_step * 2 / 3600 for step in logged},
        **{f"rank_{rank}/tokens_per_second": {5: 1.0, 10: 100.0, 15: 102.0 + rank} for rank in (0, 1)},
        **{f"rank_{rank}/peak_memory_bytes": {5: 2.0**20, 10: 2.0**21} for rank in (0, 1)},
        **{f"rank_{rank}/seconds_per_step/forward": dict.fromkeys(logged, 0.06 + rank / 100) for rank in (0, 1)},
    }
    known = {"select_by": "accuracy", "git_commit": "abc"} | dict(tags or {})
    return Run(
        f"id-{name}-{seed}", f"{name}-{seed}", status, own | dict(params or {}), known, made | dict(metrics or {})
    )


def two(*, second: tuple[float, ...] = (0.5, 0.5, 0.5, 0.55, 0.6), seeds: int = 3) -> list[Run]:
    """A method of some seeds, and one that is worse and takes half as long per step."""
    good = [(0.5, 0.6, 0.7, 0.8, value) for value in (0.79, 0.81, 0.83, 0.82)[:seeds]]
    runs = [run("muon", seed, curve) for seed, curve in enumerate(good)]
    return runs + [run("sgd", seed, second, per_step=0.05) for seed in range(seeds)]


def test_a_parameter_that_is_null_counts_as_one_that_an_older_version_did_not_have() -> None:
    new, old = run("a", 0, (0.5, 0.6), params={"train.select_by": "None"}), run("a", 1, (0.5, 0.6))
    assert len(group_runs([new, old])) == 1
    assert len(group_runs([new, run("a", 1, (0.5, 0.6), params={"train.select_by": "loss"})])) == 2


def test_groups_that_were_asked_other_questions_are_told() -> None:
    asked = [{"task.path": name, "data.num_dev": "10"} for name in ("one", "two")]
    runs = [run(name, 0, (0.5, 0.6), params=params) for name, params in zip(("a", "b"), asked, strict=True)]
    (note,) = (note for note in compare(runs, "x", None).notes if "other examples" in note)
    assert note.startswith("The groups were scored on other examples or prompts (task.path): some may be easier.")


def verdict(comparison: Comparison, unit: str) -> dict[str, Any]:
    (found,) = [found for found in comparison.to_dict()["verdicts"] if found["per"] == unit]
    return found


# --- groups --------------------------------------------------------------------------------------------------


def test_runs_that_differ_only_in_seed_are_one_group() -> None:
    groups = group_runs([*two(), run("muon", 7, (0.5,), params={"tracking.uri": "http://x", "name": "other"})])
    assert [(group.label, group.seeds) for group in groups] == [
        ("muon", ["0", "1", "2", "7"]),
        ("sgd", ["0", "1", "2"]),
    ]
    assert "seed" not in groups[0].params


def test_ranks_and_devices_are_compared_too() -> None:
    runs = [run("muon", 0, (0.5,), tags={"world_size": str(size)}) for size in (2, 4)]
    assert [group.label for group in group_runs(runs)] == ["world_size 2", "world_size 4"]


@pytest.mark.parametrize(
    ("own", "labels"),
    [
        ([{}, {"optimizer.lr": "0.01"}], ["lr 0.001", "lr 0.01"]),
        ([{}, {"probe.name": "row"}], ["muon", "row"]),
        (
            [{}, {"optimizer.lr": "0.01"}, {"optimizer.name": "sgd"}],
            ["muon, lr 0.001", "muon, lr 0.01", "sgd, lr 0.001"],
        ),
        ([{"optimizer.beta": "0.9"}, {"optimizer.name": "sgd"}], ["muon", "sgd"]),
        (
            [
                {"optimizer.name": name, "data.p": str(int(place == 1)), "data.q": str(place % 2)}
                for place, name in enumerate(("muon", "muon", "sgd", "sgd"))
            ],
            ["muon, q 0", "muon, q 1", "sgd, q 0", "sgd, q 1"],
        ),
        (
            [{f"data.p{i}": str(i == j) for i in range(6)} for j in range(6)],
            ["p0 True, p1 False, p2 False, p3 False", "p0 False, p1 True, p2 False, p3 False"],
        ),
    ],
)
def test_labels_tell_groups_apart_with_few_words(own: list[dict[str, str]], labels: list[str]) -> None:
    found = [group.label for group in group_runs([run("muon", 0, (0.5,), params=changes) for changes in own])]
    assert found[: len(labels)] == labels
    assert len(set(found)) == len(own), "no two groups have one label"


def test_a_band_is_the_mean_and_the_range_at_the_steps_that_all_seeds_have() -> None:
    short_one = run("muon", 1, (0.3, 0.5, 0.9), per_step=0.3)
    (group,) = group_runs([run("muon", 0, (0.5, 0.6, 0.7, 0.8, 0.9)), short_one])
    curve = group.curve("dev/accuracy", SECONDS)
    assert curve is not None
    assert curve.steps == [0, 10, 20]
    assert curve.x == pytest.approx([0.0, 2.0, 4.0]), "the mean cost of the seeds"
    assert curve.mean == pytest.approx([0.4, 0.55, 0.8])
    assert (curve.low, curve.high) == ([0.3, 0.5, 0.7], [0.5, 0.6, 0.9])
    assert group.curve("dev/absent", SECONDS) is None
    assert group.curve("validation/accuracy", FORWARDS) is not None, "before and final are two points of one curve"


def test_costs_between_logged_steps_are_interpolated_and_never_invented() -> None:
    one = run("muon", 0, (0.5, 0.6))
    assert SECONDS.costs(one, [0, 7, 11]) == {0: 0.0, 7: pytest.approx(0.7)}
    assert SECONDS.costs(run("muon", 0, (0.5,)), [0]) == {}


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    metrics = {name: {step: 1.0 * step for step in range(1, 2001)} for name in ("train/loss", "train/forwards")}
    (group,) = group_runs([run("muon", 0, (0.5,), metrics=metrics)])
    curve = group.curve("train/loss", FORWARDS)
    assert curve is not None
    assert len(curve.x) == 400 and curve.x[-1] == 2000.0 and curve.mean == curve.x


def test_smoothing_keeps_the_steps() -> None:
    assert smooth({1: 1.0, 2: 3.0, 3: 8.0}, 2) == {1: 1.0, 2: 2.0, 3: 5.5}


def test_a_backward_pass_is_two_forward_passes() -> None:
    """A first-order run of 1 + 1 passes a step pays 3; zero-order runs log no backward passes."""
    counts = {step: 1.0 * step for step in range(5, 41, 5)}
    first_order = run("adamw", 0, (0.5, 0.6, 0.7), metrics={"train/forwards": counts, "train/backwards": counts})
    comparison = compare([first_order, run("muon", 0, (0.5, 0.6, 0.7))], "both", None)
    assert FORWARDS.costs(first_order, [0, 7, 10]) == {0: 0.0, 7: pytest.approx(21.0), 10: 30.0}
    assert [group["totals"]["forward_equivalents"]["mean"] for group in comparison.to_dict()["groups"]] == [120.0, 80.0]
    found = verdict(comparison, "forward equivalent")
    assert (found["budget"], [s["cost_to_target"] for s in found["standings"]]) == (60.0, [60.0, 80.0])
    assert tables.result_table(comparison)[0][5] == "forward equivalents"


# --- verdicts ------------------------------------------------------------------------------------------------


def test_a_clear_verdict() -> None:
    comparison = compare(two(seeds=4), "both", None)
    assert comparison.goal.metric == "dev/accuracy"
    found = verdict(comparison, "forward equivalent")
    assert (found["best"], found["certainty"], found["budget"]) == ("muon", "clear", 160.0)
    assert found["standings"][0]["value"] == {
        "mean": pytest.approx(0.815),
        "low": 0.8,
        "high": 0.83,
        "num": 4,
    }
    assert found["target"] == 0.6
    assert [s["cost_to_target"] for s in found["standings"]] == [40.0, 160.0]
    text = "\n".join(tables.explanations(comparison))
    assert "muon is better than sgd on 4 of 4 shared seeds (mean difference 0.215)" in text
    assert "dev/accuracy 0.6000 takes, in forward equivalents: muon 40, sgd 160" in text


def test_few_seeds_are_never_clear() -> None:
    """The chance that equal groups separate is at most 5 % from four seeds each on, and is told."""
    seeds = lambda name, num: [one for one in two(seeds=4) if one.params["optimizer.name"] == name][:num]  # noqa: E731
    for num, other, chance in ((2, 2, "33%"), (3, 3, "10%"), (3, 4, "6%"), (2, 4, "13%")):
        found = verdict(compare([*seeds("muon", num), *seeds("sgd", other)], "x", None), "forward equivalent")
        assert found["certainty"] == "separate, few seeds"
        assert found["explanation"].endswith(f"which of two equal groups one does by chance in {chance} of cases")
    found = verdict(compare(two(seeds=4), "x", None), "forward equivalent")
    assert found["certainty"] == "clear" and found["explanation"].endswith("(4 seeds each): by chance 2.9%")
    third = [run("adam", seed, (0.5, 0.5, 0.5, 0.5, 0.6)) for seed in range(2)]
    found = verdict(compare([*two(seeds=4), *third], "x", None), "forward equivalent")
    assert found["certainty"] == "separate, few seeds", "of the group that has the fewest"
    draws = np.random.default_rng(0).permuted(np.tile(np.arange(6.0), (20_000, 1)), axis=1)
    separate = (draws[:, :3].min(1) > draws[:, 3:].max(1)) | (draws[:, :3].max(1) < draws[:, 3:].min(1))
    assert separate.mean() == pytest.approx(chance_of_separation(3, 3), abs=0.01)


def test_the_same_seconds_are_not_the_same_steps() -> None:
    """Twice as fast per step, the worse method per forward is the better one per second."""
    runs = two(second=(0.5, 0.5, 0.72, 0.75, 0.75))
    found = {axis.unit: verdict(compare(runs, "both", None), axis.unit) for axis in AXES}
    assert found["forward equivalent"]["best"] == "muon"
    assert (found["second"]["best"], found["second"]["budget"]) == ("sgd", 2.0)
    assert found["second"]["standings"][1]["value"]["mean"] == pytest.approx(0.7)
    assert found[HOURS.unit]["best"] == "sgd"
    assert found[HOURS.unit]["budget"] == pytest.approx(2.0 * 2 / 3600)


def test_overlapping_bands_are_said_to_overlap() -> None:
    runs = two()
    runs[-1] = run("sgd", 2, (0.5, 0.5, 0.5, 0.5, 0.805), per_step=0.05)
    comparison = compare(runs, "both", None)
    found = verdict(comparison, "forward equivalent")
    assert (found["best"], found["certainty"]) == ("muon", "within the seeds' band")
    assert "the worst seed does not beat the best seed of sgd" in found["explanation"]
    assert "3 of 3 shared seeds" in "\n".join(tables.explanations(comparison)), "paired, it is better all the same"


def test_one_seed_is_said_to_be_one() -> None:
    comparison = compare(two()[:4], "both", None)
    assert verdict(comparison, "forward equivalent")["certainty"] == "one seed only"
    assert "sgd has one seed: nothing is known of its noise." in comparison.notes
    assert not any("other examples" in note for note in comparison.notes)
    again = compare([*two()[:4], two()[3]], "both", None)
    assert verdict(again, "forward equivalent")["certainty"] == "one seed only", "a repeated seed is no second seed"
    assert "sgd has 2 runs and 1 different seeds; every run counts." in again.notes


def test_a_tie_and_a_single_group() -> None:
    same = [run(name, seed, (0.5, 0.6)) for name in ("a", "b") for seed in (0, 1)]
    tie = compare(same, "both", None)
    assert verdict(tie, "second")["certainty"] == "tie"
    assert tables.verdict_table(tie)[1][1] == "-", "nobody is the best"
    alone = compare(same[:2], "one", None)
    assert verdict(alone, "second")["certainty"] == "nothing to compare"
    assert tables.verdict_table(alone)[1][1] == "-"


def test_a_method_that_never_learns_sets_no_target() -> None:
    runs = [run("muon", 0, (0.5, 0.9)), run("sgd", 0, (0.5, 0.4))]
    found = verdict(compare(runs, "both", None), "forward equivalent")
    assert found["target"] is None
    assert all(standing["cost_to_target"] is None for standing in found["standings"])


def test_unequal_numbers_of_evaluations_are_told() -> None:
    """Only as far as they count: a run that goes on is not better for it."""
    often = {"dev/accuracy": {step: 0.5 + step / 400 for step in range(0, 41, 5)}}
    runs = [*two(), *(run("adam", seed, (0.5, 0.5, 0.5, 0.5, 0.6), metrics=often) for seed in range(2))]
    (note,) = (note for note in compare(runs, "x", None).notes if "unequally often" in note)
    assert note.startswith("Evaluated unequally often up to the same forward equivalents: muon 5, ")
    assert "adam 9" in note and "by chance" in note
    longer = {"dev/accuracy": dict.fromkeys(range(0, 101, 10), 0.5), "train/forwards": {5: 20.0, 100: 400.0}}
    for equal in (two(), [*two(), run("adam", 0, (0.5,) * 5, metrics=longer)]):
        assert not any("unequally often" in note for note in compare(equal, "x", None).notes)
    assert not any("unequally often" in note for note in compare(runs, "x", "validation/accuracy").notes)


def test_the_cost_of_equal_quality_is_that_of_what_all_runs_reach() -> None:
    """The worst seed of the worst group is below its mean, and has a cost too."""
    sgd = [(0.5, 0.5, 0.55, 0.6, 0.66), (0.5, 0.5, 0.5, 0.55, 0.6), (0.5, 0.56, 0.6, 0.6, 0.69)]
    runs = [*two()[:3], *(run("sgd", seed, curve) for seed, curve in enumerate(sgd))]
    comparison = compare(runs, "x", None)
    found = verdict(comparison, "forward equivalent")
    assert (found["target"], [s["cost_to_target"] for s in found["standings"]]) == (0.6, [40.0, 120.0])
    assert "takes, in forward equivalents: muon 40, sgd 120" in "".join(tables.explanations(comparison))
    unlogged = {name: {5: 1.0, 30: 30.0} for axis in AXES for name in axis.metrics}
    late = run("sgd", 0, (0.5, 0.5, 0.5, 0.6, 0.7), metrics=unlogged)
    found = verdict(compare([*two()[:3], late], "x", None), "forward equivalent")
    assert found["target"] == 0.6, "what is reached where the cost is not known any more, is not"


def test_less_loss_is_better() -> None:
    comparison = compare(two(seeds=4), "both", "loss")
    assert comparison.goal.lower_is_better
    found = verdict(comparison, "forward equivalent")
    assert (found["best"], found["certainty"], found["target"]) == ("muon", "clear", pytest.approx(0.4))
    assert comparison.metrics == ("dev/accuracy", "dev/loss"), "seconds are no metric of the model"


def test_validation_is_judged_by_what_a_run_leaves() -> None:
    """The weights that dev chose, else the last; neither the untuned model's nor the better of several."""
    best = {"validation/best/accuracy": {40: 0.7}, "validation/final/accuracy": {40: 0.8}}
    worse = {"validation/before/accuracy": {0: 0.9}, "validation/final/accuracy": {39: 0.6}}
    curve = (0.5, 0.6, 0.7, 0.8, 0.9)
    runs = [run("a", seed, curve, metrics=best) for seed in range(4)]
    runs += [run("b", seed, curve, metrics=worse, per_step=0.09) for seed in range(4)]
    comparison = compare(runs, "x", "validation/accuracy")
    found = verdict(comparison, "forward equivalent")
    assert {s["label"]: s["value"]["mean"] for s in found["standings"]} == {"a": 0.7, "b": 0.6}
    assert (found["best"], found["certainty"], found["budget"], found["target"]) == ("a", "clear", 160.0, None)
    assert [group["best"]["mean"] for group in comparison.to_dict()["groups"]] == [0.7, 0.6]
    slower = verdict(comparison, "second")
    assert slower["certainty"] == "unequal costs", "what b reaches in as much time is not known"
    assert slower["explanation"].startswith("a has paid 4, more than b: ")
    assert [row[1] for row in tables.verdict_table(comparison)[1:]] == ["a", "-", "-"]
    begun = Run("1", "new", "RUNNING", {}, {}, {"validation/before/accuracy": {0: 0.5}})
    assert (
        "Left out, as they have no validation/accuracy: new."
        in compare([*runs, begun], "x", "validation/accuracy").notes
    )
    with pytest.raises(ConfigError, match="a run that has been evaluated, got none"):
        compare([begun], "x", "validation/accuracy")


def test_metrics_are_those_that_were_logged() -> None:
    """Any name will do; the one that chose the weights is the default."""
    curves = {seed: {"dev/f1": {0: 0.1, 10: 0.2 + seed}} for seed in (0, 1)}
    runs = [run("a", seed, (0.5, 0.5), tags={"select_by": "f1"}, metrics=curve) for seed, curve in curves.items()]
    comparison = compare(runs, "f1", None)
    assert comparison.goal.metric == "dev/f1" and "dev/f1" in comparison.metrics
    assert compare(runs, "loss", "train/loss").goal.metric == "train/loss"
    with pytest.raises(ConfigError, match=r"got f2: choose with --metric, of: .*dev/f1"):
        compare(runs, "f2", "f2")
    unscored = {"train/loss": {0: 1.0}, "adapters/weight/model.layers.0.q_proj": {0: 1.0}}
    with pytest.raises(ConfigError, match="a run that has been evaluated, got none"):
        compare([Run("1", "new", "RUNNING", {}, {"select_by": "f1"}, unscored)], "new", None)
    mixed = [runs[0], run("a", 1, (0.5,))]
    with pytest.raises(ConfigError, match="got accuracy, f1: choose with --metric, of: accuracy, f1, loss"):
        compare(mixed, "mixed", None)


def test_what_a_reader_must_know_is_noted() -> None:
    unjudged = run(
        "old", 0, (0.5, 0.6), metrics={name: {} for name in (name for axis in AXES for name in axis.metrics)}
    )
    other = run("other", 0, (0.5,), tags={"git_commit": "def"}, status="RUNNING")
    nothing = run("empty", 0, (math.nan,))
    stopped = run("muon", 3, (0.5, 0.6), status="UNFINISHED")
    comparison = compare([*two(), unjudged, other, nothing, stopped], "all", None)
    notes = " ".join(comparison.notes)
    assert "The runs of muon have different lengths; its curves end at step 10." in notes
    assert "RUNNING: other-0." in notes and "UNFINISHED: muon-3." in notes
    assert "not judged: old, other." in notes
    assert "Left out, as they have no dev/accuracy: empty-0." in notes
    assert "different commits: abc, def." in notes


def test_runs_without_costs_are_shown_and_not_judged() -> None:
    without = {name: dict[int, float]() for axis in AXES for name in axis.metrics}
    comparison = compare([run(name, 0, (0.5, 0.6), metrics=without) for name in ("a", "b")], "x", None)
    assert comparison.verdicts == () and not list(tables.explanations(comparison))
    assert "Without running totals of their cost, so not judged: a, b." in comparison.notes
    assert [row[:5] for row in tables.result_table(comparison)[1:]] == [
        [name, "1", "0.5000", "0.6000", "0.6000"] for name in ("a", "b")
    ]


def test_a_folder_says_of_its_run_what_a_store_says(tmp_path: Path) -> None:
    """A run that was told to stop is KILLED in both, and is left out beside others."""
    card = {"experiment": "e", "run_name": "r", "params": {}, "tags": {}}
    for name, mark in {"a": "summary.json", "b": "told_to_stop", "c": None}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tracking.json").write_text(json.dumps(card))
        (tmp_path / name / "metrics.jsonl").write_text("")
        if mark is not None:
            (tmp_path / name / mark).write_text("{}")
    runs, _ = read_runs([str(tmp_path / name) for name in "abc"], "")
    assert [run.status for run in runs] == ["FINISHED", "KILLED", "UNFINISHED"]


def test_a_run_that_broke_off_does_not_end_the_comparison() -> None:
    """Its folder may end before training: nothing could be said of the others at that cost."""
    broken = [run("sgd", 3, (0.5,), status="FAILED"), run("muon", 3, (0.5, 0.6), status="KILLED")]
    whole, with_broken = compare(two(), "x", None), compare([*two(), *broken], "x", None)
    assert [group.runs for group in with_broken.groups] == [group.runs for group in whole.groups]
    assert [verdict.budget for verdict in with_broken.verdicts] == [verdict.budget for verdict in whole.verdicts]
    notes = " ".join(with_broken.notes)
    assert "FAILED: sgd-3. Left out" in notes and "KILLED: muon-3. Left out" in notes
    assert [len(group.runs) for group in compare(broken, "x", None).groups] == [1, 1], "unless all did"


def test_a_failed_seed_counts() -> None:
    """What diverged is in no mean, so no verdict is clear; one that was told to stop, or ran again, is no failure."""
    seeds = [one for one in two(seeds=4) if (one.params["optimizer.name"], one.seed) != ("sgd", "3")]
    diverged, stopped = ([*seeds, run("sgd", 3, (0.5,), status=status)] for status in ("FAILED", "KILLED"))
    failed = compare(diverged, "x", None)
    found = verdict(failed, "forward equivalent")
    assert found["certainty"] == "failed seeds" and found["explanation"].endswith("seeds failed: sgd (3 of 4) are left")
    assert [row[1] for row in tables.result_table(failed)] == ["seeds", "4", "3 of 4"]
    assert [group["failed_seeds"] for group in failed.to_dict()["groups"]] == [[], ["3"]]
    assert "sgd has 3 of 4 seeds, seed 3 failed: its figures are of those that did not." in failed.notes
    unscored = Run("1", "early", "FAILED", diverged[-1].params, diverged[-1].tags, {})
    assert verdict(compare([*seeds, unscored], "x", None), "forward equivalent") == found
    assert verdict(compare(stopped, "x", None), "forward equivalent")["certainty"] == "separate, few seeds"
    again = compare([*diverged, two(seeds=4)[-1]], "x", None)
    assert verdict(again, "forward equivalent")["certainty"] == "clear"
    assert [group.num_seeds for group in compare(diverged[-1:], "x", None).groups] == ["0 of 1"]


def test_differences_are_only_what_differs() -> None:
    comparison = compare(
        [*two(), run("sgd", 0, (0.5, 0.6), params={"optimizer.lr": "0.1", "probe.rows": "0.5"})], "x", None
    )
    assert comparison.differences == {
        "optimizer.lr": ["0.001", "0.001", "0.1"],
        "optimizer.name": ["muon", "sgd", "sgd"],
        "probe.rows": ["-", "-", "0.5"],
    }


def test_ranks_and_time() -> None:
    (group,) = compare(two()[:3], "x", None).groups
    assert group.ranks[1] == {"rank": 1.0, "tokens_per_second": 100.0, "peak_memory_bytes": 2.0**21}
    assert group.seconds_per_step == {"forward": pytest.approx(0.065), "evaluation": pytest.approx(5 / 40)}
    json.dumps(compare(two(), "x", None).to_dict(), allow_nan=False)


# --- text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (240.0, "240"), (12.3456, "12.35"), (0.81333, "0.8133"), (0.0052816, "0.005282"), (1e-7, "1e-07"),
     (123456.78, "123,457"), (-0.25, "-0.2500"), (None, "-"), (math.inf, "inf")],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert short(value) == text


def test_spreads_and_bytes() -> None:
    assert spread(Spread.of([1.0, 2.0, None, math.nan])) == "1.500 [1, 2]"
    assert spread(Spread.of([2.0, 2.0])) == "2" and spread(Spread.of([])) == "-"
    assert (mebibytes(2.0**20), mebibytes(3 * 2.0**30), mebibytes(None)) == ("1.0 MiB", "3.00 GiB", "-")


def test_tables_say_what_was_measured() -> None:
    larger = {"rank_1/peak_memory_bytes": {10: 2.0**22}, "rank_1/gathered_bytes_per_step": {10: 2.0**20}}
    runs = [run("muon", seed, (0.5, 0.9, 0.7, 0.6, 0.8), metrics=larger) for seed in (0, 1)]
    comparison = compare([*runs, run("sgd", 0, (0.5, 0.5, 0.5, 0.5, 0.6), per_step=0.05)], "x", None)
    muon = ["muon", "2", "0.5000", "0.8000", "0.9000", "160", "4", "0.002222", "200", "4.0 MiB", "1.0 MiB"]
    sgd = ["sgd", "1", "0.5000", "0.6000", "0.6000", "160", "2", "0.001111", "200", "2.0 MiB", "-"]
    assert tables.result_table(comparison)[1:] == [muon, sgd]
    assert tables.time_table(comparison) == [["group", "forward", "evaluation", "sum"],
                                             *([name, "65", "125", "190"] for name in ("muon", "sgd"))]  # fmt: skip
    assert tables.run_table(comparison)[1] == ["muon", "muon-0", "0", "FINISHED", "40", "abc", "id-muon-0"]
    assert tables.difference_table(comparison)[1:] == [["optimizer.name", "muon", "sgd"]]


def test_a_terminal_gets_no_control_characters() -> None:
    assert list(tables.align([["a", "b"], ["\x1b[31mred", "x"]])) == ["a".ljust(15) + "b", r"'\x1b[31mred'  x"]


def test_the_picture_files_are_drawn(tmp_path: Path) -> None:
    from matplotlib.image import imread

    from zoscale.comparison.pictures import PICTURES, write_pictures

    odd = run("a$b_{", 0, (0.5, 0.6))
    write_pictures(compare([*two(), odd], "x", None), tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(PICTURES)
    for path in tmp_path.glob("*.png"):
        assert imread(path)[..., :3].std() > 0.05, f"{path.name} is blank"

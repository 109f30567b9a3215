"""`memory`: the peak of a rank by method and scheme, measured and planned; the paper's Table 3 beside it.

Measured are a few steps of the preset's model: on a CPU the resident set less that of the same run with a tiny model
(Python and its libraries), on a GPU the allocator's peak. Planned are models of published sizes (`zoscale plan`).
"""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from reproduction.facts import heading, missing
from reproduction.markdown import gigabytes, megabytes, number, table
from reproduction.pictures import Pairs, draw_pairs
from reproduction.runner import Runner, summary_of
from reproduction.study import HERE, Cell, Study, merge
from zoscale.comparison.palette import colour
from zoscale.config import ConfigError, ModelConfig, RunConfig, build, read_yaml
from zoscale.devices import DEVICES
from zoscale.estimators import Estimator
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.loading import read_model_config
from zoscale.plan.fit import state_per_element
from zoscale.plan.footprint import ModelShapes
from zoscale.plan.report import make_plan
from zoscale.run_directory import write_text

_FIRST_ORDER_STATE = {"fo_sgd": 0, "fo_adamw": 2}  # fp32 values per trainable element
_PLAIN = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # freed memory goes back to the system and is not counted


def run(study: Study, runner: Runner) -> None:
    """A few steps of each method and scheme, and once of a model that weighs nothing."""
    one = replace(runner, environment=_PLAIN)
    one.run([*cells(study).values(), empty(study)])


def cells(study: Study) -> dict[tuple[str, str], Cell]:
    """By scheme and method."""
    return {
        (scheme, method): study.cell(scheme, method, study.lrs[scheme][method][0], study.seeds[0])
        for scheme in study.schemes
        for method in study.methods
        if method in study.lrs[scheme]
    }


def empty(study: Study) -> Cell:
    """What a run takes without a model: that of a tiny one.

    Raises:
        ConfigError: if no method is left.
    """
    first = next(iter(cells(study).values()), None)
    if first is None:
        raise ConfigError("a method that one of --schemes is for", ", ".join(study.methods), "name others")
    tiny = replace(study, tree=study.tree | {"base": merge(study.tree["base"], study.tree["without"])})
    cell = tiny.cell(first.scheme, first.method, first.lr, study.seeds[0])
    return replace(cell, config=replace(cell.config, name="libraries"))


def peak(cell: Cell) -> int | None:
    """Bytes of the rank that takes most, while it trains; None if the run is not finished."""
    summary = summary_of(cell)
    return None if summary is None else max(rank["peak_memory_bytes"] for rank in summary["ranks"])


def report(study: Study, logs: Path) -> Path:
    """Write what is finished and what is planned as `memory.md` and `memory.png`."""
    found, base, published = cells(study), empty(study), read_yaml(HERE / "published.yaml")["memory"]
    parts = [heading(study, "memory of a rank", list(found.values()))]
    parts += ["## Measured, MB", "", measured_table(study, found, base), *measured_notes(base), ""]
    pairs = {name: pairs_of(study, published[name], shapes) for name, shapes in study.tree["planned"].items()}
    for name, shapes in study.tree["planned"].items():
        theirs = published[name]
        parts += [f"## {name}, GB: published, and planned by zoscale", "", planned_table(study, pairs[name])]
        parts += [f"- Published: {theirs['source']}. {' '.join(theirs.get('elsewhere', []))}".rstrip()]
        parts += [planned_note(shapes), ""]
    picture(study, found, base, pairs).savefig(study.out / "memory.png", dpi=120)
    parts += ["![memory](memory.png)", ""]
    parts += missing([cell for cell in [*found.values(), base] if peak(cell) is None], logs)
    path = study.out / "memory.md"
    write_text(path, "\n".join(parts))
    return path


def measured_table(study: Study, found: dict[tuple[str, str], Cell], base: Cell) -> str:
    """Peak less libraries, and how much of it the optimizer keeps by arithmetic."""
    head = [text for own in study.schemes.values() for text in (f"{own.title}: peak", "of which optimizer state")]
    rows = [["method", *head]]
    for method, own in study.methods.items():
        row = [own["title"]]
        for scheme in study.schemes:
            cell = found.get((scheme, method))
            row += ["-", "-"] if cell is None else [megabytes(above(cell, base)), megabytes(state_bytes(cell))]
        rows.append(row)
    return table(rows)


def measured_notes(base: Cell) -> list[str]:
    """How it was measured."""
    return [
        f"- Peak: that of the rank that takes most, above the {megabytes(peak(base))} MB of the same run of a model of "
        "one million parameters (Python and its libraries; on a GPU nearly nothing).",
        "- Optimizer state: momentum and moments in fp32, by one step of the method on a small matrix. The paper's "
        "figures for JAGUAR are those of a method that keeps none.",
    ]


def above(cell: Cell, base: Cell) -> int | None:
    """A run's peak less that of the run without a model."""
    own, rest = peak(cell), peak(base)
    return None if own is None or rest is None else max(0, own - rest)


def state_bytes(cell: Cell) -> float:
    """What the optimizer keeps, all ranks together."""
    config = cell.config
    return 4 * state_values(config) * num_trained(json.dumps([vars(config.model), config.adapter]))


@functools.cache
def num_trained(text: str) -> int:
    """Trainable elements, from the JSON of a model's configuration and its adapter."""
    model, adapter = json.loads(text)
    config = ModelConfig(**model)
    shapes = ModelShapes(config, read_model_config(config), adapter)
    return sum(weight.numel for weight in shapes.weights if weight.trainable)


def state_values(config: RunConfig) -> float:
    """fp32 values that the optimizer keeps per trainable element."""
    known = _FIRST_ORDER_STATE.get(config.optimizer.name)
    return state_per_element(config) if known is None else known


def pairs_of(study: Study, published: dict[str, Any], shapes: dict[str, Any]) -> Pairs:
    """What was published of a model, and what is planned for one GPU that holds it alone."""
    found: Pairs = {}
    for name, scheme in study.schemes.items():
        if scheme.like in published:
            found[scheme.title] = [
                (published[scheme.like].get(method), planned_of(study, name, method, shapes))
                for method in study.methods
            ]
    return found


def planned_table(study: Study, pairs: Pairs) -> str:
    """A row per method, two columns per scheme."""
    rows = [["method", *(text for title in pairs for text in (f"{title}: published", "planned"))]]
    for place, own in enumerate(study.methods.values()):
        cells = [(number(theirs), gigabytes(ours)) for theirs, ours in (pairs[title][place] for title in pairs)]
        rows.append([own["title"], *(text for cell in cells for text in cell)])
    return table(rows)


def planned_of(study: Study, scheme: str, method: str, shapes: dict[str, Any]) -> int | None:
    """Bytes of a step; None too where the scheme is not for the method."""
    lrs = study.lrs[scheme].get(method)
    return None if lrs is None else planned(study.cell(scheme, method, lrs[0], study.seeds[0]).config, shapes)


def planned(config: RunConfig, shapes: dict[str, Any]) -> int | None:
    """Bytes of a step of a method on one GPU; None where the plan does not know it (derivatives)."""
    estimator: Estimator = build(config.estimator, TABLES["estimator"])
    if estimator.takes_derivatives:
        return None
    what = {"adapter": config.adapter, "master": config.master, **shapes}
    plan = plan_of(json.dumps({**what, "candidates": max(2, estimator.num_candidates)}))
    state = 4 * state_values(config) * plan["trainable"]
    if estimator.num_backwards:  # the plan's first-order column is AdamW's
        return int(plan["first_order"]["total"] + state - 4 * _FIRST_ORDER_STATE["fo_adamw"] * plan["trainable"])
    return int(plan["zero_order"]["total"] + state)


@functools.cache
def plan_of(text: str) -> dict[str, Any]:
    """The plan of a method without a state, from the JSON of what decides it."""
    own = json.loads(text)
    width, rows = own["width"], own["rows"]
    architecture = {
        "model_type": "opt", "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width,
        "num_hidden_layers": own["layers"], "num_attention_heads": own["heads"], "dropout": 0.0,
    }  # fmt: skip
    tree = {
        "model": {"config": architecture, "dtype": own["dtype"]},
        "adapter": own["adapter"],
        "master": own["master"],
        "data": {"batch_size": rows, "micro_batch_size": rows},
        "mesh": {"shard_size": 1},
        "optimizer": {"name": "zo_sgd"},
        "estimator": {"name": "one_sided", "num_directions": own["candidates"] - 1},
    }
    config = RunConfig.from_dict(tree, TABLES, DEFAULTS)
    return make_plan(config, 1, DEVICES["h100"], tokens=own["tokens"], reserve=0.0)


def planned_note(shapes: dict[str, Any]) -> str:
    """What was planned."""
    return (
        f"- Planned: {shapes['dtype']} weights, {shapes['rows']} x {shapes['tokens']} tokens in one pass, one GPU that "
        "holds the whole model: arithmetic on shapes, no GPU was used."
    )


def picture(study: Study, found: dict[tuple[str, str], Cell], base: Cell, pairs: dict[str, Pairs]) -> Figure:
    """Above what was measured, a panel per scheme; below the models of published sizes, a panel each."""
    titles = [own["title"] for own in study.methods.values()]
    heights = [0.3 * len(titles) + 1.2, *([0.45 * len(titles) + 1.4] if pairs else [])]
    figure = Figure(figsize=(4.5 * max(len(study.schemes), len(pairs)), sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    draw_measured(study, found, base, parts[0])
    if pairs:
        draw_pairs(pairs, titles, parts[1])
    return figure


def draw_measured(study: Study, found: dict[tuple[str, str], Cell], base: Cell, figure: SubFigure) -> None:
    """A panel per scheme: measured peaks, with the optimizer's state at their end."""
    panels = figure.subplots(1, len(study.schemes), sharey=True, squeeze=False)[0]
    for axes, (scheme, own) in zip(panels, study.schemes.items(), strict=True):
        for place, method in enumerate(study.methods):
            cell = found.get((scheme, method))
            height, state = (above(cell, base), state_bytes(cell)) if cell else (None, 0.0)
            if height is not None:
                axes.barh(place, height / 1e6, color=colour(0))
                axes.barh(place, min(state, height) / 1e6, left=max(0, height - state) / 1e6, color=colour(1))
        axes.set_yticks(range(len(study.methods)), [study.methods[method]["title"] for method in study.methods])
        axes.set_ylim(len(study.methods) - 0.5, -0.5)
        axes.set_title(f"measured: {own.title}")
        axes.set_xlabel("MB above the libraries")
    marks = [Patch(color=colour(0), label="peak"), Patch(color=colour(1), label="of which optimizer state")]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)

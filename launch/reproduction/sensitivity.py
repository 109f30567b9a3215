"""`sensitivity`: one setting of JAGUAR varied at a time: tau, beta, the size of the block, the signs."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reproduction.facts import heading, missing
from reproduction.markdown import percent, table
from reproduction.results import Results
from reproduction.runner import Runner, summary_of
from reproduction.study import Cell, Study
from zoscale.comparison.numbers import Spread
from zoscale.comparison.palette import colour
from zoscale.run_directory import write_text

Variants = dict[str, list[tuple[str, list[Cell]]]]
"""By what is varied: each value, as text, with its runs."""


def run(study: Study, runner: Runner) -> None:
    """All variants with all seeds; one that is in two rows runs once."""
    runner.run([cell for row in variants(study).values() for _, cells in row for cell in cells])


def variants(study: Study) -> Variants:
    """The runs of each variant; all but what is varied is the method's."""
    own = study.tree

    def cells(options: dict[str, Any]) -> list[Cell]:
        given = [f"{key}={value}" for key, value in options.items()]
        return [study.cell(own["scheme"], own["method"], float(own["lr"]), seed, given) for seed in study.seeds]

    return {what: [(text(options), cells(options)) for options in row] for what, row in own["vary"].items()}


def text(options: dict[str, Any]) -> str:
    """The value of a variant; several that are equal, once."""
    return " x ".join(
        dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in options.values())
    )


def report(study: Study, logs: Path) -> Path:
    """Write what is finished as `sensitivity.md` and `sensitivity.png`."""
    found, metric = variants(study), Results(study).metric
    every = list({cell.config.run_dir: cell for row in found.values() for _, cells in row for cell in cells}.values())
    title = f"{study.methods[study.tree['method']]['title']}, {study.schemes[study.tree['scheme']].title}"
    rows = [["varied", "value", f"best {metric} on dev", f"{metric} on validation"]]
    for what, row in found.items():
        rows += [[what, value, *(percent(of(cells, metric), len(cells)) for of in (on_dev, on_validation))]
                 for value, cells in row]  # fmt: skip
    draw(found, metric, study.out / "sensitivity.png")
    parts = [heading(study, f"sensitivity of {title}", every), f"lr {study.tree['lr']:g}; in percent.", "", table(rows)]
    parts += ["![sensitivity](sensitivity.png)", "", *missing([c for c in every if summary_of(c) is None], logs)]
    path = study.out / "sensitivity.md"
    write_text(path, "\n".join(parts))
    return path


def on_dev(cells: list[Cell], metric: str) -> Spread | None:
    """The best of each run."""
    return Spread.of((summary["dev"] or {}).get(metric) for cell in cells if (summary := summary_of(cell)))


def on_validation(cells: list[Cell], metric: str) -> Spread | None:
    """Of the weights that were best on dev."""
    return Spread.of(summary["validation"]["chosen"][metric] for cell in cells if (summary := summary_of(cell)))


def draw(found: Variants, metric: str, file: Path) -> None:
    """A panel per setting: the mean over the seeds, and their range."""
    figure = Figure(figsize=(3.2 * len(found), 3.2), layout="constrained")
    for axes, (what, row) in zip(
        figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items(), strict=True
    ):
        known = [(value, spread) for value, cells in row if (spread := on_validation(cells, metric)) is not None]
        for place, (_, spread) in enumerate(known):
            axes.plot(place, 100 * spread.mean, "o", color=colour(0))
            axes.plot([place] * 2, [100 * spread.low, 100 * spread.high], color=colour(0))
        axes.set_xticks(range(len(known)), [value for value, _ in known])
        axes.set_title(what)
        axes.grid(color="#e8e8e8")
    figure.axes[0].set_ylabel(f"{metric} on validation, percent")
    figure.savefig(file, dpi=120)

"""What was published and what our runs reached, side by side."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reproduction.results import Results
from zoscale.comparison.palette import colour


def draw_accuracy(results: Results, published: dict[str, Any], file: Path) -> None:
    """Accuracy in percent: a panel per scheme, two points per method, the range over the seeds as a line.

    Args:
        results: of the study.
        published: by scheme and method, in percent.
        file: PNG to write.
    """
    schemes, methods = results.study.schemes, list(results.study.methods)
    figure = Figure(figsize=(5.5 * len(schemes), 0.3 * len(methods) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(schemes), sharey=True, squeeze=False)[0]
    for axes, (name, scheme) in zip(panels, schemes.items(), strict=True):
        theirs = [published.get(scheme.like, {}).get(method) for method in methods]
        ours = [results.validation(name, method) for method in methods]
        known = [(place, value) for place, value in enumerate(theirs) if value is not None]
        axes.plot([value for _, value in known], [place for place, _ in known], "D", color=colour(1), label="published")
        reached = [(place, spread) for place, spread in enumerate(ours) if spread is not None]
        axes.plot([100 * own.mean for _, own in reached], [p for p, _ in reached], "o", color=colour(0), label="ours")
        for place, own in reached:
            axes.plot([100 * own.low, 100 * own.high], [place] * 2, color=colour(0))
        axes.set_title(scheme.title)
        axes.set_xlabel(f"{results.metric} in percent")
        axes.set_yticks(range(len(methods)), [results.study.methods[method]["title"] for method in methods])
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.grid(color="#e8e8e8")
        axes.set_axisbelow(True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(file, dpi=120)

"""What was published and what our runs reached, side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from reproduction.results import Results
from zoscale.comparison.palette import colour

Pairs = dict[str, list[tuple[float | None, float | None]]]
"""By a scheme's title, of each method: published GB, planned bytes; None where there is none."""

PLANNED: dict[str, Any] = {"marker": "o", "linestyle": ""}
PUBLISHED: dict[str, Any] = {"marker": "D", "linestyle": "", "markerfacecolor": "none"}


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


def draw_pairs(models: Mapping[str, Pairs], methods: Sequence[str], figure: SubFigure) -> None:
    """Memory in GB: a panel per model; in a method's row one line per scheme, in its colour.

    Args:
        models: by name.
        methods: titles of the rows.
        figure: to draw on.
    """
    schemes = list(dict.fromkeys(title for pairs in models.values() for title in pairs))
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, (name, pairs) in zip(panels, models.items(), strict=True):
        for title, values in pairs.items():
            index = schemes.index(title)
            lines = [place + (index + 0.5) / len(schemes) - 0.5 for place in range(len(methods))]
            theirs = [(gb, line) for line, (gb, _) in zip(lines, values, strict=True) if gb is not None]
            ours = [(size / 1e9, line) for line, (_, size) in zip(lines, values, strict=True) if size is not None]
            for points, mark, what in ((ours, PLANNED, "planned"), (theirs, PUBLISHED, "published")):
                x, y = [x for x, _ in points], [y for _, y in points]
                axes.plot(x, y, color=colour(index), label=f"{title}: {what}", **mark)
        for place in range(1, len(methods)):
            axes.axhline(place - 0.5, color="#e8e8e8", zorder=0)
        axes.set(title=name, xlabel="GB", xlim=(0, None), ylim=(len(methods) - 0.5, -0.5))
        axes.set_yticks(range(len(methods)), methods)
        axes.grid(axis="x", color="#e8e8e8")
    marks = [Line2D([], [], color=colour(index), linewidth=4, label=title) for index, title in enumerate(schemes)]
    marks += [Line2D([], [], color="black", label="planned by zoscale", **PLANNED)]
    marks += [Line2D([], [], color="black", label="published", **PUBLISHED)]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)

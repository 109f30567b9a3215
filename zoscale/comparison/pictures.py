"""Pictures of a comparison for papers and slides: PNG files, by matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # draws with Agg: no display, none of pyplot's state

from zoscale.comparison.charts import RANK_PANELS, loss_window
from zoscale.comparison.comparison import Comparison
from zoscale.comparison.groups import AXES, Group
from zoscale.comparison.palette import PHASE_COLOURS, colour, markers

Picture = Callable[[Comparison], Figure]


def learning_picture(comparison: Comparison) -> Figure:
    """The metric against each kind of cost."""
    return _curves(comparison, comparison.goal.metric, 1)


def loss_picture(comparison: Comparison) -> Figure:
    """The training loss against each kind of cost."""
    return _curves(comparison, "train/loss", loss_window(comparison))


def time_picture(comparison: Comparison) -> Figure:
    """Where the time of a step goes."""
    figure = Figure(figsize=(10, 1.8 + 0.45 * len(comparison.groups)), layout="constrained")
    axes = figure.subplots()
    labels = [_plain(group.label) for group in comparison.groups]
    left = [0.0] * len(labels)
    for phase, shade in PHASE_COLOURS.items():
        values = [1e3 * group.seconds_per_step.get(phase, 0.0) for group in comparison.groups]
        axes.barh(range(len(labels)), values, left=left, color=shade, label=phase, height=0.6)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per step")
    _tidy(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=8, frameon=False)
    return figure


def rank_picture(comparison: Comparison) -> Figure:
    """Throughput, memory and gathered bytes of every rank."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (name, title, unit) in zip(panels, RANK_PANELS, strict=True):
        for number, group in enumerate(comparison.groups):
            ranks = [rank for rank in group.ranks if name in rank]
            x, y = [int(rank["rank"]) for rank in ranks], [rank[name] / unit for rank in ranks]
            axes.plot(x, y, color=colour(number), marker=markers(number)[1], label=_name(group))
        axes.set(title=title, xlabel="rank")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        _tidy(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    return figure


PICTURES: dict[str, Picture] = {
    "learning": learning_picture, "loss": loss_picture, "time": time_picture, "ranks": rank_picture,
}  # fmt: skip


def write_pictures(comparison: Comparison, folder: Path) -> list[Path]:
    """All pictures into a folder; returns their files.

    Raises:
        OSError: if it cannot be written.
    """
    files = {folder / f"{name}.png": draw for name, draw in PICTURES.items()}
    for file, draw in files.items():
        draw(comparison).savefig(file, dpi=150)
    return list(files)


def _curves(comparison: Comparison, metric: str, window: int) -> Figure:
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, axis in zip(panels, AXES, strict=True):
        for number, group in enumerate(comparison.groups):
            curve = group.curve(metric, axis, window=window)
            if curve is None:
                continue
            marker = markers(number)[1] if window == 1 else None
            axes.plot(curve.x, curve.mean, color=colour(number), marker=marker, markersize=5, label=_name(group))
            if curve.num > 1:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour(number), alpha=0.18, linewidth=0)
        axes.set_xlabel(axis.label)
        _tidy(axes)
    panels[0].set_ylabel(metric if window == 1 else f"{metric}, mean of {window} points")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    return figure


def _tidy(axes: Any) -> None:
    axes.grid(color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name(group: Group) -> str:
    return f"{_plain(group.label)} ({group.seed_count})"


def _plain(text: str) -> str:
    """Matplotlib reads mathematics between dollars, and leaves out what begins with an underscore."""
    return text.replace("$", r"\$").lstrip("_")

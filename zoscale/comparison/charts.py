"""Interactive charts of a comparison, by plotly."""

import html
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from zoscale.comparison.comparison import Comparison
from zoscale.comparison.groups import AXES, Curve, Group
from zoscale.comparison.palette import PHASE_COLOURS, colour, faint, markers

RANK_PANELS = (
    ("tokens_per_second", "tokens per second", 1.0),
    ("peak_memory_bytes", "peak memory, MiB", 2.0**20),
    ("gathered_bytes_per_step", "gathered per step, MiB", 2.0**20),
)
"""Name by rank, title, unit in bytes."""

_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def loss_window(comparison: Comparison) -> int:
    """Points of the running mean of the training loss: a twentieth of the longest run's."""
    points = [len(run.metrics.get("train/loss", ())) for group in comparison.groups for run in group.runs]
    return max(1, max(points, default=0) // 20)


def learning_chart(comparison: Comparison) -> Any:
    """The metric against each kind of cost: mean of the seeds and range over them. A menu changes the metric."""
    return _curves(comparison, list(comparison.metrics), comparison.goal.metric, 1)


def loss_chart(comparison: Comparison) -> Any:
    """The training loss, a running mean, against each kind of cost."""
    return _curves(comparison, ["train/loss"], "train/loss", loss_window(comparison))


def time_chart(comparison: Comparison) -> Any:
    """Where the time of a step goes: one stacked bar per group."""
    figure = go.Figure()
    labels = [_safe(group.label) for group in comparison.groups]
    splits = [group.seconds_per_step for group in comparison.groups]
    for phase, shade in PHASE_COLOURS.items():
        values = [1e3 * split.get(phase, 0.0) for split in splits]
        shares = [split.get(phase, 0.0) / (sum(split.values()) or 1.0) for split in splits]
        hover = "%{y}<br>" + phase + ": %{x:.3g} ms, %{customdata:.1%}<extra></extra>"
        bar = go.Bar(name=phase, y=labels, x=values, orientation="h", customdata=shares, hovertemplate=hover)
        figure.add_trace(bar.update(marker_color=shade))
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(title_text="milliseconds per step")
    figure.update_yaxes(autorange="reversed")
    return _styled(figure, 130 + 46 * len(labels))


def rank_chart(comparison: Comparison) -> Any:
    """Throughput, memory and gathered bytes of every rank."""
    figure = make_subplots(rows=1, cols=3, subplot_titles=[title for _, title, _ in RANK_PANELS])
    for number, group in enumerate(comparison.groups):
        for column, (name, _, unit) in enumerate(RANK_PANELS, start=1):
            ranks = [rank for rank in group.ranks if name in rank]
            x, y = [int(rank["rank"]) for rank in ranks], [rank[name] / unit for rank in ranks]
            hover = "rank %{x}: %{y:,.1f}"
            trace = go.Scatter(x=x, y=y, mode="markers+lines", showlegend=column == 1, hovertemplate=hover)
            figure.add_trace(trace.update(_look(number, group)), row=1, col=column)
    figure.update_xaxes(title_text="rank", tickformat="d", dtick=1 if _num_ranks(comparison) <= 8 else None)
    figure.update_yaxes(rangemode="tozero")
    return _styled(figure, 360, legend=1.12, top=90)


def _num_ranks(comparison: Comparison) -> int:
    return max((len(group.ranks) for group in comparison.groups), default=0)


def _curves(comparison: Comparison, metrics: list[str], shown: str, window: int) -> Any:
    figure = make_subplots(rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.03)
    for number, group in enumerate(comparison.groups):
        for column in range(1, len(AXES) + 1):
            figure.add_trace(_band(number), row=1, col=column)
            figure.add_trace(_line(number, group, column == 1, window), row=1, col=column)
    for column, axis in enumerate(AXES, start=1):
        figure.update_xaxes(title_text=axis.label, rangemode="tozero", row=1, col=column)
    data = {metric: _data(comparison, metric, window) for metric in metrics}
    for trace, x, y in zip(figure.data, data[shown]["x"], data[shown]["y"], strict=True):
        trace.update(x=x, y=y)
    figure.update_yaxes(title_text=shown, row=1, col=1)
    if len(metrics) > 1:
        buttons = [{"label": m, "method": "update", "args": [d, {"yaxis.title.text": m}]} for m, d in data.items()]
        place = {"x": 1, "xanchor": "right", "y": 1.04, "yanchor": "bottom", "active": metrics.index(shown)}
        figure.update_layout(updatemenus=[{"buttons": buttons, "showactive": True, "bgcolor": "white", **place}])
    return _styled(figure, 420)


def _data(comparison: Comparison, metric: str, window: int) -> dict[str, list[list[float]]]:
    """x and y of every trace of `_curves`, in their order."""
    found: dict[str, list[list[float]]] = {"x": [], "y": []}
    for group in comparison.groups:
        for axis in AXES:
            curve = group.curve(metric, axis, window=window) or Curve([], [], [], [], [], 0)
            found["x"] += [curve.x + curve.x[::-1] if curve.num > 1 else [], curve.x]
            found["y"] += [curve.high + curve.low[::-1] if curve.num > 1 else [], curve.mean]
    return found


def _band(number: int) -> Any:
    fill = {"fill": "toself", "fillcolor": faint(colour(number)), "line": {"width": 0}}
    return go.Scatter(mode="lines", hoverinfo="skip", showlegend=False, legendgroup=str(number), **fill)


def _line(number: int, group: Group, legend: bool, window: int) -> Any:
    mode = "lines+markers" if window == 1 else "lines"
    line = go.Scatter(mode=mode, showlegend=legend, hovertemplate="%{y:.4g} at %{x:.4g}")
    return line.update(_look(number, group))


def _look(number: int, group: Group) -> dict[str, Any]:
    name = f"{_safe(group.label)} ({group.seed_count})"
    line, marker = {"color": colour(number), "width": 2}, {"size": 7, "symbol": markers(number)[0]}
    return {"name": name, "legendgroup": str(number), "line": line, "marker": marker}


def _safe(text: str) -> str:
    """Plotly reads some HTML in texts; what a store says is none."""
    return html.escape(text)


def _styled(figure: Any, height: int, *, legend: float = 1.04, top: int = 56) -> Any:
    """The look that all charts share; `legend` is its height over the plot, `top` the margin in pixels."""
    figure.update_layout(
        template="simple_white", height=height, hovermode="closest", font={"family": _FONT, "size": 13},
        margin={"l": 60, "r": 44, "t": top, "b": 50}, paper_bgcolor="white", modebar={"orientation": "v"},
        legend={"orientation": "h", "y": legend, "x": 0, "yanchor": "bottom", "traceorder": "normal"},
    )  # fmt: skip
    figure.update_xaxes(showgrid=True, gridcolor="#e8e8e8")
    figure.update_yaxes(showgrid=True, gridcolor="#e8e8e8", automargin=True)
    return figure

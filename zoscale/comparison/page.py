"""The report: one HTML file that needs nothing else, neither a server nor the network."""

import html
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from plotly.io import to_html
from plotly.offline import get_plotlyjs

from zoscale.comparison import charts, tables
from zoscale.comparison.comparison import Comparison
from zoscale.comparison.palette import colour
from zoscale.passes import BACKWARD

_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; color: #1a1a1a; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 28px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 19px; margin: 38px 0 6px; } p { margin: 6px 0; max-width: 90ch; }
.quiet { color: #595959; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 10px 0; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid #ddd; vertical-align: top; }
th { font-weight: 600; color: #595959; font-size: 13px; border-bottom-color: #999; }
td { white-space: nowrap; } .range { color: #595959; font-size: 13px; }
#verdict td:nth-child(2) { font-weight: 600; }
.chip { display: inline-block; width: 11px; height: 11px; margin-right: 7px; }
ul { margin: 6px 0; padding-left: 20px; max-width: 90ch; } .chart { margin: 4px 0; }
@media print { h2 { break-after: avoid; } .chart, table { break-inside: avoid; } }
"""


def render(comparison: Comparison) -> str:
    """The whole page."""
    title = html.escape(f"Comparison: {comparison.title}")
    body = "\n".join(_sections(comparison))
    data = json.dumps(comparison.to_dict()).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>\n<body><main>\n<h1>{title}</h1>\n{body}\n"
        f'<script type="application/json" id="data">{data}</script></main></body></html>\n'
    )


def _sections(comparison: Comparison) -> Iterator[str]:
    num_runs = sum(len(group.runs) for group in comparison.groups)
    better = "lower" if comparison.goal.lower_is_better else "higher"
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = f"{num_runs} runs in {len(comparison.groups)} groups that differ in more than the seed; {made}"
    yield f'<p class="quiet">{facts}. Judged by {html.escape(comparison.goal.metric)}, {better} is better.</p>'
    chips = {group.label: colour(number) for number, group in enumerate(comparison.groups)}
    yield _section("verdict", "Which is better", _table(tables.verdict_table(comparison), chips))
    yield _list([*tables.explanations(comparison), *comparison.notes])
    yield _section("results", "What was reached, and what it took", _table(tables.result_table(comparison), chips))
    yield _chart("learning", "Quality against what it costs", charts.learning_chart(comparison))
    yield '<p class="quiet">Lines are means over seeds, bands reach from the lowest to the highest.</p>'
    window = charts.loss_window(comparison)
    loss = f"Training loss, mean of {window} logged points" if window > 1 else "Training loss"
    yield _chart("loss", loss, charts.loss_chart(comparison))
    yield _chart("time", "Where the time of a step goes", charts.time_chart(comparison))
    yield f'<p class="quiet">{_PHASES}</p>'
    yield _chart("ranks", "Throughput, memory and traffic of each rank", charts.rank_chart(comparison))
    if differing := tables.difference_table(comparison)[1:]:
        rows = [tables.difference_table(comparison)[0], *differing]
        yield _section("differences", "What differs between the groups", _table(rows, chips))
    yield _section("runs", "Runs", _table(tables.run_table(comparison), chips))
    yield _section("method", "How it was judged", "".join(f"<p>{text}</p>" for text in _METHOD))


_PHASES = (
    "Means over ranks and runs, evaluation spread over all steps. gather: waiting for tensors of other ranks; "
    "exchange: exchanging the losses, which waits for the slowest rank; noise: drawing and applying perturbations, and "
    "drawing them again for the update."
)
_METHOD = (
    "A run is worth the best value that it has seen; by validation, which is measured at the end, that of the weights "
    "that it has left. The best value on dev is the one that chose the weights, so it is optimistic, and the more so "
    "the more evaluations there are: the column chosen has what these weights reach on validation, which has chosen "
    "nothing. Groups are compared at the largest cost that all runs have reached, by validation at their ends: where "
    "the best has paid more there than another, nothing follows.",
    "A verdict is clear only if the worst seed of the best group beats the best seed of every other, and there are so "
    "many seeds that groups of the same worth would part like this in at most 5 % of cases (2 n! m! / (n + m)! for n "
    "and m seeds): four seeds each; three part by chance in 10 %, two in 33 %. A seed that failed is in no mean, and "
    "no verdict is clear without it. With one seed there is no such statement. Runs of one seed see the same examples "
    "in the same order, so that they may be compared one by one where the bands overlap.",
    "Seconds are those of training, without evaluations and checkpoints. A device hour is an hour of one rank: on GPUs "
    "a GPU hour. A forward pass is one candidate on the whole batch; in forward equivalents a backward pass counts as "
    f"{BACKWARD}, the standard estimate, although it costs about one where most weights are frozen.",
)


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>'


def _chart(name: str, title: str, figure: object) -> str:
    config = {
        "displaylogo": False,
        "responsive": True,
        "showSendToCloud": False,  # on by default: a click would upload the data
        "plotlyServerURL": "",
        "modeBarButtonsToRemove": ["select2d", "lasso2d"],
        "toImageButtonOptions": {"filename": name, "scale": 2},
    }
    div = to_html(figure, full_html=False, include_plotlyjs=False, div_id=f"chart-{name}", config=config)
    return _section(name, title, f'<div class="chart">{div}</div>')


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>" if items else ""


def _table(rows: Sequence[Sequence[str]], chips: dict[str, str]) -> str:
    """The first row is the header; labels of groups get their colour in it and in the columns of groups."""
    own = [chips if title in ("group", "best") else {} for title in rows[0]]
    head = "".join(f"<th>{_cell(cell, chips)}</th>" for cell in rows[0])
    lines = ("".join(f"<td>{_cell(*cell)}</td>" for cell in zip(row, own, strict=True)) for row in rows[1:])
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str, chips: dict[str, str]) -> str:
    chip = f'<span class="chip" style="background:{chips[text]}"></span>' if text in chips else ""
    value, bracket, bounds = html.escape(text).partition(" [")
    return chip + value + (f'<span class="range">{bracket}{bounds}</span>' if bracket else "")

"""`zoscale journal`: the steps of a run as a table, as JSON lines or as a picture."""

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zoscale.config import ConfigError, Method, at_least, build
from zoscale.estimators import Estimator
from zoscale.methods import TABLES
from zoscale.recovery.journal import Journal, find_journal
from zoscale.recovery.journal_format import Header, Record

Loss = Callable[[Record], float]

_EDGE = 5  # steps shown at either end
_FEW = 3  # numbers of a kind shown per step


def journal_command(argv: Sequence[str]) -> int:
    """`zoscale journal RUN [--json] [--last N] [--plot FILE.png]`.

    Returns:
        0.

    Raises:
        ConfigError: for a mistake of the user.
        OSError: if the picture cannot be written.
    """
    parser = argparse.ArgumentParser(prog="zoscale journal", description="Print or plot the steps of a run.")
    parser.add_argument("run", metavar="RUN", help="run directory, or a journal")
    parser.add_argument("--json", action="store_true", help="every step as a line of JSON; nan and inf are text")
    parser.add_argument("--last", type=at_least(0), metavar="N", help="only the last N steps")
    parser.add_argument("--plot", metavar="FILE.png", help="draw loss, |projected grad| and lr into a PNG file")
    arguments = parser.parse_args(argv)
    try:
        journal = Journal.read(find_journal(Path(arguments.run)))
        short = arguments.last is None
        records = journal.records if short else journal.records[max(0, len(journal.records) - arguments.last) :]
        loss = _loss_of(journal.header)
        if arguments.plot is not None:
            _plot(records, loss, Path(arguments.plot))
        for line in _json_lines(records, loss) if arguments.json else _report(journal, records, loss, short):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`; what is left in the buffer must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _loss_of(header: Header) -> Loss:
    """f(x) by a step's losses, as the estimator of the configuration has it; their mean where none of ours fits."""
    tree: Any = header.config.get("estimator")
    try:
        options = {key: value for key, value in tree.items() if key != "name"}
        estimator: Estimator = build(Method(tree["name"], options), TABLES["estimator"])
        estimator.loss((0.0,) * header.num_losses)
    except (AttributeError, KeyError, TypeError, ValueError):
        return lambda record: sum(record.losses) / len(record.losses)
    return lambda record: estimator.loss(record.losses)


def _json_lines(records: Sequence[Record], loss: Loss) -> Iterator[str]:
    for record in records:
        row = {"step": record.step, "loss": loss(record), **vars(record)}
        yield json.dumps({key: _plain(value) for key, value in row.items()})


def _plain(value: Any) -> Any:
    """As strict JSON can hold it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _report(journal: Journal, records: Sequence[Record], loss: Loss, short: bool) -> Iterator[str]:
    """The header, and a table of the steps; of a long one both ends, if `short`."""
    yield from (f"{name:<9}  {text}" for name, text in _facts(journal).items())
    yield ""
    cut = short and len(records) > 2 * _EDGE + 1
    rows = [_row(record, loss) for record in ([*records[:_EDGE], *records[-_EDGE:]] if cut else records)]
    rows = [["step", "loss", "projected grads", "lr", ""], *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    yield from [*lines[: _EDGE + 1], "...".rjust(widths[0]), *lines[_EDGE + 1 :]] if cut else lines


def _facts(journal: Journal) -> dict[str, str]:
    header, config = journal.header, journal.header.config
    sections = ((key, config.get(key)) for key in ("task", "probe", "estimator", "optimizer"))
    train = config.get("train")
    planned = f" of {_text(train['steps'])}" if isinstance(train, dict) and "steps" in train else ""
    skipped = [record.step for record in journal.records if record.skipped]
    facts = {
        "run": f"{_text(config.get('name'))}, configuration {_text(header.config_hash)}",
        "seed": str(header.seed),
        "methods": ", ".join(f"{key} {_text(tree.get('name'))}" for key, tree in sections if isinstance(tree, dict)),
        **{key: _text(getattr(header, key)) for key in ("code", "model", "trainable", "data")},
        "steps": f"{len(journal.records):,}{planned}",
        "skipped": f"{len(skipped):,}" + (f": step {_few(skipped)}" if skipped else ""),
        "bytes": f"{header.record_bytes:,} per step, {journal.num_bytes + journal.num_torn:,} in all",
    }
    return facts | ({"torn": f"{journal.num_torn:,} bytes at the end are no step"} if journal.num_torn else {})


def _row(record: Record, loss: Loss) -> list[str]:
    numbers = (f"{loss(record):.6g}", _few(record.projected_grads), _few(record.lrs))
    return [str(record.step), *numbers, "skipped" if record.skipped else ""]


def _few(values: Sequence[float]) -> str:
    shown = " ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values[:_FEW])
    return shown + (f" ... ({len(values)})" if len(values) > _FEW else "")


def _text(value: Any) -> str:
    """A value from a file, safe for a terminal."""
    text = str(value) if str(value).isprintable() else ascii(str(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _plot(records: Sequence[Record], loss: Loss, file: Path) -> None:
    """Loss with its running mean, |projected grad| and lr against the step, into a PNG file."""
    try:
        import numpy as np
        from matplotlib.figure import Figure  # draws with Agg: no display, none of pyplot's state
    except ImportError as error:
        raise ConfigError("matplotlib for --plot", str(error), "pip install matplotlib") from error
    if not records:
        raise ConfigError("at least one step to plot", "none", "let the run make one")
    steps = [record.step for record in records]
    columns = [[(loss(r),) for r in records], [r.projected_grads for r in records], [r.lrs for r in records]]
    shown = map(np.array, columns)
    losses, grads, lrs = (np.where(np.abs(x) < 1e100, x, np.nan) for x in shown)  # no axis has more
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, middle, bottom = figure.subplots(3, sharex=True)
    window = np.ones(min(100, 1 + len(steps) // 20))
    total, count = (
        np.convolve(x, window)[: len(steps)] for x in (np.nan_to_num(losses[:, 0]), ~np.isnan(losses[:, 0]))
    )
    top.plot(steps, losses, ".", color="C0", markersize=2)
    top.plot(steps, total / np.where(count > 0, count, np.nan), color="C1", label=f"running mean ({len(window)})")
    top.legend()
    middle.plot(steps, np.abs(grads), ".", color="C0", markersize=2)
    bottom.plot(steps, lrs)
    top.set(ylabel="loss")
    middle.set(ylabel="|projected grad|", yscale="log" if (np.abs(grads) > 0).any() else "linear")
    bottom.set(ylabel="lr", xlabel="step")
    figure.savefig(image := io.BytesIO(), format="png", dpi=120)
    file.write_bytes(image.getvalue())

"""The head and the end of a report: what it is made of, and what is not there yet."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from reproduction.runner import last_words, summary_of
from reproduction.study import Cell, Study
from zoscale import provenance


def heading(study: Study, what: str, cells: Sequence[Cell]) -> str:
    """Title, command, commits, hardware, seeds and protocol."""
    summaries = [summary for cell in cells if (summary := summary_of(cell)) is not None]
    commits = sorted({str(summary["commit"]) for summary in summaries}) or [provenance.commit()]
    hardware = sorted({hardware_text(summary["hardware"], summary["world_size"]) for summary in summaries})
    lines = [f"# Reproduction: {what}", "", f"    python {shlex.join(sys.argv)}", ""]
    lines += [f"- commit {', '.join(commits)}; {'; '.join(hardware) or 'nothing has run yet'}"]
    if cells:
        config = cells[0].config
        model, task, data = config.model, config.task, config.data
        lines += [
            f"- model {model.id or f'of random weights, {model.config}'}, {model.dtype}; task {task.name} "
            f"({task.args.get('path')}), {data.num_train or 'all'} training, {data.num_dev} dev and "
            f"{data.num_validation or 'all'} validation examples, batch {data.batch_size}",
            f"- {length(study)} per run; seeds {', '.join(map(str, study.seeds))}; schedule "
            f"{config.schedule.name}; objective {config.objective}",
        ]
    return "\n".join([*lines, ""])


def length(study: Study) -> str:
    """Of a run."""
    steps = study.tree.get("steps")
    return f"{study.forwards:,} forwards of the batch" if steps is None else f"{steps} steps"


def hardware_text(hardware: dict[str, object], ranks: int) -> str:
    """GPUs, or processors."""
    gpus = hardware["gpus"]
    processors = f"{hardware['cpus']} {hardware['machine']} cores"
    where = ", ".join(map(str, gpus)) if isinstance(gpus, list) and gpus else processors
    return f"{where}, {ranks} rank{'s' * (ranks > 1)} per run"


def missing(cells: Sequence[Cell], logs: Path) -> list[str]:
    """Cells that have no result, with the last line that they have printed."""
    if not cells:
        return []
    lines = [f"- {cell}{': ' + words if (words := last_words(logs, cell)) else ''}" for cell in cells]
    return [f"## Missing: {len(cells)} runs", "", *lines, ""]

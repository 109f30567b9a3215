"""`Runner`: brings the cells of a study to their end, some at a time; what is finished is not run again."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reproduction.study import Cell, select_by
from zoscale.run_directory import RunDirectory, write_text

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Runner:
    """Each cell is a command of its own, `launch/train.py`, which continues a run that was killed.

    Args:
        launch: words of the command before it; `python` is this interpreter.
        jobs: commands at a time, which share the cores.
        logs: folder of what they print.
        environment: variables of the commands, over this process's.
        failed: cells whose commands have ended without a result, so far.
    """

    launch: tuple[str, ...]
    jobs: int
    logs: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    failed: list[Cell] = field(default_factory=list)

    def run(self, cells: Sequence[Cell]) -> None:
        """Run those that are not finished; a cell that fails is reported and left.

        An error or interrupt here ends the commands that run: they checkpoint and can be continued.
        """
        unfinished = {cell.config.run_dir: cell for cell in cells if summary_of(cell) is None}
        waiting = deque(unfinished.values())
        running: dict[subprocess.Popen[bytes], tuple[Cell, float]] = {}
        number = 0
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    cell = waiting.popleft()
                    running[self._start(cell)] = (cell, time.monotonic())
                time.sleep(0.1)
                for process in [process for process in running if process.poll() is not None]:
                    cell, started = running.pop(process)
                    number += 1
                    if summary_of(cell) is None:
                        self.failed.append(cell)
                    seconds = time.monotonic() - started
                    print(f"[{number}/{len(unfinished)}] {cell}: {self._outcome(cell)}, {seconds:.0f} s", flush=True)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()

    def _start(self, cell: Cell) -> "subprocess.Popen[bytes]":
        self.logs.mkdir(parents=True, exist_ok=True)
        name = cell.config.run_dir.name
        write_text(self.logs / f"{name}.yaml", cell.config.to_yaml())
        words = [sys.executable if word == "python" else word for word in self.launch]
        command = [*words, str(ROOT / "launch/train.py"), "--config", str(self.logs / f"{name}.yaml")]
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **self.environment}
        with (self.logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def _outcome(self, cell: Cell) -> str:
        summary = summary_of(cell)
        if summary is None:
            return f"FAILED: {last_words(self.logs, cell)}"
        found = summary["dev"] or summary["validation"]["chosen"]
        metric = select_by(cell.config)
        return f"{metric} on {'dev' if summary['dev'] else 'validation'} {found[metric]:.4f}"


def summary_of(cell: Cell) -> dict[str, Any] | None:
    """What a finished run has left; None if it is not finished."""
    return RunDirectory(cell.config.run_dir).read_summary()


def last_words(logs: Path, cell: Cell) -> str:
    """The last line that a run has printed; empty if it has not run."""
    try:
        text = (logs / f"{cell.config.run_dir.name}.log").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""

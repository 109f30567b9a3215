"""What the tables of `launch/gpu_checks.sh` say of the aims on a GPU: passed, failed or not measured.

python launch/gpu_verdicts.py FOLDER
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]

_COPY = 0.8  # share of a copy's bandwidth
_STEPS = 18.0  # per second
_OVER_WEIGHTS = 1.1
_FP16_BYTES = 3.0e9


class Verdict(NamedTuple):
    """An aim, whether it is reached (None = it was not measured), and what was found."""

    aim: str
    is_reached: bool | None
    found: str

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "not measured"}[self.is_reached]
        return f"{word:<13} {self.aim}" + (f": {self.found}" if self.found else "")


def verdicts(folder: Path) -> list[Verdict]:
    """Of all aims, from the files of a folder."""
    found = [_of_passes(folder / "passes.json")]
    for name in ("opt-13b", "opt-13b-blocks", "opt-13b-cuda_graphs"):
        row = _step(folder / f"{name}.json", "opt-13b", "bf16")
        found.append(_of(f"{name}, bf16 LoRA: at least {_STEPS:g} steps/s", row, _speed))
        found.append(_of(f"{name}, bf16 LoRA: peak at most {_OVER_WEIGHTS:g} x weights", row, _peak))
    aim = f"opt-1.3b, fp16 LoRA: peak at most {_FP16_BYTES / 1e9:.1f} GB"
    return [*found, _of(aim, _step(folder / "opt-1.3b.json", "opt-1.3b", "fp16"), _fp16)]


def skipped(folder: Path) -> list[str]:
    """The tests for a GPU that did not run, with their reasons."""
    report = folder / "tests.txt"
    lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    return [line for line in lines if line.startswith("SKIPPED")]


def _of_passes(file: Path) -> Verdict:
    aim = f"passes over weights: at least {_COPY:.0%} of a copy's bandwidth"
    if not file.exists():
        return Verdict(aim, None, "")
    shares: dict[str, float] = json.loads(file.read_text())
    below = [f"{name} {share:.1%}" for name, share in shares.items() if share < _COPY]
    return Verdict(aim, not below, ", ".join(below) or f"at least {min(shares.values()):.1%}")


def _step(file: Path, model: str, dtype: str) -> Row | None:
    """A whole step of a model in a type, with all candidates in one pass, on one device; a toy's is none."""
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    wanted = {"variant": "fan_out", "ranks": 1, "dtype": dtype}
    rows: list[Row] = report.get("rows", []) if report.get("model") == model else []
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _of(aim: str, row: Row | None, judge: Callable[[Row], tuple[bool, str]]) -> Verdict:
    return Verdict(aim, None, "") if row is None else Verdict(aim, *judge(row))


def _speed(row: Row) -> tuple[bool, str]:
    speed = 1 / row["seconds_per_step"]
    return speed >= _STEPS, f"{speed:.1f}"


def _peak(row: Row) -> tuple[bool, str]:
    share = row["peak_bytes"] / row["model_bytes"]
    return share <= _OVER_WEIGHTS, f"{share:.3f} x"


def _fp16(row: Row) -> tuple[bool, str]:
    return row["peak_bytes"] <= _FP16_BYTES, f"{row['peak_bytes'] / 1e9:.2f} GB"


def main() -> None:
    folder = Path(sys.argv[1])
    print("\n".join(["== verdicts", *map(str, verdicts(folder)), *skipped(folder)]))


if __name__ == "__main__":
    main()

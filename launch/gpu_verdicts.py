"""What the tables of `launch/gpu_checks.sh` say of the aims on a GPU: passed, failed or not measured.

python launch/gpu_verdicts.py FOLDER
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]

_COPY = 0.8  # share of a copy's bandwidth
_STEPS = 18.0  # per second
_OVER_WEIGHTS = 1.1
_FP16_BYTES = 3.0e9
_FULL = 1.25  # of the bare forward, all weights
_LORA = 1.05
_PROBES = ("block", "rademacher", "gaussian")
_MEZO = {"fp32": 0.7, "bf16": 0.5}  # of MeZO's step, LoRA


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
    found.append(_of(aim, _step(folder / "opt-1.3b.json", "opt-1.3b", "fp16"), _fp16))
    for dtype, name in (("bf16", "opt-125m"), ("fp32", "opt-125m-fp32")):
        found += _of_ratios(folder / f"{name}.json", dtype)
    largest = _step(folder / "opt-30b.json", "opt-30b", "bf16")
    return [*found, _of("opt-30b, bf16 LoRA: runs on one GPU", largest, lambda row: (True, _peak(row)[1]))]


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


def _of_ratios(file: Path, dtype: str) -> list[Verdict]:
    """OPT-125M, one direction: steps against the bare forward and against MeZO's."""
    found = []
    for scheme, probe, most in (("lora", "block", _LORA), *(("full", probe, _FULL) for probe in _PROBES)):
        step = _step(file, "opt-125m", dtype, scheme=scheme, probe=probe, q=1)
        aim = f"opt-125m, {dtype} {scheme}, {probe}: at most {most:g} x bare"
        found.append(_of(aim, step, partial(_ratio, most=most)))
    step, mezo = (_step(file, "opt-125m", dtype, v, scheme="lora", q=1) for v in ("fan_out", "mezo"))
    both = None if step is None or mezo is None else {"ratio_to_bare": step["ratio_to_bare"] / mezo["ratio_to_bare"]}
    aim = f"opt-125m, {dtype} lora: at most {_MEZO[dtype]:g} x mezo"
    return [*found, _of(aim, both, partial(_ratio, most=_MEZO[dtype]))]


def _step(file: Path, model: str, dtype: str, variant: str = "fan_out", **cell: Any) -> Row | None:
    """A whole step of a model in a type on one device; a toy's is none."""
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    wanted = {"variant": variant, "ranks": 1, "dtype": dtype} | cell
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


def _ratio(row: Row, most: float) -> tuple[bool, str]:
    return row["ratio_to_bare"] <= most, f"{row['ratio_to_bare']:.2f}"


def main() -> None:
    folder = Path(sys.argv[1])
    print("\n".join(["== verdicts", *map(str, verdicts(folder)), *skipped(folder)]))


if __name__ == "__main__":
    main()

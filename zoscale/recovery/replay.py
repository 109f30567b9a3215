"""`zoscale replay`: the weights of any step from the base model and the journal alone, on one CPU, without the data."""

import argparse
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from zoscale.assembly import build_engine
from zoscale.config import ConfigError, RunConfig
from zoscale.engine import ZeroOrderEngine
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.loading import read_model_config
from zoscale.recovery.journal import Journal, find_journal
from zoscale.recovery.journal_format import Header
from zoscale.recovery.resume import check_replay, check_start, replay
from zoscale.release.export import read_origin, save_trained
from zoscale.release.run_record import check_base, with_base
from zoscale.run_directory import RunDirectory

_ROUNDING = 1e-5  # methods that multiply matrices (Muon) depend on the machine's matrix product
_TIMES = 4.0  # what two machines may differ by in bfloat16, of what bfloat16 and float32 differ by on one


def replay_command(argv: Sequence[str]) -> int:
    """Rebuild a run's weights, and compare them with the saved ones where they are of the same step.

    Returns:
        0, or 1 if the saved weights are not what the journal gives.

    Raises:
        ConfigError: for a journal or a base model that does not fit.
        OSError: if the folder of the weights cannot be written.
    """
    arguments = _parser().parse_args(argv)
    path = find_journal(Path(arguments.run))
    journal, run = Journal.read(path), RunDirectory(path.parent)
    saved = run.adapter
    saved_step = read_origin(saved)
    step = _wanted(arguments.until, saved_step, len(journal.records))
    if arguments.out:
        _prepare(Path(arguments.out), step, saved, saved_step)
    was_on_gpus = _was_on_gpus(run)
    engine = rebuild(journal.header, arguments.base)
    in_16_bits = _set_precision(engine, "bfloat16" if was_on_gpus else "float32")
    started = time.monotonic()
    replay(engine, journal.records[:step])
    seconds = time.monotonic() - started
    speed = f", {step / seconds:.0f} steps/s" if step else ""
    print(f"replayed {step} steps of {len(journal.records)} in {seconds:.1f} s{speed}", end="; ")
    print(f"journal: {journal.header.record_bytes} bytes per step, {path.stat().st_size:,} in all")
    if arguments.out:
        save_trained(engine, arguments.out)
        print(f"weights: {arguments.out}")
    if step == saved_step:
        ours = _trained(engine)
        is_exact = engine.optimizer.is_elementwise and engine.probe.is_elementwise and not was_on_gpus
        allowed = 0.0 if is_exact else _ROUNDING
        if was_on_gpus and in_16_bits:
            engine = rebuild(journal.header, arguments.base)
            _set_precision(engine, "float32", of=("auto", "bfloat16"))
            replay(engine, journal.records[:step])
            allowed = max(allowed, _TIMES * _rounding(ours, _trained(engine)))
        return _verify(ours, _tensors(saved), saved, allowed)
    there = "no weights of a known step" if saved_step is None else f"those of step {saved_step}"
    print(f"nothing to compare with: {saved} has {there}")
    return 0


def rebuild(header: Header, base: str | None = None) -> ZeroOrderEngine:
    """The engine of a journal at step 0, whole in this process.

    Args:
        header: of the journal.
        base: id or folder of the base model, if it has moved.

    Raises:
        ConfigError: if the configuration is malformed or not to be trusted, or the model is not the one that was
            trained.
    """
    config = with_base(RunConfig.from_dict(header.config, TABLES, DEFAULTS), base)
    check_base(config, base)
    if base is None and config.hash != header.config_hash:
        raise ConfigError(
            f"a header of configuration {header.config_hash}", config.hash, "use the version that wrote it"
        )
    check_replay(TABLES["optimizer"][config.optimizer.name], "a journal")
    engine = build_engine(config, read_model_config(config.model), None)
    counts = (engine.num_losses, engine.estimator.num_directions, len(engine.optimizer.param_groups))
    if counts != (header.num_losses, header.num_directions, header.num_groups):
        got = f"{(header.num_losses, header.num_directions, header.num_groups)}"
        raise ConfigError(f"{counts} losses, directions and groups in the journal's header", got, "it is damaged")
    check_start(engine, header)
    return engine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoscale replay", description=__doc__)
    parser.add_argument("run", help="run directory, or a journal")
    parser.add_argument("--until", type=int, metavar="STEP", help="steps to take (default: those of the saved weights)")
    parser.add_argument("--out", metavar="DIR", help="write the weights there, as PEFT or transformers reads them")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="id or folder of the base model: if it has moved, or if it needs pickles or code of its own, to say "
        "that you trust it",
    )
    return parser


def _wanted(until: int | None, saved: int | None, recorded: int) -> int:
    if until is None and saved is not None and saved > recorded:
        raise ConfigError(
            f"a journal of at least {saved} steps, those of the saved weights", str(recorded), "restore it"
        )
    if until is None:
        return recorded if saved is None else saved
    if not 0 <= until <= recorded:
        raise ConfigError(f"--until from 0 to {recorded}, the steps in the journal", str(until), "choose one of them")
    return until


def _prepare(out: Path, step: int, saved: Path, saved_step: int | None) -> None:
    """Make the folder before the work; a run's result is not to be replaced by the weights of another step."""
    if saved_step not in (None, step) and out.resolve() == saved.resolve():
        got = f"{out}, the run's result of step {saved_step}"
        raise ConfigError(f"another folder for the weights of step {step}", got, "name one with --out")
    out.mkdir(parents=True, exist_ok=True)


def _was_on_gpus(run: RunDirectory) -> bool:
    """Whether a finished run computed on GPUs: their normals and quotients are those of a CPU to rounding only."""
    hardware = (run.read_summary() or {}).get("hardware")
    return isinstance(hardware, dict) and bool(hardware.get("gpus"))


def _set_precision(engine: ZeroOrderEngine, precision: str, of: Sequence[str] = ("auto",)) -> bool:
    """Orthogonalise in a precision instead of others; whether that is in bfloat16."""
    groups = [group for group in engine.optimizer.param_groups if "precision" in group]
    for group in groups:
        if group["precision"] in of:
            group["precision"] = precision
    return any(group["precision"] == "bfloat16" for group in groups)


def _trained(engine: ZeroOrderEngine) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        save_trained(engine, folder)
        return _tensors(Path(folder))


def _verify(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], saved: Path, allowed: float) -> int:
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
        print(f"{saved} holds other tensors than the journal gives")
        return 1
    gaps = _gaps(ours, theirs)
    worst = max(gaps, key=lambda name: gaps[name])
    if gaps[worst] <= allowed:
        print(f"{saved}: {'the same bits' if gaps[worst] == 0 else f'the same to {gaps[worst]:.1e}'}")
        return 0
    print(f"{saved} differs from what the journal gives: by {gaps[worst]:.1e} in {worst}")
    return 1


def _gaps(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: _gap(ours[name], theirs[name]) for name in ours}


def _rounding(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference that is one: what is infinite would excuse everything."""
    return max((gap for gap in _gaps(ours, theirs).values() if math.isfinite(gap)), default=0.0)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; infinite for other dtypes, for nan, and for bits that differ without a difference."""
    if ours.dtype != theirs.dtype:
        return math.inf
    gap = float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0
    same = gap > 0 or torch.equal(ours.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8))
    return gap if same and not math.isnan(gap) else math.inf


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"readable safetensors in {folder}", str(error), "restore them from a copy") from error

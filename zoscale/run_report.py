"""What a run tells the user: before the first step, and at the end."""

from typing import Any

from tqdm import tqdm

from zoscale.assembly import Plan
from zoscale.config import DataConfig, RunConfig
from zoscale.data.splits import Encoder, Splits
from zoscale.forward.division import Division
from zoscale.forward.sequential import SequentialForward
from zoscale.mesh import Mesh
from zoscale.objectives import GeneratedLoss
from zoscale.recovery.resume import Log
from zoscale.run_directory import RunDirectory
from zoscale.shards import local_bytes
from zoscale.step import Engine
from zoscale.tasks import Task

_WORTH_SAYING = 1 / 8  # share of all ranks' work


def describe(config: RunConfig, engine: Engine, made: Plan, directory: RunDirectory) -> None:
    """What will be trained, with the memory to expect, before the first step."""
    size, splits = made.size, made.splits
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[config.model.dtype]
    resident = engine.mesh.gather_objects(local_bytes(engine.model))
    slices = engine.mesh.gather_objects(sum(len(shard) for shard in engine.shards))
    masters = max(engine.mesh.gather_objects(sum(4 * len(shard) for shard in engine.shards if shard.has_master)))
    largest = max(size.largest_block, size.outside_blocks) * width
    log = say(engine.mesh)
    log(f"run directory: {directory.path}")
    log(
        f"model: {size.total:,} parameters, {config.model.dtype}; trainable: {engine.num_trainable:,} in "
        f"{len(engine.specs)} tensors; ranks: {engine.mesh.world_size}, {engine.mesh.shard_size} per copy; "
        f"slices: {slices}"
    )
    log(
        f"expected memory per rank: {_mb(max(resident))} shard + {_mb(masters)} master + about {_mb(largest)} gathered "
        "+ activations + optimizer state"
    )
    for line in (*amounts(splits, config.data), *skipped(made.task), *shortened(made.encoder, config.data)):
        log(line)
    method = f"{config.optimizer.name}, {config.probe.name} probe, {config.estimator.name}"
    passes = "1 forward and 1 backward pass" if engine.estimator.num_backwards else f"{engine.num_losses} forwards"
    log(f"method: {method}, {passes} per step, {config.train.steps} steps")
    if engine.adapters is not None:
        log(f"adapters: {len(engine.adapters.slots)}; {engine.adapters.selection}")
    for told in (why_sequential(config, engine), repeated_work(config, engine)):
        if told is not None:
            log(told)


def why_sequential(config: RunConfig, engine: Engine) -> str | None:
    """Why candidates take one pass each although that was not asked for; None where they do not."""
    if config.forward.name != "auto" or not isinstance(engine.forward, SequentialForward):
        return None
    if isinstance(engine.objective, GeneratedLoss):
        return f"forward: sequential, because objective {config.objective} reads texts that are generated"
    return "forward: sequential, because what is trained cannot be fanned out"


def repeated_work(config: RunConfig, engine: Engine) -> str | None:
    """What ranks repeat because a step has too little work of their own for all of them, and what to set; or None."""
    batch, size, ranks = config.data.batch_size, config.data.micro_batch_size, engine.mesh.world_size
    num_candidates, together = engine.estimator.num_candidates, isinstance(engine.forward, SequentialForward)

    def division(size: int, parts: int) -> Division:
        return Division(engine.mesh, batch // size, num_candidates, parts, together=together)

    def share(choice: tuple[int, int]) -> float:
        return division(*choice).num_repeats / division(*choice).num_turns

    now = size, config.mesh.candidates
    own = division(*now)
    if share(now) < ranks * _WORTH_SAYING:
        return None
    sizes = [smaller for smaller in range(size, 0, -1) if batch % smaller == 0]
    parts = range(now[1], 1 + (now[1] if engine.estimator.num_backwards else max(now[1], num_candidates)))
    best = min(((smaller, more) for more in parts for smaller in sizes), key=share)
    changes = [f"data.micro_batch_size={best[0]}"] * (best[0] != now[0])
    changes += [f"mesh.candidates={best[1]}"] * (best[1] != now[1])
    remedy = " ".join(changes) or f"data.batch_size to a multiple of {ranks * size}, or take another number of ranks"
    what = (
        f"{own.num_repeats} of {ranks} ranks have none of their own and repeat what others compute"
        if own.num_turns == 1
        else f"{own.num_repeats / own.num_turns / ranks:.0%} of what the {ranks} ranks compute is repeated"
    )
    return f"repeated work: micro-batches of a step: {batch // size}; {what}. Try {remedy}"


def amounts(splits: Splits, config: DataConfig) -> list[str]:
    """How many examples there are, and whether they are too few for a step."""
    chosen = "held out of train; chooses the step" if splits.dev else "the result is the last step"
    counts = f"{len(splits.train)} train, {len(splits.dev)} dev ({chosen}), {len(splits.validation)} validation"
    few = f"a step of data.batch_size={config.batch_size} takes some of the {len(splits.train)} examples repeatedly"
    return [f"data: {counts}", *([few] if len(splits.train) < config.batch_size else [])]


def skipped(task: Task) -> list[str]:
    """How many records ask nothing; no line if all ask something."""
    counts = [f"{count} of {split}" for split, count in task.num_skipped.items() if count]
    return [f"records that leave the task nothing to ask, left out: {', '.join(counts)}"] if counts else []


def shortened(encoder: Encoder, config: DataConfig) -> list[str]:
    """What was left out because rows would be too long, of all that was encoded so far; no line if nothing was."""
    longest, asked = encoder.max_length, f"data.max_length={config.max_length}"
    limit = f"{longest} tokens: as far as the model's positions go ({asked})" if longest < config.max_length else asked
    short = f"{encoder.num_short_of_shots} prompts have fewer than data.num_demonstrations={config.num_demonstrations}"
    lines = [f"{short}, without the first ones, to fit into {limit}"] if encoder.num_short_of_shots else []
    return [*lines, *([f"{encoder.num_truncated} rows were cut to {limit}"] if encoder.num_truncated else [])]


def conclude(config: RunConfig, summary: dict[str, Any], made: Plan, directory: RunDirectory, shown: str) -> None:
    """The result, and where it lies.

    Args:
        shown: where the run is tracked.
    """
    validation, name = summary["validation"], made.task.select_by
    print(
        f"validation {name}: {validation['before'][name]:.4f} before, {validation['chosen'][name]:.4f} after "
        f"({validation['before']['count']} examples)"
    )
    if dev := summary["dev"]:
        unchanged = ", as they were before training" if dev["best_step"] == 0 else ""
        print(f"weights: of step {dev['best_step']} of {summary['steps']}, the best on dev{unchanged}")
    peaks = [_mb(rank["peak_memory_bytes"]) for rank in summary["ranks"]]
    session, since = summary["session"], summary["resumed_at_step"]
    if session["steps"]:
        print(
            f"{f'since step {since}: ' if since else ''}{session['steps_per_second']:.2f} steps/s, "
            f"{session['tokens_per_second']:.0f} tokens/s; peak memory while training: {', '.join(peaks)}"
        )
    if summary["skipped_steps"]:
        skips = f"{summary['skipped_steps']} of {summary['steps']} steps, whose loss was not finite"
        print(f"skipped: {skips}; zoscale journal {directory.path} tells which")
    print(f"{'adapter' if config.adapter is not None else 'model'}: {directory.adapter}")
    print(f"summary: {directory.summary}")
    print(f"to look at it: {shown}")
    print(f"to compare runs: zoscale compare {directory.path.parent}/{config.name}-*")


def say(mesh: Mesh) -> Log:
    """A print that does not tear the progress bar; silent on other ranks."""
    return tqdm.write if mesh.is_main else lambda _: None


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"

"""Where a run stood: the newest checkpoint and the tail of the journal, without any forward pass."""

from collections.abc import Callable, Sequence
from pathlib import Path

from zoscale import fingerprint
from zoscale.config import ConfigError, RunConfig, flatten
from zoscale.estimators import GradientEstimate
from zoscale.optim import ShardedOptimizer
from zoscale.provenance import code
from zoscale.recovery import checkpoint
from zoscale.recovery.journal_format import HEADER_ROOM, Header, Record, unpack_header
from zoscale.recovery.manifest import complete
from zoscale.step import Engine, StepResult

Log = Callable[[str], None]


def header_of(config: RunConfig, engine: Engine, data: str) -> Header:
    """The journal's header of a run whose engine is still at step 0. A collective.

    Args:
        data: fingerprint of the examples.
    """
    return Header(
        seed=config.seed,
        config=config.to_dict(),
        config_hash=config.hash,
        code=code(config),
        model=fingerprint.of_model(engine.model, engine.mesh, trainable=False),
        trainable=fingerprint.of_model(engine.model, engine.mesh, trainable=True),
        data=data,
        num_losses=engine.num_losses,
        num_directions=engine.estimator.num_directions,
        num_groups=len(engine.optimizer.param_groups),
    )


def check_header(found: Header, expected: Header, config: RunConfig, path: Path) -> None:
    """Refuse to continue a journal that something else would write.

    Args:
        found: as read.
        expected: of this run, whose configuration is `config`.
        path: of the journal.

    Raises:
        ConfigError: naming the first difference.
    """
    _check_config(found, config, path)
    for name, what in (
        ("model", "base model"),
        ("trainable", "trainable tensors"),
        ("data", "examples"),
        ("num_groups", "parameter groups"),
    ):
        _check_same(what, getattr(found, name), getattr(expected, name), path)


def check_finished(path: Path, config: RunConfig, data: str) -> None:
    """Refuse to take the result of a finished run for that of another configuration or of other examples.

    Args:
        path: of its journal; without one there is nothing to compare.
        config: of the run that was asked for.
        data: fingerprint of its examples.

    Raises:
        ConfigError: naming the first difference, or a journal that is damaged.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        found, *_ = unpack_header(file.read(HEADER_ROOM), path)
    _check_config(found, config, path)
    _check_same("examples", found.data, data, path)


def _check_config(found: Header, config: RunConfig, path: Path) -> None:
    if found.config_hash == config.hash:
        return
    old, new = flatten(found.config), flatten(config.identity())
    key = next((key for key in new if old.get(key) != new[key]), "the configuration")
    raise ConfigError(
        f"{key}={old.get(key)}, as {path} was written with",
        str(new.get(key)),
        "change it back, or leave resume=auto to run the new configuration in a folder of its own",
    )


def _check_same(what: str, old: object, new: object, path: Path) -> None:
    if old != new:
        raise ConfigError(
            f"the {what} that {path} was written with ({old})",
            f"others ({new})",
            "restore them, or start again with overwrite=true",
        )


def check_start(engine: Engine, header: Header) -> None:
    """Refuse an engine at step 0 that a journal did not start from. A collective.

    Raises:
        ConfigError: if its base model or its trainable tensors are others.
    """
    for what, expected, trainable in (("base model", header.model, False), ("start", header.trainable, True)):
        found = fingerprint.of_model(engine.model, engine.mesh, trainable=trainable)
        if found != expected:
            raise ConfigError(f"the {what} that was trained ({expected})", f"another ({found})", "name it with --base")


def record_of(result: StepResult) -> Record:
    """A step as the journal keeps it."""
    losses, rhos = result.losses, result.estimate.projected_grads
    return Record(result.step, losses.values, losses.count, rhos, result.lrs, result.skipped)


def replay(engine: Engine, records: Sequence[Record], progress: Callable[[], None] = lambda: None) -> None:
    """Take steps from the journal instead of from losses: directions are drawn again, and nothing is evaluated.

    Args:
        records: the next steps of the engine, in order.
        progress: called after every step.

    Raises:
        ConfigError: if the steps are first-order: they take more than scalars.
    """
    if records:
        check_replay(type(engine.optimizer), f"{len(records)} more steps to take")
    lrs = [group["lr"] for group in engine.optimizer.param_groups]
    for record in records:
        if record.step != engine.num_steps:
            raise ValueError(f"expected step {engine.num_steps} in the journal, got {record.step}")
        if not record.skipped:
            _set_lrs(engine, record.lrs)
            directions = tuple(engine.directions(record.step))
            loss = engine.estimator.loss(record.losses)
            engine.optimizer.step(GradientEstimate(directions, record.projected_grads, loss))
        engine.end_step()
        progress()
    _set_lrs(engine, lrs)


def check_replay(optimizer: type[ShardedOptimizer], got: str) -> None:
    """Refuse to take steps from the journal that need gradients.

    Raises:
        ConfigError: with what there was instead of a checkpoint.
    """
    if not optimizer.can_replay:
        remedy = "name a step with a checkpoint: a first-order step is not made of the journal's scalars"
        raise ConfigError(f"a checkpoint of the step, trained by {optimizer.__name__}", got, remedy)


def restore(
    engine: Engine,
    checkpoints: Path,
    records: Sequence[Record],
    config_hash: str,
    log: Log,
    *,
    chosen: Path | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Bring an engine at step 0 to the end of the journal. A collective.

    A damaged checkpoint is passed over with a word: an older one, or none, leads to the same bits. First-order steps
    are not replayed: the engine is brought to the checkpoint's step.

    Args:
        checkpoints: folder of checkpoints.
        records: the whole journal.
        config_hash: of the run.
        chosen: a checkpoint to start from instead of the newest.
        progress: called after every step that is replayed.

    Raises:
        ConfigError: if the chosen checkpoint cannot be loaded, or lacks the optimizer's state.
    """
    if chosen is not None:
        _load_chosen(engine, chosen, config_hash)
    else:
        load_newest(engine, checkpoints, len(records), config_hash, log)
    start = engine.num_steps
    if start > len(records):
        raise ConfigError(f"a checkpoint of step {len(records)} or earlier", f"step {start}", "choose another one")
    if not engine.optimizer.can_replay:
        if records:
            log(f"resumed at step {start}, the newest checkpoint; {len(records) - start} steps are taken again")
        return
    replay(engine, records[start:], progress)
    if records:
        log(f"resumed at step {len(records)}: checkpoint of step {start}, {len(records) - start} steps replayed")


def _load_chosen(engine: Engine, chosen: Path, config_hash: str) -> None:
    if not chosen.name.startswith("step_"):
        remedy = "choose one of those, or name the run's folder"
        raise ConfigError("a checkpoint with the optimizer's state, step_<n>", str(chosen), remedy)
    checkpoint.load(engine, chosen, config_hash)


def go_to(engine: Engine, checkpoints: Path, records: Sequence[Record], step: int, config_hash: str, log: Log) -> None:
    """Bring an engine at step 0 to the weights of a step: from those kept as the best, or by replay. A collective.

    Raises:
        ConfigError: if the journal does not reach that step.
    """
    if step > len(records):
        raise ConfigError(f"a journal of at least {step} steps", str(len(records)), "restore it from a copy")
    best = engine.mesh.on_main(lambda: dict(complete(checkpoints, "best")).get(step))
    try:
        if best is not None:
            checkpoint.load(engine, best, config_hash)
            return
    except ConfigError as error:
        log(f"checkpoint passed over: {error}")
    load_newest(engine, checkpoints, step, config_hash, log)
    replay(engine, records[engine.num_steps : step])


def load_newest(engine: Engine, checkpoints: Path, limit: int, config_hash: str, log: Log) -> bool:
    """Load the newest intact checkpoint of at most `limit` steps. A collective.

    Returns:
        Whether there was one.
    """
    found = engine.mesh.on_main(lambda: [folder for step, folder in complete(checkpoints) if step <= limit])
    for folder in reversed(found):
        try:
            checkpoint.load(engine, folder, config_hash)
            return True
        except ConfigError as error:
            log(f"checkpoint passed over: {error}")
    return False


def _set_lrs(engine: Engine, lrs: Sequence[float]) -> None:
    for group, lr in zip(engine.optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr

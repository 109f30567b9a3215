"""One training run: from a configuration to a finished run directory."""

from typing import Any

from zoscale import provenance, runtime
from zoscale.agreement import check_agreement
from zoscale.assembly import Plan, build_training_engine, check_groups, plan
from zoscale.config import ConfigError, RunConfig
from zoscale.mesh import Mesh
from zoscale.plan.fit import shard_size_of_run
from zoscale.preemption import Preempted, end_on_signals
from zoscale.recovery.ledger import Ledger
from zoscale.recovery.resume import check_finished, header_of
from zoscale.release.export import save_trained, write_origin
from zoscale.rounding import check_rounding
from zoscale.run_directory import RunDirectory, as_json, write_json
from zoscale.run_report import conclude, describe, say
from zoscale.shard_groups import shard_size_of
from zoscale.step import Engine
from zoscale.tracking.tracker import NullTracker, Tracker
from zoscale.trainer import Trainer
from zoscale.watchdog import Watchdog


def run(config: RunConfig) -> dict[str, Any]:
    """Train as configured, or go on with a run that was stopped. Every rank calls it; rank 0 writes and prints.

    After an error the process group is left as it is, so that a rank that fails alone ends at once and its launcher
    ends the others.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        ConfigError: if the configuration cannot be run, or what is in the run directory cannot be continued.
        FloatingPointError: if the loss stays not finite.
        Preempted: if the job was told to stop.
        OSError: if the run directory cannot be written; what was written before stays.
    """
    with end_on_signals(RunDirectory.of(config).told_to_stop):
        return _run(config)


def _run(config: RunConfig) -> dict[str, Any]:
    made = plan(config)
    accelerator = runtime.start(
        runtime.Runtime(
            dtype=config.model.dtype,
            deepspeed=made.deepspeed,
            shard_size=shard_size_of_run(config, made.architecture),
            timeout_minutes=config.runtime.timeout_minutes,
            threads=config.runtime.threads,
        ),
        size=made.size,
    )
    mesh = Mesh(accelerator.device)
    check_agreement(mesh, {**_facts(config, made), "number of ranks per copy": shard_size_of(accelerator)})
    is_new = not RunDirectory.of(config).config.exists()
    directory = _enter(config, mesh)
    summary = mesh.on_main(directory.read_summary)
    if summary is None:
        try:
            engine = build_training_engine(
                config, made.architecture, accelerator, objective=made.objective, tokenizer=made.encoder.tokenizer
            )
            check_groups(config, engine)
            check_rounding(engine, say(mesh))
        except ConfigError:
            if is_new and mesh.is_main:
                directory.leave_unused()
            raise
        describe(config, engine, made, directory)
        summary = _watched(config, made, engine, directory)
    else:
        mesh.on_main(lambda: check_finished(directory.journal, config, made.data))
        say(mesh)(f"{directory.path} is finished; overwrite=true starts it again")
    runtime.stop()
    return summary


def _facts(config: RunConfig, made: Plan) -> dict[str, object]:
    """What all ranks must have in common."""
    return {
        **config.flatten(),
        "architecture": made.architecture.to_json_string(),
        "examples": made.data,
        "zoscale": provenance.code(config),
        **provenance.libraries(),
    }


def _enter(config: RunConfig, mesh: Mesh) -> RunDirectory:
    """Rank 0 opens the run directory and keeps its lock; all ranks must see it."""
    directory = RunDirectory.of(config)
    try:
        mesh.on_main(lambda: directory.open(config))
        mesh.together(lambda: directory.config.stat())
    except OSError as error:
        remedy = "set output_dir to a writable folder that all ranks share"
        raise ConfigError(f"a writable, shared folder {directory.path}", str(error), remedy) from error
    return directory


def _watched(config: RunConfig, made: Plan, engine: Engine, directory: RunDirectory) -> dict[str, Any]:
    """All ranks under the eyes of each other: one that stands still ends the job."""
    mesh, limits = engine.mesh, config.runtime
    slow_seconds = max(60 * limits.timeout_minutes, limits.stall_seconds)
    watchdog = Watchdog(
        rank=mesh.rank, world_size=mesh.world_size, stall_seconds=limits.stall_seconds, slow_seconds=slow_seconds
    )
    engine.answers.watch(watchdog.enter, watchdog.beat)
    with watchdog:
        log = say(mesh)
        ledger = Ledger(directory, config, engine, header_of(config, engine, made.data), log, watchdog.move)
        tracker = _tracker(config, made, engine, directory)
        status = "FAILED"
        try:
            trainer = Trainer(config, engine, made.task, made.splits, made.encoder, ledger, tracker, watchdog, log)
            summary = trainer.run() | provenance.facts(config)
            ledger.close()
            with watchdog.slow("saving"):
                _leave(config, made, engine, directory, summary, tracker)
        except Preempted:
            status = "KILLED"
            raise
        finally:
            with watchdog.slow("tracking"):
                tracker.finish(status)
    return summary


def _leave(
    config: RunConfig,
    made: Plan,
    engine: Engine,
    directory: RunDirectory,
    summary: dict[str, Any],
    tracker: Tracker,
) -> None:
    """Write the result, and the summary last: a run that has one is left alone, also by MLflow."""
    save_trained(engine, directory.adapter)
    if not engine.mesh.is_main:
        return
    write_origin(engine, directory.adapter, config.hash)
    if config.adapter is None:  # a whole model: usable as it lies, and too large to copy unasked
        made.encoder.tokenizer.save_pretrained(directory.adapter)
    else:
        tracker.log_artifacts(directory.adapter, "adapter")
    tracker.log_artifact(directory.journal)
    tracker.log_text(as_json(summary), directory.summary.name)
    tracker.finish()
    write_json(directory.summary, summary)
    directory.told_to_stop.unlink(missing_ok=True)
    conclude(config, summary, made, directory, tracker.how_to_open())


def _tracker(config: RunConfig, made: Plan, engine: Engine, directory: RunDirectory) -> Tracker:
    if not engine.mesh.is_main:
        return NullTracker()
    return Tracker.start(
        directory.path,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        run_name=directory.path.name,
        params=config.flatten(),
        tags={
            "git_commit": provenance.commit(),
            "world_size": str(engine.mesh.world_size),
            "device": provenance.device_name(engine.mesh.device),
            "select_by": made.task.select_by,
            **config.tracking.tags,
        },
        enabled=config.tracking.mlflow,
    )

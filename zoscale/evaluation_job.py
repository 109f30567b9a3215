"""`zoscale evaluate`: any checkpoint of a run, or any Hugging Face model, on any tasks, on any number of ranks."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoscale import provenance, runtime
from zoscale.agreement import check_agreement
from zoscale.assembly import build_engine, encoder_of
from zoscale.config import ConfigError, RunConfig, build, flatten, parse
from zoscale.data.batch import MicroBatch
from zoscale.data.splits import Encoder, Splits, numbered_batches, part
from zoscale.engine import ZeroOrderEngine
from zoscale.evaluate import Evaluation
from zoscale.mesh import Mesh
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.loading import read_model_config
from zoscale.models.sizes import ModelSize, count_parameters
from zoscale.plan.fit import shard_size_of_run
from zoscale.recovery import checkpoint
from zoscale.recovery.journal import Journal
from zoscale.recovery.journal_format import Header
from zoscale.recovery.manifest import complete
from zoscale.recovery.resume import check_replay, check_start, go_to, restore
from zoscale.release.export import read_origin
from zoscale.release.run_record import RunRecord, check_base, with_base
from zoscale.run_directory import write_json
from zoscale.run_report import say, shortened, skipped
from zoscale.scoring import RecordingGenerator, score, write_predictions
from zoscale.tasks import TASKS, Example, Task

_OF_THE_EVALUATION = ("task", "data", "train", "mesh", "forward", "runtime")  # what may differ from the run's


@dataclasses.dataclass(frozen=True)
class Job:
    """One task to evaluate on, read before any process group starts; examples with their numbers, as batched."""

    name: str
    task: Task
    encoder: Encoder
    examples: Sequence[tuple[int, Example]]
    batches: list[MicroBatch]


def evaluate_command(argv: Sequence[str]) -> int:
    """Every rank calls it; rank 0 prints and writes.

    Returns:
        0.

    Raises:
        ConfigError: for a mistake of the user.
        OSError: if the results cannot be written.
    """
    arguments = _parser().parse_intermixed_args(argv)
    record = _record(arguments)
    which = _checkpoint(arguments.checkpoint or "best", record)
    configs = _configurations(arguments, record)
    config = next(iter(configs.values()))
    architecture = read_model_config(config.model)
    size = count_parameters(architecture, trust_remote_code=config.model.trust_remote_code)
    jobs = [_job(name, own, architecture, size, arguments.split) for name, own in configs.items()]
    engine = _start(config, architecture, size)
    log = say(engine.mesh)
    out = Path(arguments.out) if arguments.out and engine.mesh.is_main else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    step = _restore(engine, record, which) if record is not None else None
    if step is not None:
        log(f"weights of step {step}")
    results: dict[str, Any] = {}
    for job in jobs:
        for told in (*skipped(job.task), *shortened(job.encoder, configs[job.name].data)):
            log(f"{job.name}: {told}")
        result = _evaluate(job, engine, out)
        results[job.name] = result.flat()
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in result.metrics.items())
        log(f"{job.name} {arguments.split}: {shown} ({result.count} examples)")
    if out is not None:
        about = {"model": config.model.id, "run": arguments.run, "step": step, "split": arguments.split}
        write_json(out / "results.json", {**about, "results": results, **provenance.facts(config)})
        log(f"results: {out}")
    runtime.stop()
    return 0


def _evaluate(job: Job, engine: ZeroOrderEngine, out: Path | None) -> Evaluation:
    """The result of a job, and its predictions in a folder, if one is given. A collective."""
    generator = RecordingGenerator(engine.answers, job.encoder.tokenizer, engine.mesh) if job.task.generates else None
    result, predictions = score(
        engine.answers, job.examples, job.batches, engine.mesh, job.task.metrics, generator=generator
    )
    if out is not None:
        write_predictions(out / f"{job.name}.jsonl", predictions)
    return result


def _record(arguments: argparse.Namespace) -> RunRecord | None:
    """The run to evaluate, whose base model may be loaded; None for a model without a run."""
    if arguments.run:
        record = RunRecord.read(arguments.run, arguments.base)
        check_base(record.config, arguments.base)
        return record
    if arguments.checkpoint or arguments.base:
        raise ConfigError("--run with --checkpoint and --base", f"--model {arguments.model}", "leave them out")
    return None


def _configurations(arguments: argparse.Namespace, record: RunRecord | None) -> dict[str, RunConfig]:
    """The configuration of each task to evaluate on, by its name."""
    files = [word for file in arguments.config for word in ("--config", file)]
    overrides = [word for word in arguments.words if "=" in word]
    if record is None:
        overrides = _of_a_model(arguments.model, overrides)
    tree = record.config.to_dict() if record is not None else {}
    names = [word for word in arguments.words if "=" not in word]
    configs = {}
    for name in names or [None]:
        base = {**tree, "task": {"name": name}} if name else tree
        own = parse([*files, *overrides], TABLES, DEFAULTS, command="zoscale evaluate", base=base)
        if name is not None and own.task.name != name:
            raise ConfigError(f"task {name}, as named", own.task.name, "leave task.name out, or the word")
        if record is not None:
            _check_same_run(own, record.config)
        configs[own.task.name] = own
    return configs


def _of_a_model(model: str, words: Sequence[str]) -> list[str]:
    """The options for a Hugging Face model as it is, which none of the words sets otherwise."""
    own = [f"model.id={model}", "adapter=null", "master=none"]
    for word in words:
        if word.startswith(("model.id=", "adapter=", "adapter.", "master=")) and word not in own:
            raise ConfigError(f"no other model than --model {model}", word, "leave it out")
    return [*words, *own]


def _check_same_run(config: RunConfig, trained: RunConfig) -> None:
    old = trained.flatten()
    for key, value in config.flatten().items():
        if key.partition(".")[0] not in _OF_THE_EVALUATION and old.get(key) != value:
            sections = ", ".join(_OF_THE_EVALUATION)
            raise ConfigError(f"with --run only options of {sections}", key, f"leave {key} out")


def _job(name: str, config: RunConfig, architecture: Any, size: ModelSize, split: str) -> Job:
    try:
        task: Task = build(config.task, TASKS)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError("options that the task takes", str(error), "correct the configuration") from error
    encoder = encoder_of(config, architecture, size)
    numbered = _examples(task, config, split)
    if not numbered:
        raise ConfigError(f"examples in split {split}", "none", "choose another --split, or raise data.num_dev")
    examples = [example for _, example in numbered]
    batches, order = numbered_batches(examples, encoder, config.train.eval_micro_batch_size)
    return Job(name, task, encoder, [numbered[place] for place in order], batches)


def _examples(task: Task, config: RunConfig, split: str) -> list[tuple[int, Example]]:
    """The examples to score with their numbers, which `Prediction` explains."""
    if split != "validation":
        return list(enumerate(getattr(Splits.of(task, config.data, config.seed), split)))
    everything = task.examples(split)
    places = part(range(len(everything)), config.data.num_validation)
    if config.data.num_demonstrations == 0:
        return [(place, everything[place]) for place in places]
    return list(zip(places, Splits.of(task, config.data, config.seed).validation, strict=True))


def _start(config: RunConfig, architecture: Any, size: ModelSize) -> ZeroOrderEngine:
    """All ranks with the model at step 0."""
    accelerator = runtime.start(
        runtime.Runtime(
            dtype=config.model.dtype,
            deepspeed=runtime.read_deepspeed_config(config.runtime.deepspeed),
            shard_size=shard_size_of_run(config, architecture),
            timeout_minutes=config.runtime.timeout_minutes,
            threads=config.runtime.threads,
        ),
        size=size,
    )
    check_agreement(Mesh(accelerator.device), {**config.flatten(), **provenance.libraries()})
    return build_engine(config, architecture, accelerator)


def _checkpoint(which: str, record: RunRecord | None) -> str | Path:
    """`best`, `last`, or the folder of a checkpoint, named by its path or within the run's."""
    if which in ("best", "last") or record is None:
        return which
    named = record.directory.checkpoints / which
    folder = named if named.is_dir() else Path(which)
    if not folder.is_dir():
        found = ", ".join(path.name for path in sorted(record.directory.checkpoints.glob("*_*"))) or "none"
        raise ConfigError(
            f"best, last or a checkpoint of {record.directory.path} ({found})", which, "choose one of them"
        )
    return folder


def _restore(engine: ZeroOrderEngine, record: RunRecord, which: str | Path) -> int:
    """Bring an engine at step 0 to a checkpoint of a run; returns its step. A collective."""
    directory, mesh, log = record.directory, engine.mesh, say(engine.mesh)
    journal = mesh.on_main(lambda: Journal.read(directory.journal))
    _check_as_trained(record, journal.header)
    check_start(engine, journal.header)
    records, config_hash = journal.records, journal.header.config_hash
    best = mesh.on_main(lambda: _best_step(record)) if which == "best" else None
    if best is not None:
        go_to(engine, directory.checkpoints, records, best, config_hash, log)
    elif isinstance(which, Path):
        checkpoint.load(engine, which, config_hash)
    else:  # without dev, the last step is the best
        restore(engine, directory.checkpoints, records, config_hash, log)
        if engine.num_steps < len(records):
            check_replay(type(engine.optimizer), f"the newest of step {engine.num_steps} of {len(records)}")
    return engine.num_steps


def _check_as_trained(record: RunRecord, header: Header) -> None:
    """Refuse a config.yaml that was cut short or edited: other methods would take other steps from the journal."""
    trained = with_base(RunConfig.from_dict(header.config, TABLES, DEFAULTS), record.base)
    if trained.hash == record.config.hash:
        return
    old, new = flatten(trained.identity()), flatten(record.config.identity())
    key = next((key for key in {**old, **new} if old.get(key) != new.get(key)), "the configuration")
    remedy = "restore the file; options of an evaluation go on the command line"
    raise ConfigError(f"{key}={old.get(key)} in {record.directory.config}, as trained", str(new.get(key)), remedy)


def _best_step(record: RunRecord) -> int | None:
    """The step that was best on dev, of a finished run or so far."""
    kept = [step for step, _ in complete(record.directory.checkpoints, "best")]
    return kept[-1] if kept else read_origin(record.directory.adapter)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoscale evaluate",
        description=__doc__,
        epilog="On several ranks: accelerate launch --config_file FILE -m zoscale evaluate ...",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="ID", help="Hugging Face id or folder of a causal LM")
    which.add_argument("--run", metavar="RUN", help="run directory")
    parser.add_argument(
        "--checkpoint",
        metavar="best|last|PATH",
        help="of the run: the weights that were best on dev (default), those of the last step in the journal, or those "
        "of a checkpoint by its path or name",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="id or folder of the run's base model: if it has moved, or if it needs pickles or code of its own, to say "
        "that you trust it",
    )
    parser.add_argument(
        "--split",
        default="validation",
        choices=["validation", "dev", "train"],
        help="default: validation",
    )
    parser.add_argument("--out", metavar="DIR", help="write results.json, and the predictions as <task>.jsonl")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML as for zoscale train")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="TASK|key=value",
        help="tasks by name (default: the run's, or task.name), and options as for zoscale train: task.path=DIR",
    )
    return parser

"""`Ledger`: what a run writes so that it can be killed at any moment: journal, evaluations, choices, checkpoints."""

from collections.abc import Callable
from pathlib import Path

from zoscale.adapters.choice import Change
from zoscale.config import ConfigError, RunConfig
from zoscale.evaluate import Evaluation
from zoscale.recovery import checkpoint
from zoscale.recovery.evaluation_log import EvaluationLog
from zoscale.recovery.journal import Journal, JournalWriter
from zoscale.recovery.journal_format import Header, Record
from zoscale.recovery.manifest import complete, keep_last, name_of, remove_unfinished
from zoscale.recovery.resume import Log, check_header, load_newest, record_of, replay, restore
from zoscale.run_directory import RunDirectory, write_json
from zoscale.step import Engine, StepResult

_BEST = "best"


class Ledger:
    """Opens a run's records, brings the engine to where they end, and goes on writing. Collectives throughout.

    Args:
        directory: of the run, made and locked.
        config: of the run.
        engine: at step 0; at the journal's last step afterwards.
        header: of the run.
        log: prints on rank 0.
        progress: called after every step that is replayed.

    Raises:
        ConfigError: if what is there is damaged or belongs to another run.
        OSError: if it cannot be written.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: RunConfig,
        engine: Engine,
        header: Header,
        log: Log,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory
        self.engine = engine
        self.log = log
        self._config = config
        self._options = config.checkpoint
        self._hash = header.config_hash
        self._writer: JournalWriter | None = None
        self.records: list[Record] = engine.mesh.on_main(lambda: self._open_journal(header))
        self.evaluations = EvaluationLog(directory.evaluations, engine.mesh)
        chosen = directory.chosen_checkpoint(config)
        restore(engine, directory.checkpoints, self.records, self._hash, log, chosen=chosen, progress=progress)
        engine.mesh.on_main(self._cut_journal)
        del self.records[engine.num_steps :]

    def append(self, result: StepResult) -> None:
        """Put a step into the journal.

        Raises:
            OSError: on rank 0, if it cannot be written; all earlier steps are safe.
        """
        record = record_of(result)
        self.records.append(record)
        if self._writer is not None:
            self._writer.append(record)

    def add_evaluation(self, name: str, step: int, result: Evaluation) -> None:
        """Keep an evaluation."""
        self._sync()
        self.evaluations.add(name, step, result)

    def add_choice(self, change: Change) -> Path:
        """Keep a choice of adapters; made again by a replay, it is the same."""
        path = self.directory.choices / f"{name_of(change.step)}.json"
        if self.engine.mesh.is_main:
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"step": change.step, "kept": change.kept, "weights": change.weights})
        return path

    def checkpoint_is_due(self) -> bool:
        """Whether the current step ends with a checkpoint."""
        every = self._options.every
        return every > 0 and self.engine.num_steps % every == 0

    def checkpoint(self) -> None:
        """Write a checkpoint of the current step and remove old ones."""
        self._sync()
        self._save("step")
        if self.engine.mesh.is_main:
            keep_last(self.directory.checkpoints, self._options.keep)

    def save_best(self) -> None:
        """Keep the weights of the current step as the best so far."""
        self._save(_BEST, state=False)
        if self.engine.mesh.is_main:
            keep_last(self.directory.checkpoints, 1, _BEST)

    def load_best(self, step: int) -> None:
        """Put the weights of a step that was the best back into the engine.

        Raises:
            ConfigError: if they are not there or damaged, and no checkpoint of an earlier step leads to them.
        """
        folder = self.directory.checkpoints
        try:
            checkpoint.load(self.engine, folder / name_of(step, _BEST), self._hash)
        except ConfigError as error:
            self.log(f"checkpoint passed over: {error}")
            if not load_newest(self.engine, folder, step, self._hash, self.log):
                remedy = f"rebuild them: zoscale replay {self.directory.path} --until {step} --out DIR"
                if not self.engine.optimizer.can_replay:
                    remedy = "restore the folder from a copy, or start again with overwrite=true"
                raise ConfigError(f"the weights of step {step}", str(error), remedy) from error
            replay(self.engine, self.records[self.engine.num_steps : step])

    def close(self) -> None:
        """Sync and close the journal."""
        if self._writer is not None:
            self._writer.close()

    def _save(self, kind: str, *, state: bool = True) -> None:
        step, folder = self.engine.num_steps, self.directory.checkpoints
        known = self.engine.mesh.on_main(lambda: [found for found, _ in complete(folder, kind)])
        if step not in known:
            checkpoint.save(self.engine, folder / name_of(step, kind), self._hash, state=state)

    def _sync(self) -> None:
        """A checkpoint or an evaluation is never ahead of the journal on the disk."""
        if self._writer is not None:
            self._writer.sync()

    def _cut_journal(self) -> None:
        """Leave the records of the steps that the engine has taken."""
        if self._writer is not None and len(self.records) > self.engine.num_steps:
            self._writer.cut(len(self.records) - self.engine.num_steps)

    def _check_new(self) -> None:
        """Refuse to start where a run has left something: a lost journal, or an overwrite that was cut short."""
        folder = self.directory.checkpoints
        left = [path for kind in ("step", _BEST) for _, path in complete(folder, kind)]
        left += [self.directory.evaluations] if self.directory.evaluations.exists() else []
        if left:
            remedy = "restore it from a copy, or start again with overwrite=true"
            raise ConfigError(f"the journal {self.directory.journal}", f"{left[0]} without it", remedy)

    def _open_journal(self, header: Header) -> list[Record]:
        path, every = self.directory.journal, self._options.journal_sync_every
        if not path.exists():
            self._check_new()
            remove_unfinished(self.directory.checkpoints)
            self._writer = JournalWriter.create(path, header, sync_every=every)
            return []
        journal = Journal.read(path)
        check_header(journal.header, header, self._config, path)
        remove_unfinished(self.directory.checkpoints)
        if journal.header.code != header.code:
            self.log(f"the journal was started by zoscale {journal.header.code}, this is {header.code}")
        if journal.num_torn:
            self.log(f"journal: {journal.num_torn} bytes of an unfinished write after step {len(journal.records)} cut")
        self._writer = JournalWriter(path, journal.header, journal.num_bytes, sync_every=every)
        return journal.records

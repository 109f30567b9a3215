"""`Trainer`: one run from its configuration to its run directory."""

import time
import warnings
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm
from transformers import get_scheduler

from zoscale.config import ConfigError, RunConfig
from zoscale.data.batch import MicroBatch
from zoscale.data.splits import Encoder, Splits, evaluation_batches
from zoscale.data.train_batches import TrainBatches
from zoscale.evaluate import Evaluation, evaluate
from zoscale.fingerprint import check_replicas
from zoscale.preemption import Preempted, stop_on_signals
from zoscale.progress import BestOnDev, Score, Skips, evaluated
from zoscale.recovery.journal_format import Record
from zoscale.recovery.ledger import Ledger
from zoscale.recovery.resume import Log
from zoscale.run_meters import RunMeters
from zoscale.step import Engine, StepResult
from zoscale.tasks import Task
from zoscale.tracking.tracker import Tracker
from zoscale.watchdog import Watchdog

_MULTIPLE = 32  # tokens to which rows are padded for a compiled forward
_LOOKED_AT = 2**14  # steps whose shapes are compiled before the first; one that only comes later runs without a graph


class Trainer:
    """The loop: batches -> engine.step -> journal; evaluation on dev; the best step on dev is what the run leaves.

    Args:
        config: of the run.
        engine: built from it; at step 0, or where the ledger has brought it.
        task: built from it.
        splits: its examples.
        encoder: with the model's tokenizer.
        ledger: keeps every step.
        tracker: where rank 0 writes metrics.
        watchdog: is told of phases that may take long.
        log: prints on rank 0.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        task: Task,
        splits: Splits,
        encoder: Encoder,
        ledger: Ledger,
        tracker: Tracker,
        watchdog: Watchdog,
        log: Log,
    ) -> None:
        self.config = config
        self.engine = engine
        self.task = task
        self.ledger = ledger
        self.tracker = tracker
        self.watchdog = watchdog
        self.log = log
        gold_only = config.objective == "lm"
        multiple = config.data.pad_to_multiple_of or (1 if config.forward.compile == "off" else _MULTIPLE)
        self.batches = TrainBatches(
            splits.train, encoder, config.data, config.seed, gold_only=gold_only, multiple=multiple
        )
        size = config.train.eval_micro_batch_size
        self.metrics = evaluated(config, task)
        self.dev = evaluation_batches(splits.dev, encoder, size)
        self.validation = evaluation_batches(splits.validation, encoder, size)
        self.meters = RunMeters(engine, tracker.past)
        self.schedule = get_scheduler(
            config.schedule.name, engine.optimizer, config.schedule.warmup_steps, max(1, config.train.steps)
        )
        adapters = engine.adapters
        self._best = BestOnDev(task.select_by, 0 if adapters is None else adapters.selection.warmup_steps)
        self._skips = Skips(config.train.max_skipped_in_row)
        self._has_scored = False

    def run(self) -> dict[str, Any]:
        """Train; evaluate on validation before it, at its end and with the weights that were best on dev.

        Returns:
            The summary.

        Raises:
            Diverged: if replicas hold different weights.
            Preempted: if the job was told to stop; the step is finished and a checkpoint written.
            FloatingPointError: if the loss is not finite for too many steps in a row.
        """
        started, first = time.monotonic(), self.engine.num_steps
        before = self._evaluate("validation/before", self.validation, 0)
        self._catch_up()
        if first < self.config.train.steps:
            with self.watchdog.slow("the rehearsal of the forward"):
                self.engine.rehearse(self._rehearsed(first))
        bar = tqdm(
            initial=first,
            total=self.config.train.steps,
            disable=not self.engine.mesh.is_main,
            unit="step",
            mininterval=1.0,
        )
        with bar, stop_on_signals(self.engine.mesh, self.ledger.directory.told_to_stop), self.meters.training():
            for step in range(first, self.config.train.steps):
                with self.watchdog.slow("first step", repeats=True) if step == first else nullcontext():
                    result = self._step(step)
                bar.set_postfix_str(f"loss {result.loss:.4f}", refresh=False)
                bar.update()
                self._after(step + 1)
        steps = self.config.train.steps
        final = self._evaluate("validation/final", self.validation, steps) if steps else before
        best = self._restore_best(final)
        return self._summary(before, final, best, first, time.monotonic() - started)

    def _rehearsed(self, first: int) -> list[MicroBatch]:
        """Micro-batches for which the forward gets ready."""
        if self.config.forward.compile == "off":
            return self.batches.at(first)
        return self.batches.one_of_each_shape(min(self.config.train.steps, _LOOKED_AT))

    def _step(self, step: int) -> StepResult:
        with self.meters.phases.phase("data"):
            batch = self.batches.at(step)
        result = self.engine.step(batch)
        self.ledger.append(result)
        self._tell_choices()
        self.schedule.step()
        self.meters.count(result)
        self._skips.count(step, skipped=result.skipped)
        if self._is_logged(step + 1):
            self.tracker.log(step + 1, self._metrics(self.ledger.records[-1]) | self.meters.take())
        return result

    def _tell_choices(self) -> None:
        """Write down the choices of adapters that were made since the last call."""
        for change in self.engine.adapters.take_changes() if self.engine.adapters is not None else ():
            self.tracker.log(change.step, change.metrics)
            self.tracker.log_artifact(self.ledger.add_choice(change))
            self.log(f"step {change.step}: {change}")

    def _after(self, step: int) -> None:
        """What comes between two steps."""
        due = self._is_evaluated(step) or self.ledger.checkpoint_is_due()
        if due or step % self.config.mesh.check_every == 0:
            check_replicas(self.engine.shards, self.engine.mesh)
        if self._is_evaluated(step):
            with self.meters.aside("evaluate"):
                self._choose(step)
        stopping = self.engine.mesh.stop_agreed and step < self.config.train.steps
        ends = step == self.config.train.steps and not self.engine.optimizer.can_replay
        if stopping or ends or self.ledger.checkpoint_is_due():
            with self.meters.aside("checkpoint"), self.watchdog.slow("checkpoint"):
                self.ledger.checkpoint()
        if stopping:
            raise Preempted(step)

    def _catch_up(self) -> None:
        """Bring the loop's own state to the step where the ledger stands; what was missed there is done now."""
        records, step = self.ledger.records, self.engine.num_steps
        self._tell_choices()
        for record in records:
            self._skips.count(record.step, skipped=record.skipped)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # the steps were taken long ago
            for _ in records:
                self.schedule.step()
        if records and self._is_logged(step):
            self.tracker.log(step, self._metrics(records[-1]))
        for earlier, dev in self.ledger.evaluations.series("dev"):
            if earlier < step:
                self._best.consider(Score(earlier, dev))
        if step == 0 or self._is_evaluated(step):
            self._choose(step)

    def _metrics(self, record: Record) -> dict[str, float]:
        """What the journal knows of a step."""
        rhos, adapters = record.projected_grads, self.engine.adapters
        return ({} if adapters is None else {"train/adapters": float(len(adapters.connected))}) | {
            "train/loss": self.engine.estimator.loss(record.losses),
            "train/lr": record.lrs[0],
            "train/forwards": float((record.step + 1) * self.engine.num_forwards),
            "train/skipped_steps": float(self._skips.total),
            "train/projected_grad_abs_mean": sum(map(abs, rhos)) / len(rhos),
            "train/projected_grad_max": max(map(abs, rhos)),
            "train/projected_grad_mean": sum(rhos) / len(rhos),
            **({"train/backwards": float(record.step + 1)} if self.engine.estimator.num_backwards else {}),
        }

    def _is_logged(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step == self.config.train.steps

    def _is_evaluated(self, step: int) -> bool:
        every = self.config.train.eval_every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def _evaluate(self, name: str, batches: list[MicroBatch], step: int) -> Evaluation:
        """An evaluation; the earlier one, where the run has taken it already."""
        result, cost = self.ledger.evaluations.get(name, step), {}
        if result is None:
            if step == 0 < self.engine.num_steps:
                got = "a file without it"
                raise ConfigError(f"{name} of step 0 in {self.ledger.evaluations.path}", got, "restore the file")
            started = time.monotonic()
            result = self._scored(batches)
            cost = {f"{name}/seconds": time.monotonic() - started}
            self.ledger.add_evaluation(name, step, result)
        self.tracker.log(step, {f"{name}/{metric}": value for metric, value in result.metrics.items()} | cost)
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in result.metrics.items())
        self.log(f"step {step}: {name} {shown} ({result.count} examples)")
        return result

    def _scored(self, batches: list[MicroBatch]) -> Evaluation:
        """An evaluation that is taken now; the first of a process may be slow."""
        mesh, generator = self.engine.mesh, self.engine.generator if self.task.generates else None
        is_first, self._has_scored = not self._has_scored, True
        is_one_pass = mesh.share(len(batches))[1] == 1  # there is no time between two to judge the next ones by
        with self.watchdog.slow("first evaluation", repeats=is_one_pass) if is_first else nullcontext():
            return evaluate(self.engine.answers, batches, mesh, self.metrics, generator=generator)

    def _choose(self, step: int) -> None:
        """Evaluate on dev and keep the weights if they are the best so far."""
        if self.dev and self._best.consider(Score(step, self._evaluate("dev", self.dev, step))):
            with self.watchdog.slow("checkpoint"):
                self.ledger.save_best()

    def _restore_best(self, final: Evaluation) -> Evaluation:
        """Validation with the weights that were best on dev; the engine keeps those weights."""
        steps = self.config.train.steps
        if self._best.score is not None:
            self.tracker.log(steps, {"train/best_step": float(self._best.score.step)})
        if self._best.score is None or self._best.score.step == steps:
            return final
        with self.watchdog.slow("loading the best weights"):
            self.ledger.load_best(self._best.score.step)
        return self._evaluate("validation/best", self.validation, steps)

    def _summary(
        self, before: Evaluation, final: Evaluation, best: Evaluation, first: int, seconds: float
    ) -> dict[str, Any]:
        steps, score, records = self.config.train.steps, self._best.score, self.ledger.records
        return {
            "validation": {"before": before.flat(), "final": final.flat(), "chosen": best.flat()},
            "dev": {"best_step": score.step, **score.dev.flat()} if score else None,
            "steps": steps,
            "resumed_at_step": first or None,
            "skipped_steps": self._skips.total,
            "forwards": steps * self.engine.num_forwards,
            "backwards": steps * self.engine.estimator.num_backwards,
            "final_train_loss": self._metrics(records[-1])["train/loss"] if records else None,
            **self.meters.summary(seconds),
        }

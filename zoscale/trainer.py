"""`Trainer`: one run from its configuration to its run directory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import get_scheduler

from zoscale.batch import MicroBatch
from zoscale.config import RunConfig
from zoscale.data import Encoder, Splits, TrainBatches, evaluation_batches
from zoscale.engine import StepResult, ZeroOrderEngine
from zoscale.evaluate import Evaluation, evaluate
from zoscale.run_meters import RunMeters
from zoscale.snapshot import Snapshot
from zoscale.tasks import Task
from zoscale.tracking import Tracker

Log = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """An evaluation on dev and the step before which it was taken."""

    step: int
    dev: Evaluation


class Trainer:
    """The loop: batches -> engine.step -> log; evaluation on dev; the best step on dev is what the run leaves.

    Args:
        config: of the run.
        engine: built from it.
        task: built from it.
        splits: its examples.
        encoder: with the model's tokenizer.
        tracker: where rank 0 writes metrics.
        log: prints on rank 0.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: ZeroOrderEngine,
        task: Task,
        splits: Splits,
        encoder: Encoder,
        tracker: Tracker,
        log: Log,
    ) -> None:
        self.config = config
        self.engine = engine
        self.task = task
        self.tracker = tracker
        self.log = log
        gold_only = config.objective == "lm"
        self.batches = TrainBatches(splits.train, encoder, config.data, config.seed, gold_only=gold_only)
        size = config.train.eval_micro_batch_size
        self.dev = evaluation_batches(splits.dev, encoder, size)
        self.validation = evaluation_batches(splits.validation, encoder, size)
        self.meters = RunMeters(engine)
        self.schedule = get_scheduler(
            config.schedule.name, engine.optimizer, config.schedule.warmup_steps, max(1, config.train.steps)
        )
        self.best = Snapshot(config.run_dir / "checkpoints" / "best", engine)
        self._best_score: Score | None = None
        self._skipped = 0
        self._skipped_in_row = 0

    def run(self) -> dict[str, Any]:
        """Train, evaluate once on validation with the weights that were best on dev, and write the summary."""
        started = time.monotonic()
        before = self._evaluate("validation/before", self.validation, 0)
        self._choose(0)
        last: StepResult | None = None
        bar = tqdm(total=self.config.train.steps, disable=not self.engine.mesh.is_main, unit="step", mininterval=1.0)
        with bar, self.meters.training():
            for step in range(self.config.train.steps):
                last = self._step(step)
                bar.set_postfix_str(f"loss {last.loss:.4f}", refresh=False)
                bar.update()
                if self._due(step + 1):
                    with self.meters.evaluating():
                        self._choose(step + 1)
        final = self._evaluate("validation/final", self.validation, self.config.train.steps)
        best = self._restore_best(final)
        return self._summary(before, final, best, last, time.monotonic() - started)

    def _step(self, step: int) -> StepResult:
        result = self.engine.step(self.batches.at(step))
        self.schedule.step()
        self.meters.count(result)
        self._watch_skips(result)
        every = self.config.train.log_every
        if (step + 1) % every == 0 or step + 1 == self.config.train.steps:
            self._report(result)
        return result

    def _watch_skips(self, result: StepResult) -> None:
        self._skipped += result.skipped
        self._skipped_in_row = self._skipped_in_row + 1 if result.skipped else 0
        if self._skipped_in_row > self.config.train.max_skipped_in_row:
            raise FloatingPointError(
                f"the loss was not finite for {self._skipped_in_row} steps in a row, up to step {result.step}; "
                "lower optimizer.lr or estimator.tau, or compute in bfloat16 or float32"
            )

    def _report(self, result: StepResult) -> None:
        """Metrics of the steps since the last report; per-rank numbers are gathered."""
        rhos = torch.tensor(result.estimate.projected_grads, dtype=torch.float64)
        metrics = {
            "train/loss": result.loss,
            "train/lr": result.lr,
            "train/skipped_steps": float(self._skipped),
            "train/projected_grad_abs_mean": float(rhos.abs().mean()),
            "train/projected_grad_max": float(rhos.abs().max()),
            "train/projected_grad_mean": float(rhos.mean()),
        }
        self.tracker.log(result.step + 1, metrics | self.meters.take())

    def _due(self, step: int) -> bool:
        every = self.config.train.eval_every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def _evaluate(self, name: str, batches: list[MicroBatch], step: int) -> Evaluation:
        result = evaluate(self.engine.answers, batches, self.engine.mesh)
        numbers = {metric: getattr(result, metric) for metric in self.task.metrics}
        self.tracker.log(step, {f"{name}/{metric}": value for metric, value in numbers.items()})
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in numbers.items())
        self.log(f"step {step}: {name} {shown} ({result.count} examples)")
        return result

    def _choose(self, step: int) -> None:
        """Evaluate on dev and keep the weights if they are the best so far."""
        if not self.dev:
            return
        score = Score(step, self._evaluate("dev", self.dev, step))
        if self._best_score is None or self._better(score.dev, self._best_score.dev):
            self._best_score = score
            self.best.save()

    def _better(self, a: Evaluation, b: Evaluation) -> bool:
        if not (a.is_finite and b.is_finite):
            return a.is_finite
        name = self.task.select_by
        new, old = getattr(a, name), getattr(b, name)
        return bool(new < old) if name.endswith("loss") else bool(new > old)

    def _restore_best(self, final: Evaluation) -> Evaluation:
        """Validation with the weights that were best on dev; the engine keeps those weights."""
        steps = self.config.train.steps
        if self._best_score is None or self._best_score.step == steps:
            return final
        self.best.load()
        return self._evaluate("validation/best", self.validation, steps)

    def _summary(
        self, before: Evaluation, final: Evaluation, best: Evaluation, last: StepResult | None, seconds: float
    ) -> dict[str, Any]:
        steps = self.config.train.steps
        score = self._best_score
        return {
            "validation": {"before": vars(before), "final": vars(final), "chosen": vars(best)},
            "dev": {"best_step": score.step, **vars(score.dev)} if score else None,
            "steps": steps,
            "skipped_steps": self._skipped,
            "forwards": steps * self.engine.estimator.num_candidates,
            "final_train_loss": last.loss if last else None,
            "seconds": seconds,
            **self.meters.summary(),
        }

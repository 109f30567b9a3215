"""`Engine`: one step of training, from micro-batches to updated slices."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from zoscale.adapters.choice import AdapterChoice, Shapes
from zoscale.adapters.layers import uncalled_told
from zoscale.adapters.selection import Selection
from zoscale.data.batch import MicroBatch
from zoscale.estimators import Candidate, Estimator, GradientEstimate
from zoscale.forward.compilation import CompiledAnswers
from zoscale.forward.sequential import Forward, Losses
from zoscale.mesh import Mesh
from zoscale.models.answers import AnswerModel
from zoscale.models.generation import Generator
from zoscale.noise.generator import Noise
from zoscale.objectives import Objective
from zoscale.optim import ShardedOptimizer
from zoscale.probes import Direction, Probe
from zoscale.rehearsal import Rehearsal, rehearse_forward
from zoscale.shard_groups import cut_up_like, forget_order
from zoscale.shards import ShardedParam, TensorSpec

Batch = Mapping[str, Any] | MicroBatch | Sequence[MicroBatch] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank but for the local counts.

    Args:
        step: number of the step, from 0.
        estimate: the loss and the projected gradients used.
        losses: of the candidates.
        lrs: learning rate of each parameter group, as used.
        skipped: whether a loss was not finite, so that nothing was updated.
    """

    step: int
    estimate: GradientEstimate
    losses: Losses
    lrs: tuple[float, ...]
    skipped: bool

    @property
    def loss(self) -> float:
        """Estimate of f(x) before the update."""
        return self.estimate.loss

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return self.lrs[0]


class Engine(ABC):
    """Model, ranks, forward and optimizer, and the step that they take: what zero-order and first-order training share.

    A subclass lays out the model and gives this its parts, and sets `forward`.

    Args:
        model: whose trainable parameters are those with `requires_grad`.
        module: what is called for it.
        mesh: the ranks.
        shards: this rank's slices of the trainable tensors.
        optimizer: the update rule of these slices.
        probe: what directions look like.
        estimator: which points are evaluated.
        objective: the loss of a micro-batch.
        noise: of all directions.
        tokenizer: of the model; needed where answers are generated.
        selection: which adapters are kept, and when they are chosen.

    Raises:
        ValueError: if the optimizer needs another probe or estimator.
    """

    forward: Forward

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        mesh: Mesh,
        shards: list[ShardedParam],
        optimizer: ShardedOptimizer,
        *,
        probe: Probe,
        estimator: Estimator,
        objective: Objective,
        noise: Noise,
        tokenizer: PreTrainedTokenizerBase | None,
        selection: Selection | None,
    ) -> None:
        optimizer.check_company(probe, estimator)
        self.model = model
        self.mesh = mesh
        self.shards = shards
        self.optimizer = optimizer
        self.probe = probe
        self.estimator = estimator
        self.objective = objective
        self.noise = noise
        self.answers = AnswerModel(module, model)
        self.generator = Generator(self.answers, tokenizer, mesh) if tokenizer is not None else None
        self.adapters = AdapterChoice(model, selection, Noise(noise.seed), mesh) if selection is not None else None
        self.num_steps = 0
        self._rehearsal: Rehearsal | None = None
        self._is_watched = False

    @abstractmethod
    def _take_over(self) -> None:
        """Let slices, optimizer and forward be those of the tensors that the model trains now."""

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors that are trained now."""
        return [shard.spec for shard in self.shards]

    @property
    def num_trainable(self) -> int:
        """Trainable elements of the whole model."""
        return sum(spec.numel for spec in self.specs)

    @property
    def num_losses(self) -> int:
        """Forward evaluations of the batch per step (K), those of the optimizer's trials included."""
        return self.estimator.num_candidates + self.optimizer.num_trials

    @property
    def num_forwards(self) -> int:
        """Those of them that a forward pass gives, not a backward pass."""
        return self.num_losses - self.estimator.num_backwards

    def step(self, batch: Batch) -> StepResult:
        """One step on a batch: the same call with the same micro-batches on every rank.

        Args:
            batch: micro-batches, shared out to the ranks whole; or Hugging Face tensors (`input_ids`, `labels`,
                optionally `attention_mask`), one micro-batch each.
        """
        if self._rehearsal is not None:
            self._rehearsal.run(self.noise, self.shards)
            self._rehearsal = None
        directions, batches = self.directions(self.num_steps), micro_batches(batch)
        with self._watched():
            losses = self.losses(batches, directions)
        estimate = self.estimator.estimate(directions, losses.values)
        if self.optimizer.num_trials:
            estimate, losses = self._try(batches, estimate, losses)
        lrs = tuple(float(group["lr"]) for group in self.optimizer.param_groups)
        if estimate.is_finite:
            self.optimizer.step(estimate)
        result = StepResult(self.num_steps, estimate, losses, lrs, skipped=not estimate.is_finite)
        self.end_step()
        return result

    def rehearse(self, batches: Sequence[MicroBatch]) -> None:
        """What the first step would do before it: some passes, to see which rows need not be run.

        And compile the forward, if that is asked for, for steps on micro-batches of these shapes; later steps compile
        no more of it. A collective.
        """

        def candidates() -> Sequence[Candidate]:
            return self.estimator.candidates(self.directions(0))

        rehearse_forward(self.forward, batches, candidates, self.optimizer.num_trials, self.objective)

    def end_step(self) -> None:
        """Count a step, and choose among the adapters where that is due. A collective then."""
        self.num_steps += 1
        change = self.adapters.after(self.num_steps, self.shards) if self.adapters is not None else None
        if change is not None:
            self.arrange(change.shapes)
            for shard in self.shards:
                if shard.spec.name in change.values:
                    shard.assign(change.values[shard.spec.name])

    def arrange(self, shapes: Shapes) -> None:
        """Train these tensors from here on; those that are new or have another shape are zero. A collective.

        The others keep their values and their optimizer state. Ids are those of the tensors now.

        Args:
            shapes: by name; some of the adapters.
        """
        if self.adapters is None or {s.name: s.shape for s in self.specs} == {n: tuple(s) for n, s in shapes.items()}:
            return
        self.adapters.arrange(shapes, partial(cut_up_like, self.model))
        forget_order(self.answers.module)
        self._take_over()

    def _watched(self) -> AbstractContextManager[None]:
        """Within, once, one rank looks which adapters run; not in compiled blocks, whose graphs hold no hooks."""
        is_due, self._is_watched = not self._is_watched, True
        is_compiled = isinstance(getattr(self.forward, "model", None), CompiledAnswers)
        return uncalled_told(self.model) if is_due and self.mesh.is_main and not is_compiled else nullcontext()

    def _try(
        self, batches: Sequence[MicroBatch], estimate: GradientEstimate, losses: Losses
    ) -> tuple[GradientEstimate, Losses]:
        """The second round: what the optimizer makes of the estimate once it knows the losses of its trials."""
        if not estimate.is_finite:
            return estimate, replace(losses, values=losses.values + (math.nan,) * self.optimizer.num_trials)
        trials = self.forward.losses(batches, self.optimizer.trials(estimate), self.objective)
        return self.optimizer.decide(estimate, trials.values), losses.followed_by(trials)

    def directions(self, step: int) -> list[Direction]:
        """The q directions of a step."""
        return [self.probe.draw(self.noise, self.specs, step, k) for k in range(self.estimator.num_directions)]

    def losses(self, batches: Sequence[MicroBatch], directions: Sequence[Direction]) -> Losses:
        """The losses of the estimator's candidates; the weights are left as they were."""
        return self.forward.losses(batches, self.estimator.candidates(directions), self.objective)


def micro_batches(batch: Batch) -> list[MicroBatch]:
    """A batch as a list of micro-batches.

    Raises:
        ValueError: if it is empty or malformed.
    """
    items: list[Any] = [batch] if isinstance(batch, Mapping | MicroBatch) else list(batch)
    if not items:
        raise ValueError("expected at least one micro-batch, got an empty batch")
    return [item if isinstance(item, MicroBatch) else MicroBatch.from_labels(item) for item in items]

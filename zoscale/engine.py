"""`ZeroOrderEngine`: model, mesh, forward and optimizer behind one call, `step(batch)`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from zoscale.adapter_choice import AdapterChoice, Shapes
from zoscale.batch import MicroBatch
from zoscale.compilation import CompileName
from zoscale.estimators import ESTIMATORS, Estimator, GradientEstimate
from zoscale.forward import Forward, Losses
from zoscale.forward_choice import ForwardName, choose_forward
from zoscale.generation import Generator
from zoscale.mesh import Mesh
from zoscale.models import AnswerModel
from zoscale.noise import Noise
from zoscale.objectives import Objective, language_modeling
from zoscale.optim import JaguarSignSGD, ZeroOrderOptimizer
from zoscale.placement import place
from zoscale.probes import PROBES, Direction, Probe
from zoscale.rehearsal import Rehearsal, rehearse_forward
from zoscale.selection import Selection
from zoscale.shard_groups import cut_up_like, forget_order
from zoscale.shards import Master, ShardedParam, TensorSpec, shard_parameters, trainable_specs

OptimizerFactory = Callable[[Sequence[ShardedParam], Mesh], ZeroOrderOptimizer]
NoiseBackend = Literal["auto", "eager", "compiled"]
Batch = Mapping[str, Any] | MicroBatch | Sequence[MicroBatch] | Sequence[Mapping[str, Any]]

_COMPILE_ABOVE = 2**20  # trainable elements from which a compiled generator pays for its compilation on a CPU


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


class ZeroOrderEngine:
    """Zero-order training of a causal LM whose trainable parameters are those with `requires_grad`.

    Args:
        model: a Hugging Face (or PEFT) causal LM.
        accelerator: from `zoscale.start`: the model is sharded by ZeRO-3 over all ranks, within groups of them, or
            whole on each (`Runtime(shard_size=...)`); None = this process alone.
        optimizer: makes the update rule from this rank's shards and the mesh; a class with its defaults will do.
        probe: what directions look like; None = what goes with the optimizer.
        estimator: which points are evaluated; likewise.
        objective: the loss of a micro-batch; one that is no `GeneratedLoss` may be replaced later.
        seed: of all directions.
        master: keep the truth of 16-bit trainable slices in fp32 (4 bytes per local element), or none.
        noise: compile the generator: `auto` does on a GPU, and on a CPU from about a million trainable elements on.
        forward: `fan_out` takes all candidates in one pass; `sequential` takes one pass each; `auto` fans out where
            it can, which is wherever modules keep the rows of a batch in order.
        max_rows: most rows of one pass of `fan_out`; None = as `models.tokens_per_pass` says.
        compile: `blocks` runs transformer blocks under torch.compile, `cuda_graphs` replays what they launch too;
            `auto` compiles on a GPU where it can. Give such an engine batches of few shapes, and all to `rehearse`.
        tokenizer: of the model; needed where answers are generated.
        candidate_parts: parts that the candidates are cut into, so that ranks share out the candidates of a
            micro-batch and not only the micro-batches.
        selection: which adapters are kept, and when they are chosen; for a model after `weigh_adapters`.

    Raises:
        ValueError: if nothing is trainable, `fan_out` is asked for and not possible, the optimizer needs another
            probe or estimator, the estimator the whole model, or the objective a tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        accelerator: Accelerator | None = None,
        optimizer: OptimizerFactory = JaguarSignSGD,
        probe: Probe | None = None,
        estimator: Estimator | None = None,
        objective: Objective = language_modeling,
        seed: int = 0,
        master: Master = "fp32",
        noise: NoiseBackend = "auto",
        forward: ForwardName = "auto",
        max_rows: int | None = None,
        compile: CompileName = "off",
        tokenizer: PreTrainedTokenizerBase | None = None,
        candidate_parts: int = 1,
        selection: Selection | None = None,
    ) -> None:
        self.model = model
        module, self.mesh = self._place(model, accelerator)
        self.master = master
        self.shards = self._slices(model, master)
        self.optimizer = optimizer(self.shards, self.mesh)
        company = self.optimizer.goes_with
        self.probe = probe or PROBES[company.probe](**company.options.get("probe", {}))
        self.estimator = estimator or ESTIMATORS[company.estimator](**company.options.get("estimator", {}))
        self.optimizer.check_company(self.probe, self.estimator)
        self.objective = objective
        self.noise = Noise(seed, compiled=is_compiled(noise, self.num_trainable, self.shards[0].truth.device))
        self.answers = AnswerModel(module, model)
        self.generator = Generator(self.answers, tokenizer, self.mesh) if tokenizer is not None else None
        self._new_forward = partial(self._choose_forward, forward, max_rows, candidate_parts, compile)
        self.forward = self._new_forward()
        self.adapters = AdapterChoice(model, selection, Noise(seed), self.mesh) if selection is not None else None
        self.num_steps = 0
        self._rehearsal: Rehearsal | None = Rehearsal(self.probe, self.estimator, optimizer, master)

    def _place(self, model: nn.Module, accelerator: Accelerator | None) -> tuple[nn.Module, Mesh]:
        """What is called for the model, and the ranks."""
        return place(model, accelerator)

    def _slices(self, model: nn.Module, master: Master) -> list[ShardedParam]:
        return shard_parameters(model, master=master)

    def _choose_forward(self, name: ForwardName, max_rows: int | None, num_parts: int, compile: CompileName) -> Forward:
        return choose_forward(
            name, self.answers, self.shards, self.mesh, derivatives=self.estimator.takes_derivatives,
            objective=self.objective, generator=self.generator, max_rows=max_rows, num_parts=num_parts,
            compile=compile,
        )  # fmt: skip

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
        """Compile the forward for steps on micro-batches of these shapes; later steps compile no more of it.

        A collective; a no-op without a compiled forward.
        """
        points = self.estimator.candidates(self.directions(0))
        rehearse_forward(self.forward, batches, points, self.optimizer.num_trials, self.objective)

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
        self.forward = self._new_forward()

    def _take_over(self) -> None:
        """Let slices and optimizer be those of the tensors that the model trains now."""
        old = {shard.param: shard for shard in self.shards}
        self.shards = []
        for spec, param in trainable_specs(self.model):
            shard = old.pop(param) if param in old else ShardedParam(param, spec, master=self.master)
            shard.spec = spec
            self.shards.append(shard)
        self.optimizer.adopt(self.shards)
        for shard in old.values():
            shard.release()

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


def is_compiled(noise: NoiseBackend, num_trainable: int, device: torch.device) -> bool:
    """Whether noise for so many trainable elements on a device is drawn by a compiled generator.

    On a GPU it also saves launches, of which a step of small adapters is made.
    """
    return noise == "compiled" or (noise == "auto" and (device.type == "cuda" or num_trainable >= _COMPILE_ABOVE))


def micro_batches(batch: Batch) -> list[MicroBatch]:
    """A batch as a list of micro-batches.

    Raises:
        ValueError: if it is empty or malformed.
    """
    items: list[Any] = [batch] if isinstance(batch, Mapping | MicroBatch) else list(batch)
    if not items:
        raise ValueError("expected at least one micro-batch, got an empty batch")
    return [item if isinstance(item, MicroBatch) else MicroBatch.from_labels(item) for item in items]

"""`ZeroOrderEngine`: training by losses alone, of a model that is cut up for forward passes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from zoscale.adapters.selection import Selection
from zoscale.config.sections import CompileName, ForwardName, Master, NoiseBackend
from zoscale.estimators import ESTIMATORS, Estimator
from zoscale.fingerprint import check_replicas
from zoscale.forward.choice import choose_forward
from zoscale.forward.sequential import Forward
from zoscale.mesh import Mesh
from zoscale.noise.generator import Noise
from zoscale.objectives import Objective, language_modeling
from zoscale.optim import JaguarSignSGD, ShardedOptimizer
from zoscale.optim.checks import check_choice
from zoscale.placement import place
from zoscale.probes import PROBES, Probe
from zoscale.rehearsal import Rehearsal
from zoscale.shards import ShardedParam, shard_parameters, trainable_specs
from zoscale.step import Engine

OptimizerFactory = Callable[[Sequence[ShardedParam], Mesh], ShardedOptimizer]

_COMPILE_ABOVE = 2**20  # trainable elements from which a compiled generator pays for its compilation on a CPU


class ZeroOrderEngine(Engine):
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
        max_rows: most rows of one pass of `fan_out`; None = as `models.sizes.tokens_per_pass` says.
        compile: `blocks` runs transformer blocks under torch.compile, `cuda_graphs` replays what they launch too;
            `auto` compiles on a GPU where it can. Give such an engine batches of few shapes, and all to `rehearse`.
        tokenizer: of the model; needed where answers are generated.
        candidate_parts: parts that the candidates are cut into, so that ranks share out the candidates of a
            micro-batch and not only the micro-batches.
        selection: which adapters are kept, and when they are chosen; for a model after `weigh_adapters`.

    Raises:
        ValueError: if nothing is trainable, an option has none of its values, `fan_out` is asked for and not possible,
            the optimizer needs another probe or estimator, the estimator the whole model, or the objective a tokenizer.
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
        check_choice("master", master, get_args(Master))
        check_choice("noise", noise, get_args(NoiseBackend))
        check_choice("forward", forward, get_args(ForwardName))
        check_choice("compile", compile, get_args(CompileName))
        module, mesh = place(model, accelerator)
        shards = shard_parameters(model, master=master)
        rule = optimizer(shards, mesh)
        company = rule.goes_with
        probe = probe or PROBES[company.probe](**company.options.get("probe", {}))
        estimator = estimator or ESTIMATORS[company.estimator](**company.options.get("estimator", {}))
        num_trainable = sum(shard.spec.numel for shard in shards)
        numbers = Noise(seed, compiled=is_compiled(noise, num_trainable, shards[0].truth.device))
        super().__init__(
            model, module, mesh, shards, rule, probe=probe, estimator=estimator, objective=objective, noise=numbers,
            tokenizer=tokenizer, selection=selection,
        )  # fmt: skip
        self.master = master
        self._choose = partial(
            choose_forward, forward, objective=objective, max_rows=max_rows, num_parts=candidate_parts, compile=compile
        )  # the objective as it came: meters wrap the engine's
        self.forward = self._new_forward()
        self._rehearsal = Rehearsal(self.probe, self.estimator, optimizer, master)
        check_replicas(self.shards, self.mesh, remedy="call torch.manual_seed on all ranks before the model is made")

    def _new_forward(self) -> Forward:
        derivatives, generator = self.estimator.takes_derivatives, self.generator
        return self._choose(self.answers, self.shards, self.mesh, derivatives=derivatives, generator=generator)

    def _take_over(self) -> None:
        old = {shard.param: shard for shard in self.shards}
        self.shards = []
        for spec, param in trainable_specs(self.model):
            shard = old.pop(param) if param in old else ShardedParam(param, spec, master=self.master)
            shard.spec = spec
            self.shards.append(shard)
        self.optimizer.adopt(self.shards)
        for shard in old.values():
            shard.release()
        self.forward = self._new_forward()


def is_compiled(noise: NoiseBackend, num_trainable: int, device: torch.device) -> bool:
    """Whether noise for so many trainable elements on a device is drawn by a compiled generator.

    On a GPU it also saves launches, of which a step of small adapters is made.
    """
    return noise == "compiled" or (noise == "auto" and (device.type == "cuda" or num_trainable >= _COMPILE_ABOVE))

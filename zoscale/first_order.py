"""`FirstOrderEngine`: training by backpropagation through DeepSpeed ZeRO-3."""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from accelerate import Accelerator, DistributedType
from torch import nn
from transformers import PreTrainedTokenizerBase

from zoscale.adapters.choice import Shapes
from zoscale.adapters.selection import Selection
from zoscale.backward import BackwardForward
from zoscale.config import ConfigError, RunConfig
from zoscale.estimators import Backpropagation
from zoscale.mesh import Mesh
from zoscale.noise.generator import Noise
from zoscale.objectives import OBJECTIVES, Objective, language_modeling
from zoscale.optim.first_order import FirstOrderOptimizer, FOAdamW
from zoscale.partitions import shards_of_optimizer
from zoscale.probes.gradient import Gradient
from zoscale.shard_groups import GroupedAccelerator
from zoscale.shards import ShardedParam, trainable_specs
from zoscale.step import Engine

_BUCKET = 2**24  # elements, 64 MiB: DeepSpeed's own 5e8 would dwarf small models
_LEFT_BEHIND = ("pre_bwd_fn", "post_bwd_fn")  # by an ended engine in modules; the next would take them for its own

FirstOrderFactory = Callable[[Sequence[ShardedParam], Mesh], FirstOrderOptimizer]


class FirstOrderEngine(Engine):
    """First-order training of a causal LM whose trainable parameters are those with `requires_grad`.

    DeepSpeed's engine and stage-3 optimizer do the backward pass, the reduction of the gradients and the update, over
    all ranks. Dropout is off: the loss is the one that the zero-order methods see. Weights are trained in fp32 and
    computed with in the model's type.

    DeepSpeed's optimizer keeps the tensors that it starts with, so a choice among weighted adapters (WeightLoRA, arXiv
    2506.02724) ends its engine and starts another one for the tensors that are left. The paper's choice is read as
    setting the other adapters' w to 0 for good: for what stays, training goes on, and moments and number of steps are
    kept. The matrices of twice the rank are new variables in another basis: they start with zero moments at step 0;
    their w keeps its own. DeepSpeed counts steps by group, and matrices and vectors are in different ones.

    Args:
        model: a Hugging Face (or PEFT) causal LM.
        accelerator: from `zoscale.start`, with ZeRO-3 over all ranks.
        optimizer: makes the update rule; a class with its defaults will do.
        objective: the loss of a micro-batch, differentiable.
        seed: of the rows of A that WeightLoRA+ adds; of no other matter to training.
        tokenizer: of the model; needed where answers are generated in evaluations.
        selection: which adapters are kept, and when they are chosen; for a model after `weigh_adapters`.

    Raises:
        ValueError: if nothing is trainable, or the model is not sharded over all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        accelerator: Accelerator | None,
        optimizer: FirstOrderFactory = FOAdamW,
        objective: Objective = language_modeling,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        selection: Selection | None = None,
    ) -> None:
        is_sharded = accelerator is not None and accelerator.distributed_type == DistributedType.DEEPSPEED
        if accelerator is None or not is_sharded or isinstance(accelerator, GroupedAccelerator):
            raise ValueError(
                "expected ZeRO-3 over all ranks (mesh.shard_size null) for first-order training, got a whole model "
                "or shard groups; a single rank must ask for it: Runtime(deepspeed=runtime.ZERO3)"
            )
        mesh, plugin = Mesh(accelerator.device), cast(Any, accelerator.state.deepspeed_plugin)
        rule = optimizer(_outlines(model, mesh), mesh)
        module, shards = _start(model, rule, plugin.deepspeed_config)
        super().__init__(
            model, module, mesh, shards, rule, probe=Gradient(), estimator=Backpropagation(), objective=objective,
            noise=Noise(seed), tokenizer=tokenizer, selection=selection,
        )  # fmt: skip
        self.optimizer: FirstOrderOptimizer
        self.forward = BackwardForward(self.answers, shards, mesh)
        self._deepspeed: Mapping[str, Any] = plugin.deepspeed_config

    def arrange(self, shapes: Shapes) -> None:
        super().arrange(shapes)
        gc.collect()  # an engine of DeepSpeed that has ended and its optimizer hold each other, and their tensors

    def _take_over(self) -> None:
        here = {param for _, param in trainable_specs(self.model)}
        kept = {s.param: (s.truth, self.optimizer.state_of(s)) for s in self.shards if s.param in here}
        gone = [shard for shard in self.shards if shard.param not in here]
        end_engine(self.answers.module)
        self.optimizer.adopt(_outlines(self.model, self.mesh))
        self.answers.module, self.shards = _start(self.model, self.optimizer, self._deepspeed)
        self.forward = BackwardForward(self.answers, self.shards, self.mesh)
        for shard in self.shards:
            if shard.param in kept:
                truth, state = kept[shard.param]
                shard.truth.copy_(truth)
                shard.publish()
                self.optimizer.load_state_of(shard, state)
        for shard in gone:
            shard.release()


def check_first_order(config: RunConfig) -> None:
    """Refuse what backpropagation through ZeRO-3 over all ranks cannot do.

    Raises:
        ConfigError: what was expected.
    """
    wanted = (
        (
            "objective",
            " or ".join(OBJECTIVES),
            config.objective in OBJECTIVES,
            "others have no gradient: set objective",
        ),
        ("mesh.shard_size", "null", config.mesh.shard_size is None, "leave it out: DeepSpeed shards over all ranks"),
        ("mesh.candidates", "1", config.mesh.candidates == 1, "leave it out: there are no candidates"),
        ("forward.name", "auto", config.forward.name == "auto", "leave it out: there are no candidates"),
        ("forward.max_rows", "null", config.forward.max_rows is None, "leave it out: there are no candidates"),
        ("master", "fp32", config.master == "fp32", "leave it out: DeepSpeed trains fp32 weights"),
        ("model.dtype", "bfloat16 or float32", config.model.dtype != "float16", "set model.dtype"),
    )
    values = config.flatten()
    for key, expected, holds, remedy in wanted:
        if not holds:
            raise ConfigError(f"{key} {expected} with optimizer {config.optimizer.name}", str(values[key]), remedy)


def start_engine(model: nn.Module, rule: FirstOrderOptimizer, config: Mapping[str, Any]) -> Any:
    """DeepSpeed's engine and stage-3 optimizer for the tensors that a model trains now. A collective.

    Args:
        model: sharded, without an engine.
        rule: with these tensors in its groups.
        config: as `runtime.fill_deepspeed_config` gives it.
    """
    import deepspeed

    found = trainable_specs(model)
    bucket = reduce_bucket([spec.numel for spec, _ in found])
    optimizer = rule.new_torch_optimizer({spec.name: param for spec, param in found})
    for module in model.modules():
        for name in _LEFT_BEHIND:
            vars(module).pop(name, None)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=with_gradients(config, bucket, rule.max_grad_norm)
    )
    return engine


def end_engine(engine: Any) -> None:
    """Take DeepSpeed's engine and its stage-3 optimizer off their model; `destroy` leaves the engine's own hooks."""
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()


def reduce_bucket(sizes: Sequence[int]) -> int:
    """Elements of the gradients that are reduced together, from those of the trainable tensors."""
    return min(sum(sizes), max(_BUCKET, *sizes))


def with_gradients(config: Mapping[str, Any], bucket: int, max_grad_norm: float | None) -> dict[str, Any]:
    """A DeepSpeed configuration for forward passes made fit for backward passes.

    Args:
        config: for forward passes.
        bucket: gradients that are reduced together, unless the configuration says so.
        max_grad_norm: to clip to.
    """
    zero = {"reduce_bucket_size": bucket, **config["zero_optimization"]}
    return {
        **config,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": max_grad_norm or 0.0,
    }


def _start(model: nn.Module, rule: FirstOrderOptimizer, config: Mapping[str, Any]) -> tuple[Any, list[ShardedParam]]:
    """DeepSpeed's engine, and the slices that it holds, for a rule that steps with both from here on. A collective."""
    engine = start_engine(model, rule, config)
    shards = shards_of_optimizer(model)
    rule.attach(engine)
    rule.adopt(shards)
    return engine, shards


def _outlines(model: nn.Module, mesh: Mesh) -> list[ShardedParam]:
    return [ShardedParam.outline(spec, 0, 0, mesh.device) for spec, _ in trainable_specs(model)]

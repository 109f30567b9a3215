"""`FirstOrderEngine`: backpropagation through DeepSpeed ZeRO-3, behind the zero-order engine's interface."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import nn
from transformers import PreTrainedTokenizerBase

from zoscale.adapters import selection_of
from zoscale.backward import BackwardForward
from zoscale.config import ConfigError, RunConfig
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import Backpropagation
from zoscale.forward import Forward
from zoscale.forward_choice import ForwardName
from zoscale.mesh import Mesh
from zoscale.objectives import OBJECTIVES, Objective, language_modeling
from zoscale.optim.first_order import FirstOrderOptimizer, FOAdamW
from zoscale.partitions import shards_of_optimizer
from zoscale.probes.gradient import Gradient
from zoscale.shard_groups import GroupedAccelerator
from zoscale.shards import Master, ShardedParam, trainable_specs

_BUCKET = 2**24  # elements, 64 MiB: DeepSpeed's own 5e8 would dwarf small models

FirstOrderFactory = Callable[[Sequence[ShardedParam], Mesh], FirstOrderOptimizer]


class FirstOrderEngine(ZeroOrderEngine):
    """First-order training of a causal LM whose trainable parameters are those with `requires_grad`.

    DeepSpeed's engine and stage-3 optimizer do the backward pass, the reduction of the gradients and the update, over
    all ranks. Dropout is off: the loss is the one that the zero-order methods see. Weights are trained in fp32 and
    computed with in the model's type.

    Args:
        model: a Hugging Face (or PEFT) causal LM.
        accelerator: from `zoscale.start`, with ZeRO-3 over all ranks.
        optimizer: makes the update rule; a class with its defaults will do.
        objective: the loss of a micro-batch, differentiable.
        seed: of no matter to training.
        tokenizer: of the model; needed where answers are generated in evaluations.

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
    ) -> None:
        self._factory = optimizer
        super().__init__(
            model,
            accelerator=accelerator,
            optimizer=optimizer,
            probe=Gradient(),
            estimator=Backpropagation(),
            objective=objective,
            seed=seed,
            noise="eager",
            tokenizer=tokenizer,
        )
        self.optimizer: FirstOrderOptimizer
        self.optimizer.attach(self.answers.module)

    def _place(self, model: nn.Module, accelerator: Accelerator | None) -> tuple[nn.Module, Mesh]:
        is_sharded = accelerator is not None and accelerator.distributed_type == DistributedType.DEEPSPEED
        if accelerator is None or not is_sharded or isinstance(accelerator, GroupedAccelerator):
            raise ValueError("expected ZeRO-3 over all ranks (mesh.shard_size null) for first-order training")
        import deepspeed

        mesh, found = Mesh(accelerator.device), trainable_specs(model)
        rule = self._factory([ShardedParam.outline(spec, 0, 0, mesh.device) for spec, _ in found], mesh)
        named = {spec.name: param for spec, param in found}
        groups = [
            {**_options(group), "params": [named[name] for name in group["param_names"]]} for group in rule.param_groups
        ]
        sizes = [spec.numel for spec, _ in found]
        bucket = min(sum(sizes), max(_BUCKET, *sizes))
        plugin: Any = accelerator.state.deepspeed_plugin
        config = with_gradients(plugin.deepspeed_config, bucket, rule.max_grad_norm)
        engine, *_ = deepspeed.initialize(model=model, optimizer=rule.torch_optimizer(groups), config=config)
        return engine, mesh

    def _slices(self, model: nn.Module, master: Master) -> list[ShardedParam]:
        return shards_of_optimizer(model)

    def _choose_forward(self, name: ForwardName, max_rows: int | None, num_parts: int) -> Forward:
        return BackwardForward(self.answers, self.shards, self.mesh)


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
        (
            "adapter.peft_type",
            "other than weight_lora",
            selection_of(config.adapter) is None,
            "train plain LoRA: DeepSpeed's optimizer keeps the tensors that it starts with",
        ),
        ("model.dtype", "bfloat16 or float32", config.model.dtype != "float16", "set model.dtype"),
    )
    values = config.flatten()
    for key, expected, holds, remedy in wanted:
        if not holds:
            raise ConfigError(f"{key} {expected} with optimizer {config.optimizer.name}", str(values[key]), remedy)


def with_gradients(config: Mapping[str, Any], bucket: int, max_grad_norm: float | None) -> dict[str, Any]:
    """A DeepSpeed configuration for forward passes made fit for backward passes.

    Args:
        config: as `runtime.fill_deepspeed_config` gives it.
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


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}

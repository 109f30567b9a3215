"""From a configuration to what it names: everything that can be refused early, and the engine."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, init_empty_weights
from torch import nn
from transformers import PreTrainedTokenizerBase

from zoscale import runtime
from zoscale.adapters.schemes import check_scheme, num_virtual_tokens, selection_of
from zoscale.config import ConfigError, ModelConfig, RunConfig, build
from zoscale.data.splits import Encoder, Splits
from zoscale.engine import ZeroOrderEngine
from zoscale.first_order import FirstOrderEngine, check_first_order
from zoscale.forward.compilation import check_compile
from zoscale.mesh import Mesh
from zoscale.methods import TABLES
from zoscale.metrics import COMPARED, METRICS, TALLIED, score
from zoscale.models.attention import check_attention
from zoscale.models.loading import (
    add_adapter,
    can_merge_rows,
    load_model,
    load_sharded,
    load_tokenizer,
    loaded_types,
    new_model,
    read_model_config,
)
from zoscale.models.quantization import check_quantization
from zoscale.models.sizes import ModelSize, count_parameters
from zoscale.nvme import check_offload
from zoscale.objectives import OBJECTIVES, ChosenLoss, GeneratedLoss, Objective, language_modeling
from zoscale.optim import ShardedOptimizer
from zoscale.optim.first_order import FIRST_ORDER
from zoscale.progress import examined
from zoscale.shard_groups import GroupedAccelerator, cut_up
from zoscale.shards import ShardedParam, TensorSpec
from zoscale.step import Engine
from zoscale.tasks import TASKS, Task


@dataclass(frozen=True)
class Plan:
    """All of a run that can be known, and refused, before any process group starts."""

    task: Task
    objective: Objective
    encoder: Encoder
    splits: Splits
    data: str
    architecture: Any
    size: ModelSize
    deepspeed: dict[str, Any]


def plan(config: RunConfig) -> Plan:
    """Check the configuration and read everything but the weights.

    Raises:
        ConfigError: what is wrong, and what to do.
    """
    if config.model.dtype == "float16" and not torch.cuda.is_available():
        raise ConfigError("model.dtype bfloat16 or float32 on a CPU", "float16", "set model.dtype")
    if config.forward.compile == "cuda_graphs" and not torch.cuda.is_available():
        raise ConfigError("a GPU for forward.compile=cuda_graphs", "none", "set forward.compile=off")
    check_attention(config.model)
    return _plan(config)


def check(configs: Sequence[RunConfig]) -> None:
    """Check runs that another machine will train, the files of the first alone: the others differ in options.

    Raises:
        ConfigError: what is wrong, and what to do.
    """
    for config in configs:
        check_methods(config)
    _plan(configs[0])


def _plan(config: RunConfig) -> Plan:
    task = check_methods(config)
    check_scheme(config.adapter, config.trainable, config.train.steps)
    check_quantization(config)
    objective = find_objective(config.objective, task)
    estimator = build(config.estimator, TABLES["estimator"])
    check_compile(config, losses_of_answers=not (estimator.takes_derivatives or isinstance(objective, GeneratedLoss)))
    if isinstance(objective, GeneratedLoss) and config.forward.name == "fan_out":
        got = f"fan_out with objective {config.objective}, for which text is generated"
        raise ConfigError("forward.name auto or sequential", got, "set forward.name")
    deepspeed = runtime.read_deepspeed_config(config.runtime.deepspeed)
    if config.optimizer.name in FIRST_ORDER and "offload_optimizer" in deepspeed["zero_optimization"]:
        raise ConfigError(f"no offload_optimizer with optimizer {config.optimizer.name}", "one", "remove it")
    check_offload(config, deepspeed)
    architecture = read_model_config(config.model)
    size = count_parameters(architecture, trust_remote_code=config.model.trust_remote_code)
    encoder = encoder_of(config, architecture, size)
    splits = Splits.of(task, config.data, config.seed)
    data = encoder.fingerprint(splits)
    return Plan(task, objective, encoder, splits, data, architecture, size, deepspeed)


def encoder_of(config: RunConfig, architecture: Any, size: ModelSize) -> Encoder:
    """From texts to token ids, with several options or examples in one row where the model can.

    Raises:
        ConfigError: if there is no tokenizer, or the model has no position for a token.
    """
    length = longest_row(config, size)
    can_merge = not num_virtual_tokens(config.adapter) and can_merge_rows(architecture, config.model, length)
    return Encoder(
        load_tokenizer(config.model),
        length,
        branching=can_merge and config.data.share_prefixes,
        packing=can_merge and config.data.pack,
        vocabulary=size.vocabulary,
    )


def longest_row(config: RunConfig, size: ModelSize) -> int:
    """`data.max_length`, or as many tokens as the model has positions for beside the adapter's virtual ones.

    Raises:
        ConfigError: if the virtual tokens take all of them.
    """
    if size.positions is None:
        return config.data.max_length
    left = size.positions - num_virtual_tokens(config.adapter)
    if left < 1:
        got = f"{size.positions - left} for {size.positions} positions"
        raise ConfigError("fewer virtual tokens than the model has positions", got, "lower adapter.num_virtual_tokens")
    return min(config.data.max_length, left)


def check_methods(config: RunConfig) -> Task:
    """Refuse methods whose options are impossible, or that do not go together; returns the task.

    Raises:
        ConfigError: what was expected.
    """
    try:
        task: Task = examined(config, build(config.task, TASKS))
        probe, estimator = build(config.probe, TABLES["probe"]), build(config.estimator, TABLES["estimator"])
        rule: type[ShardedOptimizer] = TABLES["optimizer"][config.optimizer.name]
        rule.check_company(probe, estimator)
        for shape in ((1, 1), (1,)):
            example = ShardedParam(nn.Parameter(torch.zeros(shape)), TensorSpec(0, "example", shape))
            build(config.optimizer, TABLES["optimizer"], [example])
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError("options that the method takes", str(error), "correct the configuration") from error
    if estimator.takes_derivatives:
        _check_derivatives(config)
    if config.optimizer.name in FIRST_ORDER:
        check_first_order(config)
    return task


def _check_derivatives(config: RunConfig) -> None:
    """Refuse what an estimator of derivatives cannot do.

    Raises:
        ConfigError: what was expected.
    """
    beside = f"for estimator {config.estimator.name}"
    if config.mesh.shard_size != 1:
        got = f"mesh.shard_size={'null' if config.mesh.shard_size is None else config.mesh.shard_size}"
        remedy = "set mesh.shard_size=1: ZeRO-3 gathers weights without their tangents"
        raise ConfigError(f"the whole model on every rank {beside}", got, remedy)
    if config.objective not in OBJECTIVES:
        wanted = f"objective {' or '.join(OBJECTIVES)} {beside}"
        raise ConfigError(wanted, config.objective, "others have no derivative: set objective")
    if config.forward.name == "fan_out":
        raise ConfigError(f"forward.name auto or sequential {beside}", config.forward.name, "set forward.name")


def find_objective(name: str, task: Task) -> Objective:
    """The training objective of a name: one of `OBJECTIVES`, or 1 - the score that `metrics.score` knows.

    Raises:
        ConfigError: if there is none, or it makes no sense for the task.
    """
    if name in task.objectives:
        return OBJECTIVES[name]
    chooses = "classification" in task.objectives
    scores = (*METRICS, "module:function") if chooses or task.generates else ()
    if name in OBJECTIVES or not scores or not (name in METRICS or ":" in name):
        wanted = " or ".join((*task.objectives, *scores))
        if name in TALLIED or name in COMPARED:
            got = f"{name}, one number for all examples together: no mean over them, as the loss of a step is"
            remedy = "train on one of those: it is a metric of evaluations"
            raise ConfigError(f"objective {wanted} for this task", got, remedy)
        raise ConfigError(f"objective {wanted} for this task", name, "set objective")
    return GeneratedLoss(score(name)) if task.generates else ChosenLoss(score(name))


def build_training_engine(
    config: RunConfig,
    architecture: Any,
    accelerator: Accelerator,
    *,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
) -> Engine:
    """The engine that trains a run, at step 0; see `build_engine`."""
    if config.optimizer.name not in FIRST_ORDER:
        return build_engine(config, architecture, accelerator, objective=objective, tokenizer=tokenizer)
    _seed(config.seed)
    return FirstOrderEngine(
        build_model(config.model, architecture, config.adapter, accelerator, trainable=config.trainable),
        accelerator=accelerator,
        optimizer=lambda shards, mesh: build(config.optimizer, FIRST_ORDER, shards, mesh),
        objective=objective,
        seed=config.seed,
        tokenizer=tokenizer,
        selection=selection_of(config.adapter),
    )


def check_groups(config: RunConfig, engine: Engine) -> None:
    """Refuse groups of the optimizer whose pattern is found in no name: they would change nothing.

    Raises:
        ConfigError: with what names are like.
    """
    names = [name for group in engine.optimizer.param_groups for name in group["param_names"]]
    for group in config.optimizer.args.get("groups") or ():
        pattern = group.get("pattern", "")
        if not any(re.search(pattern, name) for name in names):
            expected = "a pattern in optimizer.groups to be found in names of trained weights"
            raise ConfigError(expected, repr(pattern), f"they are like {', '.join(names[:3])}")


def build_engine(
    config: RunConfig,
    architecture: Any,
    accelerator: Accelerator | None,
    *,
    objective: Objective = language_modeling,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ZeroOrderEngine:
    """The engine of a run at step 0, for forward passes and zero-order steps; without an accelerator, whole in this
    process.

    Args:
        config: of the run.
        architecture: from `read_model_config`.
        accelerator: from `runtime.start`.
        objective: the loss of a micro-batch; of no matter where no losses are taken.
        tokenizer: of the model, where answers are generated.
    """
    _seed(config.seed)
    return ZeroOrderEngine(
        build_model(config.model, architecture, config.adapter, accelerator, trainable=config.trainable),
        accelerator=accelerator,
        optimizer=lambda shards, mesh: build(config.optimizer, TABLES["optimizer"], shards, mesh),
        probe=build(config.probe, TABLES["probe"]),
        estimator=build(config.estimator, TABLES["estimator"]),
        objective=objective,
        seed=config.seed,
        master=config.master,
        noise=config.runtime.noise,
        forward=config.forward.name,
        max_rows=config.forward.max_rows,
        compile=config.forward.compile,
        tokenizer=tokenizer,
        candidate_parts=config.mesh.candidates,
        selection=selection_of(config.adapter),
    )


def build_model(
    config: ModelConfig,
    architecture: Any,
    adapter: Mapping[str, Any] | None,
    accelerator: Accelerator | None,
    *,
    trainable: str | None = None,
) -> nn.Module:
    """The model with its adapter, or with the weights that are trained marked.

    In shard groups, where weights are random, and for the few models that ZeRO-3 loads as others than a single rank
    does, the first rank of each group builds it as it would alone, and the others build it empty: the weights are the
    same bits for any number of ranks and shard size.

    Raises:
        ConfigError: see `load_model` and `add_adapter`.
    """
    is_grouped = isinstance(accelerator, GroupedAccelerator)
    is_sharded = accelerator is not None and accelerator.distributed_type == DistributedType.DEEPSPEED
    if accelerator is None or not (is_grouped or is_sharded):
        gpu = accelerator.device if accelerator is not None and accelerator.device.type == "cuda" else None
        return add_adapter(load_model(config, architecture, gpu), adapter, trainable)
    if config.id is not None and not is_grouped:
        with _no_zero(accelerator):
            types = loaded_types(config, architecture)
        if (loaded := load_sharded(config, architecture, types)) is not None:
            return add_adapter(loaded, adapter, trainable)
    mesh, built = accelerator.mesh if is_grouped else Mesh(accelerator.device), list[nn.Module]()

    def build_own() -> None:
        if mesh.shard_rank == 0:
            built.append(add_adapter(load_model(config, architecture), adapter, trainable))
        else:
            with init_empty_weights(include_buffers=False):
                built.append(add_adapter(new_model(config, architecture), adapter, trainable))

    with _no_zero(accelerator):
        mesh.together(build_own)
    if is_sharded:
        cut_up(built[0], mesh, accelerator.state.deepspeed_plugin.deepspeed_config)
    return built[0]


@contextmanager
def _no_zero(accelerator: Accelerator) -> Iterator[None]:
    """Within, transformers builds models as if there were no ZeRO-3."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if accelerator.state.deepspeed_plugin is not None:
            set_hf_deepspeed_config(accelerator.state.deepspeed_plugin.dschf)  # type: ignore[no-untyped-call]


def _seed(seed: int) -> None:
    """Seed the generators that initialise weights (random models, LoRA's A); training itself reads none."""
    from accelerate.utils import set_seed

    set_seed(seed % 2**32)

"""`CompiledAnswers`: an `AnswerModel` whose transformer blocks run under torch.compile, one graph per shape of rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoscale.adapters.weighted_lora import find_slots
from zoscale.config import ConfigError, RunConfig
from zoscale.config.sections import CompileName
from zoscale.data.batch import MicroBatch
from zoscale.models.answers import AnswerModel
from zoscale.models.sizes import blocks_of
from zoscale.noise.kernels import kernels_on
from zoscale.optim.first_order import FIRST_ORDER

_MODES = {"blocks": None, "cuda_graphs": "reduce-overhead"}  # of torch.compile
_LIMITS = {"recompile_limit": 1024, "accumulated_recompile_limit": 1024}  # graphs before dynamo gives up


class CompiledAnswers(AnswerModel):
    """See `AnswerModel`. Blocks of one kind share their graphs, whose inputs the weights and the adapters are.

    Until `compiling` was used, a new shape is compiled where it is met; from then on it runs without a graph.

    Args:
        model: the Hugging Face (or PEFT) model, whole on this rank.
        mode: of torch.compile; None = its default.
    """

    def __init__(self, model: nn.Module, mode: str | None = None) -> None:
        super().__init__(model, model)
        self.has_cuda_graphs = mode == "reduce-overhead"
        self._is_on = False
        self._is_complete = False
        compiled: dict[type, Callable[..., Any]] = {}
        for block in blocks_of(model):
            kind = type(block)
            if kind not in compiled:
                compiled[kind] = torch.compile(kind.forward, dynamic=False, mode=mode)
            block.forward = self._either(block, compiled[kind])

    @property
    def runs_until_recorded(self) -> int:
        """Passes of a shape after which it only replays: a CUDA graph warms up first, and records after that."""
        return 3 if self.has_cuda_graphs else 1

    def _either(self, block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The block's forward: compiled in a pass of training, else its own."""
        own = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return compiled(block, *args, **kwargs) if self._is_on else own(*args, **kwargs)

        return forward

    def answer_logprobs(self, batch: MicroBatch) -> Tensor:
        """See `AnswerModel`."""
        if self.has_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # what the last pass held may go
        self._is_on = True
        try:
            stance = "eager_on_recompile" if self._is_complete else "default"
            with torch.compiler.set_stance(stance), torch._dynamo.config.patch(_LIMITS):
                return super().answer_logprobs(batch)
        finally:
            self._is_on = False

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Within, new shapes are compiled; after it, no more."""
        self._is_complete = False
        try:
            yield
        finally:
            self._is_complete = True


def compiled_answers(name: CompileName, answers: AnswerModel, obstacle: str | None) -> AnswerModel:
    """The answers that a forward takes its losses from.

    Args:
        name: as configured; auto compiles on a GPU for which Triton can compile, where nothing stands in the way.
        answers: the model as it is.
        obstacle: what the caller knows to stand in the way.

    Raises:
        ConfigError: if compiled blocks are asked for and not possible.
    """
    if name == "off" or (name == "auto" and answers.head.weight.device.type != "cuda"):
        return answers
    found = obstacle or _obstacle(answers)
    if found is None and name == "cuda_graphs" and not torch.cuda.is_available():
        found = "no GPU"
    if found is None and name == "auto" and kernels_on(answers.head.weight.device) is None:
        found = "no compiler for its GPU"
    if found is None:
        return CompiledAnswers(answers.model, _MODES["blocks" if name == "auto" else name])
    if name == "auto":
        return answers
    raise ConfigError(f"what forward.compile={name} can compile", found, "set forward.compile=off")


def _obstacle(answers: AnswerModel) -> str | None:
    """What stands in the way of compiling the blocks of a model."""
    if answers.module is not answers.model:
        return "ZeRO-3, which gathers weights between the parts of a graph (mesh.shard_size=1 has none)"
    if any(type(module).__name__ == "Linear4bit" for module in answers.model.modules()):
        return "weights in 4 bits"
    if find_slots(answers.model):
        return "weighted adapters, which come and go"
    if not blocks_of(answers.model):
        return "a model without transformer blocks"
    return None


def check_compile(config: RunConfig, *, losses_of_answers: bool = True) -> None:
    """Refuse a compiled forward where the configuration alone says that it is not possible.

    Args:
        config: of the run.
        losses_of_answers: whether a step takes these, not derivatives and not scores of generated texts.

    Raises:
        ConfigError: what was expected.
    """
    if config.forward.compile in ("off", "auto"):
        return
    beside = f"beside forward.compile={config.forward.compile}"
    if config.mesh.shard_size != 1:
        got = "null" if config.mesh.shard_size is None else str(config.mesh.shard_size)
        remedy = "set it to 1 if the model fits one rank, or forward.compile=off: ZeRO-3 gathers weights inside graphs"
        raise ConfigError(f"mesh.shard_size 1 {beside}", got, remedy)
    if not losses_of_answers:
        got = f"estimator {config.estimator.name} with objective {config.objective}"
        remedy = "set forward.compile=off: graphs carry no tangents and generate no text"
        raise ConfigError(f"losses of given answers {beside}", got, remedy)
    if config.model.quantization is not None:
        remedy = "remove it, or set forward.compile=off"
        raise ConfigError(f"no model.quantization {beside}", config.model.quantization, remedy)
    if config.adapter is None and config.forward.name != "sequential":
        remedy = (
            "set it, or adapter, or forward.compile=off: all weights are drawn for each candidate within the blocks"
        )
        raise ConfigError(f"forward.name sequential {beside} without an adapter", config.forward.name, remedy)
    if (config.adapter or {}).get("peft_type") == "weight_lora":
        remedy = "set forward.compile=off: adapters that come and go change the graphs within the run"
        raise ConfigError(f"another adapter {beside}", "weight_lora", remedy)
    if config.optimizer.name in FIRST_ORDER:
        raise ConfigError(f"a zero-order optimizer {beside}", config.optimizer.name, "set forward.compile=off")

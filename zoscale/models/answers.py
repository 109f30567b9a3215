"""`AnswerModel`: answers of any causal language model, with its head on the answers' positions only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zoscale.data.batch import MicroBatch
from zoscale.lanes import lane
from zoscale.models.attention import padding_unmasked
from zoscale.models.wide_head import wide_logits, widen
from zoscale.shards import end_without_backward, order_gathers_after_writes

_AT_ONCE = 2**26  # logits whose exponentials are held at a time


class AnswerModel:
    """Log-probabilities of answer tokens from any causal LM, sharded or not.

    Args:
        module: what is called: the model itself, or the engine that wraps it.
        model: the Hugging Face (or PEFT) model inside; its output embedding is the head.
        wide_logits: whether the head's products are taken as float32 where no derivatives are asked for.
    """

    def __init__(self, module: nn.Module, model: nn.Module, *, wide_logits: bool = True) -> None:
        self.module = module
        self.model = model
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ValueError(f"expected a causal LM with an output embedding, got {type(model).__name__}")
        self.head: nn.Module = head
        self.wide_logits = wide_logits
        widen(head)
        self._dtype = next(head.parameters()).dtype

    def watch(self, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        """From now on call `enter` where a pass begins, before anything is gathered, and `leave` where it ends.

        Each pass calls the input embedding and the head, one of a generated token too.
        """
        if (embedding := self.model.get_input_embeddings()) is not None:  # type: ignore[operator]
            embedding.register_forward_pre_hook(lambda *_: enter(), prepend=True)
        self.head.register_forward_pre_hook(lambda *_: leave())

    def answer_logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probability of each answer token: float32 [A]."""
        is_first = not lane()
        if is_first:
            order_gathers_after_writes(self.module)
            if _is_training(self.model):  # losses are taken without dropout, whatever was done to the model since
                self.model.eval()
        masks = padding_unmasked() if batch.is_right_padded else nullcontext()
        inputs = batch.model_inputs(self._dtype)
        with (
            wide_logits(self.wide_logits and not torch.is_grad_enabled()),
            _answer_positions(self.head, batch),
            masks,
            _prefix_noted(self.model),
            _virtual_seen(self.model, inputs),
        ):
            called = self.module if is_first else self.model
            output = called(**inputs, use_cache=False)
        if is_first and not torch.is_grad_enabled():
            end_without_backward(self.module)
        logits: Tensor = output.logits[0]
        chosen = logits[batch.answer_position, batch.answer_token].float()
        return chosen - _logsumexp(logits)[batch.answer_position]


def _logsumexp(logits: Tensor) -> Tensor:
    """Over the last dimension, float32, of [P, V]: of `_AT_ONCE` at a time, for it makes copies."""
    parts = torch.split(logits, max(1, _AT_ONCE // logits.shape[-1]))
    return torch.cat([torch.logsumexp(part.float(), dim=-1) for part in parts])


def _is_training(model: nn.Module) -> bool:
    """Whether some module of it is: ten times as fast as to tell them all that they are not."""
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None:
            if module.training:
                return True
            waiting.extend(module._modules.values())
    return False


@contextmanager
def _answer_positions(head: nn.Module, batch: MicroBatch) -> Iterator[None]:
    """The head sees one contiguous matrix [1, P, hidden] of the wanted positions instead of [R, T, hidden]."""

    own = lane()

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if lane() != own:
            return None
        hidden = args[0]
        num_virtual = hidden.shape[1] - batch.input_ids.shape[1]  # prompt tuning puts tokens before the others
        return (hidden[batch.position_row, batch.position_column + num_virtual].unsqueeze(0), *args[1:])

    with head.register_forward_pre_hook(select):
        yield


@contextmanager
def _virtual_seen(model: Any, inputs: dict[str, Any]) -> Iterator[None]:
    """Within, a model with virtual tokens sees them and what the mask in `inputs` says, which is taken from these.

    PEFT would move both the tokens and their part of the mask from the host in every pass, which waits for the device.
    """
    peft_config = getattr(model, "active_peft_config", None)
    if peft_config is None or not peft_config.is_prompt_learning:
        yield
        return
    own, mask = lane(), inputs.pop("attention_mask")
    seen = {"attention_mask": nn.functional.pad(mask, (peft_config.num_virtual_tokens, 0), value=1)}
    model.prompt_tokens[model.active_adapter] = model.prompt_tokens[model.active_adapter].to(mask.device)

    def see(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return (args, kwargs | seen) if lane() == own else None

    with model.get_base_model().register_forward_pre_hook(see, with_kwargs=True):
        yield


@contextmanager
def _prefix_noted(model: Any) -> Iterator[None]:
    """What fails within it with a prefix says so: models whose cache is another than PEFT's do, each in its own way."""
    try:
        yield
    except Exception as error:
        if getattr(getattr(model, "active_peft_config", None), "peft_type", None) == "PREFIX_TUNING":
            kind = type(model.get_base_model()).__name__
            error.add_note(f"{kind} may not take PEFT's prefix: set adapter.peft_type=prompt_tuning, or lora")
        raise

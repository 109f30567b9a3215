"""`Generator`: greedy answers of the model, sharded or not."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from zoscale.data.batch import MicroBatch, Question
from zoscale.mesh import Mesh
from zoscale.models.answers import AnswerModel
from zoscale.shards import direct_calls, order_gathers_after_writes

_STOP = "\n"
_COUNT_PADDING = frozenset({
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "deepseek_v4", "git", "marian", "mbart", "mvp",
    "pegasus", "plbart", "recurrent_gemma", "reformer", "rwkv", "trocr", "whisper", "xlstm",
})  # fmt: skip
"""Model types whose states or positions count padding before a prompt, whatever the mask says."""
_CACHES = frozenset({"past_key_values", "cache_params", "state", "past_buckets_states"})
"""What models take that need not run a prompt again for every token."""


class Generator:
    """Writes answers token by token, the most probable one each time, up to the first newline or the end of the text.

    Prompts are padded on the left, but for models that would count the padding, which write one answer at a time. So do
    models with code of their own, those that count it behind a prefix since they take no positions, and those without a
    cache behind virtual tokens.

    Under ZeRO-3 every forward is a collective: all ranks go on until the last one has finished, so all of them call
    `texts` equally often. Without a cache (OpenAI GPT) none stops early: transformers cannot go on behind the end then.

    Args:
        answers: the model.
        tokenizer: of the model.
        mesh: the ranks that generate at the same time.
    """

    def __init__(self, answers: AnswerModel, tokenizer: PreTrainedTokenizerBase, mesh: Mesh) -> None:
        self.answers = answers
        self.tokenizer = tokenizer
        self.mesh = mesh
        model: Any = answers.model
        self._base = model.get_base_model() if hasattr(model, "peft_config") else model
        is_known = type(self._base).__module__.startswith("transformers.")
        inputs = inspect.signature(self._base.forward).parameters
        self._has_cache = not _CACHES.isdisjoint(inputs)
        virtual = getattr(model, "active_peft_config", None)
        self._virtual = virtual.peft_type if virtual is not None and virtual.is_prompt_learning else None
        is_unplaced = self._virtual == "PREFIX_TUNING" and "position_ids" not in inputs
        is_injected = self._virtual == "PROMPT_TUNING" and not self._has_cache
        counts_padding = self._base.config.model_type in _COUNT_PADDING or is_unplaced or is_injected
        self._takes_padding = is_known and not counts_padding
        stop: list[int] = tokenizer.encode(_STOP, add_special_tokens=False)
        ends = {tokenizer.eos_token_id, *(stop if len(stop) == 1 and stop != [tokenizer.unk_token_id] else [])}
        self._ends = sorted(end for end in ends if end is not None)

    @torch.no_grad()
    def texts(self, batch: MicroBatch) -> list[str]:
        """One answer per example.

        Raises:
            ValueError: if an example is not to be generated.
        """
        if not batch.questions or not all(question.max_new_tokens for question in batch.questions):
            raise ValueError("expected examples with max_new_tokens, got some whose options are scored")
        order_gathers_after_writes(self.answers.module)
        self.answers.model.eval()
        longest, ends = max(question.max_new_tokens for question in batch.questions), self._ends
        synced = self.mesh.world_size > 1
        if synced and not self._has_cache:
            longest, ends, synced = max(self.mesh.gather_objects(longest)), [], False
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
            eos_token_id=ends or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        rows: list[list[int]] = []
        with direct_calls(self.answers.module, self._base), _greedy_by_default(self._base):
            for questions in self._together(batch.questions):
                ids, mask = self._prompts([question.prompt for question in questions])
                rows += self._generate(ids, mask, generation_config=config, synced_gpus=synced).tolist()
        own = zip(rows[: len(batch.questions)], batch.questions, strict=True)  # those of further turns are repeated
        return [self._text(row[: question.max_new_tokens]) for row, question in own]

    def _together(self, questions: Sequence[Question]) -> list[Sequence[Question]]:
        """Those to generate at the same time: all, or each by itself, for as many turns as any rank has questions."""
        if self._takes_padding:
            return [questions]
        turns = max(self.mesh.gather_objects(len(questions)))
        return [[questions[turn % len(questions)]] for turn in range(turns)]

    def _generate(self, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        """The new tokens, int64 [E, N]."""
        model: Any = self.answers.model
        if self._virtual != "PROMPT_TUNING" or not self._has_cache:  # transformers needs one to begin with embeddings
            return cast(Tensor, model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :])
        embedded = model.word_embeddings(ids)  # PEFT would put the virtual tokens before the padding
        virtual = model.get_prompt(len(ids)).to(embedded.dtype)
        pads = (mask == 0).sum(dim=1).tolist()
        rows = [torch.cat([row[:n], own, row[n:]]) for row, own, n in zip(embedded, virtual, pads, strict=True)]
        longer = torch.cat([mask, mask.new_ones(virtual.shape[:2])], dim=1)
        with _begins_with_embeddings(self._base):
            return cast(Tensor, self._base.generate(inputs_embeds=torch.stack(rows), attention_mask=longer, **options))

    def _prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [E, T], padded on the left so that all end together."""
        longest = max(map(len, prompts))
        pad = int(self.tokenizer.pad_token_id or 0)
        ids = [[pad] * (longest - len(tokens)) + list(tokens) for tokens in prompts]
        mask = [[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts]
        return torch.tensor(ids, device=self.mesh.device), torch.tensor(mask, device=self.mesh.device)

    def _text(self, tokens: Sequence[int]) -> str:
        length = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        text = str(self.tokenizer.decode(list(tokens[:length]), skip_special_tokens=True))
        return text.split(_STOP)[0].strip()


@contextmanager
def _begins_with_embeddings(model: Any) -> Iterator[None]:
    """Within, `generate` begins with embeddings for models that hand them on without naming them, too (Bamba, CTRL)."""
    own = model.prepare_inputs_for_generation
    if "inputs_embeds" in inspect.signature(own).parameters:
        yield
        return

    def prepare(*args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:  # it reads these names
        return own(*args, inputs_embeds=inputs_embeds, **kwargs)

    model.prepare_inputs_for_generation = prepare
    try:
        yield
    finally:
        model.prepare_inputs_for_generation = own


@contextmanager
def _greedy_by_default(model: Any) -> Iterator[None]:
    """Within, the model's own settings of generation are its special tokens only: no penalty, no shortest length.

    transformers fills in from them whatever a call leaves open.
    """
    own = model.generation_config
    tokens = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own

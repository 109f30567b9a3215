"""From records to losses: sources, tasks, the encoder, micro-batches, the order of examples, objectives, evaluation."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from zoscale.config import ConfigError, DataConfig
from zoscale.data import splits
from zoscale.data.batch import MicroBatch
from zoscale.data.prefixes import Row, share_prefixes
from zoscale.data.splits import Encoded, Encoder, Splits, evaluation_batches, part
from zoscale.data.train_batches import TrainBatches
from zoscale.evaluate import Evaluation, evaluate
from zoscale.mesh import Mesh
from zoscale.models.answers import AnswerModel
from zoscale.objectives import (
    OBJECTIVES,
    classification,
    language_modeling,
    option_scores,
    predictions,
    sums_by,
    sums_in_order,
)
from zoscale.progress import BestOnDev, Score, Skips
from zoscale.run_report import shortened
from zoscale.tasks import SST2, TASKS, Classification, Completion, Example, Task
from zoscale.tasks.sources import Source

torch.set_num_threads(1)

WORDS = [*"abcdefghijklmnopqrst", "good", "bad", "not", "so", "It", "was", "great", "terrible", "film", "the", "end"]


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """With <s> before every text, as OPT and Llama have it, and <pad>."""
    first = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(tokenizer)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """One token per byte, but `xy` is one; so a word is several tokens, and a boundary can be merged away."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "<unk>", *alphabet, "xy"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("x", "y")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("<pad>")])
    return wrapped(tokenizer)


def tiny_opt(vocab_size: int = 320, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0, init_std=0.3,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


# --- MicroBatch. ---


def test_from_rows_by_hand() -> None:
    rows = [
        Row((1, 5, 6), ((2, 9, 0), (2, 8, 1)), 0),
        Row((1, 7), ((1, 4, 0),), 1),
        Row((1, 7, 4, 3), ((1, 4, 1), (2, 3, 1), (3, 2, 1)), 1),
    ]
    batch = MicroBatch.from_rows(rows, [[False, True], [True, False]], pad_token=11)
    assert batch.input_ids.tolist() == [[1, 5, 6, 11], [1, 7, 11, 11], [1, 7, 4, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.position_row.tolist() == [0, 1, 2, 2, 2], "two answers at one position share the head's output"
    assert batch.position_column.tolist() == [2, 1, 1, 2, 3]
    assert batch.answer_position.tolist() == [0, 0, 1, 2, 3, 4]
    assert batch.answer_token.tolist() == [9, 8, 4, 4, 3, 2]
    assert batch.answer_option.tolist() == [0, 1, 2, 3, 3, 3]
    assert batch.option_example.tolist() == [0, 0, 1, 1]
    assert batch.option_is_gold.tolist() == [False, True, True, False]
    assert (batch.num_examples, batch.num_tokens) == (2, 9)


def test_from_labels_by_hand() -> None:
    input_ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 0]])
    labels = torch.tensor([[1, -100, 6, 7], [-100, -100, 9, -100]])
    batch = MicroBatch.from_labels({"input_ids": input_ids, "labels": labels})
    assert batch.position_row.tolist() == [0, 0, 1] and batch.position_column.tolist() == [1, 2, 1]
    assert batch.answer_token.tolist() == [6, 7, 9], "the label of the first token has nothing to predict it"
    assert batch.answer_option.tolist() == [0, 0, 1] and batch.option_is_gold.tolist() == [True, True]
    assert (batch.num_examples, batch.num_tokens) == (2, 8) and bool(batch.attention_mask.all())
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    masked = MicroBatch.from_labels({"input_ids": input_ids, "labels": labels, "attention_mask": mask})
    assert masked.num_tokens == 7 and torch.equal(masked.attention_mask, mask)


def test_from_labels_gives_hugging_faces_loss() -> None:
    model = tiny_opt(40)
    input_ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    mask[1, 6:] = 0
    labels = torch.where(mask.bool(), input_ids, -100)
    labels[0, :4] = -100
    with torch.no_grad():
        theirs = float(model(input_ids=input_ids, attention_mask=mask, labels=labels).loss)
        batch = MicroBatch.from_labels({"input_ids": input_ids, "labels": labels, "attention_mask": mask})
        total, count = language_modeling(AnswerModel(model, model).answer_logprobs(batch), batch)
    assert float(total / count) == pytest.approx(theirs, abs=1e-5)
    assert int(count) == int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_rows_padded_on_either_side_have_one_loss(kind: str) -> None:
    """GPT-2 would count positions from the padding on; of no row is the first token predicted from padding."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    model: Any = tiny_opt(40) if kind == "opt" else gpt2.eval()
    ids = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    lengths, found = (5, 9, 1, 7), []
    for shifts in ((0, 0, 0, 0), (4, 0, 8, 2), (1, 0, 3, 0)):  # padding behind, before, on both sides
        mask = torch.tensor([[int(0 <= c - s < n) for c in range(9)] for s, n in zip(shifts, lengths, strict=True)])
        rows = torch.stack([row.roll(shift) for row, shift in zip(ids, shifts, strict=True)])
        labels = torch.where(mask.bool(), rows, -100)
        batch = MicroBatch.from_labels({"input_ids": rows, "labels": labels, "attention_mask": mask})
        assert batch.is_right_padded and batch.num_tokens == 22
        found.append((AnswerModel(model, model).answer_logprobs(batch), batch.answer_token))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))
    assert len(found[0][1]) == 18


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"labels": torch.zeros(2, 3)}, "input_ids and labels"),
        ({"input_ids": torch.zeros(2, 3)}, "input_ids and labels"),
        ({"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 4)}, "one shape"),
        ({"input_ids": torch.zeros(3), "labels": torch.zeros(3)}, "one shape"),
        (
            {"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 3), "attention_mask": torch.zeros(2, 2)},
            "one shape",
        ),
        ({"input_ids": torch.zeros(2, 3), "labels": torch.full((2, 3), -100)}, "at least one label"),
        ({"input_ids": torch.zeros(2, 3), "labels": torch.tensor([[1, -100, -100]] * 2)}, "at least one label"),
    ],
)
def test_from_labels_refuses(batch: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MicroBatch.from_labels(batch)


@pytest.mark.usefixtures("short_rows")
def test_to_moves_every_tensor() -> None:
    moved = MicroBatch.from_rows([Row((1, 2), ((1, 3, 0),), 0)], [[True]], 0).to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 10 and all(value.device.type == "meta" for value in tensors)
    assert (moved.num_examples, moved.num_tokens) == (1, 2)


@pytest.mark.usefixtures("short_rows")
def test_what_goes_to_a_gpu_is_pinned_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA copies columns of a table to memory that is not pinned before it sends them, and the host waits for that."""
    pinned: list[torch.Tensor] = []

    def pin(values: torch.Tensor) -> Any:
        pinned.append(values)
        return SimpleNamespace(to=lambda device, non_blocking: values.to("meta"))

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    (row,) = share_prefixes([Row((1, 2, n), ((2, n, n),), 0) for n in range(2)], 9, branching=True)
    batch = MicroBatch.from_rows([row, Row((1,), ((0, 3, 0),), 1)], [[True, False], [True]], 0)
    moved = batch.to(torch.device("cuda"))
    assert len(pinned) == 12 and all(values.is_contiguous() for values in pinned)
    assert moved.ends is not None and moved.ends.device.type == "meta"


# --- Encoder. ---


def scored(batch: MicroBatch) -> list[list[tuple[list[int], int]]]:
    """Per option: the (tokens read so far, target) pairs whose log-probabilities make its score."""
    found: list[list[tuple[list[int], int]]] = [[] for _ in batch.option_example]
    for position, token, option in zip(
        batch.answer_position.tolist(), batch.answer_token.tolist(), batch.answer_option.tolist(), strict=True
    ):
        row, column = int(batch.position_row[position]), int(batch.position_column[position])
        assert bool(batch.attention_mask[row, : column + 1].all())
        read = torch.arange(column + 1)
        if batch.ends is not None and batch.position_ids is not None:
            read = read[batch.ends[row, : column + 1] > column]
            assert batch.position_ids[row, read].tolist() == list(range(len(read)))
        found[option].append((batch.input_ids[row, read].tolist(), token))
    return found


def test_one_token_options_share_one_row(words: PreTrainedTokenizerFast) -> None:
    example = Example("the film It was", (" terrible", " great"), 1)
    batch = Encoder(words, 64).micro_batch([example, example], gold_only=False)
    prompt = words("the film It was")["input_ids"]
    assert batch.input_ids.tolist() == [prompt, prompt] and batch.position_row.numel() == 2
    terrible, great = words.convert_tokens_to_ids(["terrible", "great"])
    assert scored(batch) == [[(prompt, terrible)], [(prompt, great)]] * 2
    assert batch.option_is_gold.tolist() == [False, True] * 2 and batch.option_example.tolist() == [0, 0, 1, 1]


def test_options_of_several_tokens(words: PreTrainedTokenizerFast) -> None:
    """The prompt is run once for all of them; without branching, once for those that another one continues."""
    example = Example("the film It was", (" not so good", " bad", " not so bad", " so not so bad", " great"), 2)
    prompt, no = words("the film It was")["input_ids"], words.convert_tokens_to_ids
    longer = [prompt, prompt + no(["not"]), prompt + no(["not", "so"])]
    other = [prompt, *(prompt + no(["so", "not", "so"])[:length] for length in (1, 2, 3))]
    expected = [
        list(zip(longer, no(["not", "so", "good"]), strict=True)),
        [(prompt, no("bad"))],
        list(zip(longer, no(["not", "so", "bad"]), strict=True)),
        list(zip(other, no(["so", "not", "so", "bad"]), strict=True)),
        [(prompt, no("great"))],
    ]
    apart = Encoder(words, 64).micro_batch([example], gold_only=False)
    assert sorted(apart.input_ids[apart.attention_mask.bool()].tolist()) == sorted([*longer[-1], *other[-1]])
    assert scored(apart) == expected and apart.ends is None and apart.num_tokens == 15
    merged = Encoder(words, 64, branching=True).micro_batch([example], gold_only=False)
    assert merged.input_ids.tolist() == [[*prompt, *no(["not", "so"]), *no(["so", "not", "so"])]]
    assert scored(merged) == expected and merged.ends is not None and merged.num_tokens == 10
    assert merged.position_row.numel() == 6, "the head is computed once where options agree"
    gold = Encoder(words, 64, branching=True).micro_batch([example], gold_only=True)
    assert scored(gold) == [expected[2]] and gold.option_is_gold.tolist() == [True] and gold.ends is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=8, unique=True),
    st.integers(1, 30),
    st.booleans(),
)
def test_merged_rows_hold_the_same_sequences(texts: list[str], room: int, branching: bool) -> None:
    """Whatever sequences there are and whatever fits into a row: the same answers after the same tokens."""
    sequences = [(1, *(2 + (letter == "b") for letter in text)) for text in texts]
    rows = [Row(tokens, tuple((c, 10 * n + c, n) for c in range(len(tokens))), 0) for n, tokens in enumerate(sequences)]
    longest = max(room, *map(len, sequences))
    merged = share_prefixes(rows, longest, branching=branching)
    assert sum(len(row.tokens) for row in merged) <= sum(map(len, sequences))
    assert all(len(row.tokens) <= longest for row in merged)
    if not branching:
        assert not any(row.tree for row in merged)
    gold = [[True] * len(rows)]
    assert list(map(sorted, scored(MicroBatch.from_rows(merged, gold, 0)))) == list(
        map(sorted, scored(MicroBatch.from_rows(rows, gold, 0)))
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3, unique=True), min_size=1, max_size=6
    ),
    st.booleans(),
)
def test_packed_rows_hold_the_same_sequences(texts: list[list[str]], branching: bool) -> None:
    """Of any examples, also where the options of one share a row already."""
    rows = []
    for example, options in enumerate(texts):
        sequences = [(1, *(2 + (letter == "b") for letter in text)) for text in options]
        own = [Row(s, tuple((c, 10 * n + c, n) for c in range(len(s))), 0) for n, s in enumerate(sequences)]
        rows += [replace(row, example=example) for row in share_prefixes(own, 30, branching=branching)]
    gold = [[True] * len(options) for options in texts]
    encoder = object.__new__(Encoder)
    encoder.packing, encoder.max_length = True, 64
    groups, width = encoder.layout([len(row.tokens) for row in rows])
    packed, apart = MicroBatch.from_rows(rows, gold, 0, (), width, groups=groups), MicroBatch.from_rows(rows, gold, 0)
    assert packed.input_ids.numel() <= apart.input_ids.numel() and packed.num_tokens == apart.num_tokens
    assert list(map(sorted, scored(packed))) == list(map(sorted, scored(apart)))


def test_how_sequences_are_packed(words: PreTrainedTokenizerFast) -> None:
    """Into rows of nearly equal lengths and the fewest tokens; not where that saves little, or masks would be large."""
    encoder = Encoder(words, 1000, packing=True)
    alone = [[0], [1], [2], [3]]
    assert encoder.layout([5, 20, 6, 10]) == ([[1, 3, 2, 0]], 41)
    assert encoder.layout([60, 90, 50, 70]) == ([[1], [3], [0, 2]], 110)
    assert encoder.layout([300, 100, 90, 80]) == ([[0], [1, 2, 3]], 300), "no wider than the longest or 128"
    assert encoder.layout([100, 99, 98, 97]) == (alone, 100)
    assert encoder.layout([513, 1, 1, 1]) == (alone, 513)
    assert encoder.layout([5, 20, 6, 10], 32) == ([[1, 3, 2, 0]], 64)
    assert Encoder(words, 1000).layout([5, 20, 6, 10], 8) == (alone, 24)


def test_the_mask_of_merged_rows_by_hand() -> None:
    """1 2 then 3 or 4 5, beside a plain row with padding."""
    rows = [Row((1, 2, 3), ((2, 9, 0),), 0), Row((1, 2, 4, 5), ((3, 9, 1),), 0)]
    (tree,) = share_prefixes(rows, 8, branching=True)
    batch = MicroBatch.from_rows([tree, Row((1, 6), ((1, 9, 0),), 1)], [[True, False], [True]], pad_token=0)
    inputs = batch.model_inputs(torch.float32)
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 6, 0, 0, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 2, 3], [0, 1, 0, 0, 0]]
    mask = inputs["attention_mask"]
    assert mask.shape == (2, 1, 5, 5) and set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    assert (mask[:, 0] == 0).int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]],
    ]
    twice = batch.repeat(2).model_inputs(torch.bfloat16)
    assert twice["attention_mask"].dtype == torch.bfloat16
    assert torch.equal(twice["attention_mask"][2:] == 0, mask == 0)
    assert torch.equal(twice["position_ids"], inputs["position_ids"].repeat(2, 1))


def test_tokens_that_merge_across_the_boundary_are_answers(letters: PreTrainedTokenizerFast) -> None:
    """`ax` + `y` is [a, xy]: what differs from the prompt's tokens is scored, and nothing twice."""
    batch = Encoder(letters, 64).micro_batch([Example("ax", ("y", "z"), 0)], gold_only=False)
    first, a, x, xy, z = letters.convert_tokens_to_ids(["<s>", "a", "x", "xy", "z"])
    assert scored(batch) == [[([first, a], xy)], [([first, a, x], z)]]


def test_the_end_that_a_tokenizer_puts_behind_every_text_is_none_of_it(words: PreTrainedTokenizerFast) -> None:
    """As BART's does: a prompt goes on behind it, and no answer is scored for it."""
    closing = copy.deepcopy(words)
    ends = processors.TemplateProcessing(single="<s> $A <unk>", special_tokens=[("<s>", 1), ("<unk>", 2)])
    closing.backend_tokenizer.post_processor = ends
    assert closing("the film")["input_ids"] == [*words("the film")["input_ids"], 2]
    example = Example("the film was", (" good", " not so good"), max_new_tokens=3)
    ours, wanted = (Encoder(own, 5).encode(example, gold_only=False) for own in (closing, words))
    assert ours == wanted and len(ours.rows) == 2 and len(ours.question.prompt) == 3


def test_an_empty_answer_is_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        ConfigError, match=r"at least one token each, got answer '' after prompt 'the film'.*candidates"
    ):
        Encoder(words, 64).micro_batch([Example("the film", ("", " great"))], gold_only=False)


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1.0), ("lm_loss", -1.0)])
def test_the_best_on_dev_is_finite_and_the_earlier_of_equals(metric: str, sign: float) -> None:
    best = BestOnDev(metric, first_step=2)
    found = [
        step
        for step, value in enumerate([0.9, 0.8, math.nan, 0.5, 0.4, 0.5, math.nan, 0.6, 0.6])
        if best.consider(Score(step, Evaluation(8, {metric: sign * value, "other": 0.0})))
    ]
    assert found == [2, 3, 7], "none before the first step; the first that may be kept, though it is broken"
    assert best.score is not None and best.score.step == 7
    assert not best.consider(Score(9, Evaluation(8, {metric: sign, "other": math.inf}))), "broken weights"


def test_of_equals_on_dev_that_of_the_lower_loss_is_kept() -> None:
    """A metric of few examples often stands still while the loss falls; the first of equals would be the untrained."""
    best = BestOnDev("accuracy")
    values = [(0.5, 0.73), (0.5, 0.72), (0.5, 0.72), (0.4, 0.1), (0.5, 0.75), (0.6, 0.9)]
    scores = [Score(n, Evaluation(8, {"accuracy": a, "loss": loss})) for n, (a, loss) in enumerate(values)]
    assert [score.step for score in scores if best.consider(score)] == [0, 1, 5]


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run() -> None:
    skips = Skips(most_in_row=2)
    for step, skipped in enumerate([True, True, False, True, True]):
        skips.count(step, skipped=skipped)
    with pytest.raises(FloatingPointError, match=r"for 3 steps in a row, up to step 5; lower optimizer\.lr"):
        skips.count(5, skipped=True)
    assert skips.total == 5


def test_options_that_the_tokenizer_does_not_tell_apart_are_refused(words: PreTrainedTokenizerFast) -> None:
    """Both are unknown words: every model would score them alike."""
    options = (" sublime", " dreadful")
    with pytest.raises(ConfigError, match=r"options of different tokens, got the same for .* sublime"):
        Encoder(words, 64).micro_batch([Example("the film", options)], gold_only=False)
    assert Encoder(words, 64).micro_batch([Example("the film", options)], gold_only=True).num_examples == 1
    for gold in (0, 1):
        with pytest.raises(ConfigError, match="options of different tokens"):
            Encoder(words, 64).micro_batch([Example("the film", (*options, " great"), gold)], gold_only=False)
    assert Encoder(words, 64).micro_batch([Example("the film", (*options, " great"), 2)], gold_only=False)


def test_the_fingerprint_names_all_tokens_and_an_error_its_example(words: PreTrainedTokenizerFast) -> None:
    """The digest is that of the tables as a whole, as in journals that were written before."""
    train = [Example(f"the film {'so ' * n}It was", (" bad", " great"), n % 2) for n in range(3)]
    encoder = Encoder(words, 64)
    digest = hashlib.sha256()
    for examples in (train, train[:1], []):
        encoded = [encoder.encode(example, gold_only=False) for example in examples]
        digest.update(repr([(item.rows, item.gold, item.question) for item in encoded]).encode())
    assert encoder.fingerprint(Splits(train, train[:1], [])) == digest.hexdigest()[:16]
    wrong = [*train, Example("the film", (" sublime", " dreadful"))]
    with pytest.raises(ConfigError, match="different tokens in example 4 of dev, 'the film', got the same for"):
        encoder.fingerprint(Splits(train, wrong, []))


def test_texts_are_read_in_lists_for_the_fingerprint(
    words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By as many threads as there are cores; texts that may lose demonstrations are read one by one."""
    monkeypatch.setattr(splits, "_AHEAD", 2)
    train = [Example(f"the film {'so ' * n}It was", (" bad", " great"), n % 2) for n in range(5)]
    counted = mock.MagicMock(wraps=words, pad_token_id=words.pad_token_id)
    encoder = Encoder(counted, 64)
    counted.reset_mock()
    found = encoder.fingerprint(Splits(train, [], []))
    assert [len(call.args[0]) for call in counted.call_args_list] == [6, 6, 3]
    monkeypatch.setattr(splits, "_AHEAD", 100)
    assert Encoder(words, 64).fingerprint(Splits(train, [], [])) == found
    shots = [replace(train[0], shots=(len("the film "),))]
    counted.reset_mock()
    encoder.fingerprint(Splits(shots, [], []))
    assert counted.call_count and all(isinstance(call.args[0], str) for call in counted.call_args_list)


def test_options_of_long_prompts_have_rows_of_their_own(
    words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask has the square of their tokens."""
    example = Example("the film It was", (" not bad", " so great"))
    encoder = Encoder(words, 64, branching=True)
    longest = len(words(example.prompt)["input_ids"]) + 1
    for limit, rows in ((longest, 1), (longest - 1, 2)):
        monkeypatch.setattr(splits, "_BRANCHES", limit)
        assert len(encoder.encode(example, gold_only=False).rows) == rows


def test_tokens_that_the_model_does_not_have_are_refused_and_padding_with_one_is_not(
    words: PreTrainedTokenizerFast,
) -> None:
    """On a GPU a lookup beyond the embedding ends the process with an error that names nothing."""
    examples = [Example("it was", (" great", " terrible"), 0), Example("a film it was", (" great", " terrible"), 1)]
    highest = max(
        id for example in examples for text in example.options for id in words(example.prompt + text)["input_ids"]
    )
    with pytest.raises(ConfigError, match=f"token ids below {highest}.*got {highest}"):
        for example in examples:
            Encoder(words, 64, vocabulary=highest).encode(example, gold_only=False)
    padded = copy.deepcopy(words)
    padded.add_special_tokens({"pad_token": "<added>"})
    known = len(words)
    assert padded.pad_token_id >= known
    batch = Encoder(padded, 64, vocabulary=known).micro_batch(examples, gold_only=True)
    assert not batch.attention_mask.bool().all() and int(batch.input_ids.max()) < known


def test_truncation_keeps_the_answer_and_counts(words: PreTrainedTokenizerFast) -> None:
    """Pitfall 18: the prompt loses its earliest words but the first token; what is cut is counted."""
    encoder = Encoder(words, 6)
    prompt = "a b c d e f g It was"
    batch = encoder.micro_batch([Example(prompt, (" not so good",))], gold_only=True)
    first, g, it, was, no, so, good = words.convert_tokens_to_ids(["<s>", "g", "It", "was", "not", "so", "good"])
    assert batch.input_ids.tolist() == [[first, g, it, was, no, so]]
    assert [token for _, token in scored(batch)[0]] == [no, so, good]
    assert encoder.num_truncated == 1
    encoder.micro_batch([Example("a b", (" not so good",)), Example(prompt, (" bad",))], gold_only=True)
    assert encoder.num_truncated == 2, "a row that just fits is not cut"
    fits = encoder.micro_batch([Example("a b c", (" not so good",))], gold_only=True)
    assert fits.input_ids.shape == (1, 6) and encoder.num_truncated == 2
    assert shortened(encoder, DataConfig(max_length=6)) == ["2 rows were cut to data.max_length=6"]
    (told,) = shortened(encoder, DataConfig(max_length=7))
    assert told == "2 rows were cut to 6 tokens: as far as the model's positions go (data.max_length=7)"
    with pytest.raises(ConfigError, match="max_length=6"):
        encoder.micro_batch([Example("a", (" not so good not so good",))], gold_only=True)


def test_truncated_rows_are_counted_once_each(words: PreTrainedTokenizerFast) -> None:
    """Options that share a row are cut together: the run reports the number of rows that were cut."""
    encoder = Encoder(words, 4)
    batch = encoder.micro_batch([Example("a b c d e f It was", (" terrible", " great"))], gold_only=False)
    assert batch.input_ids.shape == (1, 4)
    assert encoder.num_truncated == 1


# --- Objectives against a naive computation with full logits, one unpadded sequence at a time. ---

EXAMPLES = [
    Example("the film It was", (" terrible", " great"), 1),
    Example("a b c", (" not so good", " bad", " so bad"), 2),
    Example("the end", (" not so good",), 0),
    Example("q r s t the film a b It was", (" great", " not great"), 0),
]


def naive(model: PreTrainedModel, tokenizer: Any, example: Example) -> list[list[float]]:
    """Per option, the log-probability of each of its tokens."""
    prompt = tokenizer(example.prompt)["input_ids"]
    scores = []
    for option in example.options:
        tokens = tokenizer(example.prompt + option)["input_ids"]
        assert tokens[: len(prompt)] == prompt
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        scores.append([float(logprobs[i - 1, tokens[i]]) for i in range(len(prompt), len(tokens))])
    return scores


def test_objectives_against_full_logits(words: PreTrainedTokenizerFast) -> None:
    model = tiny_opt(64)
    batch = Encoder(words, 64).micro_batch(EXAMPLES, gold_only=False)
    with torch.no_grad():
        logprobs = AnswerModel(model, model).answer_logprobs(batch)
    scores, best, loss, lm, tokens = [], [], 0.0, 0.0, 0
    for example in EXAMPLES:
        options = naive(model, words, example)
        means = torch.tensor([sum(option) / len(option) for option in options], dtype=torch.float64)
        scores += means.tolist()
        best.append(int(means.argmax()))
        loss -= float(means.log_softmax(0)[example.gold])
        lm -= sum(options[example.gold])
        tokens += len(options[example.gold])
    torch.testing.assert_close(option_scores(logprobs, batch), torch.tensor(scores).double(), atol=1e-5, rtol=0)
    assert predictions(logprobs, batch).tolist() == best
    for name, expected, count in [("classification", loss, 4), ("lm", lm, tokens)]:
        total, number = OBJECTIVES[name](logprobs, batch)
        assert total.dtype == number.dtype == torch.float64
        assert float(total) == pytest.approx(expected, abs=1e-4) and float(number) == count
    gold = Encoder(words, 64).micro_batch(EXAMPLES, gold_only=True)
    with torch.no_grad():
        total, number = language_modeling(AnswerModel(model, model).answer_logprobs(gold), gold)
    assert float(total) == pytest.approx(lm, abs=1e-4) and float(number) == tokens


@torch.no_grad()
def test_a_pass_holds_logits_at_the_answers_and_no_keys_and_values(words: PreTrainedTokenizerFast) -> None:
    model, found = tiny_opt(64), []
    model.register_forward_hook(lambda module, args, output: found.append(output))
    batch = Encoder(words, 64).micro_batch(EXAMPLES, gold_only=False)
    AnswerModel(model, model).answer_logprobs(batch)
    (output,) = found
    assert output.past_key_values is None and model.config.use_cache, "which transformers would fill"
    assert output.logits.shape[:2] == (1, batch.position_row.numel()) < (1, batch.input_ids.numel())


def test_classification_of_extreme_scores_is_finite() -> None:
    rows = [Row((1,), ((0, 2, 0), (0, 3, 1)), 0)]
    batch = MicroBatch.from_rows(rows, [[True, False]], 0)
    total, _ = classification(torch.tensor([-5000.0, 0.0]), batch)
    assert float(total) == pytest.approx(5000.0)
    total, _ = classification(torch.tensor([0.0, -5000.0]), batch)
    assert float(total) == 0.0
    assert predictions(torch.tensor([-1.0, -1.0]), batch).tolist() == [0], "ties go to the first"
    total, _ = classification(torch.tensor([math.nan, 0.0]), batch)
    assert math.isnan(float(total))


def test_predictions_of_scores_that_are_not_finite() -> None:
    (batch,) = tiny.options(merged=False, num_micro_batches=1)
    for chosen, value in (([0, 0], -torch.inf), ([2, 3], 1.0), ([2, 3], torch.nan)):
        logprobs = torch.full((len(batch.answer_token),), -torch.inf)
        logprobs[(batch.answer_option == 2) | (batch.answer_option == 7)] = value
        assert predictions(logprobs, batch).tolist() == chosen


def test_evaluation_counts_every_example_once(words: PreTrainedTokenizerFast) -> None:
    """Pitfall 18: the last, smaller micro-batch counts too, and the mean is over examples."""
    model = tiny_opt(64, seed=3)
    examples = [*EXAMPLES, *EXAMPLES[:3]]
    batches = evaluation_batches(examples, Encoder(words, 64), 3)
    assert [batch.num_examples for batch in batches] == [3, 3, 1]
    result = evaluate(AnswerModel(model, model), batches, Mesh())
    means = [[sum(o) / len(o) for o in naive(model, words, example)] for example in examples]
    right = [max(range(len(m)), key=m.__getitem__) == e.gold for m, e in zip(means, examples, strict=True)]
    losses = [-float(torch.tensor(m).log_softmax(0)[e.gold]) for m, e in zip(means, examples, strict=True)]
    tokens = [naive(model, words, example)[example.gold] for example in examples]
    assert result.count == 7 and result.metrics["accuracy"] == pytest.approx(sum(right) / 7) and 0 < sum(right) < 7
    assert result.metrics["loss"] == pytest.approx(sum(losses) / 7, abs=1e-5)
    assert result.metrics["lm_loss"] == pytest.approx(-sum(map(sum, tokens)) / sum(map(len, tokens)), abs=1e-5)
    with pytest.raises(ValueError, match="at least one micro-batch"):
        evaluate(AnswerModel(model, model), [], Mesh())


# --- Which examples, and when. ---


def numbered(count: int) -> list[Example]:
    """Examples that can be told apart by their tokens."""
    names = [f"{a} {b}" for a in "abcdefghij" for b in "klmnopqrst"]
    return [Example(f"{name} It was", (" terrible", " great"), i % 2) for i, name in enumerate(names[:count])]


def contents(batches: Sequence[MicroBatch]) -> list[tuple[int, ...]]:
    """The rows without their padding."""
    return [
        tuple(row[mask.bool()].tolist())
        for batch in batches
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def test_batches_are_a_pure_function_of_seed_and_step(words: PreTrainedTokenizerFast) -> None:
    config = DataConfig(batch_size=6, micro_batch_size=3)

    def make(seed: int) -> TrainBatches:
        return TrainBatches(numbered(10), Encoder(words, 64), config, seed, gold_only=False)

    batches = make(1)
    state = torch.get_rng_state()
    forwards = {step: contents(batches.at(step)) for step in range(8)}
    assert torch.equal(torch.get_rng_state(), state), "pitfall 6: no global generator"
    assert {step: contents(batches.at(step)) for step in (7, 0, 3, 3, 6, 1, 5, 2, 4)} == forwards
    assert contents(make(1).at(5)) == forwards[5]
    assert [contents(make(2).at(step)) for step in range(3)] != [forwards[step] for step in range(3)]
    assert forwards[0] != forwards[5], "an epoch has an order of its own"


def test_each_epoch_visits_every_example_once(words: PreTrainedTokenizerFast) -> None:
    """Batches of 6 over 10 examples: three steps span epochs 0 and 1."""
    config = DataConfig(batch_size=6, micro_batch_size=2)
    batches = TrainBatches(numbered(10), Encoder(words, 64), config, 0, gold_only=True)
    seen = [row for step in range(10) for row in contents(batches.at(step))]
    epochs = [seen[start : start + 10] for start in range(0, 60, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "shuffled anew"


def test_an_example_is_encoded_once_and_not_in_every_epoch(
    words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, encode = list[Example](), Encoder.encode

    def counting(self: Encoder, example: Example, *, gold_only: bool) -> Encoded:
        counted.append(example)
        return encode(self, example, gold_only=gold_only)

    monkeypatch.setattr(Encoder, "encode", counting)
    config = DataConfig(batch_size=6, micro_batch_size=2)
    batches = TrainBatches(numbered(10), Encoder(words, 64), config, 0, gold_only=True)
    for step in range(10):
        batches.at(step)
    assert len(counted) == 10


def test_micro_batches_are_fixed(words: PreTrainedTokenizerFast) -> None:
    """Cut by example, in order, whatever the number of ranks; the content of a batch does not depend on the cut."""
    encoder = Encoder(words, 64)

    def at(batch_size: int, micro_batch_size: int, step: int) -> list[MicroBatch]:
        config = DataConfig(batch_size=batch_size, micro_batch_size=micro_batch_size)
        return TrainBatches(numbered(10), encoder, config, 0, gold_only=False).at(step)

    assert [batch.num_examples for batch in at(6, 2, 3)] == [2, 2, 2]
    assert contents(at(6, 2, 3)) == contents(at(6, 6, 3)) == contents(at(6, 3, 3))
    assert contents(at(12, 6, 0))[:10] != contents(at(12, 6, 0))[2:12]
    assert len(contents(at(12, 6, 0))) == 12, "a batch larger than the data goes round"


def prompts_of(*lengths: int) -> list[Example]:
    """Prompts of so many words, each with a first word of its own where there are enough."""
    return [
        Example(" ".join(["abcdefghijklmnopqrst"[i % 20], *["film"] * (n - 1)]), (" good", " bad"))
        for i, n in enumerate(lengths)
    ]


def test_a_steps_examples_are_sorted_into_its_micro_batches(words: PreTrainedTokenizerFast) -> None:
    """By default a step keeps its examples; only who is padded with whom changes."""
    examples = prompts_of(*(1 + 7 * i % 20 for i in range(20)))
    make = lambda size: TrainBatches(  # noqa: E731
        examples, Encoder(words, 64), DataConfig(batch_size=8, micro_batch_size=size), 0, gold_only=False
    )
    for step in range(5):
        parts = make(2).at(step)
        assert sorted(contents(make(8).at(step))) == sorted(contents(parts))
        lengths = [int(n) for batch in parts for n in batch.attention_mask.sum(1)]
        assert lengths == sorted(lengths) and len(set(lengths)) > 4
    with pytest.raises(ValueError, match="divisor of 8"):
        make(3)


def test_a_window_deals_each_step_its_share_of_every_length(words: PreTrainedTokenizerFast) -> None:
    examples = prompts_of(*(1 + 7 * i % 20 for i in range(20)))
    batches = {
        window: TrainBatches(
            examples, Encoder(words, 64),
            DataConfig(batch_size=8, micro_batch_size=2, length_window=window), 3, gold_only=False,
        )
        for window in (1, 5)
    }  # fmt: skip
    steps = {window: {step: made.at(step) for step in range(10)} for window, made in batches.items()}
    again = {step: contents(batches[5].at(step)) for step in (7, 2, 9, 2, 0)}
    assert all(contents(steps[5][step]) == found for step, found in again.items()), "a pure function of the step"

    def rows(window: int, first: int) -> list[tuple[int, ...]]:
        return [row for step in range(first, first + 5) for row in contents(steps[window][step])]

    for first in (0, 5):
        assert sorted(rows(1, first)) == sorted(rows(5, first)), "a window holds the examples of its steps"
        tops = [
            [int(batch.attention_mask.sum(1).max()) for batch in steps[5][step]] for step in range(first, first + 5)
        ]
        for shorter, longer in itertools.pairwise(tops):
            for stratum in range(3):
                assert shorter[stratum] <= longer[stratum + 1] and longer[stratum] <= shorter[stratum + 1]
    assert contents(steps[5][0]) != contents(steps[5][5])
    padded = {w: sum(b.input_ids.numel() for made in steps[w].values() for b in made) for w in steps}
    assert padded[5] < padded[1]


def test_evaluation_puts_examples_of_one_length_together(words: PreTrainedTokenizerFast) -> None:
    batches = evaluation_batches(prompts_of(9, 2, 9, 2, 2), Encoder(words, 64), 2)
    assert [batch.input_ids.shape for batch in batches] == [(2, 3), (2, 10), (1, 10)]


class Given(Task):
    """A task with given examples."""

    def __init__(self, train: int, validation: int) -> None:
        super().__init__(Source())
        self.sizes = {"train": train, "validation": validation}

    def example(self, record: Any) -> Example:
        raise NotImplementedError

    def examples(self, split: str) -> list[Example]:
        return [Example(f"{split} {i}", (" a",)) for i in range(self.sizes[split])]


def test_splits_are_disjoint_and_seeded() -> None:
    """Validation is a part of the split at random, the same for every seed: neighbours may share a passage."""
    config = DataConfig(num_train=30, num_dev=10, num_validation=5)
    splits = Splits.of(Given(50, 8), config, 0)
    assert [len(splits.train), len(splits.dev), len(splits.validation)] == [30, 10, 5]
    prompts = [example.prompt for example in [*splits.train, *splits.dev]]
    assert len(set(prompts)) == 40 and all(prompt.startswith("train ") for prompt in prompts)
    numbers = [int(example.prompt.split()[1]) for example in splits.validation]
    assert numbers == sorted(set(numbers)) and numbers != list(range(5)), "from the whole split, in its order"
    assert part(Given(0, 8).examples("validation"), 5) == splits.validation, "as zoscale evaluate takes them"
    assert len(part(Given(0, 8).examples("validation"), None)) == 8
    assert Splits.of(Given(50, 8), config, 0) == splits
    other = Splits.of(Given(50, 8), config, 1)
    assert other.train != splits.train and other.validation == splits.validation
    assert [example.prompt for example in splits.train] != sorted(example.prompt for example in splits.train)


@pytest.mark.parametrize(
    ("num_train", "num_dev", "sizes"),
    [
        (None, None, (20, 0)),
        (None, 5, (15, 5)),
        (12, None, (12, 8)),
        (12, 8, (12, 8)),
        (20, 0, (20, 0)),
        (1, 0, (1, 0)),
    ],
)
def test_null_takes_what_is_left(num_train: int | None, num_dev: int | None, sizes: tuple[int, int]) -> None:
    splits = Splits.of(Given(20, 3), DataConfig(num_train=num_train, num_dev=num_dev), 0)
    assert (len(splits.train), len(splits.dev)) == sizes and len(splits.validation) == 3


@pytest.mark.parametrize(
    ("num_train", "num_dev"), [(21, 0), (15, 6), (None, 20), (None, 21), (0, 5), (21, None), (100, None)]
)
def test_counts_that_are_too_large_are_refused(num_train: int | None, num_dev: int | None) -> None:
    """Pitfall 18: no silent truncation of the asked counts."""
    with pytest.raises(ConfigError, match="20 examples"):
        Splits.of(Given(20, 3), DataConfig(num_train=num_train, num_dev=num_dev), 0)


def test_a_validation_count_that_is_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_validation up to 3"):
        Splits.of(Given(20, 3), DataConfig(num_train=5, num_dev=5, num_validation=4), 0)


# --- Tasks and sources. ---


@pytest.fixture
def data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_sst2_has_mezos_prompt() -> None:
    """MeZO: strip the sentence, add ` It was`, score ` terrible` (0) against ` great` (1)."""
    task = SST2(path=None)
    assert task.example({"sentence": "hide new secretions from the parental units ", "label": 0}) == Example(
        "hide new secretions from the parental units It was", (" terrible", " great"), 0
    )
    assert task.example({"sentence": "  a {gem} \n", "label": "1"}) == Example(
        "a {gem} It was", (" terrible", " great"), 1
    )
    assert TASKS["sst2"] is SST2
    with pytest.raises(ConfigError, match="labels 0, 1"):
        task.example({"sentence": "no label in the test split", "label": -1})


def test_classification_with_named_labels() -> None:
    task = Classification(template="{q}?", candidates={"no": " No", "yes": " Yes", "may": " Maybe"}, label="answer")
    assert task.example({"q": "is it", "answer": "may"}) == Example("is it?", (" No", " Yes", " Maybe"), 2)
    with pytest.raises(ConfigError, match=r"'answer'.*no, yes, may"):
        task.example({"q": "is it", "answer": "perhaps"})
    with pytest.raises(ConfigError, match="'answer'"):
        task.example({"q": "is it"})
    with pytest.raises(ConfigError, match="answer, q"):
        Classification(template="{question}?", candidates=["a", "b"], label="answer").example({"q": "x", "answer": 0})
    with pytest.raises(ConfigError, match=r"task\.template with {fields} of the record, got 'It was'"):
        Classification(template="It was", candidates=["a", "b"])
    with pytest.raises(ConfigError, match=r"task\.template"):
        Classification(template="{q", candidates=["a", "b"], label="answer").example({"q": "x", "answer": 0})
    for candidates in (["one"], ["same", "same"], {"a": "x", "b": "x"}):
        with pytest.raises(ConfigError, match="two different"):
            Classification(template="{q}", candidates=candidates)  # type: ignore[arg-type]


def test_completion() -> None:
    task = Completion(template="Q: {q}\nA:", answer=" {a}.")
    assert task.example({"q": "1 + 1", "a": 2}) == Example("Q: 1 + 1\nA:", (" 2.",), 0)
    assert Completion().example({"prompt": "p", "answer": "q"}) == Example("p", (" q",), 0)
    assert task.objectives == ("lm",) and task.select_by == "lm_loss"
    with pytest.raises(ConfigError, match="among: a"):
        task.example({"a": 2})


RECORDS = [
    {"sentence": '"a bare mark', "label": "0"},
    {"sentence": "NA", "label": "1"},
    {"sentence": "comma, apple é", "label": "1"},
]


def write(file: Path, records: Sequence[dict[str, str]]) -> None:
    if file.suffix == ".jsonl":
        text = "".join(json.dumps(record) + "\n" for record in records)
    else:
        quote = (lambda s: '"' + s.replace('"', '""') + '"') if file.suffix == ".csv" else str
        separator = "," if file.suffix == ".csv" else "\t"
        lines = [separator.join(RECORDS[0]), *(separator.join(map(quote, record.values())) for record in records)]
        text = "\n".join(lines) + "\n"
    file.write_text(text, encoding="utf-8")


@pytest.mark.usefixtures("data_cache")
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_folders_and_files(tmp_path: Path, suffix: str) -> None:
    """GLUE's bare quotation marks, the word NA and commas come through every format, as do all the records."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / f"train.{suffix}", RECORDS)
    write(folder / f"validation.{suffix}", RECORDS[1:])
    expected = [
        Example(f"{record['sentence']} It was", (" terrible", " great"), int(record["label"])) for record in RECORDS
    ]
    task = SST2(path=str(folder))
    assert task.examples("train") == expected and task.examples("validation") == expected[1:]
    files = {"train": str(folder / f"validation.{suffix}"), "validation": str(folder / f"train.{suffix}")}
    task = SST2(files=files)
    assert task.examples("train") == expected[1:] and task.examples("validation") == expected


@pytest.mark.usefixtures("data_cache")
def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(ConfigError, match="an empty folder"):
        Source(path=str(folder)).records("train")
    write(folder / "train.tsv", RECORDS)
    with pytest.raises(ConfigError, match=r"validation\.jsonl.*train\.tsv"):
        Source(path=str(folder)).records("validation")
    with pytest.raises(ConfigError, match=r"an existing file, got .*nowhere\.csv"):
        Source(files={"train": str(folder / "nowhere.csv")}).records("train")
    with pytest.raises(ConfigError, match=r"'validation'.*train"):
        Source(files={"train": str(folder / "train.tsv")}).records("validation")
    (folder / "train.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"ends in \.jsonl.*train\.txt"):
        Source(files={"train": str(folder / "train.txt")}).records("train")
    with pytest.raises(ConfigError, match=r"task\.path or task\.files"):
        Source().records("train")
    (folder / "validation.jsonl").write_text('{"sentence": "half')
    with pytest.raises(ConfigError, match="readable split 'validation'"):
        Source(path=str(folder)).records("validation")
    (folder / "validation.jsonl").unlink()
    (folder / "validation.csv").write_text("sentence,label\n")
    with pytest.raises(ConfigError, match="split 'validation'"):
        Source(path=str(folder)).records("validation")


@pytest.mark.usefixtures("data_cache")
def test_missing_fields_and_labels_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1}\n')
    with pytest.raises(ConfigError, match="label, text"):
        Classification(path=str(tmp_path), template="{sentence}", candidates=[" a", " b"]).examples("train")
    with pytest.raises(ConfigError, match="'gold'"):
        Classification(path=str(tmp_path), template="{text}", candidates=[" a", " b"], label="gold").examples("train")
    with pytest.raises(ConfigError, match="label, text"):
        SST2(path=str(tmp_path)).examples("train")


def test_sst2_as_shipped() -> None:
    folder = Path(__file__).parents[1].parent / "shared" / "data" / "sst2"
    if not (folder / "validation.tsv").is_file():
        pytest.skip("no SST-2 files next to the checkout")
    examples = SST2(path=str(folder)).examples("validation")
    assert all(example.prompt.endswith(" It was") and example.prompt == example.prompt.strip() for example in examples)
    assert {example.gold for example in examples} == {0, 1}


def test_sums_as_a_gpu_takes_them_are_those_of_a_cpu() -> None:
    """In the order of the values; an index without any gives 0."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, generator=generator, dtype=torch.float64)
    index = torch.randint(0, 6, (40,), generator=generator)
    found = sums_in_order(values, index, 8)
    torch.testing.assert_close(found, sums_by(values, index, 8), rtol=1e-14, atol=1e-14)
    assert found[6:].tolist() == [0, 0] and float(found[0]) == pytest.approx(float(values[index == 0].sum()))

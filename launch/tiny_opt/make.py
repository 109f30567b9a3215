"""Make a tiny OPT model, its tokenizer and a small sentiment set, from generated or from your own text.

The text comes from a seeded grammar of movie-review English (see grammar.py) or from a file. The whole run is
deterministic for a seed, uses one CPU thread, needs no network and takes a few minutes.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from grammar import VERBALIZERS, document, sentiment_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, set_seed

HERE = Path(__file__).resolve().parent
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # the ids 0 to 3, as in OPT
VOCAB_SIZE, MAX_POSITIONS, BLOCK = 2048, 128, 96
BATCH, PEAK_LR, WARMUP = 32, 2e-3, 50
TAIL, TAIL_WEIGHT = 7, 10.0  # the last tokens of a document, its closing sentence, count more
DOCUMENTS, TRAIN_ROWS, VALIDATION_ROWS = 12000, 1500, 400

Rows = list[dict[str, str | int]]


def write_rows(path: Path, rows: Rows) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder: Path, seed: int) -> Rows:
    """Write the sentiment set; return its validation rows."""
    rng = random.Random(seed)
    train = sentiment_rows(rng, TRAIN_ROWS, seed, held_out=False)
    validation = sentiment_rows(rng, VALIDATION_ROWS, seed, held_out=True)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "validation.jsonl", validation)
    return validation


def load_documents(text: Path | None, seed: int, validation: Rows) -> list[str]:
    """The pre-training documents: the lines of `text`, or generated ones without any validation sentence."""
    if text is not None:
        return [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    rng = random.Random(seed + 1)
    excluded = {str(row["sentence"]) for row in validation}
    return [document(rng, seed, excluded) for _ in range(DOCUMENTS)]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with OPT's special tokens, which puts `</s>` before every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    known = ["It was" + word for word in VERBALIZERS] * len(documents)  # so that each becomes one token
    backend.train_from_iterator(documents + known, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def check_verbalizers(tokenizer: PreTrainedTokenizerFast) -> None:
    """Require that each verbalizer is one token."""
    for word in VERBALIZERS:
        ids = tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{word!r} is not one token: {tokenizer.convert_ids_to_tokens(ids)}")


def build_model(vocab_size: int) -> OPTForCausalLM:
    """A randomly initialised OPT of about one million parameters."""
    config = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=512,
        max_position_embeddings=MAX_POSITIONS,
        init_std=0.08,
        dropout=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=True,
    )
    return OPTForCausalLM(config)


def encode(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of every document, ended by `</s>`, in pieces of at most BLOCK that begin with `</s>`."""
    end, room = int(tokenizer.eos_token_id), BLOCK - 1
    pieces: list[list[int]] = []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        closed = [*ids, end]
        pieces += [[end, *closed[start : start + room]] for start in range(0, len(closed), room)]
    return pieces


def collate(pieces: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids, the mask of the real ones, and the weight of every next-token target."""
    rows = [torch.tensor(piece) for piece in pieces]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(piece) for piece in pieces])[:, None]
    positions = torch.arange(ids.shape[1])[None, :]
    mask = (positions < lengths).long()
    weights = mask * torch.where(positions >= lengths - TAIL, TAIL_WEIGHT, 1.0)
    return ids, mask, weights[:, 1:]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to a twentieth."""
    return min((step + 1) / WARMUP, max(0.05, 1 - step / steps))


def pretrain(model: OPTForCausalLM, pieces: list[list[int]], steps: int, seed: int) -> None:
    """Next-token training with AdamW; prints the loss now and then."""
    rng = random.Random(seed + 2)
    pad = int(model.config.pad_token_id or 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        ids, mask, weights = collate(rng.choices(pieces, k=BATCH), pad)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step} loss {loss.item():.3f} after {seconds:.0f} s", flush=True)


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save the model in half precision and the tokenizer, readable by every release of transformers."""
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings_path = out / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=HERE / "model", help="folder for the model and the tokenizer")
    add("--data", type=Path, default=HERE / "data", help="folder for the sentiment set")
    add("--text", type=Path, help="UTF-8 file, one document a line, used in place of the generated text")
    add("--steps", type=int, default=800, help="pre-training steps")
    add("--seed", type=int, default=0, help="seed of the text, of the sentiment set and of the training")
    return parser.parse_args()


def main() -> None:
    """Write the sentiment set, then the tokenizer, then the pre-trained model."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    set_seed(arguments.seed)
    validation = make_data(arguments.data, arguments.seed)
    documents = load_documents(arguments.text, arguments.seed, validation)
    tokenizer = train_tokenizer(documents)
    check_verbalizers(tokenizer)
    model = build_model(len(tokenizer))
    pieces = encode(documents, tokenizer)
    sizes = f"{len(documents)} documents, {len(tokenizer)} tokens, {model.num_parameters()} parameters"
    print(sizes, flush=True)
    pretrain(model, pieces, arguments.steps, arguments.seed)
    save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()

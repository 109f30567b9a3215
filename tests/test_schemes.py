"""What can be trained: every scheme under real ZeRO-3 on two ranks, against the plain model in this process."""

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import schemes_worker
import tiny
import torch
from accelerate import DistributedType
from jobs import SHORT, SIGN, JobServer, result_bytes, run_dir_of
from peft import PeftModel
from processes import ROOT, torchrun
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from zoscale.adapters.schemes import check_scheme, choose_trainable
from zoscale.assembly import build_engine, plan
from zoscale.config import ConfigError, ModelConfig, parse
from zoscale.data.batch import MicroBatch
from zoscale.data.prefixes import Row
from zoscale.data.splits import Encoder, evaluation_batches
from zoscale.data.train_batches import TrainBatches
from zoscale.forward.fan_out import FanOutForward
from zoscale.forward.sequential import SequentialForward
from zoscale.mesh import Mesh
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.answers import AnswerModel
from zoscale.models.generation import Generator
from zoscale.models.loading import add_adapter, load_model, load_sharded, load_tokenizer, read_model_config
from zoscale.models.sizes import count_parameters, num_positions
from zoscale.placement import place
from zoscale.recovery.journal import Journal
from zoscale.recovery.replay import replay_command
from zoscale.release.publish import export_command

MODEL = ROOT / "launch/tiny_opt/model"
RTE = ["task.name=rte", f"task.path={ROOT}/tests/samples/rte"]
CB = ["task.name=cb", f"task.path={ROOT}/tests/samples/cb"]
RECORD = ["task.name=record", f"task.path={ROOT}/tests/samples/record", "objective=lm"]
WRITTEN = [
    "task.name=squad", f"task.path={ROOT}/tests/samples/squad", "task.max_new_tokens=4",
    "objective=schemes_worker:letters", "estimator.tau=0.5",
]  # fmt: skip
HEAD = ["adapter=null", "trainable=^lm_head"]
SHORT_RUN = [
    *RTE, "model.dtype=float32", "data.num_train=null", "data.num_dev=0", "data.batch_size=2", "data.max_length=100",
    "data.micro_batch_size=1", "train.steps=2", "optimizer.name=jaguar_sign_sgd", "optimizer.lr=0.01",
    "tracking.mlflow=false",
]  # fmt: skip
SCHEMES: dict[str, list[str]] = {
    "full": ["opt", *RTE, "adapter=null"],
    "full_electra": ["electra", *RTE, "adapter=null"],
    "lora": ["opt", *WRITTEN],
    "prefix": ["opt", *WRITTEN, "adapter.peft_type=prefix_tuning"],
    "prefix_llama": ["llama", *RECORD, "adapter.peft_type=prefix_tuning"],
    "prompt": ["opt", *RECORD, "adapter.peft_type=prompt_tuning"],
    "prompt_llama": ["llama", *WRITTEN, "adapter.peft_type=prompt_tuning"],
    "ia3": ["opt", *RTE, "adapter.peft_type=ia3"],
    "ln_tuning": ["llama", *RTE, "adapter.peft_type=ln_tuning"],
    "ln_tuning_opt": ["opt", *RTE, "adapter.peft_type=ln_tuning"],
    "norms_and_biases": ["opt", *RTE, "adapter=null", "trainable=norm|ln_|bias"],
    "head": ["llama", *CB, *HEAD, "objective=accuracy", "estimator.tau=1.0"],
    "untied_head": ["opt", *RTE, *HEAD, "model.untie_head=true"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled OPT, whose embeddings are tied, and random models of its vocabulary: a Llama, whose are not, and an
    ELECTRA, some of whose weights had other names once.
    """
    electra = {"model_type": "electra", "is_decoder": True, "embedding_size": 36, "max_position_embeddings": 128}
    found = {"opt": MODEL}
    for name, own in {"llama": tiny.ARCHITECTURES["llama"], "electra": tiny.ARCHITECTURES["opt"] | electra}.items():
        found[name] = tmp_path_factory.mktemp("models") / name
        options = own | {"vocab_size": AutoConfig.from_pretrained(MODEL).vocab_size}
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.15)
        model.save_pretrained(found[name])
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def sharded(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All schemes in one job of two ranks."""
    out = tmp_path_factory.mktemp("sharded")
    scenarios = {name: [f"model.id={models[arch]}", *options] for name, (arch, *options) in SCHEMES.items()}
    (out / "scenarios.json").write_text(json.dumps(scenarios))
    worker = Path(__file__).parent / "schemes_worker.py"
    torchrun(2, str(worker), str(out / "scenarios.json"), str(out), timeout=300)
    return out


@pytest.mark.parametrize("name", SCHEMES)
def test_two_ranks_give_what_the_plain_model_gives(
    name: str, sharded: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """Losses, weights, generated texts and metrics, bit for bit; and what was saved loads without this package."""
    arch, *options = SCHEMES[name]
    torch.set_num_threads(1)
    schemes_worker.play(*schemes_worker.prepare([f"model.id={models[arch]}", *options]), tmp_path, sharded=False)
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (sharded / name, tmp_path))
    assert ours == theirs
    assert len({tuple(losses) for losses in ours["losses"]}) > 1, "the steps differ"
    weights, expected = (load_file(folder / "weights.safetensors") for folder in (sharded / name, tmp_path))
    assert sorted(weights) == sorted(expected)
    assert all(torch.equal(weights[tensor], expected[tensor]) for tensor in weights)
    loaded = load(sharded / name / "trained", models[arch], weights)
    assert lm_loss(loaded, options) == pytest.approx(ours["metrics"]["lm_loss"], abs=1e-4)
    assert lm_loss(AutoModelForCausalLM.from_pretrained(models[arch]), options) != pytest.approx(
        ours["metrics"]["lm_loss"], abs=1e-3
    ), "something was trained"


def load(folder: Path, base: Path, trained: dict[str, torch.Tensor]) -> Any:
    """The saved model by PEFT or transformers alone."""
    if not (folder / "adapter_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = dict(plain.named_parameters(remove_duplicate=False))
        changed = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
        assert changed == set(trained), "these and no others were trained"
        own, others = (set(load_file(place / "model.safetensors")) for place in (folder, base))
        assert own - {"lm_head.weight"} == others - {"lm_head.weight"}, "the names are those of the checkpoint"
        assert ("lm_head.weight" in own) == ("lm_head.weight" in others or "lm_head.weight" in trained), "once if tied"
        return model.eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()


@torch.no_grad()
def lm_loss(model: Any, options: list[str]) -> float:
    """Cross-entropy of the right answers' tokens on the validation sample: one row at a time, by transformers' loss."""
    config = parse(["model.id=x", *options], TABLES, DEFAULTS)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    total, count = 0.0, 0
    for example in TABLES["task"][config.task.name](**config.task.args).examples("validation"):
        start = len(tokenizer(example.prompt)["input_ids"])
        ids = torch.tensor([tokenizer(example.prompt + example.options[example.gold])["input_ids"]])
        labels = ids.clone()
        labels[:, :start] = -100
        total += float(model.eval()(input_ids=ids, labels=labels).loss) * (ids.shape[1] - start)
        count += ids.shape[1] - start
    return total / count


def test_generation_trained_by_an_objective_of_the_users(sharded: Path) -> None:
    """Sequential by itself, and the losses of the candidates differ."""
    for name in ("lora", "prefix", "prompt_llama"):
        report = json.loads((sharded / name / "report.json").read_text())
        assert report["forward"] == "SequentialForward"
        assert any(len(set(losses)) > 1 for losses in report["losses"]), name
        assert len(report["texts"]) == 2 and set(report["metrics"]) == {"count", "f1", "exact_match", "lm_loss"}


@pytest.mark.parametrize(
    "name", ["prefix_llama", "prompt", "ia3", "ln_tuning", "norms_and_biases", "head", "untied_head"]
)
def test_schemes_fan_out_where_they_can(name: str, models: dict[str, Path]) -> None:
    """The losses of one pass for all candidates are those of one pass each; virtual tokens take one pass each."""
    arch, *options = SCHEMES[name]
    found = []
    for forward in ("auto", "sequential"):
        changes = [f"forward.name={forward}", "objective=lm", "estimator.tau=0.05"]
        config, made = schemes_worker.prepare([f"model.id={models[arch]}", *options, *changes])
        engine = build_engine(config, made.architecture, None, objective=made.objective)
        batches = TrainBatches(made.splits.train, made.encoder, config.data, 0, gold_only=True)
        found.append(engine.losses(batches.at(0), engine.directions(0)))
        fans_out = forward == "auto" and not name.startswith("pr")
        assert isinstance(engine.forward, FanOutForward if fans_out else SequentialForward)
    assert found[0].values == pytest.approx(found[1].values, abs=2e-5)
    assert len(set(found[1].values)) == 2, "the candidates differ"


@pytest.mark.parametrize("arch", ["opt", "llama"])
@pytest.mark.parametrize("name", ["lora", "prefix_tuning", "prompt_tuning", "ia3"])
@torch.no_grad()
def test_generation_of_every_scheme(name: str, arch: str, models: dict[str, Path]) -> None:
    """Prompts of different lengths together, with padding and a cache, give what each gives alone without either."""
    adapter = parse(["model.id=x", f"adapter.peft_type={name}"], TABLES, DEFAULTS).adapter
    torch.manual_seed(0)
    model: Any = add_adapter(AutoModelForCausalLM.from_pretrained(models[arch], dtype=torch.float32), adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.3)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    examples = TABLES["task"]["squad"](path=str(ROOT / "tests/samples/squad"), max_new_tokens=6).examples("train")
    examples = [replace(examples[0], prompt="the film"), examples[1], replace(examples[2], prompt="It was a dull")]
    batch = Encoder(tokenizer, 64).micro_batch(examples, gold_only=True)
    generator = Generator(AnswerModel(model, model), tokenizer, Mesh())
    alone = []
    for question in batch.questions:
        made: list[int] = []
        for _ in range(6):
            ids = torch.tensor([[*question.prompt, *made]])
            logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            made.append(int(logits[0, -1].argmax()))
        alone.append(generator._text(made))
    assert generator.texts(batch) == alone
    assert len(generator._together(batch.questions)) == 1 and len(set(alone)) == 3


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "gptj", "roberta", "mpt"])
@torch.no_grad()
def test_learned_positions_end_where_the_model_does(name: str) -> None:
    options = {**tiny.FAMILIES["opt"], "model_type": name, "rotary_dim": 4, "is_decoder": True, "max_seq_len": 40}
    architecture = AutoConfig.for_model(**tiny.FAMILIES.get(name, options))
    model = AutoModelForCausalLM.from_config(architecture).eval()
    most = {"opt": 40, "gpt2": 40, "gptj": 40, "roberta": 38, "mpt": 40}.get(name)
    assert num_positions(model) == count_parameters(architecture).positions == most
    for length in (most or 40, 1 + (most or 40)):
        ids = torch.full((1, length), 5)
        with pytest.raises((IndexError, RuntimeError)) if most and length > most else nullcontext():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))


STRETCHED = {
    "longrope": {"short_factor": [1.0] * 3, "long_factor": [4.0] * 3, "original_max_position_embeddings": 12},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize(("kind", "most"), [("longrope", 12), ("dynamic", 24)])
@torch.no_grad()
def test_rows_are_so_short_that_no_other_row_stretches_their_positions(kind: str, most: int) -> None:
    options = {**tiny.FAMILIES["llama"], "max_position_embeddings": 24, "model_type": "llama"}
    rope = {"rope_type": kind, "rope_theta": 1e4, **STRETCHED[kind]}
    architecture = AutoConfig.for_model(**options, rope_parameters=rope)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    answers = AnswerModel(model, model)
    assert count_parameters(architecture).positions == most
    alone, *beside = [
        answers.answer_logprobs(MicroBatch.from_rows([Row((5, 6, 7, 8), ((3, 9, 0),), 0)], [[True]], 1, width=width))
        for width in (0, most, most + 1)
    ]
    assert [torch.allclose(alone, other) for other in beside] == [True, False]


@pytest.mark.parametrize("scheme", ["lora", "prefix_tuning", "prompt_tuning"])
@torch.no_grad()
def test_rows_are_no_longer_than_learned_positions(scheme: str) -> None:
    """By default, and with a prompt longer than the model: virtual tokens and generated answers have positions too."""
    options = [f"model.id={MODEL}", "model.dtype=float32", *WRITTEN, f"adapter.peft_type={scheme}", "data.num_dev=0"]
    config = parse([*options, "data.num_train=null"], TABLES, DEFAULTS)
    made = plan(config)
    virtual = 0 if scheme == "lora" else (config.adapter or {})["num_virtual_tokens"]
    assert (config.data.max_length, made.encoder.max_length) == (512, 128 - virtual)
    long = replace(made.splits.train[0], prompt="the film " * 200)
    batch = evaluation_batches([long], made.encoder, 1)[0]
    assert batch.input_ids.shape[1] == len(batch.questions[0].prompt) + long.max_new_tokens - 1 == 128 - virtual
    model = add_adapter(load_model(config.model, made.architecture), config.adapter)
    answers = AnswerModel(model, model)
    assert answers.answer_logprobs(batch).isfinite().all()
    assert len(Generator(answers, made.encoder.tokenizer, Mesh()).texts(batch)) == 1


def test_a_model_without_a_position_for_a_token_is_refused() -> None:
    options = [f"model.id={MODEL}", *RTE, "adapter.peft_type=prefix_tuning", "adapter.num_virtual_tokens=128"]
    with pytest.raises(ConfigError, match="fewer virtual tokens than the model has positions, got 128 for 128"):
        plan(parse(options, TABLES, DEFAULTS))


@pytest.mark.parametrize(
    ("adapter", "trainable", "message"),
    [
        ({"peft_type": "vera"}, None, "adapter.peft_type lora, prefix_tuning"),
        ({"peft_type": "ia3", "r": 8}, None, "a field of peft.IA3Config, got adapter.r"),
        ({"lora_alfa": 1}, None, "got adapter.lora_alfa: did you mean adapter.lora_alpha"),
        ({"peft_type": "prefix_tuning", "prefix_projection": True}, None, "prefix_projection false"),
        ({"peft_type": "prompt_tuning", "num_virtual_tokens": 0}, None, "num_virtual_tokens of at least 1, got 0"),
        ({"peft_type": "prefix_tuning", "num_virtual_tokens": "x"}, None, "num_virtual_tokens to be int, got 'x'"),
        ({"peft_type": ["lora"]}, None, "weight_lora, got ['lora']"),
        ({"r": "8"}, None, "adapter.r to be int, got '8'"),
        ({"r": 0}, None, "adapter.r at least 1, got 0"),
        ({"r": True}, None, "adapter.r to be int, got True"),
        ({"lora_alpha": 0}, None, "adapter.lora_alpha above 0, got 0"),
        ({"lora_dropout": -0.1}, None, "adapter.lora_dropout in [0, 1), got -0.1"),
        ({"use_rslora": "no"}, None, "adapter.use_rslora to be bool, got 'no'"),
        ({"bias": "some"}, None, "adapter.bias to be one of none, all, lora_only, got 'some'"),
        ({"target_modules": 3}, None, "adapter.target_modules to be"),
        ({"rank_pattern": ["q_proj"]}, None, "adapter.rank_pattern to be"),
        ({"peft_type": "weight_lora", "r": 1.5}, None, "adapter.r to be int, got 1.5"),
        (
            {"peft_type": "prompt_tuning", "num_virtual_tokens": 2, "prompt_tuning_init": "sample_vocab"},
            None,
            "adapter.prompt_tuning_init to be one of RANDOM, SAMPLE_VOCAB, TEXT, got 'sample_vocab'",
        ),
        ({"inference_mode": True}, None, "inference_mode false"),
        ({"layers_to_transform": [0], "target_modules": "q_proj"}, None, "that peft.LoraConfig takes, got `layers_to"),
        ({"use_dora": True, "lora_bias": True}, None, "lora_bias=True is not supported for DoRA"),
        ({"init_lora_weights": "pissa_niter_2"}, None, "that can be made again, got pissa_niter_2: set it to pissa"),
        ({"peft_type": "weight_lora", "init_lora_weights": "olora"}, None, "leaves the base weights, with weight_lora"),
        ({"peft_type": "weight_lora", "init_lora_weights": "PiSSA"}, None, "adapter.init_lora_weights that leaves"),
        (
            {"peft_type": "prefix_tuning", "num_virtual_tokens": 2, "modules_to_save": ["lm_head"]},
            None,
            "all that is trained with prefix_tuning, got adapter.modules_to_save=['lm_head']: remove it",
        ),
        (None, "(", "a regular expression"),
    ],
)
def test_schemes_that_cannot_be_trained_are_refused(
    adapter: dict[str, Any] | None, trainable: str | None, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_scheme(adapter, trainable)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 0.5}, {"layer_replication": [[0, 2], [1, 3]]}, {"target_modules": "all-linear"},
        {"rank_pattern": {"q_proj": 4}}, {"init_lora_weights": False}, {"trainable_token_indices": {"embed": [1]}},
        {"layers_to_transform": 3}, {"corda_config": {}, "init_lora_weights": "corda"},
        {"peft_type": "prompt_tuning", "num_virtual_tokens": 2, "token_dim": None},
    ],
)  # fmt: skip
def test_fields_of_adapters_have_the_types_of_peft(options: dict[str, Any]) -> None:
    check_scheme(options, None)


def test_an_adapter_and_a_subset_of_the_weights_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="set adapter=null"):
        parse(["model.id=x", "trainable=bias"], TABLES, DEFAULTS)


def test_each_type_of_adapter_has_its_own_defaults() -> None:
    def adapter(*options: str) -> Any:
        return parse(["model.id=x", *options], TABLES, DEFAULTS).adapter

    prefix = {"peft_type": "prefix_tuning", "num_virtual_tokens": 7, "init_weights": "zero"}
    assert adapter("adapter.peft_type=prefix_tuning", "adapter.num_virtual_tokens=7") == prefix
    assert adapter("adapter.peft_type=ia3") == {"peft_type": "ia3"}
    assert adapter("adapter.peft_type=lora", "adapter.r=2") == adapter("adapter.r=2") | {"peft_type": "lora"}


def test_names_of_weights_are_chosen_or_refused_with_a_reason() -> None:
    """A tied head is refused by its second name; a pattern that finds nothing shows what names are like."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL)
    tied = r"lm_head\.weight, which is tied to model\.decoder\.embed_tokens\.weight: .* or set model\.untie_head=true"
    with pytest.raises(ConfigError, match=tied):
        choose_trainable(model, "^lm_head")
    with pytest.raises(ConfigError, match="they are like model"):
        choose_trainable(model, "LayerNorm")
    add_adapter(model, None, r"layers\.0\..*bias$|embed_tokens")
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert "model.decoder.embed_tokens.weight" in trained
    assert all(name.endswith("bias") and ".layers.0." in name for name in trained if "embed" not in name)
    choose_trainable(model, None)
    assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_documented_pattern_trains_all_norms_and_biases(name: str) -> None:
    """Of every family: GPT-2 calls its norms ln_1, ln_2 and ln_f."""
    row = next(row for row in (ROOT / "launch/METHODS.md").read_text().splitlines() if "norms and biases" in row)
    (pattern,) = re.findall("trainable='(.*)'", row.replace("\\", ""))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny.FAMILIES[name]))
    choose_trainable(model, pattern)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    norms = {f"{name}.weight" for name, module in model.named_modules() if "Norm" in type(module).__name__}
    wanted = {name for name, _ in model.named_parameters() if name.endswith(".bias") or name in norms}
    assert norms and trained == wanted


def changed(model: Path, folder: Path, *, without: str = "", **config: Any) -> Path:
    """A copy of a model whose checkpoint lacks the tensors that a pattern is found in, and with other settings."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not without or not re.search(without, name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | config))
    return folder


def loaded(folder: Path, **options: Any) -> Any:
    config = ModelConfig(id=str(folder), dtype="float32", **options)
    return load_model(config, read_model_config(config))


def test_an_adapter_that_does_not_fit_is_told_what_the_model_has() -> None:
    """The default targets are names of OPT and Llama; GPT-2 has others."""
    config = ModelConfig(config={"n_embd": 16, "n_layer": 2, "n_head": 2, **tiny.FAMILIES["gpt2"]}, dtype="float32")
    adapter = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(ConfigError, match=r"fit GPT2LMHeadModel.*adapter\.target_modules: c_attn, c_proj, c_fc$"):
        add_adapter(load_model(config, read_model_config(config)), adapter)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"bias": "some"}, "bias: some, is not implemented"),
        ({"rank_pattern": [1]}, "'list' object has no attribute 'keys'"),
        ({"r": "8"}, "'<=' not supported between instances of 'str' and 'int'"),
        ({"trainable_token_indices": [10**6]}, "index 1000000 is out of bounds"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq_iter'"),
        ({"megatron_config": {"hidden_size": 32}}, "No module named 'megatron'"),
    ],
)
def test_values_that_peft_fails_on_are_told_in_a_line(field: dict[str, Any], message: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL)
    with pytest.raises(ConfigError, match=f"expected adapter options that fit OPTForCausalLM, got .*{message}"):
        add_adapter(model, {"r": 2, "target_modules": ["q_proj"], **field})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_haed", r"names of modules of OPTForCausalLM, got 'lm_haed': did you mean lm_head\?"),
        ("attn", r"layers\.\*\.self_attn\.q_proj, in a module .*exclude_modules=\[self_attn\.q_proj\]"),
        ("layers.0", r"apart from each other, got model\.decoder\.layers\.\*\.fc1 in another one"),
    ],
)
def test_modules_that_would_not_be_trained_or_loaded_as_a_whole_are_refused(name: str, message: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL)
    with pytest.raises(ConfigError, match=message):
        add_adapter(model, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["fc1", name]})


def test_layers_that_peft_refuses_are_not_named() -> None:
    """Nor names of layers that it put in before it came to them."""
    config = ModelConfig(config={"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2}, dtype="float32")
    model = load_model(config, read_model_config(config))
    with pytest.raises(ConfigError, match=r"Mamba-based.*adapter\.target_modules: in_proj, x_proj, dt_proj$"):
        add_adapter(model, {"r": 2, "target_modules": "all-linear"})


_MOE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 2, "num_local_experts": 2, "head_dim": 8,
    "num_experts_per_tok": 1, "shared_expert_intermediate_size": 8, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "reason", "excluded"),
    [
        ("laguna", r"PEFT loads as it was saved.*shared_experts\.gate_proj", 3),  # renamed to shared_experts..gate_proj
        ("llama4_text", r"only multiply.*feed_forward\.router \(Llama4Router\)", 1),
        ("phimoe", r"only multiply.*mlp\.router \(PhimoeTopKRouter\)", 1),
    ],
)
def test_layers_whose_adapters_fail_or_get_lost_are_refused(kind: str, reason: str, excluded: int) -> None:
    """As the remedy says, the others can be trained."""
    config = ModelConfig(config={"model_type": kind, **_MOE}, dtype="float32")
    adapter = {"r": 2, "target_modules": "all-linear"}
    with pytest.raises(ConfigError, match=reason) as caught:
        add_adapter(load_model(config, read_model_config(config)), adapter)
    names = re.findall(r"[\w.]+", str(caught.value).partition("adapter.exclude_modules=")[2].partition("]")[0])
    assert len(names) == excluded
    adapted = add_adapter(load_model(config, read_model_config(config)), adapter | {"exclude_modules": names})
    assert any(parameter.requires_grad for parameter in adapted.parameters())


def test_a_prefix_that_a_model_would_ignore_is_refused() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8, "num_heads": 4}
    config = ModelConfig(config={"model_type": "mamba2", "num_attention_heads": 4, **sizes}, dtype="float32")
    adapter = {"peft_type": "prefix_tuning", "num_virtual_tokens": 3}
    with pytest.raises(ConfigError, match=r"prefix of keys and values, got Mamba2ForCausalLM.*=prompt_tuning, or lora"):
        add_adapter(load_model(config, read_model_config(config)), adapter)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 2}),
        ("mpt", {"d_model": 16, "n_heads": 4, "n_layers": 2}),
        ("xglm", {"d_model": 16, "attention_heads": 4, "num_layers": 2, "ffn_dim": 24}),
    ],
)
def test_virtual_tokens_of_models_whose_heads_peft_does_not_find(
    kind: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    """Prompts need none; a prefix does, so that models without heads are refused, and told of no layers."""
    config = ModelConfig(config={"model_type": kind, "vocab_size": 50, **sizes}, dtype="float32")
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4).long()}
    for peft_type in ("prompt_tuning", "prefix_tuning"):
        base = load_model(config, read_model_config(config))
        told = pytest.raises(ConfigError, match="takes a prefix of keys and values, got MambaForCausalLM: set adapter")
        with told if (kind, peft_type) == ("mamba", "prefix_tuning") else nullcontext():
            model: Any = add_adapter(base, {"peft_type": peft_type, "num_virtual_tokens": 3})
            logits = model.eval()(**batch, use_cache=False).logits
            model.save_pretrained(tmp_path / peft_type)
            loaded = PeftModel.from_pretrained(model.get_base_model(), tmp_path / peft_type)
            assert torch.equal(loaded.eval()(**batch, use_cache=False).logits, logits)


def test_norms_without_weights_are_refused_as_targets() -> None:
    architecture = AutoConfig.for_model("modernbert-decoder", **_SMALL)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(architecture)
    with pytest.raises(ConfigError, match="fit ModernBertDecoderForCausalLM, got a target without weights"):
        add_adapter(base, {"peft_type": "ln_tuning", "target_modules": ["attn_norm"]})


def test_a_prefix_that_does_not_fit_a_model_is_told_with_the_error() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModelConfig(config={"model_type": "falcon", **sizes}, dtype="float32")
    adapter = {"peft_type": "prefix_tuning", "num_virtual_tokens": 3}
    model = add_adapter(load_model(config, read_model_config(config)), adapter)
    batch = MicroBatch.from_labels({"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 4).long()})
    with pytest.raises(RuntimeError) as caught:
        AnswerModel(model, model).answer_logprobs(batch)
    assert "FalconForCausalLM may not take PEFT's prefix: set adapter.peft_type" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm", "xlnet", "prophetnet"])
def test_models_that_look_ahead_are_refused(kind: str) -> None:
    """The answer would be among what it is predicted from; AutoModelForCausalLM loads them all the same."""
    remedy = "; if .* set is_decoder true" if "bert" in kind else "$"
    with pytest.raises(ConfigError, match=f"do not see those after them, got {kind}: choose a decoder{remedy}"):
        count_parameters(AutoConfig.for_model(kind))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"is_causal": False}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma4_text", {"use_bidirectional_attention": "all"}),
    ],
)
def test_decoders_that_look_ahead_by_their_configuration_are_refused(kind: str, options: dict[str, Any]) -> None:
    """Embedding models that were made of decoders: transformers lets all tokens see one another."""
    with pytest.raises(ConfigError, match=f"do not see those after them, got {kind}: choose a decoder"):
        count_parameters(AutoConfig.for_model(kind, **_SMALL, **options))


def test_a_configuration_that_transformers_refuses_is_an_error_of_the_user() -> None:
    config = {"model_type": "llama", "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}
    with pytest.raises(ConfigError, match="Missing required keys in `rope_parameters`"):
        read_model_config(ModelConfig(config=config))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"hidden_size": "8"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": 0}, "a causal language model of transformers, got opt"),
        ({"ffn_dim": -1}, "a causal language model of transformers, got opt"),
        ({"num_attention_heads": 0}, "a causal language model of transformers, got opt"),
        ({"activation_function": "none"}, "a causal language model of transformers, got opt"),
        ({"dtype": "fp99"}, "has no attribute 'fp99'"),
        ({"dtype": [1]}, "a known model_type, got model_type 'opt'"),
        ({"quantization_config": 1}, "a known model_type, got model_type 'opt'"),
        (
            {"num_hidden_layer": 2},
            "fields of OPTConfig in model.config, got 'num_hidden_layer': did you mean num_hidden_l",
        ),
    ],
)
def test_values_that_no_architecture_has_are_errors_of_the_user(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        count_parameters(read_model_config(ModelConfig(config={"model_type": "opt", **option})))
    assert message in str(caught.value)


def test_fields_of_older_versions_and_of_other_models_are_kept() -> None:
    """As a published config.json has them: `num_labels`, which no default holds, and what only this library renames."""
    older = {"model_type": "llama", "rope_theta": 5e5, "torch_dtype": "bfloat16", "pretraining_tp": 1, "num_labels": 3}
    assert read_model_config(ModelConfig(config=older)).rope_parameters["rope_theta"] == 5e5
    assert read_model_config(ModelConfig(config={"model_type": "gpt2", "hidden_size": 8})).n_embd == 8


@pytest.mark.parametrize(
    ("is_decoder", "reason"), [(True, "do not see those after them, got reformer"), (False, "a causal language model")]
)
def test_attention_that_sorts_tokens_is_refused(is_decoder: bool, reason: str) -> None:
    """Reformer's hashing: which tokens are seen depends on those behind, and is drawn anew in every pass."""
    with pytest.raises(ConfigError, match=reason):
        count_parameters(AutoConfig.for_model("reformer", is_decoder=is_decoder))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {"is_decoder": True}),
        ("gpt_neox", {}),
        ("gpt2", {"is_decoder": False}),
        ("reformer", {"is_decoder": True, "attn_layers": ["local"], "axial_pos_embds": False}),
    ],
)
def test_decoders_by_their_configuration_are_not_refused(kind: str, options: dict[str, Any]) -> None:
    """Old files say is_decoder false of models that have no such choice."""
    architecture = AutoConfig.for_model(kind, **options, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    assert count_parameters(architecture).total > 0


def test_weights_of_a_file_are_moved_to_where_gathered_ones_lie(tmp_path: Path) -> None:
    """Safetensors puts them at any address, and single rows are rounded by where the weights lie."""
    tiny.save_model("opt", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert any(param.data_ptr() % 64 for param in model.parameters()), "as they come from the file"
    before = [param.clone() for param in model.parameters()]
    place(model, None)
    assert not any(param.data_ptr() % 64 for param in model.parameters())
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


def test_a_model_that_reads_weights_where_they_are_not_gathered_is_not_sharded() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", hidden_size=16, num_hidden_layers=2))
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ConfigError, match=r"ZeRO-3 can shard, got rwkv.*mesh\.shard_size=1"):
        place(model, accelerator)


@pytest.mark.parametrize("kind", ["mamba", "zamba"])
def test_nested_blocks_and_blocks_that_share_weights_count_once(kind: str) -> None:
    options = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    layers = {"zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]}}
    architecture = AutoConfig.for_model(kind, num_hidden_layers=4, **options, **layers.get(kind, {}))
    size = count_parameters(architecture)
    assert size.outside_blocks == (64 + 1) * 32, "embedding and final norm"
    assert size.matrices_outside == 1


@torch.no_grad()
def test_virtual_tokens_are_as_wide_as_the_embedding(tmp_path: Path) -> None:
    """OPT-350M's is narrower than its hidden states; what PEFT saves of them it loads again."""
    narrow = {**tiny.FAMILIES["opt"], "word_embed_proj_dim": 20, "do_layer_norm_before": False}
    config = ModelConfig(config=narrow, dtype="float32")
    for init in ("SAMPLE_VOCAB", "RANDOM"):
        adapter = {"peft_type": "prompt_tuning", "num_virtual_tokens": 3, "prompt_tuning_init": init}
        model: Any = add_adapter(load_model(config, read_model_config(config)), adapter)
        batch = tiny.batch(0, 1)[0]
        logits = model.eval()(**batch).logits
        model.save_pretrained(tmp_path / init)
        loaded = PeftModel.from_pretrained(model.get_base_model(), tmp_path / init)
        assert torch.equal(loaded.eval()(**batch).logits, logits)


EXPERTS = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "first_k_dense_replace": 1,
}  # fmt: skip
"""A model with a buffer that its checkpoint holds."""


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"revision": "v1"}, ("a/b", {"revision": "v1", "trust_remote_code": False})),
        ({"trust_remote_code": True}, ("a/b", {"revision": None, "trust_remote_code": True})),
        ({"revision": "v1", "tokenizer": "c/d"}, ("c/d", {"revision": None, "trust_remote_code": False})),
        ({"revision": "v1", "tokenizer": "a/b"}, ("a/b", {"revision": "v1", "trust_remote_code": False})),
    ],
)
def test_a_revision_is_of_the_model_and_not_of_a_tokenizer_from_elsewhere(
    options: dict[str, Any], asked: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    def from_pretrained(place: str, **given: Any) -> SimpleNamespace:
        seen.append((place, given))
        return SimpleNamespace(pad_token_id=None, eos_token="</s>", pad_token=None)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    assert load_tokenizer(ModelConfig(id="a/b", **options)).pad_token == "</s>"
    assert seen == [asked]
    with pytest.raises(ConfigError, match=r"model.tokenizer beside model.config, got none"):
        load_tokenizer(ModelConfig(config={"model_type": "opt"}))


def test_weights_that_a_checkpoint_lacks_are_refused(tmp_path: Path) -> None:
    """They would be random; tied weights under their second names and buffers are no weights that are missing."""
    with pytest.raises(
        ConfigError, match=r"none for model\.decoder\.layers\.1\.fc1\.bias and 1 others: complete the ch"
    ):
        loaded(changed(MODEL, tmp_path / "less", without=r"layers\.1\.fc1"))
    wrong = changed(MODEL, tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(
        ConfigError, match=r"none for lm_head\.weight: .* set tie_word_embeddings true in its config\.json"
    ):
        loaded(wrong)
    with pytest.raises(ConfigError, match=r"none for lm_head\.weight and 1 others"):
        loaded(changed(MODEL, tmp_path / "neither", without="embed_tokens"), untie_head=True)
    model = loaded(MODEL)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    experts = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **EXPERTS))
    experts.save_pretrained(tmp_path / "experts")
    assert loaded(changed(tmp_path / "experts", tmp_path / "no_buffer", without="e_score_correction_bias"))


def test_weights_of_other_sizes_are_refused(tmp_path: Path) -> None:
    """A config.json of another model."""
    wrong = changed(MODEL, tmp_path / "wider", ffn_dim=640)
    with pytest.raises(ConfigError, match=r"fc1\.bias of \[512\] for \[640\]: correct config\.json"):
        loaded(wrong)


_SMALL = {
    "vocab_size": 1700, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 96, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
UNLIKE: dict[str, dict[str, Any]] = {
    "olmo_hybrid": {
        "num_key_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
    },
    "ernie4_5_moe": {
        "num_key_value_heads": 2, "moe_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    },
    "youtu": {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}  # fmt: skip
"""Models that ZeRO-3 would load as others: numbers that their code makes in float32 (it draws some first, too), weights
that are to stay in float32, and one that reads its weights while it is made."""


def test_prompt_tuning_of_blocks_that_look_at_token_ids_is_refused() -> None:
    """Virtual tokens have none; Gemma 4 without embeddings of each layer needs none."""
    for width, refused in ((8, True), (0, False)):
        own = {"hidden_size_per_layer_input": width, "vocab_size_per_layer_input": 1700, "num_kv_shared_layers": 0}
        architecture = AutoConfig.for_model("gemma4_text", **{**_SMALL, "head_dim": 8, **own})
        base = AutoModelForCausalLM.from_config(architecture)
        told = pytest.raises(
            ConfigError, match="another adapter for this model, got prompt_tuning with Gemma4ForCausalLM"
        )
        with told if refused else nullcontext():
            add_adapter(base, {"peft_type": "prompt_tuning", "num_virtual_tokens": 2})
    layered = {"vocab_size_per_layer_input": 1700, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2}
    architecture = AutoConfig.for_model("gemma3n_text", **{**_SMALL, "head_dim": 8, **layered})
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(architecture)
    with pytest.raises(ConfigError, match="got prompt_tuning with Gemma3nForCausalLM, whose blocks look at token ids"):
        add_adapter(base, {"peft_type": "prompt_tuning", "num_virtual_tokens": 2})


def test_prompt_tuning_of_a_model_whose_embedding_peft_does_not_find_is_refused() -> None:
    """It has one row more than the vocabulary."""
    architecture = AutoConfig.for_model("moshi", **_SMALL, head_dim=8, num_key_value_heads=2)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(architecture)
    with pytest.raises(ConfigError, match=r"embedding of tokens PEFT finds.*MoshiForCausalLM.*none: set adapter.peft"):
        add_adapter(base, {"peft_type": "prompt_tuning", "num_virtual_tokens": 2})


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_model_that_zero3_would_load_as_another_is_that_of_one_rank(
    server: JobServer, tmp_path: Path, kind: str
) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_SMALL, **UNLIKE[kind]))
    model.save_pretrained(tmp_path / "model")
    options = [
        *SHORT, *SIGN, "train.steps=3", f"model.id={tmp_path / 'model'}", f"model.tokenizer={MODEL}",
        "model.dtype=bfloat16", "adapter.target_modules=all-linear",
    ]  # fmt: skip
    hpz = json.loads((ROOT / "ds_configs/zero3_cpu.json").read_text())
    hpz["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(hpz))
    journals = []
    for name, ranks, own in (("one", 1, []), ("two", 2, []), ("hpz", 2, [f"runtime.deepspeed={tmp_path}/hpz.json"])):
        server.run(ranks, *options, *own, f"output_dir={tmp_path / name}")
        run_dir = run_dir_of(tmp_path / name)
        assert run_dir is not None
        journals.append(Journal.read(run_dir / "journal.bin").records)
        assert result_bytes(tmp_path / name) == result_bytes(tmp_path / "one")
    assert len(journals[0]) == 3 and journals[0] == journals[1] == journals[2]


@pytest.mark.parametrize("cause", [OSError("Input/output error"), ValueError("not enough values to unpack")])
def test_what_is_wrong_on_one_rank_only_is_told_there(monkeypatch: pytest.MonkeyPatch, cause: Exception) -> None:
    """The others are reading still: to build the model in another way takes all of them."""

    def fail(config: ModelConfig, architecture: Any) -> None:
        raise ConfigError("readable weights", str(cause), "check model.id") from cause

    monkeypatch.setattr("zoscale.models.loading.load_model", fail)
    with pytest.raises(ConfigError) if isinstance(cause, OSError) else nullcontext():
        assert load_sharded(ModelConfig(id="x"), None, {}) is None


@pytest.mark.parametrize("files", [1, 2])
def test_a_tied_head_and_embedding_of_two_values_are_refused(tmp_path: Path, files: int) -> None:
    """Transformers parts them with a warning; under ZeRO-3 both would be the one that is read last."""

    def stored(name: str, head: torch.Tensor) -> Path:
        folder = changed(MODEL, tmp_path / name)
        whole = weights | {"lm_head.weight": head}
        if files == 1:
            save_file(whole, folder / "model.safetensors", {"format": "pt"})
            return folder
        (folder / "model.safetensors").unlink()
        parts = {name: f"{int(name == 'lm_head.weight')}.safetensors" for name in whole}
        for file in set(parts.values()):
            save_file({n: whole[n] for n in whole if parts[n] == file}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
        return folder

    weights = load_file(MODEL / "model.safetensors")
    embedding = weights["model.decoder.embed_tokens.weight"]
    other = stored("other", embedding + 1)
    with pytest.raises(ConfigError, match=r"decoder\.embed_tokens\.weight and lm_head\.weight: set model\.untie"):
        loaded(other)
    model = loaded(other, untie_head=True)
    assert torch.equal(model.lm_head.weight, embedding + 1)
    assert torch.equal(model.model.decoder.embed_tokens.weight, embedding)
    model = loaded(stored("same", embedding.clone()))
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_a_head_of_its_own_is_at_first_a_copy_of_the_embedding(tmp_path: Path) -> None:
    """Whichever of the two the checkpoint holds; in the type of the weights; refused where none is tied."""
    base = tiny.save_model("gpt2", tmp_path / "gpt2")
    weights = load_file(base / "model.safetensors")
    only_head = changed(base, tmp_path / "only_head", without="wte")
    renamed = {name: value for name, value in weights.items() if "wte" not in name}
    save_file(renamed | {"lm_head.weight": weights["transformer.wte.weight"]}, only_head / "model.safetensors")
    for folder in (base, only_head):
        model = loaded(folder, untie_head=True)
        head, embedding = model.lm_head.weight, model.transformer.wte.weight
        assert torch.equal(head, embedding) and head.data_ptr() != embedding.data_ptr()
        assert torch.equal(embedding, weights["transformer.wte.weight"])
        assert model.config.tie_word_embeddings is False
    config = ModelConfig(id=str(base), dtype="bfloat16", untie_head=True)
    assert load_model(config, read_model_config(config)).lm_head.weight.dtype == torch.bfloat16
    tied, own = (count_parameters(read_model_config(ModelConfig(id=str(base), untie_head=on))) for on in (False, True))
    assert own.total - tied.total == head.numel()
    with pytest.raises(ConfigError, match=r"one with a head of its own: leave model\.untie_head out"):
        read_model_config(ModelConfig(id=str(tiny.save_model("llama", tmp_path / "llama")), untie_head=True))
    with pytest.raises(ConfigError, match=r"random weights: set tie_word_embeddings: false in model\.config"):
        read_model_config(ModelConfig(config={"model_type": "gpt2"}, untie_head=True))


def test_missing_weights_end_a_run_on_every_rank(server: JobServer, tmp_path: Path) -> None:
    """Under ZeRO-3 over all ranks, where nobody reads all weights, and in shard groups, where one rank reads them."""
    less = changed(MODEL, tmp_path / "less", without=r"layers\.1\.fc1")
    for size in ("null", "2"):
        options = [f"model.id={less}", *SHORT_RUN, f"mesh.shard_size={size}", f"output_dir={tmp_path / size}"]
        text = server.run(4 if size == "2" else 2, *options, expect=2)
        assert "none for model.decoder.layers.1.fc1.bias and 1 others" in text


def test_only_the_head_of_the_bundled_model_is_trained_and_exported(server: JobServer, tmp_path: Path) -> None:
    """The same bits on one rank, on two and in shard groups; its whole model reloads in transformers alone."""
    options = [f"model.id={MODEL}", "model.untie_head=true", *HEAD, *SHORT_RUN]
    kinds = {"one": (1, "null"), "two": (2, "null"), "groups": (4, "2"), "replicas": (2, "1")}
    for kind, (ranks, size) in kinds.items():
        text = server.run(ranks, *options, f"mesh.shard_size={size}", f"output_dir={tmp_path / kind}")
        assert "MISSING" not in text and "in 1 tensors" in text
        assert result_bytes(tmp_path / kind) == result_bytes(tmp_path / "one")
    run_dir = run_dir_of(tmp_path / "two")
    assert run_dir is not None and export_command([str(run_dir), "--merge"]) == 0
    assert replay_command([str(run_dir)]) == 0
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for folder in (run_dir / "export/merged", run_dir / "adapter"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        embedding = model.model.decoder.embed_tokens.weight
        assert torch.equal(embedding, base.lm_head.weight), "it was frozen"
        assert not torch.equal(model.lm_head.weight, embedding)
        assert torch.equal(model.lm_head.weight, load_file(run_dir / "adapter/model.safetensors")["lm_head.weight"])


def test_an_adapter_of_an_untied_head_is_merged_into_it(server: JobServer, tmp_path: Path) -> None:
    options = [f"model.id={MODEL}", "model.untie_head=true", "adapter.target_modules=[lm_head]", *SHORT_RUN]
    server.run(2, *options, f"output_dir={tmp_path}")
    run_dir = run_dir_of(tmp_path)
    assert run_dir is not None and export_command([str(run_dir), "--merge"]) == 0
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export/merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    assert torch.equal(model.model.decoder.embed_tokens.weight, base.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)

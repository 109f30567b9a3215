"""`zoscale evaluate` and `zoscale export`: any checkpoint on any number of ranks; the result as others load it."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from jobs import FULL, SHORT, SIGN, JobServer, run_dir_of
from peft import PeftModel
from processes import ROOT, run, status_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from zoscale import cli
from zoscale.assembly import build_engine
from zoscale.config import parse
from zoscale.data.splits import part
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.loading import read_model_config
from zoscale.release.export import save_trained
from zoscale.release.publish import _write_merged as write_merged
from zoscale.release.run_record import RunRecord
from zoscale.run_directory import RunDirectory

MODEL = ROOT / "launch/tiny_opt/model"
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
KINDS = {
    "lora": [*SIGN, "optimizer.lr=1e-2", "train.steps=9", "train.eval_every=3", "data.num_dev=8", "checkpoint.every=4"],
    "full": [*FULL, "train.steps=3"],
    "pickles": [*SIGN, "train.steps=2", "model.allow_pickle=true"],
}
TASK = [
    "classification", "task.path=launch/tiny_opt/data", "task.template={sentence} It was",
    'task.candidates=[" terrible", " great"]', "data.num_validation=11", "model.dtype=float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(server: JobServer) -> dict[str, Path]:
    """Finished runs of two ranks by kind."""
    found = {}
    for kind, options in KINDS.items():
        server.run(2, *SHORT, *options, "data.num_validation=11", f"output_dir={server.folder / kind}")
        run_dir = run_dir_of(server.folder / kind)
        assert run_dir is not None
        found[kind] = run_dir
    return found


def summary(run_dir: Path) -> Any:
    return json.loads((run_dir / "summary.json").read_text())


def read(out: Path) -> dict[str, Any]:
    """The results and the predictions that an evaluation wrote."""
    results = json.loads((out / "results.json").read_text())
    rows = [json.loads(line) for line in (out / "classification.jsonl").read_text().splitlines()]
    return results["results"]["classification"] | {"rows": rows, "step": results["step"]}


def evaluate(server: JobServer, ranks: int, out: Path, *options: str) -> dict[str, Any]:
    server.run(ranks, "evaluate", *options, f"--out={out}")
    return read(out)


@pytest.fixture(scope="module")
def best(server: JobServer, runs: dict[str, Path]) -> Path:
    """The evaluation of the weights that were best on dev, on one rank."""
    evaluate(server, 1, server.folder / "best", f"--run={runs['lora']}")
    return server.folder / "best"


@pytest.fixture(scope="module")
def at_nine(server: JobServer, runs: dict[str, Path]) -> Path:
    """The run without checkpoints, its adapter that of the last step, rebuilt from the journal."""
    copy = Path(shutil.copytree(runs["lora"], server.folder / "at_nine"))
    shutil.rmtree(copy / "checkpoints")
    assert cli.main(["replay", str(copy), "--until", "9", "--out", str(server.folder / "nine")]) == 0
    shutil.copy(server.folder / "nine/adapter_model.safetensors", copy / "adapter")
    return copy


@pytest.fixture(scope="module")
def last(server: JobServer, at_nine: Path) -> Path:
    """The evaluation of the last step, to which the journal alone leads."""
    evaluate(server, 1, server.folder / "last", f"--run={at_nine}", "--checkpoint=last")
    return server.folder / "last"


def test_a_checkpoint_scores_as_it_did_in_the_run(best: Path, runs: dict[str, Path]) -> None:
    found, facts = read(best), summary(runs["lora"])
    expected = facts["validation"]["chosen"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert (found["accuracy"], found["count"]) == (expected["accuracy"], 11)
    assert found["step"] == facts["dev"]["best_step"] != 9, "not the last"
    assert [row["index"] for row in found["rows"]] == part(range(400), 11), "lines of the file"
    for row in found["rows"]:
        assert row["prompt"].endswith(" It was") and row["options"] == [" terrible", " great"]
        assert row["prediction"] == max((0, 1), key=row["scores"].__getitem__)
    assert sum(row["prediction"] == row["gold"] for row in found["rows"]) / 11 == found["accuracy"]


def test_readme_command_gives_the_same_predictions_on_two_ranks(
    best: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    """The line as the README has it, with two processes; every prediction is the same, bit for bit."""
    lines = (ROOT / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("accelerate launch") and "evaluate" in line]
    words = ["--num_processes", "2", *line.partition("#")[0].split()[2:]]
    words = [{"RUN": str(runs["lora"]), "DIR": str(tmp_path / "out")}.get(word, word) for word in words]
    text = run([sys.executable, "-m", "accelerate.commands.launch", *words]).stdout
    assert "classification validation: accuracy " in text
    assert (tmp_path / "out/classification.jsonl").read_bytes() == (best / "classification.jsonl").read_bytes()
    assert read(tmp_path / "out") == read(best)


@torch.no_grad()
def test_scores_are_what_transformers_gives(server: JobServer, tmp_path: Path) -> None:
    """A Hugging Face model without a run; the options have one token each."""
    rows = evaluate(server, 1, tmp_path / "out", f"--model={MODEL}", *TASK)["rows"]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for row in rows:
        logprobs = model(torch.tensor([tokenizer(row["prompt"]).input_ids])).logits[0, -1].log_softmax(-1)
        for option, score in zip(row["options"], row["scores"], strict=True):
            (token,) = tokenizer(option, add_special_tokens=False).input_ids
            assert score == pytest.approx(float(logprobs[token]), abs=1e-5)


def test_predictions_with_demonstrations_have_the_numbers_of_their_lines(server: JobServer, tmp_path: Path) -> None:
    """Those of dev, which is cut from the training split, the order in which they were drawn."""
    lines = (ROOT / "launch/tiny_opt/data/validation.jsonl").read_text().splitlines()
    options = (f"--model={MODEL}", *TASK, "data.num_demonstrations=2", "data.num_dev=3")
    rows = evaluate(server, 1, tmp_path / "validation", *options)["rows"]
    assert [row["index"] for row in rows] == part(range(len(lines)), 11)
    assert all(row["prompt"].endswith(f"{json.loads(lines[row['index']])['sentence']} It was") for row in rows)
    rows = evaluate(server, 1, tmp_path / "dev", *options, "--split=dev")["rows"]
    assert [row["index"] for row in rows] == [0, 1, 2]


def test_checkpoints_of_a_run(
    server: JobServer, best: Path, at_nine: Path, last: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    """By name; the last step; and the best one where its checkpoint is gone."""
    options = (f"--run={runs['lora']}", "--checkpoint=step_00000004")
    assert evaluate(server, 1, tmp_path / "4", *options)["step"] == 4
    expected = summary(at_nine)["validation"]["final"]["loss"]
    assert read(last)["step"] == 9 and read(last)["loss"] == pytest.approx(expected, rel=1e-6)
    assert evaluate(server, 1, tmp_path / "best", f"--run={at_nine}") == read(best) != read(last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model=/nowhere", "sst2"], "/nowhere"),
        ([f"--model={MODEL}", "sst3"], "sst2"),
        ([f"--model={MODEL}", "sst2", "--checkpoint=last"], "--run with --checkpoint"),
        (["--run=README.md"], "the folder of a run"),
        (["--run=RUN", "--checkpoint=nowhere"], "step_00000004, step_00000008"),
        (["--run=RUN", "--checkpoint=/nowhere/at/all"], "step_00000004, step_00000008"),
        (["--run=RUN", "optimizer.lr=3"], "with --run only options of task, data"),
        (["--run=RUN", "--split=dev", "data.num_dev=0"], "examples in split dev"),
        ([f"--model={MODEL}", "sst2", "task.name=completion"], "task sst2, as named"),
        ([f"--model={MODEL}", "sst2", "model.id=another"], "got model.id=another: leave it out"),
        ([f"--model={MODEL}", "sst2", "adapter.r=4"], "got adapter.r=4: leave it out"),
        ([f"--model={MODEL}", "sst2", "--split=dev", "seed=-1"], "seed to be at least 0"),
    ],
)  # fmt: skip
def test_mistakes_of_an_evaluation(
    options: list[str], message: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused("evaluate", *[option.replace("RUN", str(runs["lora"])) for option in options], capsys=capsys).count(
        message
    )


def test_what_would_fail_after_the_work_fails_before_it(
    server: JobServer, runs: dict[str, Path], tmp_path: Path
) -> None:
    """A folder that is a file; a configuration that was edited, with which the journal gives other weights."""
    (tmp_path / "file").write_text("")
    text = server.run(1, "evaluate", f"--run={runs['lora']}", f"--out={tmp_path / 'file'}", expect=2)
    assert "File exists" in text and "accuracy" not in text
    copy = Path(shutil.copytree(runs["lora"], tmp_path / "run"))
    config = (copy / "config.yaml").read_text()
    assert "tau: 0.01" in config
    (copy / "config.yaml").write_text(config.replace("tau: 0.01", "tau: 0.02"))
    text = server.run(1, "evaluate", f"--run={copy}", expect=2)
    assert f"estimator.tau=0.01 in {copy}/config.yaml, as trained, got 0.02: restore the file" in text


def test_ranks_that_evaluate_something_else_are_refused(server: JobServer, tmp_path: Path) -> None:
    command = ["evaluate", f"--model={MODEL}", *TASK]
    text = server.run_differing([*command, f"--out={tmp_path / 'out'}"], [*command, "data.num_validation=12"])
    assert "expected the same data.num_validation on all ranks, got 11 on rank 0 and 12 on rank 1" in text
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_elsewhere_is_to_be_named(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run has it as a relative path, and the command is given in another folder."""
    run_dir = str(runs["lora"])
    monkeypatch.chdir(tmp_path)
    for words in (["evaluate", "--run", run_dir], ["export", run_dir, "--merge"], ["replay", run_dir]):
        text = refused(*words, capsys=capsys)
        assert f"no folder {tmp_path}/launch/tiny_opt/model: name it where it is now with --base" in text


def test_a_run_of_pickles_loads_only_the_model_that_the_user_names(
    server: JobServer, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = str(runs["pickles"])
    for words in (["evaluate", "--run", run_dir], ["export", run_dir, "--merge"], ["replay", run_dir]):
        assert "name a model that you trust with --base" in refused(*words, capsys=capsys)
    named = ("--base", str(MODEL))
    assert evaluate(server, 1, tmp_path / "scores", "--run", run_dir, *named)["step"] == 2
    assert cli.main(["export", run_dir, "--merge", "--out", str(tmp_path / "merged"), *named]) == 0
    assert cli.main(["replay", run_dir, *named]) == 0


def test_an_adapter_is_exported_without_its_base_model(runs: dict[str, Path], tmp_path: Path) -> None:
    """The run says that the base is of pickles, and names one that is nowhere."""
    copy = Path(shutil.copytree(runs["pickles"], tmp_path / "run"))
    config = (copy / "config.yaml").read_text()
    assert "allow_pickle: true" in config and "id: launch/tiny_opt/model" in config
    (copy / "config.yaml").write_text(config.replace("id: launch/tiny_opt/model", "id: someone/pickles"))
    assert cli.main(["export", str(copy), "--adapter", "--out", str(tmp_path / "out")]) == 0
    options = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == "someone/pickles"


def test_a_full_disk_is_told_from_a_mistake(
    server: JobServer, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 74, and nothing half written is left of an export."""
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/classification.jsonl.tmp").symlink_to("/dev/full")
    text = server.run(1, "evaluate", f"--model={MODEL}", *TASK, f"--out={tmp_path / 'scores'}", expect=74)
    assert "No space left on device: make room on the disk or mend it, and run the same command again" in text
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))"
    out = tmp_path / "exports/merged"
    text = server.run(1, "export", str(runs["lora"]), "--merge", f"--out={out}", expect=74, plant=small)
    assert f"{out} could not be written: " in text and "make room on the disk" in text
    assert not list(out.parent.iterdir())
    text = refused("export", str(runs["lora"]), "--adapter", "--out", "/dev/null/x", capsys=capsys)
    assert "File exists: '/dev/null'" in text and text.endswith(": check the path\n")


# --- export


@torch.no_grad()
def test_merged_model_is_base_and_adapter(at_nine: Path, tmp_path: Path) -> None:
    out = tmp_path / "sentiment"
    (tmp_path / "sentiment.tmp").mkdir()
    assert cli.main(["export", str(at_nine), "--merge", "--out", str(out)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    plain = base(TOKENS).logits
    adapted = PeftModel.from_pretrained(base, at_nine / "adapter")(TOKENS).logits
    assert (adapted - plain).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(merged(TOKENS).logits, adapted, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out)("the film").input_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sentiment", "sentiment.tmp"], "one is the user's"


def merged_and_trained(folder: Path, *options: str) -> tuple[Any, Any]:
    """A model with an adapter of random values merged into it, and the model that has this adapter."""
    task = ["task.name=classification", f"task.path={MODEL.parent / 'data'}", *TASK[2:]]
    config = parse([*task, *options], TABLES, DEFAULTS)
    engine = build_engine(config, read_model_config(config.model), None)
    for shard in engine.shards:
        shard.truth.normal_(std=0.1, generator=torch.Generator().manual_seed(shard.spec.id))
        shard.publish()
    save_trained(engine, folder / "adapter")
    write_merged(RunRecord(RunDirectory(folder), config), folder / "merged", "float32")
    return AutoModelForCausalLM.from_pretrained(folder / "merged"), engine.model.eval()


@torch.no_grad()
@pytest.mark.parametrize("targets", ["[embed_tokens]", "[q_proj,lm_head]", "[embed_tokens,lm_head]"])
def test_an_adapter_of_one_end_of_a_tied_model_is_merged_there_alone(targets: str, tmp_path: Path) -> None:
    merged, trained = merged_and_trained(tmp_path, f"model.id={MODEL}", f"adapter.target_modules={targets}")
    assert merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight
    torch.testing.assert_close(merged(TOKENS).logits, trained(TOKENS).logits, rtol=1e-4, atol=1e-4)


def saved_model(folder: Path, kind: str, **options: Any) -> list[str]:
    """A small model with random weights in a folder, as options of a run."""
    sizes = {"vocab_size": 211, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48} | options
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
    return [f"model.id={folder}", f"model.tokenizer={MODEL}"]


@torch.no_grad()
def test_adapters_that_change_nothing_are_not_merged(tmp_path: Path) -> None:
    """Mamba's code reads the weights of `dt_proj` without a call, so that an adapter of it has no effect."""
    model = saved_model(tmp_path / "base", "mamba", state_size=4)
    merged, trained = merged_and_trained(tmp_path, *model, "adapter.target_modules=[dt_proj,in_proj]")
    torch.testing.assert_close(merged(TOKENS).logits, trained(TOKENS).logits, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(merged.backbone.layers[0].mixer.dt_proj.weight, base.backbone.layers[0].mixer.dt_proj.weight)
    assert (merged(TOKENS).logits - base(TOKENS).logits).abs().max() > 1e-2, "the other one does something"


@torch.no_grad()
@pytest.mark.parametrize("targets", ["[v_proj]", "[embed_tokens]", "[in_proj] adapter.modules_to_save=[lm_head]"])
def test_layers_that_share_their_weights_are_parted_to_merge_adapters(targets: str, tmp_path: Path) -> None:
    """Zamba's attention is in several places, with an adapter in each; it is tied where embedding and head are."""
    kinds = ["mamba", "hybrid", "hybrid"]
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "n_mamba_heads": 2}
    sizes = {"layers_block_type": kinds, "num_hidden_layers": 3, "initializer_range": 0.2, **heads}
    model = saved_model(tmp_path / "base", "zamba", **sizes)
    merged, trained = merged_and_trained(tmp_path, *model, *f"adapter.target_modules={targets}".split())
    torch.testing.assert_close(merged(TOKENS).logits, trained(TOKENS).logits, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (merged(TOKENS).logits - base(TOKENS).logits).abs().max() > 1e-2, "the adapter does something"


@torch.no_grad()
def test_routers_that_are_trained_as_a_whole_are_saved_with_their_buffers(tmp_path: Path) -> None:
    """Which PEFT asks for: the bias of DeepSeek's routers is no parameter."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2}
    others = {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "initializer_range": 0.2}
    model = saved_model(tmp_path / "base", "dots1", **heads, **experts, **others)
    options = ["adapter.target_modules=[q_proj]", "adapter.modules_to_save=[gate]"]
    merged, trained = merged_and_trained(tmp_path, *model, *options)
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in saved if ".gate." in name} == {"weight", "e_score_correction_bias"}
    torch.testing.assert_close(merged(TOKENS).logits, trained(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_a_merged_model_is_where_a_longer_run_begins(
    server: JobServer, at_nine: Path, last: Path, tmp_path: Path
) -> None:
    """As the FAQ has it; on four ranks, of which two have no micro-batch of their own, as the run says."""
    assert cli.main(["export", str(at_nine), "--merge", "--out", str(tmp_path / "begun")]) == 0
    options = [f"model.id={tmp_path / 'begun'}", *SIGN, "train.steps=2", "data.num_validation=11"]
    text = server.run(4, *SHORT, *options, f"output_dir={tmp_path / 'runs'}")
    run_dir = run_dir_of(tmp_path / "runs")
    assert run_dir is not None
    before = summary(run_dir)["validation"]["before"]
    assert before["accuracy"] == read(last)["accuracy"]
    assert before["loss"] == pytest.approx(read(last)["loss"], rel=1e-5)
    what = "micro-batches of a step: 2; 2 of 4 ranks have none of their own and repeat what others compute"
    assert f"repeated work: {what}. Try data.micro_batch_size=1\n" in text


@torch.no_grad()
def test_adapter_loads_as_its_card_says(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the card as it stands, in the folder where the export lies."""
    out = tmp_path / "sentiment"
    for _ in range(2):  # an earlier export is replaced
        assert cli.main(["export", str(runs["lora"]), "--adapter", "--out", str(out), "--base", str(MODEL)]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, runs["lora"] / "adapter")(TOKENS).logits
    assert torch.equal(names["model"].eval()(TOKENS).logits, expected)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "zoscale.json",
    ]  # fmt: skip


def test_all_weights_are_exported_as_they_are(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(runs["full"]), "--merge"]) == 0
    out = runs["full"] / "export/merged"
    assert str(out) in capsys.readouterr().out
    weights, saved = load_file(out / "model.safetensors"), load_file(runs["full"] / "adapter/model.safetensors")
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    half = runs["full"].parent / "half"
    assert cli.main(["export", str(runs["full"]), "--merge", "--dtype", "bfloat16", "--out", str(half)]) == 0
    rounded = load_file(half / "model.safetensors")
    assert rounded.keys() == weights.keys()
    assert all(torch.equal(rounded[name], saved[name].bfloat16()) for name in rounded)
    assert "one that trained all weights" in refused("export", str(runs["full"]), "--adapter", capsys=capsys)
    assert "model" in ModelCard.load(out / "README.md").content


def test_card_is_written_from_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "sentiment"
    assert cli.main(["export", str(runs["lora"]), "--adapter", "--out", str(out), "--base", "someone/tiny-opt"]) == 0
    card, facts = ModelCard.load(out / "README.md"), summary(runs["lora"])
    assert card.data.base_model == "someone/tiny-opt"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny-opt"
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert {"zoscale", "lora", "jaguar_sign_sgd"} <= set(card.data.tags or [])
    assert "An adapter (lora) for [someone/tiny-opt]" in card.text
    assert card.data.metrics == ["accuracy", "calibrated_accuracy", "loss", "lm_loss"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert results["accuracy"] == pytest.approx(facts["validation"]["chosen"]["accuracy"], abs=1e-6)
    for fact in (facts["commit"], facts["config_hash"], f"{facts['forwards']}", f"{facts['dev']['best_step']} of 9"):
        assert fact in card.text
    dev = [json.loads(line) for line in (runs["lora"] / "evaluations.jsonl").read_text().splitlines()]
    for row in dev:
        if row["name"] == "dev":
            assert f"| {row['step']} | {row['result']['accuracy']:.4f} |" in card.text
    assert str(ROOT) not in card.content and "mlflow" not in card.text.partition("Configuration")[2], "no places"


def test_push_through_the_hub_s_own_client(runs: dict[str, Path], tmp_path: Path) -> None:
    hub = FakeHub()
    command = [sys.executable, "-m", "zoscale", "export", str(runs["lora"]), "--adapter", "--out", str(tmp_path / "x")]
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path)}
    text = run([*command, "--push", "me/tiny", "--private", "--base", "someone/tiny-opt"], **online).stdout
    hub.shutdown()
    assert "hf_secret" not in text and f"pushed: {hub.url}/me/tiny/commit/abc" in text
    assert hub.created["name"] == "tiny"
    assert hub.created.get("visibility") == "private" or hub.created.get("private"), "the library's old way and its new"
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    tokens = {path.partition("?")[0]: token for _, path, token in hub.requests}
    assert tokens["/api/repos/create"] == tokens["/api/models/me/tiny/commit/main"] == "Bearer hf_secret"


def test_mistakes_of_an_export(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = str(runs["lora"])
    (tmp_path / "file").write_text("mine")
    for options, message in (
        ([str(tmp_path), "--merge"], "the folder of a run"),
        ([lora, "--merge", "--out", str(tmp_path)], "a new folder, or one of an earlier export"),
        ([lora, "--adapter", "--out", str(runs["lora"] / "adapter")], "a new folder, or one of an earlier export"),
        ([lora, "--adapter", "--out", "."], "got ., the working directory or one around it"),
        ([lora, "--adapter", "--push", "me/tiny"], "a base model on the hub"),
        ([lora, "--adapter", "--push", "me/tiny/x"], "me/tiny/x"),
        ([lora, "--merge", "--push", "me/tiny"], "offline mode"),
        ([lora, "--merge", "--private"], "--push ID with --private"),
    ):
        assert message in refused("export", *options, capsys=capsys)
    assert (tmp_path / "file").read_text() == "mine"
    copy = Path(shutil.copytree(runs["lora"], tmp_path / "run"))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    assert "name a model that you trust with --base" in refused("export", str(copy), "--merge", capsys=capsys)
    virtual = "adapter: {peft_type: prompt_tuning, num_virtual_tokens: 3}"
    config.write_text(re.sub(r"(?m)^adapter:\n(  .*\n)+", f"{virtual}\n", (runs["lora"] / "config.yaml").read_text()))
    assert "weights can take up, got prompt_tuning" in refused("export", str(copy), "--merge", capsys=capsys)
    shutil.copy(runs["lora"] / "config.yaml", config)
    weights = copy / "adapter/adapter_model.safetensors"
    save_file({name: value / 0 for name, value in load_file(weights).items()}, weights)
    text = refused("export", str(copy), "--merge", capsys=capsys)
    assert "that PEFT can merge, got NaNs detected" in text and "export it with --adapter" in text
    (copy / "summary.json").unlink()
    assert "zoscale replay" in refused("export", str(copy), "--merge", capsys=capsys)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter/adapter_model.safetensors", b""),
        ("adapter/adapter_model.safetensors", None),
        ("adapter/adapter_config.json", None),
        ("adapter/adapter_config.json", b"[1]"),
        ("adapter/adapter_config.json", b'{"r": 8}'),
        ("summary.json", b'{"steps": 9}'),
    ],
)
def test_what_is_damaged_is_not_exported(
    name: str, damage: bytes | None, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty, cut short (None) or something else: both kinds of export name the file and write nothing."""
    copy = Path(shutil.copytree(runs["lora"], tmp_path / "run"))
    file = copy / name
    file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    for kind in ("--adapter", "--merge"):
        text = refused("export", str(copy), kind, capsys=capsys)
        assert f"{name}, got" in text and ("zoscale replay" in text or "finished anew" in text)
    assert not (copy / "export").exists()


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_lm_evaluation_harness_scores_the_export(at_nine: Path, last: Path, tmp_path: Path) -> None:
    """The merged model under EleutherAI's harness gives every option the score that `zoscale evaluate` gives."""
    data = (ROOT / "launch/tiny_opt/data/validation.jsonl").read_text().splitlines()
    places = part(range(len(data)), 11)
    (tmp_path / "validation.jsonl").write_text("".join(f"{data[place]}\n" for place in places))
    (tmp_path / "sentiment.yaml").write_text(
        f"task: sentiment\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/validation.jsonl}}}}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{sentence}} It was"\ndoc_to_target: label\n'
        "doc_to_choice: [terrible, great]\nmetric_list: [{metric: acc}]\n"
    )
    assert cli.main(["export", str(at_nine), "--merge", "--out", str(tmp_path / "merged")]) == 0
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("lm_eval run")]
    words = (
        line.partition("#")[0].replace("DIR", f"{tmp_path}/merged,dtype=float32").replace("...", "sentiment").split()
    )
    more = ["--include_path", str(tmp_path), "--device", "cpu", "--log_samples", "--output_path", f"{tmp_path}/theirs"]
    run([sys.executable, "-m", *words, *more], timeout=200)
    (results,) = (tmp_path / "theirs").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["sentiment"]["acc,none"] == read(last)["accuracy"]
    (samples,) = (tmp_path / "theirs").rglob("samples_*.jsonl")
    theirs = {
        sample["doc_id"]: sample["filtered_resps"] for sample in map(json.loads, samples.read_text().splitlines())
    }
    assert sorted(row["index"] for row in read(last)["rows"]) == places, "lines of the file"
    for row in read(last)["rows"]:
        responses = theirs[places.index(row["index"])]
        assert [float(response[0]) for response in responses] == pytest.approx(row["scores"], abs=1e-4)


def refused(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with status 2."""
    assert status_of(*argv) == 2
    return capsys.readouterr().err

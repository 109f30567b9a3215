"""Every task of the table on its small sample: prompts, options, scores, demonstrations, objectives, generation."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from processes import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from zoscale.assembly import check_methods, find_objective
from zoscale.config import ConfigError, DataConfig, RunConfig, parse
from zoscale.data.batch import MicroBatch
from zoscale.data.splits import Encoder, Splits, evaluation_batches
from zoscale.engine import ZeroOrderEngine
from zoscale.evaluate import Evaluation, evaluate
from zoscale.mesh import Mesh
from zoscale.methods import DEFAULTS, TABLES
from zoscale.metrics import calibrated_accuracy, exact_match, f1, last_f1, macro_f1, normalise, score
from zoscale.models.answers import AnswerModel
from zoscale.models.generation import Generator
from zoscale.models.loading import add_adapter
from zoscale.objectives import ChosenLoss, GeneratedLoss
from zoscale.recovery.evaluation_log import EvaluationLog
from zoscale.run_report import skipped
from zoscale.tasks import TASKS, Completion, Example, Task

torch.set_num_threads(1)

SAMPLES = ROOT / "tests/samples"
MODEL = ROOT / "launch/tiny_opt/model"
NAMED = [name for name in TASKS if name != "classification"]
GENERATED = ("squad", "drop")

# The first training record of each sample: prompt (as MeZO's code has it, arXiv 2305.17333), options, gold.
FIRST: dict[str, tuple[str, tuple[str, ...], int]] = {
    "sst2": ("a warm and funny story It was", (" terrible", " great"), 1),
    "rte": (
        'The ship left the harbour on Monday.\nDoes this mean that "The ship left on Monday." is true? Yes or No?\n',
        ("Yes", "No"),
        0,
    ),
    "cb": (
        'Suppose Tom said that he had won. Can we infer that "Tom had won"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        2,
    ),
    "boolq": ("The moon is smaller than the earth. Is the moon larger than the earth?\n", ("No", "Yes"), 0),
    "wsc": (
        "Mark told Pete many lies about himself.\n"
        'In the previous sentence, does the pronoun "himself" refer to Mark? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "wic": (
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "They sat on the bank.\nShe works at a bank.\n",
        ("No", "Yes"),
        0,
    ),
    "multirc": (
        "Ben bought a red kite. It broke on Friday.\nQuestion: What broke?\n"
        'I found this answer "The kite". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "copa": (
        "The man broke his toe because",
        (" he got a hole in his sock.", " he dropped a hammer on his foot."),
        1,
    ),
    "record": (
        "Lena Fox met Omar in Rome.\n- The two signed a treaty\n-",
        tuple(f" After the meeting {name} flew home to Cairo" for name in ("Lena Fox", "Omar", "Rome")),
        1,
    ),
    "winogrande": ("Ian likes soup more than Dennis so", (" Ian ate two bowls.", " Dennis ate two bowls."), 0),
    "multiple_choice": (
        "Question: What melts in the sun?\nAnswer:",
        (" a stone", " ice", " the wind"),
        1,
    ),
    "squad": (
        "Title: Rivers\nContext: The Elbe flows through Dresden.\n"
        "Question: Which river flows through Dresden?\nAnswer:",
        (" The Elbe\n",),
        0,
    ),
    "drop": ("Passage: They scored 3 goals, then 2.\nQuestion: How many goals in all?\nAnswer:", (" 5\n",), 0),
    "completion": ("the film was", (" good .",), 0),
}


def task_of(name: str, **options: Any) -> Task:
    return TASKS[name](path=str(SAMPLES / name), **options)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_the_objective_is_the_task_s_unless_another_is_given() -> None:
    def objective(*argv: str) -> str:
        return parse(["model.id=x", *argv], TABLES, DEFAULTS).objective

    lm = {"copa", "record", "winogrande", "multiple_choice", "squad", "drop"}
    named = [name for name in TASKS if name not in ("classification", "completion")]
    assert {name for name in named if objective(f"task.name={name}") == "lm"} == lm
    assert objective() == objective("task.name=copa", "objective=classification") == "classification"
    config = parse(["model.id=x", "task.name=squad"], TABLES, DEFAULTS)
    assert type(config).from_dict(config.to_dict(), TABLES, DEFAULTS) == config
    assert find_objective(config.objective, task_of("squad"))


def test_every_task_has_a_sample_and_a_known_prompt() -> None:
    assert set(NAMED) == set(FIRST) == {path.name for path in SAMPLES.iterdir()}


@pytest.mark.parametrize("name", NAMED)
def test_prompts_are_those_of_the_paper(name: str) -> None:
    example = task_of(name).examples("train")[0]
    assert (example.prompt, example.options, example.gold) == FIRST[name]
    assert (example.max_new_tokens > 0) == (name in GENERATED)


@pytest.mark.parametrize("name", NAMED)
def test_scores_are_those_of_the_options_one_by_one(name: str, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Options of any number and length per record: mean log-probability per token, each row fed alone."""
    task, encoder = task_of(name), Encoder(tokenizer, 512)
    examples = task.examples("validation")
    names = tuple(metric for metric in task.metrics if metric not in ("f1", "exact_match"))
    found = evaluate(AnswerModel(model, model), evaluation_batches(examples, encoder, 2), Mesh(), names)
    assert found.count == len(examples) and list(found.metrics) == list(names)
    right, tokens, gold_logprob = 0, 0, 0.0
    for example in examples:
        logprobs = [naive(model, tokenizer, example.prompt, option) for option in example.options]
        means = [sum(values) / len(values) for values in logprobs]
        right += example.labels[means.index(max(means))] in example.accepted
        tokens += len(logprobs[example.gold])
        gold_logprob += sum(logprobs[example.gold])
    assert found.metrics["lm_loss"] == pytest.approx(-gold_logprob / tokens, abs=1e-4)
    if "accuracy" in found.metrics:
        assert found.metrics["accuracy"] == right / len(examples)


def test_f1_over_all_answers(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Of what the options' scores choose, by scikit-learn's formulas; the same however the examples are batched."""
    for name, metric, wanted in (("multirc", "f1a", last_of_two), ("cb", "macro_f1", mean_of_all)):
        task, encoder = task_of(name), Encoder(tokenizer, 512)
        examples = [*task.examples("train"), *task.examples("validation")]
        pairs = []
        for example in examples:
            means = [statistics.fmean(naive(model, tokenizer, example.prompt, option)) for option in example.options]
            pairs.append((means.index(max(means)), example.gold))
        for size in (1, 4):
            batches = evaluation_batches(examples, encoder, size)
            found = evaluate(AnswerModel(model, model), batches, Mesh(), (metric, "accuracy"))
            assert found.metrics[metric] == pytest.approx(wanted(pairs)), name
            assert found.metrics["accuracy"] == statistics.fmean(chosen == right for chosen, right in pairs)


def last_of_two(pairs: list[tuple[int, int]]) -> float:
    hits = sum(chosen == right == 1 for chosen, right in pairs)
    wrong = sum(chosen != right for chosen, right in pairs)
    return hits / (hits + wrong / 2) if hits else 0.0


def mean_of_all(pairs: list[tuple[int, int]]) -> float:
    labels = {label for pair in pairs for label in pair}
    return statistics.fmean(last_of_two([(int(a == label), int(b == label)) for a, b in pairs]) for label in labels)


@pytest.mark.parametrize("size", [1, 4])
def test_accuracy_without_the_liking_for_a_word(tokenizer: PreTrainedTokenizerBase, model: Any, size: int) -> None:
    """By NumPy on every option's score; the same however the examples are batched."""
    task = task_of("cb")
    examples = [*task.examples("train"), *task.examples("validation")]
    scores = np.array(
        [[statistics.fmean(naive(model, tokenizer, e.prompt, option)) for option in e.options] for e in examples]
    )
    wanted = ((scores - scores.mean(0)).argmax(1) == [example.gold for example in examples]).mean()
    batches = evaluation_batches(examples, Encoder(tokenizer, 512), size)
    found = evaluate(AnswerModel(model, model), batches, Mesh(), ("loss", "calibrated_accuracy", "accuracy"))
    assert list(found.metrics) == ["loss", "calibrated_accuracy", "accuracy"]
    assert found.metrics["calibrated_accuracy"] == wanted
    assert calibrated_accuracy([([0.0, 5.0], 0), ([-1.0, 9.0], 1), ([0.5, 4.0], 0)]) == 1.0


def test_labels_that_differ_cannot_be_calibrated(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    batches = evaluation_batches(task_of("copa").examples("train"), Encoder(tokenizer, 512), 1)
    with pytest.raises(ValueError, match="the same labels for calibrated_accuracy, got"):
        evaluate(AnswerModel(model, model), batches, Mesh(), ("calibrated_accuracy",))


def test_tallies() -> None:
    tally = [(2, 4, 3), (0, 1, 2), (0, 0, 0)]
    assert macro_f1(tally) == pytest.approx((4 / 7 + 0) / 2), "a label that never occurs does not count"
    assert last_f1(tally[:1]) == pytest.approx(4 / 7) and last_f1(tally) == 0


@torch.no_grad()
def naive(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> list[float]:
    """Log-probability of each token of the answer."""
    before, full = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    start = next((i for i, (a, b) in enumerate(zip(before, full, strict=False)) if a != b), len(before))
    logprobs = model(torch.tensor([full])).logits[0].log_softmax(-1)
    return [float(logprobs[place - 1, full[place]]) for place in range(start, len(full))]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rte", {"label": -1}, "'label' with one of the labels"),
        ("copa", {"question": "why"}, "cause or effect"),
        ("copa", {"label": 2}, "'label' that is 0 or 1"),
        ("record", {"query": "no gap"}, "a query with @placeholder"),
        ("record", {"entities": "Omar"}, "a list of texts"),
        ("winogrande", {"answer": ""}, "'answer' that is 1 or 2"),
        ("winogrande", {"sentence": "no blank"}, "a sentence with _"),
        ("multiple_choice", {"choices": "ice"}, "'choices' that is a list of texts"),
        ("multiple_choice", {"answer": 3}, "an option, or its number from 0 to 2, got 3"),
        ("multiple_choice", {"answer": -1}, "from 0 to 2, got -1"),
        ("multiple_choice", {"answer": "steam"}, "from 0 to 2, got 'steam'"),
        ("multiple_choice", {"answer": None}, "a value in field 'answer', got none"),
        ("copa", {"premise": None}, "a value in field 'premise', got none"),
        ("rte", {"premise": None}, "a value in field 'premise', got none"),
        ("completion", {"answer": None}, "a value in field 'answer', got none"),
        ("squad", {"answers": {"text": []}}, "at least one answer"),
        ("drop", {"answers_spans": ["5"]}, "a mapping with a list 'spans'"),
    ],
)
def test_malformed_records_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    record = json.loads((SAMPLES / name / "train.jsonl").read_text().splitlines()[0])
    with pytest.raises(ConfigError, match=message):
        task_of(name).example(record | change)
    with pytest.raises(ConfigError, match="field"):
        task_of(name).example({})


def first_record(name: str) -> dict[str, Any]:
    return dict(json.loads((SAMPLES / name / "train.jsonl").read_text().splitlines()[0]))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("winogrande", {"sentence": "_ likes soup."}),
        ("winogrande", {"sentence": " _ likes soup."}),
        ("record", {"answers": ["Nobody"]}),
        ("record", {"answers": []}),
        ("record", {"entities": ["Omar", "Omar"]}),
        ("multiple_choice", {"choices": ["ice", "ice"]}),
        ("winogrande", {"option2": "trophy", "option1": "trophy"}),
        ("multiple_choice", {"choices": []}),
        ("multiple_choice", {"choices": ["ice"], "answer": None}),
    ],
)
def test_records_that_ask_nothing_are_left_out_and_counted(
    name: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One among sound ones leaves the others; alone it is an error; a malformed one is named by its number."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def records(*changes: dict[str, Any]) -> Task:
        rows = [json.dumps(first_record(name) | own) for own in changes]
        (tmp_path / "train.jsonl").write_text("\n".join(rows))
        return TASKS[name](path=str(tmp_path))  # type: ignore[call-arg]

    task = records({}, change, {})
    assert task.examples("train") == 2 * [task.example(first_record(name))]
    assert task.num_skipped == {"train": 1}
    assert skipped(task) == ["records that leave the task nothing to ask, left out: 1 of train"]
    with pytest.raises(ConfigError, match="an example in split 'train', got 2 records that ask nothing"):
        records(change, change).examples("train")
    row = {key: value for key, value in first_record(name).items() if not key.startswith("answer")}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=r"records with a field 'answers?', got .* \(record 1 of train\)"):
        TASKS[name](path=str(tmp_path)).examples("train")  # type: ignore[call-arg]


def test_nothing_is_told_where_every_record_asks_something() -> None:
    task = task_of("record")
    assert len(task.examples("train")) == 3 and not skipped(task)


def test_winogrande_is_the_debiased_part_unless_another_is_named() -> None:
    assert task_of("winogrande").source.subset == "winogrande_debiased", "as MeZO's code loads"
    assert task_of("winogrande", subset="winogrande_s").source.subset == "winogrande_s"


@pytest.mark.parametrize(
    ("choice", "option"),
    [
        ("TV was on.", " tv was on."),
        ("I opened my umbrella.", " I opened my umbrella."),
        ("I'm late.", " i'm late."),
        ("The USA won.", " the USA won."),
        ("Rain", " rain"),
    ],
)
def test_the_first_word_of_a_copa_choice_is_in_lower_case(choice: str, option: str) -> None:
    """All of it, but I, as in MeZO's code."""
    example = task_of("copa").example(first_record("copa") | {"choice1": choice})
    assert example is not None and example.options[0] == option


def test_a_continuation_names_the_option() -> None:
    """Else the model could not tell the options apart, and the losses of all would be equal."""
    task = task_of("multiple_choice", continuation=" yes")
    with pytest.raises(ConfigError, match=r"a task.continuation with .option. in it"):
        task.example({"question": "?", "choices": ["ice", "snow"], "answer": 0})


def test_options_and_answers_of_your_own_records() -> None:
    """The answer as a number, a number in a text, or the option itself, which a text is first; equal options once."""
    task = task_of("multiple_choice", template="{ctx}:", continuation="\n{option} ({ctx})", options="ends", answer="y")
    for answer, gold in ((1, 1), ("1", 1), ("b", 1), ("a", 0)):
        example = task.example({"ctx": "x", "ends": ["a", "b", "c"], "y": answer})
        assert example == Example("x:", ("\na (x)", "\nb (x)", "\nc (x)"), gold, labels=("a", "b", "c"))
    for answer, label in (("2", "2"), (2, "0"), (0, "1")):
        example = task.example({"ctx": "x", "ends": ["1", "2", "0"], "y": answer})
        assert example is not None and example.accepted == (label,)
    example = task.example({"ctx": "x", "ends": ["a", "a", "b"], "y": 2})
    assert example is not None and (example.labels, example.gold) == (("a", "b"), 1)


@pytest.mark.parametrize(
    ("answer", "accepted", "word_f1", "exact"),
    [
        ("The  Cat!", ["a cat"], 1.0, 1.0),
        ("cat sat", ["the cat"], 2 / 3, 0.0),
        ("red red cat", ["red cat", "dog"], 4 / 5, 0.0),
        ("", ["cat"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
        ("dog", ["cat"], 0.0, 0.0),
    ],
)
def test_f1_and_exact_match(answer: str, accepted: list[str], word_f1: float, exact: float) -> None:
    """By hand, after lower case and without punctuation and articles; the best of the accepted answers."""
    assert f1(answer, accepted) == pytest.approx(word_f1)
    assert exact_match(answer, accepted) == exact
    assert normalise("An  Owl's, the theory") == "owls theory"


def test_demonstrations_stand_before_every_prompt_and_are_in_no_split() -> None:
    task = task_of("copa")
    plain = {example.prompt for example in task.examples("train")}
    splits = Splits.of(task, DataConfig(num_train=1, num_dev=1, num_demonstrations=2), seed=3)
    for example in (*splits.train, *splits.dev, *splits.validation):
        *shots, last = example.prompt.split("\n\n")
        assert len(shots) == 2
        assert last in plain | {other.prompt for other in task.examples("validation")}
        own = [prompt for prompt in plain if any(shot.startswith(prompt) for shot in shots)]
        assert len(own) == 2 and last not in own
        assert all(shot.endswith(".") for shot in shots), "with their right answers"
    with pytest.raises(ConfigError, match="num_demonstrations=3"):
        Splits.of(task, DataConfig(num_train=1, num_dev=1, num_demonstrations=3), seed=3)


@pytest.mark.parametrize("name", ["copa", "squad"])
def test_demonstrations_that_do_not_fit_are_left_out_as_a_whole(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """The first ones go, the same for all options and with the right one alone; none is cut within."""
    task = task_of(name, **({"max_new_tokens": 3} if name == "squad" else {}))
    splits = Splits.of(task, DataConfig(num_train=1, num_dev=0, num_demonstrations=2), seed=3)
    example = splits.train[0]
    last = max(example.options, key=lambda option: len(tokenizer(option).input_ids))
    texts = [example.without_shots(count).prompt for count in range(3)]
    assert texts[2] in {plain.prompt for plain in task.examples("train")} and texts[1] == texts[0].split("\n\n", 1)[1]
    for count, text in enumerate(texts):
        scored, written = (len(tokenizer(whole).input_ids) - 1 for whole in (text + last, text))
        encoder = Encoder(tokenizer, fed := max(scored, written + example.max_new_tokens))
        alone = replace(example, prompt=text, shots=())
        for gold_only in (False, True):
            found, wanted = (encoder.encode(one, gold_only=gold_only) for one in (example, alone))
            assert (found.rows, found.question) == (wanted.rows, wanted.question)
        assert encoder.num_short_of_shots == (count > 0) and encoder.num_truncated == 0
        shorter = Encoder(tokenizer, fed - 1)
        shorter.encode(example, gold_only=False)
        assert shorter.num_short_of_shots == 1 and (shorter.num_truncated > 0) == (count == 2)


def length(answer: str, accepted: Sequence[str]) -> float:
    return 1 / (1 + len(answer))


def one_argument(answer: str) -> float:
    return 1.0


def no_number(answer: str, accepted: Sequence[str]) -> Any:
    return answer


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("classification", "squad", "objective lm or accuracy or f1"),
        ("f1", "completion", "objective lm for this task"),
        ("acuracy", "rte", "objective classification or lm or accuracy"),
        ("macro_f1", "cb", "or accuracy or .* got macro_f1, one number for all examples together: .* train on one of"),
        ("f1a", "multirc", "got f1a, one number for all examples together"),
        ("nowhere:f", "rte", "a module 'nowhere'"),
        (":f", "rte", "module:name, .* got ':f'"),
        ("test_tasks:a:b", "rte", "module:name, .* got 'test_tasks:a:b'"),
        (".metrics:f", "rte", "module:name, .* got '.metrics:f'"),
        ("test_tasks:nothing", "rte", "a function 'nothing'"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(name: str, task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_objective(name, task_of(task))


@pytest.mark.parametrize("name", ["accuracy", "f1", "test_tasks:length"])
def test_the_loss_of_chosen_options_is_one_minus_the_mean_score(
    name: str, tokenizer: PreTrainedTokenizerBase, model: Any
) -> None:
    """The same number as the evaluation's, from the sequential forward and from the fan-out."""
    from peft import LoraConfig, get_peft_model

    objective = find_objective(name, task_of("cb"))
    assert isinstance(objective, ChosenLoss)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(target_modules=["q_proj"]))
    batches = evaluation_batches(task_of("cb").examples("train"), Encoder(tokenizer, 512), 3)
    found = []
    for forward in ("sequential", "fan_out"):
        engine = ZeroOrderEngine(adapted, objective=objective, forward=forward)  # type: ignore[arg-type]
        found.append(engine.losses(batches, engine.directions(0)))
        mean = evaluate(engine.answers, batches, engine.mesh, [name]).metrics[name]
        assert found[-1].values == pytest.approx((1 - mean, 1 - mean), abs=1e-12), "B is 0: nothing is perturbed yet"
    assert found[0] == found[1] and found[0].count == 4
    loss, _ = objective(torch.full_like(engine.answers.answer_logprobs(batches[0]), torch.nan), batches[0])
    assert loss.isnan(), "broken weights are no choice"


def test_the_metric_that_chooses_is_one_of_those_that_are_evaluated() -> None:
    """The task's own, another of them, or the score that is trained for; the name of a run without one stays."""

    def chosen(*options: str) -> tuple[str, RunConfig]:
        config = parse(["model.id=launch/tiny_opt/model", *options], TABLES, DEFAULTS)
        return check_methods(config).select_by, config

    usual, config = chosen("task.name=sst2")
    assert usual == "accuracy" and "select_by" not in config.identity()["train"]
    other, chosen_config = chosen("task.name=sst2", "train.select_by=loss")
    assert other == "loss" and chosen_config.hash != config.hash
    score_of = "objective=test_tasks:length"
    generates = ["task.name=squad", f"task.path={ROOT}/tests/samples/squad", "task.max_new_tokens=4", score_of]
    assert chosen(*generates)[0] == "f1"
    assert chosen(*generates, "train.select_by=test_tasks:length")[0] == "test_tasks:length"
    with pytest.raises(ConfigError, match=r"train.select_by of accuracy, .*, got 'acuracy': did you mean accuracy"):
        chosen("task.name=sst2", "train.select_by=acuracy")


def test_a_function_that_returns_no_number_is_an_error_of_the_user() -> None:
    with pytest.raises(ConfigError, match="a number from test_tasks:no_number"):
        score("test_tasks:no_number")("a", ["a"])
    with pytest.raises(
        ConfigError, match=r"test_tasks:one_argument, got TypeError: .*: it is called with the text and"
    ):
        score("test_tasks:one_argument")("a", ["a"])


@pytest.mark.parametrize("name", GENERATED)
def test_generation_is_the_most_probable_token_each_time(
    name: str, tokenizer: PreTrainedTokenizerBase, model: Any
) -> None:
    """Several prompts of different lengths together are what each is alone, without a cache; prompts are cut to fit."""
    task = task_of(name, max_new_tokens=5)
    encoder = Encoder(tokenizer, 24)
    (batch,) = evaluation_batches(task.examples("train"), encoder, 3)
    generator = Generator(AnswerModel(model, model), tokenizer, Mesh())
    assert generator.texts(batch) == [greedy(model, tokenizer, list(q.prompt), 5) for q in batch.questions]
    lengths = [len(question.prompt) for question in batch.questions]
    assert max(lengths) == 20 and encoder.num_truncated > 0, "20 + 5 - 1 tokens are fed"
    first = tokenizer("x")["input_ids"][0]
    assert all(question.prompt[0] == first for question in batch.questions)
    with pytest.raises(ConfigError, match=r"data\.max_length above"):
        Encoder(tokenizer, 5)._question(task.examples("train")[0], [0])
    with pytest.raises(ValueError, match="whose options are scored"):
        generator.texts(evaluation_batches(task_of("rte").examples("train"), Encoder(tokenizer, 512), 2)[0])


@pytest.mark.parametrize("kind", ["bart", "recurrent_gemma", "rwkv", "xlstm"])
def test_models_that_would_count_padding_generate_without(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Their states or positions; see `test_generation_is_the_most_probable_token_each_time` for others."""
    sizes: dict[str, Any] = {
        "hidden_size": 64, "d_model": 32, "lru_width": 64, "attention_hidden_size": 64, "num_hidden_layers": 3,
        "decoder_layers": 2, "decoder_attention_heads": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
        "num_heads": 4, "qk_dim_factor": 1.0, "intermediate_size": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 64, "vocab_size": len(tokenizer),
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    examples = task_of("squad", max_new_tokens=5).examples("train")
    batch = Encoder(tokenizer, 24).micro_batch(examples, gold_only=True)
    prompts = [list(question.prompt)[: 6 + 2 * number] for number, question in enumerate(batch.questions)]
    questions = tuple(replace(q, prompt=tuple(p)) for q, p in zip(batch.questions, prompts, strict=True))
    found = Generator(AnswerModel(model, model), tokenizer, Mesh()).texts(replace(batch, questions=questions))
    assert found == [greedy(model, tokenizer, prompt, 5) for prompt in prompts]


@pytest.mark.parametrize(
    ("kind", "peft_type"), [("ctrl", "prompt_tuning"), ("openai-gpt", "prompt_tuning"), ("mpt", "prefix_tuning")]
)
def test_answers_behind_virtual_tokens(kind: str, peft_type: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of models that name no embeddings to begin with, have no cache, or take no positions."""
    sizes: dict[str, Any] = {"n_embd": 32, "d_model": 32, "dff": 48, "n_positions": 64, "max_seq_len": 64}
    sizes |= {"n_layer": 2, "n_layers": 2, "n_head": 4, "n_heads": 4, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    model: Any = add_adapter(base, {"peft_type": peft_type, "num_virtual_tokens": 3}).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    examples = task_of("squad", max_new_tokens=5).examples("train")
    batch = Encoder(tokenizer, 24).micro_batch(examples, gold_only=True)
    cut = tuple(replace(q, prompt=q.prompt[: 6 + 2 * number]) for number, q in enumerate(batch.questions))
    found = Generator(AnswerModel(model, model), tokenizer, Mesh()).texts(replace(batch, questions=cut))
    assert found == [greedy(model, tokenizer, list(question.prompt), 5) for question in cut]


def test_ranks_write_equally_often_without_a_cache(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as the rank with most tokens to write, also behind the end of an answer."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", **sizes)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    examples = task_of("squad", max_new_tokens=5).examples("train")
    batch = Encoder(tokenizer, 24).micro_batch(examples, gold_only=True)
    cut = tuple(replace(q, prompt=q.prompt[: 6 + 2 * number]) for number, q in enumerate(batch.questions))
    batch = replace(batch, questions=cut)
    generator = Generator(AnswerModel(model, model), tokenizer, Mesh())
    generator._ends = [int(model(torch.tensor([batch.questions[0].prompt])).logits[0, -1].argmax())]
    wanted = generator.texts(batch)
    assert not wanted[0] and any(wanted)
    monkeypatch.setattr(generator.mesh, "world_size", 2)
    monkeypatch.setattr(generator.mesh, "gather_objects", lambda value: [value, 7])
    calls: list[Any] = []
    model.register_forward_pre_hook(lambda *_: calls.append(_))
    assert generator.texts(batch) == wanted and len(calls) == 7


@torch.no_grad()
def greedy(model: Any, tokenizer: PreTrainedTokenizerBase, tokens: list[int], count: int) -> str:
    made: list[int] = []
    while len(made) < count:
        made.append(int(model(torch.tensor([tokens + made])).logits[0, -1].argmax()))
    text = tokenizer.decode(made, skip_special_tokens=False)
    for end in (tokenizer.eos_token, "\n"):
        text = text.split(end)[0] if end else text
    return text.strip()


@pytest.mark.parametrize("own", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}])
@pytest.mark.parametrize("peft_type", [None, "lora", "prompt_tuning"])
def test_a_model_s_own_settings_of_generation_do_not_count(
    own: dict[str, Any], peft_type: str | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Penalties would change the answers; they are the model's again afterwards, also after an exception."""
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    adapter = None if peft_type is None else parse(["model.id=x", f"adapter.peft_type={peft_type}"], TABLES, DEFAULTS)
    torch.manual_seed(0)
    model: Any = add_adapter(base, adapter.adapter if adapter is not None else None)
    encoder = Encoder(tokenizer, 64)
    (batch,) = evaluation_batches(task_of("squad", max_new_tokens=12).examples("train"), encoder, 3)
    generator = Generator(AnswerModel(model, model), tokenizer, Mesh())
    plain = generator.texts(batch)
    settings = GenerationConfig(eos_token_id=tokenizer.eos_token_id, **own)
    base.generation_config = settings
    assert generator.texts(batch) == plain
    assert base.generation_config is settings
    with (
        pytest.raises(RuntimeError, match="planted"),
        mock.patch.object(type(base), "forward", side_effect=RuntimeError("planted")),
    ):
        generator.texts(batch)
    assert base.generation_config is settings


def test_an_answer_ends_at_the_newline_and_at_the_end_of_the_text(
    tokenizer: PreTrainedTokenizerBase, model: Any
) -> None:
    generator = Generator(AnswerModel(model, model), tokenizer, Mesh())
    words = tokenizer(" good film", add_special_tokens=False)["input_ids"]
    assert generator._text([*words, tokenizer.eos_token_id, *words]) == "good film"
    assert generator._text([tokenizer.eos_token_id]) == ""
    assert generator._text(words) == "good film"


def test_the_loss_of_generated_answers(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Of a user's completion task: 1 - the mean score of what the model writes, sequential whatever is trained."""
    task = Completion(path=str(SAMPLES / "completion"), max_new_tokens=3)
    assert (task.select_by, task.metrics, task.generates) == ("f1", ("f1", "exact_match", "lm_loss"), True)
    objective = find_objective("test_tasks:length", task)
    assert isinstance(objective, GeneratedLoss)
    batches = evaluation_batches(task.examples("train"), Encoder(tokenizer, 64), 2)
    model.requires_grad_(True)
    engine = ZeroOrderEngine(model, objective=objective, tokenizer=tokenizer)
    wanted = [length(greedy(model, tokenizer, list(q.prompt), 3), ()) for b in batches for q in b.questions]
    names = ["test_tasks:length", *task.metrics]
    found = evaluate(engine.answers, batches, engine.mesh, names, generator=engine.generator)
    assert found.metrics["test_tasks:length"] == pytest.approx(sum(wanted) / 3)
    own = objective(engine.generator.texts(batches[0]), batches[0])  # type: ignore[union-attr]
    assert [float(value) for value in own] == pytest.approx([2 - sum(wanted[:2]), 2])
    for options in ({"forward": "fan_out", "tokenizer": tokenizer}, {}):
        with pytest.raises(ValueError, match="expected a tokenizer and the forward sequential"):
            ZeroOrderEngine(model, objective=objective, **options)


def test_scores_of_texts_need_texts(model: Any) -> None:
    batch = MicroBatch.from_labels({"input_ids": torch.tensor([[2, 5, 6]]), "labels": torch.tensor([[2, 5, 6]])})
    with pytest.raises(ValueError, match="use an Encoder"):
        evaluate(AnswerModel(model, model), [batch], Mesh())


def test_evaluations_of_any_metrics_are_kept_on_disk(tmp_path: Path) -> None:
    """Rows of accuracy and losses are those of earlier versions."""
    path = tmp_path / "evaluations.jsonl"
    path.write_text(
        '{"name": "dev", "step": 3, "result": {"count": 5, "accuracy": 0.5, "loss": 1.0, "lm_loss": 2.0}}\n'
    )
    log = EvaluationLog(path, Mesh())
    assert log.get("dev", 3) == Evaluation(5, {"accuracy": 0.5, "loss": 1.0, "lm_loss": 2.0})
    log.add("dev", 4, Evaluation(2, {"f1": 0.25, "mine:score": 3.0}))
    with path.open("a") as file:
        file.write('{"name": "dev", "st')
    EvaluationLog(path, Mesh()).add("dev", 5, Evaluation(1, {}))
    again = EvaluationLog(path, Mesh())
    assert again.series("dev")[1:] == [(4, Evaluation(2, {"f1": 0.25, "mine:score": 3.0})), (5, Evaluation(1, {}))]
    path.write_text('{"name": "dev", "step": 3, "result": {"accuracy": 0.5}}\n')
    with pytest.raises(ConfigError, match="count of examples"):
        EvaluationLog(path, Mesh())

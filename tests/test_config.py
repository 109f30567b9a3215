"""The configuration layer: precedence, methods, types, errors, help, hash and round trips."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import own_methods
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoscale import cli, methods, provenance
from zoscale.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    ForwardConfig,
    MeshConfig,
    Method,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
    build,
    parse,
    validate,
)
from zoscale.config.strict_yaml import dump_yaml, load_yaml

if TYPE_CHECKING:
    from nowhere import Tensor  # type: ignore[import-not-found]


class Muon:
    """Momentum made orthogonal (100 %).

    Args:
        params: Tensors.
        lr: Step size of Muon.
        beta: Decay of the momentum, in [0, 1).
    """

    def __init__(
        self,
        params: list[Tensor],
        world: int = 1,
        *,
        lr: float = 1e-2,
        beta: float = 0.9,
        steps: int = 5,
        nesterov: bool = False,
        mode: Literal["sign", "full"] | None = None,
        layers: list[int] | None = None,
        label: str = "m",
        groups: list[dict[str, Any]] | None = None,
        factors: dict[str, float] = {"a": 1.0},  # noqa: B006
    ) -> None:
        self.params, self.world, self.lr, self.groups = params, world, lr, groups
        self.others = (beta, steps, nesterov, mode, layers, label, factors)


class WideMuon(Muon):
    """Muon with another step size.

    Args:
        width: Its own.
    """

    def __init__(self, params: list[Tensor], *, lr: float = 3e-2, width: int = 4, **others: Any) -> None:
        super().__init__(params, lr=lr, **others)
        self.width = width


class Sgd:
    """Plain zero-order SGD."""

    def __init__(self, params: list[Tensor], *, lr: float, decay: float = 0.0) -> None:
        """Set up.

        Args:
            lr: Step size of SGD.
        """


class Plain:
    """Nothing to configure."""


class Gaussian:
    """Gaussian directions."""

    def __init__(self, *, tau: float = 1e-3) -> None: ...


TABLES: dict[str, dict[str, type]] = {
    "task": {"sst2": Plain, "rte": Plain},
    "probe": {"gaussian": Gaussian},
    "estimator": {"two_point": Plain},
    "optimizer": {"jaguar_muon": Muon, "zo_sgd": Sgd},
}
DEFAULTS = {
    "task": "sst2",
    "probe": "gaussian",
    "estimator": "two_point",
    "optimizer": "jaguar_muon",
}
MODEL = "model.id=facebook/opt-125m"
Write = Callable[[str], str]


def read(*argv: str) -> RunConfig:
    return parse([MODEL, *argv], TABLES, DEFAULTS)


def failure(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_(text: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(text)
        return str(path)

    return write_


# ------------------------------------------------------------ values and precedence


def test_defaults_are_those_of_the_dataclasses_and_signatures() -> None:
    config = read()
    assert (config.data, config.train, config.runtime) == (DataConfig(), TrainConfig(), RuntimeConfig())
    assert config.optimizer == Method("jaguar_muon", {
        "lr": 1e-2, "beta": 0.9, "steps": 5, "nesterov": False, "mode": None, "layers": None, "label": "m",
        "groups": None, "factors": {"a": 1.0},
    })  # fmt: skip
    assert config.probe.args == {"tau": 1e-3}
    assert config.task == Method("sst2", {})


def test_later_files_beat_earlier_ones_and_overrides_beat_files_wherever_they_stand(write: Write) -> None:
    first = write("seed: 1\ndata: {batch_size: 8, max_length: 64}\noptimizer: {lr: 1e-3, beta: 0.5}\n")
    second = write("data: {batch_size: 32}\ntracking: {tags: {team: a}}\n")
    config = read("data.max_length=16", "--config", first, f"--config={second}", "tracking.tags.run=1")
    assert (config.seed, config.data.batch_size, config.data.max_length) == (1, 32, 16)
    assert (config.optimizer.args["lr"], config.optimizer.args["beta"]) == (1e-3, 0.5)
    assert config.tracking.tags == {"team": "a", "run": "1"}


@pytest.mark.parametrize(
    "argv",
    [
        ["optimizer.lr=1e-3"],
        ["--optimizer.lr=1e-3"],
        ["--optimizer.lr", "1e-3"],
        ["optimizer={lr: 1e-3}"],
    ],
)
def test_an_override_may_be_spelled_three_ways_or_as_a_mapping(argv: list[str]) -> None:
    assert read(*argv).optimizer.args["lr"] == 1e-3


def test_mappings_on_the_command_line_merge_like_those_in_files() -> None:
    for argv in (
        ["data={batch_size: 8}", "data.max_length=9"],
        ["data.max_length=9", "data={batch_size: 8}"],
    ):
        assert read(*argv).data == DataConfig(batch_size=8, max_length=9)


def test_a_mapping_that_is_one_value_replaces_the_earlier_one(tmp_path: Path) -> None:
    """Labels of a recipe and of the command line make no set of labels; one of them can still be changed by its key."""

    class Labelled:
        one_value = ("candidates",)

        def __init__(self, *, candidates: dict[str, str] | list[str], files: dict[str, str] | None = None) -> None: ...

    tables = {**TABLES, "task": {"labelled": Labelled}}
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    files[0].write_text("task: {name: labelled, candidates: {spam: ' spam', ham: ' fine'}, files: {train: a}}")
    files[1].write_text("task: {candidates: {pos: ' good', neg: ' bad'}, files: {validation: b}}")

    def candidates(*argv: str) -> Any:
        return parse([MODEL, "--config", str(files[0]), *argv], tables, DEFAULTS).task.args["candidates"]

    new = {"pos": " good", "neg": " bad"}
    assert candidates("task.candidates={pos: ' good', neg: ' bad'}") == new
    assert candidates("task={candidates: {pos: ' good', neg: ' bad'}}") == new
    assert candidates("--config", str(files[1])) == new
    assert candidates("task.candidates=[' no', ' yes']") == [" no", " yes"]
    assert candidates("task.candidates.ham=' okay'") == {"spam": " spam", "ham": " okay"}
    both = parse([MODEL, *(word for file in files for word in ("--config", str(file)))], tables, DEFAULTS)
    assert both.task.args["files"] == {"train": "a", "validation": "b"}, "other mappings merge key by key"


def test_a_partial_adapter_goes_over_the_default_one_and_null_is_full_fine_tuning() -> None:
    full = {"lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    assert read("adapter.r=4").adapter == {"r": 4, **full}
    assert read("adapter=null").adapter is None
    assert replace(read(), adapter={"r": 4}) == read("adapter.r=4")


VALUES: list[tuple[str, Any]] = [
    ("optimizer.lr=1", 1.0),
    ("optimizer.lr=-1E+2", -100.0),
    ("optimizer.nesterov=true", True),
    ("optimizer.mode=sign", "sign"),
    ("optimizer.mode=null", None),
    ("optimizer.layers=[1, 2]", [1, 2]),
    ("optimizer.label=3", "3"),
    ("optimizer.label=", ""),
    ("optimizer.label={x}", "{x}"),
    ("optimizer.label=a=b", "a=b"),
    ("optimizer.groups=[{match: bias, lr: 1e-4}]", [{"match": "bias", "lr": 1e-4}]),
    ("optimizer.factors={b: 2}", {"a": 1.0, "b": 2.0}),
    ("optimizer.factors.b=2", 2.0),
    ("data.num_train=null", None),
    ("name=1e3", "1e3"),
]


@pytest.mark.parametrize(("override", "value"), VALUES)
def test_overrides_are_read_in_the_type_of_their_field(override: str, value: Any) -> None:
    found: Any = read(override).to_dict()
    for part in override.partition("=")[0].split("."):
        found = found[part]
    assert_same(found, value)


# ------------------------------------------------------------ classes of the user's

OWN = [f"{section}.name=own_methods:{name}" for section, name in (
    ("task", "Reviews"), ("probe", "Draws"), ("estimator", "Losses"), ("optimizer", "Clipped"),
)]  # fmt: skip


def test_classes_of_the_users_are_methods_like_any_other() -> None:
    argv = [MODEL, *OWN, "optimizer.limit=0.5", "estimator.num_directions=2"]
    config = parse(argv, methods.TABLES, methods.DEFAULTS)
    assert (config.optimizer.args["limit"], config.estimator.args["num_directions"]) == (0.5, 2)
    assert RunConfig.from_dict(config.to_dict(), methods.TABLES, methods.DEFAULTS) == config
    assert type(build(config.probe, methods.TABLES["probe"])) is own_methods.Draws
    with pytest.raises(ConfigError, match=r"optimizer\.limit to be float, got 'wide'"):
        parse([*argv, "optimizer.limit=wide"], methods.TABLES, methods.DEFAULTS)


def test_their_modules_are_part_of_the_code_that_a_run_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = parse([MODEL], methods.TABLES, methods.DEFAULTS)
    assert provenance.code(usual) == provenance.code()
    monkeypatch.syspath_prepend(tmp_path)
    codes = []
    for text in ("def f(answer, accepted): return 1", "def f(answer, accepted): return 0"):
        (tmp_path / "of_mine.py").write_text(text)
        config = parse([MODEL, *OWN, "objective=of_mine:f"], methods.TABLES, methods.DEFAULTS)
        assert config.modules == ["of_mine", "own_methods"]
        codes.append(provenance.code(config))
    assert codes[0] != codes[1]
    assert all(code.startswith(f"{provenance.code()}, of_mine ") and ", own_methods " in code for code in codes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.name=nowhere:Rule", "a module 'nowhere' on the Python path, got No module named 'nowhere'"),
        ("optimizer.name=broken_of_mine:Rule", "'broken_of_mine' that can be imported, got ZeroDivisionError"),
        ("optimizer.name=own_methods:Nothing", "subclass of zoscale.optim.base.ZeroOrderOptimizer, got nothing"),
        ("optimizer.name=own_methods:NO_CLASS", "subclass of zoscale.optim.base.ZeroOrderOptimizer, got 1"),
        ("optimizer.name=own_methods:Draws", "subclass of zoscale.optim.base.ZeroOrderOptimizer, got"),
        ("optimizer.name=own_methods:Lacking", "zoscale.optim.base.ZeroOrderOptimizer asks for, got no direction"),
        (
            "optimizer.name=own_methods:Unmade",
            "own_methods:Unmade to call its base's __init__ with what that takes, got",
        ),
        ("optimizer.name=own methods:Rule", "module:name, of a module and of what it holds"),
        ("optimizer.name=:Rule", "module:name, of a module and of what it holds"),
        ("optimizer.name=zosgd", "jaguar_muon, fo_sgd, fo_adamw, module:Class, got 'zosgd'"),
        ("probe.name=own_methods:Odd", "options of own_methods:Odd that can be written, got Odd: 'name' picks"),
        ("probe={name: layers, inner: {name: 'own_methods:Clipped'}}", "subclass of zoscale.probes.base.Probe"),
    ],
)
def test_classes_that_are_no_methods_are_refused(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_of_mine.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=re.escape(message)):
        config = parse([MODEL, override], methods.TABLES, methods.DEFAULTS)
        build(config.probe, methods.TABLES["probe"])
        build(config.optimizer, methods.TABLES["optimizer"], [])


# ------------------------------------------------------------ methods


def test_a_new_method_drops_the_class_defaults_of_the_old_one_and_keeps_given_arguments(write: Write) -> None:
    path = write("optimizer: {name: jaguar_muon, lr: 0.5}")
    assert read("--config", path, "optimizer.name=zo_sgd").optimizer == Method("zo_sgd", {"lr": 0.5, "decay": 0.0})


def test_an_argument_given_for_another_method_is_an_error_that_says_so(write: Write) -> None:
    """Where both come from one place, or the argument from the later one; or nobody named a method."""
    both = write("optimizer: {name: zo_sgd, lr: 0.5, beta: 0.8}")
    for argv in (["--config", both], ["--config", write("optimizer: {name: zo_sgd, lr: 0.5}"), "optimizer.beta=0.8"]):
        message = failure(*argv)
        for part in ("optimizer.beta", "belongs to jaguar_muon", f"zo_sgd (chosen by {argv[1]})"):
            assert part in message
    assert "belongs to jaguar_muon" in failure("optimizer.name=zo_sgd", "optimizer.beta=0.8", "optimizer.lr=1")
    tables = {**TABLES, "optimizer": {"zo_sgd": Sgd, "jaguar_muon": Muon}}
    with pytest.raises(ConfigError, match="belongs to jaguar_muon"):
        path = write("optimizer: {beta: 0.8}")
        parse([MODEL, "--config", path, "optimizer.lr=1"], tables, {**DEFAULTS, "optimizer": "zo_sgd"})


def test_arguments_of_a_method_that_a_later_place_replaces_are_left_out_and_told(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("optimizer: {name: jaguar_muon, lr: 0.5, beta: 0.8}")
    replaced = Method("zo_sgd", {"lr": 0.5, "decay": 0.0})
    for rank, told in (
        ("0", f"left out, because what was chosen later has none: optimizer.beta (from {path})"),
        ("1", ""),
    ):
        monkeypatch.setenv("RANK", rank)
        assert read("--config", path, "optimizer.name=zo_sgd").optimizer == replaced
        assert read("--config", path, "--config", write("optimizer: {name: zo_sgd}")).optimizer == replaced
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 * bool(told) and all(line.endswith(told) for line in lines)


def test_so_are_those_of_a_method_that_goes_with_the_replaced_one(write: Write) -> None:
    """A recipe may leave the probe to its optimizer, and say how that is."""
    path = write("optimizer: {name: jaguar_sign_sgd, lr: 0.5}\nprobe: {rows: 0.25}")
    argv = [MODEL, "--config", path]
    assert parse(argv, methods.TABLES, methods.DEFAULTS).probe.args["rows"] == 0.25
    other = parse([*argv, "optimizer.name=zo_sgd"], methods.TABLES, methods.DEFAULTS)
    assert "rows" not in other.probe.args
    with pytest.raises(ConfigError, match=r"got probe.rows .from the command line., which belongs to block"):
        parse([*argv, "optimizer.name=zo_sgd", "probe.rows=0.5"], methods.TABLES, methods.DEFAULTS)


def test_a_required_argument_that_is_missing_is_named() -> None:
    assert "set optimizer.lr" in failure("optimizer.name=zo_sgd")


def test_positional_parameters_are_not_configurable() -> None:
    assert "optimizer.world" in failure("optimizer.world=2")
    assert "optimizer.params" in failure("optimizer.params=[]")


def test_a_constructor_hands_options_on_to_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    """`**others` are those of the next constructor: its defaults, types and meanings; the nearest default holds."""
    tables = {**TABLES, "optimizer": {"wide": WideMuon}}
    defaults = {**DEFAULTS, "optimizer": "wide"}
    found = parse([MODEL, "optimizer.beta=0.5", "optimizer.mode=sign"], tables, defaults).optimizer
    assert found.args == read().optimizer.args | {"lr": 3e-2, "width": 4, "beta": 0.5, "mode": "sign"}
    made = build(found, tables["optimizer"], ["p"])
    assert isinstance(made, WideMuon) and (made.lr, made.width, made.others[0]) == (3e-2, 4, 0.5)
    for wrong in ("optimizer.mode=fast", "optimizer.world=2", "optimizer.others=1"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            parse([MODEL, wrong], tables, defaults)
    with pytest.raises(SystemExit):
        parse(["--help"], tables, defaults)
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "optimizer.lr Step size of Muon. (type: float, default: 0.03)",
        "optimizer.width Its own. (type: int, default: 4)",
        "optimizer.beta Decay of the momentum, in [0, 1). (type: float, default: 0.9)",
    ):
        assert part in text


def test_build_calls_the_class_and_shares_nothing_with_the_configuration() -> None:
    config = read("optimizer.groups=[{match: bias}]")
    made = build(config.optimizer, {"jaguar_muon": Muon}, ["p"], 3)
    assert (made.params, made.world, made.lr, made.groups) == (["p"], 3, 1e-2, [{"match": "bias"}])
    made.groups.append({})  # type: ignore[union-attr]
    assert config.optimizer.args["groups"] == [{"match": "bias"}]
    with pytest.raises(ConfigError, match="did you mean jaguar_muon"):
        build(Method("jaguar_mun"), {"jaguar_muon": Muon})


def test_configurations_share_nothing_with_each_other_or_with_the_signature() -> None:
    read().optimizer.args["factors"]["a"] = 7.0
    read().tracking.tags["a"] = "b"
    assert read().optimizer.args["factors"] == {"a": 1.0}
    assert read().tracking.tags == {}


def test_a_class_whose_default_contradicts_its_type_is_a_mistake_of_the_class() -> None:
    class Wrong:
        def __init__(self, *, lr: float = "fast") -> None: ...  # type: ignore[assignment]

    class Clash:
        def __init__(self, *, name: str = "x") -> None: ...

    for cls in (Wrong, Clash):
        with pytest.raises(TypeError, match=cls.__name__):
            parse([MODEL], {**TABLES, "probe": {"gaussian": cls}}, DEFAULTS)


# ------------------------------------------------------------ errors

MISTAKES = [
    ("optimzer.lr=1", "did you mean optimizer.lr?"),
    ("lr=1", "did you mean optimizer.lr?"),
    ("data.batchsize=3", "did you mean data.batch_size?"),
    ("optimizer.learning_rate=1", "the keys are optimizer.name, optimizer.lr, optimizer.beta"),
    ("train.batch_size=3", "did you mean data.batch_size?"),
    ("optimizer.nam=zo_sgd", "did you mean optimizer.name?"),
    ("optimizer.name=zosgd", "did you mean zo_sgd?"),
    ("optimizer.name=[1]", "jaguar_muon, zo_sgd"),
    ("optimizer=muon", "set optimizer.name="),
    ("data=3", "set data."),
    ("optimizer.lr=fast", "expected optimizer.lr to be float, got 'fast'"),
    ("train.steps=true", "to be int"),
    ("train.steps=1.5", "to be int"),
    ("train.steps=null", "to be int"),
    ("train.steps=010", "to be int"),
    ("tracking.mlflow=1", "to be bool"),
    ("tracking.mlflow=yes", "to be bool"),
    ("seed.x=1", "to be int"),
    ("model.dtype=fp16", "float32, bfloat16, float16"),
    ("optimizer.lr=.nan", "to be float"),
    ("optimizer.lr=inf", "to be float"),
    ("optimizer.layers=[1, a]", "list[int]"),
    ("optimizer.lr=1e999", "to be float"),
    ("optimizer.groups={a: 1}", "to be list"),
    ("tracking.tags={a: 1}", "dict[str, str]"),
    ("adapter=3", "to be dict"),
    ("seed", "key=value"),
    ("--seed", "key=value"),
    ("a..b=1", "key=value"),
    ("=1", "key=value"),
    ("data.batch_size=10", "divides the batch size"),
    ("model.id=null", "got neither"),
    ("seed=-1", "at least 0"),
    ("model.config={model_type: opt}", "got both"),
    ("train.steps=-1", "train.steps to be at least 0"),
    ("data.micro_batch_size=0", "at least 1"),
    ("schedule={name: linear, warmup_steps: 2000}", "within the run"),
    ("schedule={name: constant, warmup_steps: 1}", "constant_with_warmup"),
    ("runtime.timeout_minutes=0", "above 0"),
    ("runtime.stall_seconds=0", "runtime.stall_seconds above 0"),
    ("checkpoint.keep=0", "checkpoint.keep to be at least 1"),
    ("mesh.shard_size=0", "mesh.shard_size to be at least 1"),
    ("mesh.candidates=0", "mesh.candidates to be at least 1"),
    ("name=a/b", "'a/b'"),
    ("forward={name: sequential, max_rows: 4}", "drop one of them"),
    ("model={id: null, config: {model_type: opt}, revision: main}", "drop model.revision"),
    ("output_dir=", "output_dir to be a name, got ''"),
    ("output_dir='a\0'", "output_dir to be a name"),
    ("tracking.experiment= ", "tracking.experiment to be a name"),
    ('tracking.uri=" "', "tracking.uri to be a name"),
    ("runtime.threads=1000000", "runtime.threads to be at most 1,024"),
    ("runtime.timeout_minutes=1e30", "runtime.timeout_minutes to be at most 1,000,000"),
    ("data.length_window=9223372036854775807", "data.length_window to be at most 10,000"),
    ("--config=nowhere.yaml", "No such file"),
    ("--config=.", "directory"),
    (".".join("a" * 50) + "=1", "nested levels"),
    ("seed=9223372036854775808", "seed to be int"),
]


@pytest.mark.parametrize(("argument", "part"), MISTAKES)
def test_a_mistake_is_told_as_expected_got_remedy(argument: str, part: str) -> None:
    message = failure(argument)
    assert part in message
    assert message.startswith("expected ")
    assert ", got " in message
    assert ": " in message


FILES = [
    ("data: {batchsize: 3}", "did you mean data.batch_size?"),
    ("optimizer.lr: 1", "nested mappings"),
    ("data:", "section of keys"),
    ("seed: 1\nseed: 2", "duplicate key 'seed'"),
    ("a: {b: 1, b: 2}", "line 1, column 11"),
    ("- 1", "a list"),
    ("3", "a int"),
    ("seed: [", "valid YAML"),
    ("on: {1: 2}", "put it in quotes"),
    ("seed: &x 1\nname: *x", "alias"),
    ("seed: !!int x", "valid YAML"),
    ("seed: !!bool x", "valid YAML"),
    ("seed: !!python/name:os.system", "valid YAML"),
    ("seed: .inf", "finite"),
    ("adapter: {a: .nan}", "finite"),
    ("seed: 1" + "0" * 5000, "valid YAML"),
    ("seed: 1" + "0" * 50, "64 bits"),
    (f"seed: {2**63}", "64 bits"),
    (f"seed: {-(2**63) - 1}", "64 bits"),
    ("seed: !!set {a}", "null, booleans"),
    ("adapter: {a: !!binary aGk=}", "null, booleans"),
    ("seed: " + "[" * 3000, "valid YAML"),
    ("seed: '1'", "to be int"),
    ("adapter: " + "[" * 40 + "]" * 40, "nested levels"),
    ("\0", "valid YAML"),
    ("tracking: {tags: {a: 1}}", "dict"),
]


@pytest.mark.parametrize(("text", "part"), FILES)
def test_a_mistake_in_a_file_names_the_file(text: str, part: str, write: Write) -> None:
    path = write(text)
    message = failure("--config", path)
    assert part in message
    assert path in message


def test_a_file_that_is_no_text_is_refused_and_an_empty_one_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    assert "not UTF-8" in failure("--config", str(path))
    path.write_text("# nothing\n")
    assert read("--config", str(path)) == read()


def test_train_prints_one_line_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train(["sed=1", "optimizer.name=zosgd"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("zoscale train: error: expected a known key, got 'sed' (from the command line)"), (
        "of two mistakes"
    )


def test_the_error_survives_a_process_boundary() -> None:
    error = ConfigError("a", "b", "c")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "expected a, got b: c"


# ------------------------------------------------------------ fuzz

TRICKY = ["zo_sgd", "null", "1e-3", "1_0", "yes", "2024-01-01", "~", "0x1", "1:30", "<<", "*a", "=", "{x}"]
KEYS = [
    *("optimizer", "name", "lr", "beta", "groups", "probe", "tau", "adapter", "r", "data", "batch_size"),
    *("tracking", "tags", "seed", "model", "id", "config"),
]
text = st.text() | st.sampled_from(TRICKY)
keys = st.sampled_from(KEYS) | st.text(max_size=4)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text | st.just("\ud800")
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))
finite = st.floats(allow_nan=False, allow_infinity=False)
plain_trees = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | finite | st.text(st.characters()) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(text, plain_trees, max_size=3)
valid = st.fixed_dictionaries(
    {"model": st.fixed_dictionaries({"id": text}, optional={"revision": st.none() | text})},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "adapter": st.none() | mappings,
        "tracking": st.fixed_dictionaries({"tags": st.dictionaries(text, text)}),
        "optimizer": st.fixed_dictionaries(
            {"lr": finite | st.integers(-9, 9), "label": text},
            optional={"groups": st.lists(mappings, max_size=2), "factors": st.dictionaries(text, finite)},
        ),
    },
)
fuzz = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(valid)
def test_every_configuration_round_trips_through_yaml(tree: dict[str, Any]) -> None:
    config = RunConfig.from_dict(tree, TABLES, DEFAULTS)
    again = RunConfig.from_dict(load_yaml(config.to_yaml(), "text"), TABLES, DEFAULTS)
    assert_same(again.to_dict(), config.to_dict())
    assert (again, again.hash) == (config, config.hash)


@fuzz
@given(st.dictionaries(keys, trees, max_size=5))
def test_any_mapping_gives_a_configuration_or_a_config_error(tree: dict[str, Any]) -> None:
    with suppress(ConfigError):
        RunConfig.from_dict({"model": {"id": "x"}} | tree, TABLES, DEFAULTS)


@fuzz
@given(st.text() | trees.map(repr))
def test_any_text_in_a_file_gives_a_configuration_or_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with suppress(ConfigError):
        read("--config", str(path))


@fuzz
@given(st.lists(st.tuples(st.lists(keys, min_size=1, max_size=3), st.text() | trees.map(repr)), max_size=3))
def test_any_overrides_give_a_configuration_or_a_config_error(overrides: list[tuple[list[str], str]]) -> None:
    with suppress(ConfigError):
        read(*(f"{'.'.join(path)}={text}" for path, text in overrides))


@fuzz
@given(plain_trees)
def test_yaml_reads_back_exactly_what_was_written(tree: Any) -> None:
    assert_same(load_yaml(dump_yaml(tree), "text"), tree)


def test_yaml_writes_shared_values_out() -> None:
    shared = ["q_proj"]
    assert load_yaml(dump_yaml({"a": shared, "b": shared}), "text") == {"a": shared, "b": shared}


def assert_same(left: Any, right: Any) -> None:
    """Equal in value and type: 1, 1.0 and True differ."""
    assert type(left) is type(right)
    assert left == right
    if isinstance(left, dict | list):
        pairs = ((left[key], right[key]) for key in left) if isinstance(left, dict) else zip(left, right, strict=True)
        for one, other in pairs:
            assert_same(one, other)


# ------------------------------------------------------------ what comes out


def direct() -> RunConfig:
    return RunConfig(
        model=ModelConfig(config={"model_type": "opt", "hidden_size": 8}),
        adapter={"r": 2},
        tracking=TrackingConfig(tags={"1e3": "no"}),
        task=Method("rte"),
        probe=Method("gaussian", {"tau": 1}),
        estimator=Method("two_point"),
        optimizer=Method("zo_sgd", {"lr": 1e-5, "decay": 0}),
    )


def test_a_configuration_made_in_python_round_trips() -> None:
    config = direct()
    validate(config)
    again = RunConfig.from_dict(load_yaml(config.to_yaml(), "text"), TABLES, DEFAULTS)
    assert (again, again.hash) == (config, config.hash)


def test_print_config_prints_what_reads_back_as_the_same_configuration(
    capsys: pytest.CaptureFixture[str], write: Write
) -> None:
    with pytest.raises(SystemExit) as caught:
        read("optimizer.lr=0.25", "--print-config")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "lr: 0.25" in text
    assert parse(["--config", write(text)], TABLES, DEFAULTS) == read("optimizer.lr=0.25")


def test_the_hash_is_the_same_in_another_process_with_other_hash_seeds() -> None:
    code = "import test_config; print(test_config.direct().hash)"
    hashes = set()
    for seed in ("1", "2"):
        here = Path(__file__).parent
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(here.parent)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=True)
        hashes.add(done.stdout.strip())
    assert hashes == {direct().hash}
    assert len(direct().hash) == 10


SAME = ["name=x", "output_dir=/y", "overwrite=true", "tracking.tags.a=b", "runtime.timeout_minutes=1",
        "runtime.threads=2", "runtime.stall_seconds=9", "resume=never", "mesh.shard_size=1", "mesh.shard_size=auto",
        "checkpoint.every=7", "train.log_every=7", "optimizer.lr=0.010"]  # fmt: skip
OTHER = ["seed=1", "model.id=x", "adapter.r=4", "adapter=null", "optimizer.lr=0.02", "runtime.noise=eager",
         "optimizer.groups=[]", "data.micro_batch_size=2", "task.name=rte", "master=none",
         "forward.name=sequential", "mesh.candidates=2"]  # fmt: skip


@pytest.mark.parametrize(("override", "same"), [(o, True) for o in SAME] + [(o, False) for o in OTHER])
def test_the_hash_names_what_is_computed_and_nothing_else(override: str, same: bool) -> None:
    assert (read(override).hash == read().hash) is same


def test_the_hash_ignores_the_order_of_keys() -> None:
    one, two = ("adapter={a: 1, b: {c: 2, d: 3}}", "adapter={b: {d: 3, c: 2}, a: 1}")
    assert read(one).hash == read(two).hash


def test_the_run_directory_is_named_by_name_and_hash() -> None:
    config = read("name=a", "output_dir=out")
    assert config.run_dir == Path("out") / f"a-{config.hash}"


def test_flatten_has_a_scalar_for_every_dotted_key() -> None:
    flat = read("adapter=null", "optimizer.layers=[1, 2]", "tracking.tags.a=b").flatten()
    assert (flat["adapter"], flat["tracking.tags.a"], flat["optimizer.name"]) == (None, "b", "jaguar_muon")
    assert json.loads(str(flat["optimizer.layers"])) == [1, 2]
    assert flat["data.batch_size"] == 16
    assert all(value is None or isinstance(value, str | int | float | bool) for value in flat.values())


def test_a_class_brings_the_defaults_of_other_sections(capsys: pytest.CaptureFixture[str]) -> None:
    """`goes_with` holds where nothing is named, whatever the order of the sections, also for what may be set."""

    class Company:
        probe = "wide"

    class Wide:
        """Wide directions."""

        def __init__(self, *, width: int = 3) -> None: ...

    class Friend(Sgd):
        goes_with = Company

    tables = {
        **TABLES,
        "probe": {**TABLES["probe"], "wide": Wide},
        "optimizer": {**TABLES["optimizer"], "friend": Friend},
    }
    chosen = [MODEL, "optimizer.name=friend", "optimizer.lr=1.0"]
    assert parse(chosen, tables, DEFAULTS).probe == Method("wide", {"width": 3})
    assert parse([*chosen, "probe.width=5"], tables, DEFAULTS).probe == Method("wide", {"width": 5})
    assert parse([*chosen, "probe.name=gaussian"], tables, DEFAULTS).probe.name == "gaussian"
    assert parse([MODEL], tables, DEFAULTS).probe.name == "gaussian"
    with pytest.raises(ConfigError, match=r"probe\.width"):
        parse([*chosen, "probe.widht=5"], tables, DEFAULTS)
    with pytest.raises(SystemExit):
        parse(["--help"], tables, DEFAULTS)
    assert "gaussian, wide (default: gaussian; wide with optimizer.name=friend)" in capsys.readouterr().out


# ------------------------------------------------------------ help


def help_of(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(["data.nonsense=1", "--help"], TABLES, DEFAULTS)
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_has_every_key_with_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    sections = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "schedule": ScheduleConfig,
                "tracking": TrackingConfig, "runtime": RuntimeConfig, "mesh": MeshConfig, "forward": ForwardConfig,
                    "checkpoint": CheckpointConfig}  # fmt: skip
    assert {*sections, *TABLES} == {key for key, value in read("adapter=null").to_dict().items() if type(value) is dict}
    fields = [f"{section}.{name}" for section, cls in sections.items() for name in asdict(cls())]
    fields += [key for key in read().to_dict() if key not in sections and key not in TABLES]
    for field in fields:
        _, found, rest = text.partition(f" {field} ")
        assert found, field
        assert not rest.startswith("(type"), field


def test_help_has_every_method_with_arguments_defaults_and_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    for part in (
        "optimizer.name: jaguar_muon, zo_sgd (default: jaguar_muon)",
        "optimizer.name=jaguar_muon: Momentum made orthogonal (100 %).",
        "optimizer.lr Step size of Muon. (type: float, default: 0.01)",
        "optimizer.steps (type: int, default: 5)",
        "optimizer.name=zo_sgd: Plain zero-order SGD.",
        "optimizer.lr Step size of SGD. (required, type: float)",
        "probe.tau (type: float, default: 0.001)",
        "task.name=rte: Nothing to configure.",
    ):
        assert part in text
    assert "params" not in text
    assert "optimizer.world" not in text


def test_importing_the_layer_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "deepspeed", "peft", "mlflow"}
    code = f"import sys, zoscale.config; print({heavy} & set(sys.modules))"
    root = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"

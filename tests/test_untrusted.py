"""Whatever bytes a user's file holds, the answer is a value or one `ConfigError`: no other exception, hang or flood.

The examples are the same in every run. `ZOSCALE_FUZZ=deep` draws new ones each time, fifty times as many.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, TypeVar

import datasets
import huggingface_hub
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from processes import ROOT
from test_journal import HEADER, NUM_STEPS, RECORDS, SIZE, START, record, same, write

from zoscale.config import ConfigError, ModelConfig, RunConfig, load_yaml, parse
from zoscale.config.merging import Given, Schema
from zoscale.methods import DEFAULTS, TABLES
from zoscale.recovery.journal import Journal, JournalWriter
from zoscale.release.run_record import check_base, with_base
from zoscale.runtime import ZERO3, fill_deepspeed_config, read_deepspeed_config
from zoscale.tasks.sources import Source

T = TypeVar("T")
COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
PROFILES = {
    "quick": settings(derandomize=True, **COMMON),
    "deep": settings(derandomize=False, print_blob=True, **COMMON),
}
PROFILE = os.environ.get("ZOSCALE_FUZZ", "quick")
FACTOR = {"quick": 1, "deep": 50}[PROFILE]
settings.register_profile(f"zoscale-{PROFILE}", PROFILES[PROFILE])


def fuzz(max_examples: int) -> settings:
    """So many examples, or fifty times as many in the deep profile."""
    return settings(settings.get_profile(f"zoscale-{PROFILE}"), max_examples=max_examples * FACTOR)


def attempt(call: Callable[[], T]) -> T | ConfigError | SystemExit:
    """The answer, or how it was refused; any other exception is a failure."""
    try:
        return call()
    except (ConfigError, SystemExit) as refusal:
        return refusal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("untrusted")


# ------------------------------------------------------------ damage

CHANGES: dict[str, Callable[[bytes, int, int, bytes], bytes]] = {
    "flip": lambda old, at, num, _: old[:at] + bytes(b ^ (1 << num % 8) for b in old[at : at + 1]) + old[at + 1 :],
    "clear": lambda old, at, num, _: old[:at] + bytes(len(old[at : at + num])) + old[at + num :],
    "cut": lambda old, at, *_: old[:at],
    "delete": lambda old, at, num, _: old[:at] + old[at + num :],
    "insert": lambda old, at, _, new: old[:at] + new + old[at:],
    "overwrite": lambda old, at, _, new: old[:at] + new + old[at + len(new) :],
    "duplicate": lambda old, at, num, _: old[: at + num] + old[at:],
    "swap": lambda old, at, num, _: old[:at] + old[at + num : at + 2 * num] + old[at : at + num] + old[at + 2 * num :],
}


@st.composite
def damaged(
    draw: st.DrawFn, wholes: list[bytes], new: st.SearchStrategy[bytes], *, keep: int = 0, unit: int = 1
) -> bytes:
    """One of `wholes` after one to three changes behind its first `keep` bytes; some at multiples of `unit`."""
    content = draw(st.sampled_from(wholes))
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        change = CHANGES[draw(st.sampled_from(sorted(CHANGES)))]
        at, num = draw(st.integers(keep, max(keep, len(content)))), draw(st.integers(1, 5) | st.integers(1, 300))
        if draw(st.booleans()):
            at, num = keep + (at - keep) // unit * unit, num % 4 * unit
        content = change(content, at, num, draw(new))
    return content


# ------------------------------------------------------------ journal

with tempfile.TemporaryDirectory() as name:
    WHOLE = write(Path(name) / "journal.bin")


def sealed(text: bytes) -> bytes:
    """The start of a journal with any text as its header, its checksum right."""
    head = b"ZOJRNL\r\n" + struct.pack("<I", len(text)) + text
    return head + struct.pack("<I", zlib.crc32(head))


def read_journal(folder: Path, content: bytes) -> Journal | None:
    path = folder / "journal.bin"
    path.write_bytes(content)
    journal = attempt(lambda: Journal.read(path))
    if not isinstance(journal, Journal):
        return None
    assert [r.step for r in journal.records] == list(range(len(journal.records)))
    assert journal.num_bytes + journal.num_torn == len(content)
    return journal


@fuzz(150)
@given(content=st.binary() | st.binary().map(lambda rest: WHOLE[:12] + rest))
def test_any_bytes_are_a_journal_or_a_config_error(folder: Path, content: bytes) -> None:
    assert read_journal(folder, content) is None, "none of these has a header"


@fuzz(400)
@given(
    content=damaged([WHOLE], st.binary(max_size=200))
    | damaged([WHOLE], st.binary(max_size=200), keep=START, unit=SIZE)
    | damaged([WHOLE], st.just(WHOLE[-SIZE:]), keep=START, unit=SIZE)
)
def test_a_damaged_journal_gives_a_prefix_or_a_config_error(folder: Path, content: bytes) -> None:
    journal = read_journal(folder, content)
    if journal is None:
        return
    assert journal.header == HEADER
    assert same(journal.records, RECORDS[: len(journal.records)])
    writer = JournalWriter(folder / "journal.bin", journal.header, journal.num_bytes)
    for step in range(len(journal.records), NUM_STEPS):
        writer.append(record(step))
    writer.close()
    assert (folder / "journal.bin").read_bytes() == WHOLE


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
counts = st.fixed_dictionaries({key: st.integers(1, 3) for key in ("num_losses", "num_directions", "num_groups")})
wrong = st.dictionaries(st.sampled_from(sorted(HEADER.__dict__)), junk, max_size=2)
forged_headers = st.tuples(counts, wrong | st.just({})).map(lambda parts: {**HEADER.__dict__, **parts[0], **parts[1]})
forged_records = st.lists(st.tuples(st.integers(0, 3) | st.integers(0, 2**64 - 1), st.integers(0, 255)), max_size=4)
forged_records |= st.integers(0, 4).map(lambda num: [(step, step % 2) for step in range(num)])


@fuzz(200)
@given(tree=forged_headers, records=forged_records, fill=st.binary(max_size=80))
def test_a_forged_journal_with_right_checksums_is_one_or_a_config_error(
    folder: Path, tree: dict[str, Any], records: list[tuple[int, int]], fill: bytes
) -> None:
    start = sealed(json.dumps(tree).encode())
    (seed,) = struct.unpack("<I", start[-4:])
    sizes = [n for key, n in tree.items() if key.startswith("num_") and type(n) is int and 0 < n < 9]
    bodies = (struct.pack("<QB", *values) + (fill + bytes(90))[: 8 * (sum(sizes) + 1)] for values in records)
    read_journal(folder, start + b"".join(body + struct.pack("<I", zlib.crc32(body, seed)) for body in bodies))


def large(**counts: object) -> bytes:
    return sealed(json.dumps({**HEADER.__dict__, **counts}).encode())


FLOODS = {
    "a header of 4 GiB": WHOLE[:8] + b"\xff" * 4 + bytes(2**21),
    "a header of 1 MiB of brackets": sealed(b"[" * 2**20),
    "an integer of a million digits": sealed(b'{"seed": ' + b"9" * 2**20),
    "a deep configuration": sealed(b'{"config": ' + b'{"a": ' * 10_000),
    "the largest counts": large(num_losses=2**16, num_directions=2**16, num_groups=2**16) + bytes(2**22),
    "larger counts": large(num_losses=2**40) + bytes(2**20),
    "counts beyond 64 bits": large(num_directions=10**30) + bytes(2**20),
}


@pytest.mark.parametrize("content", FLOODS.values(), ids=FLOODS)
def test_a_huge_number_in_a_journal_takes_no_memory_or_time(folder: Path, content: bytes) -> None:
    tracemalloc.start()
    start = time.process_time()
    assert read_journal(folder, content) is None
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 10
    assert peak < 4 * len(content) + 2**20


# ------------------------------------------------------------ configuration

RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
BASE = ["--config", str(ROOT / "launch/recipes/quickstart.yaml")]
SCHEMA = Schema(RunConfig, TABLES, DEFAULTS)
KEYS = sorted(
    {*SCHEMA.keys(Given()), "optimizer", "data", "adapter.r", "task.template", "optimizer.tau", "config", "x"}
)
VALUES = [
    *("null", "true", "~", "0", "-1", "3", "0.5", "1e-3", "1e400", ".nan", "-.inf", "9" * 400, "1_0", "0x1f", "1:30"),
    *("[]", "{}", "[1, [2]]", "{name: sst2}", "{lr: {}}", "{a: 1, a: 2}", "{? [1]: 2}", "!!int x", "!!set {a}", "&a x"),
    *("*a", "<<", "!!merge", "=", "{x", "{x}", "|", ">-", "%", "'", '"', "\\", "@", "`", "# x", "- 1", "x: 1", "---"),
    *("\ud800", "\udcff", "\0", "\x85", "\ufeff", "\U0010ffff", "", " ", "\t", "a" * 5000, "[" * 400, "{a: " * 40),
    *(
        "[" * 60 + "]" * 60,
        "[" * 500 + "]" * 500,
        "!!omap [a: 1]",
        "!!timestamp 2024-01-01",
        "!!binary aGk=",
        "!!str [a]",
    ),
    *(name for table in TABLES.values() for name in table),
]
values = st.sampled_from(VALUES) | st.text() | st.integers().map(str) | st.floats().map(str)
keys = st.sampled_from(
    [*KEYS] * 3 + ["", "a.b", "seed.x", "data.batch_size.x", "." * 40, "optimizer." * 40 + "lr", "\0"]
)
overrides = st.tuples(keys, values).map(lambda pair: [f"{pair[0]}={pair[1]}"])
odd_words = st.one_of(
    st.tuples(keys, values).map(lambda pair: [f"--{pair[0]}", pair[1]]),
    st.sampled_from([["--print-config"], ["--config"], ["--config="], ["--"], ["-"], ["="], ["--seed"]]),
    values.map(lambda value: [value]),
    st.binary(max_size=6).map(lambda raw: [os.fsdecode(raw)]),
)
argvs = st.lists(overrides, max_size=4) | st.tuples(overrides, odd_words).map(list)
splinters = (
    st.sampled_from([value.encode(errors="surrogatepass") for value in VALUES])
    | st.sampled_from([f"\n{key.replace('.', ': {')}: ".encode() for key in KEYS])
    | st.sampled_from(
        [b"\n", b": ", b"\n  ", b", ", b"{", b"}", b"[", b"]", b"\n- ", b"\r", b"!!python/name:os.system "]
    )
    | st.binary(max_size=4)
)


def configure(*argv: str) -> RunConfig | None:
    """What the command line gives; what it gives can be named, written, and read back."""
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
        config = attempt(lambda: parse(argv, TABLES, DEFAULTS))
    if isinstance(config, SystemExit):
        assert config.code == 0 and {"-h", "--help", "--print-config"} & set(argv)
    if not isinstance(config, RunConfig):
        return None
    again = RunConfig.from_dict(load_yaml(config.to_yaml(), "text"), TABLES, DEFAULTS)
    assert (again, again.hash) == (config, config.hash)
    assert config.flatten() and config.run_dir.name.endswith(config.hash)
    return config


def test_the_recipes_are_configurations() -> None:
    assert all(configure("--config", str(path)) for path in RECIPES)
    assert len(RECIPES) >= 5


KINDS = ["optimizer", "optimizer.name", "optimizer.lr", "adapter", "tracking.tags", "seed", "name", "data.num_train"]


def as_file(pairs: list[tuple[str, str]]) -> str:
    """YAML with the values as they stand: `a.b` and `x` give `a:` and below it `b: x`."""
    return "".join(f"{key}: {value}\n".replace(".", ":\n  ", key.count(".")) for key, value in pairs)


@pytest.mark.parametrize("key", KINDS)
def test_each_odd_value_is_a_configuration_or_a_config_error(folder: Path, key: str) -> None:
    for value in VALUES:
        path = folder / "value.yaml"
        path.write_bytes(as_file([(key, value)]).encode(errors="surrogatepass"))
        configure("model.id=x", "--config", str(path))
        configure("model.id=x", f"{key}={value}")


@fuzz(150)
@given(
    text=st.text() | values | st.lists(st.tuples(keys, values), max_size=3).map(as_file), raw=st.none() | st.binary()
)
def test_any_file_is_a_configuration_or_a_config_error(folder: Path, text: str, raw: bytes | None) -> None:
    path = folder / "any.yaml"
    path.write_bytes(raw if raw is not None else text.encode(errors="surrogatepass"))
    configure(*BASE, "--config", str(path))


@fuzz(250)
@given(content=damaged([path.read_bytes() for path in RECIPES], splinters), argv=st.just([]) | argvs)
def test_a_damaged_recipe_is_a_configuration_or_a_config_error(
    folder: Path, content: bytes, argv: list[list[str]]
) -> None:
    path = folder / "damaged.yaml"
    path.write_bytes(content)
    configure("--config", str(path), *itertools.chain(*argv))


@fuzz(250)
@given(argv=argvs)
@example(argv=[["--help"], ["\0"]])
@example(argv=[["adapter.x=\udcff"], ["--print-config"]])
def test_any_words_are_a_configuration_or_a_config_error(argv: list[list[str]]) -> None:
    configure(*BASE, *itertools.chain(*argv))


# ------------------------------------------------------------ DeepSpeed file


def read_deepspeed(folder: Path, content: bytes) -> dict[str, Any] | None:
    path = folder / "deepspeed.json"
    path.write_bytes(content)
    config = attempt(lambda: read_deepspeed_config(path))
    if not isinstance(config, dict):
        return None
    for dtype in ("float32", "bfloat16"):
        with suppress(ConfigError):
            fill_deepspeed_config(config, dtype, None)
    return config


deepspeed_trees = st.dictionaries(st.sampled_from([*ZERO3, "bf16", "fp16", "optimizer", "x"]), junk) | junk
NEARLY = [
    b"null",
    b"[]",
    b"3",
    b'{"stage": 3}',
    b'{"enabled": true}',
    b"NaN",
    b"1" * 5000,
    b"[" * 99,
    b"\xff",
    b"\\ud800",
]


@fuzz(300)
@given(
    content=st.binary()
    | damaged([path.read_bytes() for path in (ROOT / "ds_configs").glob("*.json")], st.sampled_from(NEARLY))
    | deepspeed_trees.map(lambda tree: json.dumps(tree).encode())
    | deepspeed_trees.map(lambda tree: json.dumps({**ZERO3, **tree} if isinstance(tree, dict) else tree).encode())
)
def test_any_deepspeed_file_is_zero3_or_a_config_error(folder: Path, content: bytes) -> None:
    config = read_deepspeed(folder, content)
    assert config is None or config["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[" * 100_000, "a DeepSpeed JSON file"),
        ('{"zero_optimization": null}', "zero_optimization in"),
        ('{"zero_optimization": [3]}', "to be a section of keys, got [3]"),
        ('{"zero_optimization": {"stage": 3}, "bf16": null}', "bf16 in"),
        ('{"zero_optimization": {"stage": 3}, "fp16": true}', "fp16 in"),
        ('{"zero_optimization": {"stage": "3"}}', "stage 3 in"),
        ("[3]", "stage 3 in"),
        ("\udcff", "a DeepSpeed JSON file"),
    ],
)
def test_a_deepspeed_file_of_another_shape_is_refused(folder: Path, text: str, part: str) -> None:
    path = folder / "shape.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_config(path)
    assert part in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


# ------------------------------------------------------------ data files

numbers = itertools.count()


@pytest.fixture(scope="module")
def _cache(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        level = datasets.logging.get_verbosity()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()
        datasets.logging.set_verbosity(level)


def read_rows(folder: Path, suffix: str, content: bytes) -> list[dict[str, Any]] | None:
    path = folder / f"{next(numbers)}{suffix}"  # a new name each time: the library caches by name and time
    path.write_bytes(content)
    rows = attempt(lambda: Source(files={"train": str(path)}).records("train"))
    path.unlink()
    if not isinstance(rows, list):
        assert path.name in str(rows)
        return None
    assert rows and all(isinstance(row, dict) for row in rows)
    return rows


ROWS = [{"text": f"it was {word} \u00e9", "label": label} for label, word in enumerate(["poor", "fine", "so\tso", '"'])]
WHOLES = {
    ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
    ".json": json.dumps(ROWS).encode(),
    ".csv": b'text,label\n"it was, poor",0\nit was fine,1\n"say ""so""\nso",0\n\xc3\xa9,1\n',
    ".tsv": b'text\tlabel\nit was, poor\t0\nit was "fine\t1\n\xc3\xa9\t1\n',
}
ODD = [
    *(
        b"\n",
        b"\r",
        b"\r\n",
        b"\0",
        b",",
        b"\t",
        b'"',
        b"'",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b"null",
        b"NaN",
        b"\xef\xbb\xbf",
    ),
    *(
        b'{"a": 1}\n',
        b'{"a": [1, {"b": null}]}\n',
        b'{"a": {"": {}}}\n',
        b'{"text": 5, "label": "x"}\n',
        b"[]\n",
        b"{}\n",
    ),
    *(b"9" * 400, b"1e999", b"-0", b"2024-01-01T00:00:00", b"true", b"\xff\xfe", b"\\ud800", b'"\\ud800"', b",,,,\n"),
    *(b'{"_type": "Image"}', b'{"text": "a", "text": 2}\n', b"[" * 3000, b'{"a":' * 3000, b"a" * 70_000),
]


objects = st.dictionaries(st.sampled_from(["text", "label", ""]) | st.text(max_size=3), junk, max_size=3)
tables = st.lists(objects | objects | junk, max_size=4).map(
    lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()
)


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("suffix", WHOLES)
@fuzz(50)
@given(data=st.data())
def test_any_data_file_holds_rows_or_gives_a_config_error(folder: Path, suffix: str, data: st.DataObject) -> None:
    whole = damaged([WHOLES[suffix]], st.sampled_from(ODD) | st.binary(max_size=8))
    read_rows(folder, suffix, data.draw(whole | tables | st.binary() | st.lists(st.sampled_from(ODD)).map(b"".join)))


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("suffix", WHOLES)
def test_each_odd_piece_holds_rows_or_gives_a_config_error(folder: Path, suffix: str) -> None:
    assert len(read_rows(folder, suffix, WHOLES[suffix]) or []) >= 3
    for piece in (*ODD, b""):
        read_rows(folder, suffix, piece if suffix == ".json" else WHOLES[suffix] + piece)


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("empty.jsonl", "", "an empty file"),
        ("blank.json", " \n\n", "an empty file"),
        ("null.jsonl", "null\n", "null for a row (line 1)"),  # pyarrow would end the process with SIGSEGV
        ("later.jsonl", '{"a": 1}\n\nnull\n{"a": 2}\n', "null for a row (line 3)"),
        ("array.json", '[null, {"a": 1}]', "null for a row"),
        ("deep.jsonl", '{"a": 1}\n{"a": ' + "[" * 20_000 + "]" * 20_000 + "}\n", "recursion depth"),  # likewise
        ("nested.jsonl", '{"a": ' + "[" * 70 + "]" * 70 + "}\n", "more than 64 nested levels for a row (line 1)"),
        ("half.jsonl", '{"a": 1}\n{"a": ', "line 2"),
        ("empty.csv", "", "No columns"),
        ("ragged.csv", "a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3"),
        ("wide.csv", "text,label\nit was, poor,0\nit was fine,1\n", "Length of header"),
        ("wide.tsv", "text\tlabel\nit was\tpoor\t0\n", "Length of header"),
    ],
)
def test_a_data_file_that_cannot_be_used_is_refused_with_the_reason(
    folder: Path, name: str, text: str, part: str
) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        Source(files={"train": str(folder / name)}).records("train")
    assert part in str(caught.value) and name in str(caught.value)


@pytest.mark.usefixtures("_cache")
def test_a_data_file_whose_name_is_a_pattern_is_read_and_no_other(folder: Path) -> None:
    for number, name in enumerate(["[!a].csv", "b.csv", "x[1].csv", "x1.csv", "y*.csv", "yz.csv"]):
        (folder / name).write_text(f"number\n{number}\n")
    for number, name in enumerate(["[!a].csv", "b.csv", "x[1].csv", "x1.csv", "y*.csv", "yz.csv"]):
        assert Source(files={"train": str(folder / name)}).records("train") == [{"number": number}]
    (folder / "run[1]").mkdir()
    (folder / "run[1]" / "train.jsonl").write_text('{"number": 6}\n')
    assert Source(path=str(folder / "run[1]")).records("train") == [{"number": 6}]


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize(
    "text",
    [
        '\ufeff{"a": [1, null], "b": {"c": null}}\n\n',
        '[{"a": [1, null], "b": {"c": null}}]',
        '{\n  "a": [1, null],\n  "b": {"c": null}\n}',
        '{"a":[1,null],"b":{"c":null}}\r\n',
    ],
)
def test_the_spellings_of_json_are_read(folder: Path, text: str) -> None:
    assert read_rows(folder, ".json", text.encode()) == [{"a": [1, None], "b": {"c": None}}]


def test_a_run_does_not_choose_what_of_a_trusted_model_is_loaded(tmp_path: Path) -> None:
    """The user has named a repository; another version of it, and a tokenizer from elsewhere, may hold other code."""

    def model_of(base: str, **options: object) -> ModelConfig:
        config = with_base(RunConfig.from_dict({"model": {"id": "a/b", **options}}, TABLES, DEFAULTS), base)
        check_base(config, base)
        return config.model

    version, elsewhere = {"revision": "refs/pr/1"}, {"tokenizer": "evil/c"}
    for options in ({"allow_pickle": True, **version}, {"trust_remote_code": True, **elsewhere}):
        with pytest.raises(ConfigError, match=r"got (refs/pr/1|evil/c): download what you trust into one folder"):
            model_of("a/b", **options)
    for permission in ("allow_pickle", "trust_remote_code"):
        model = model_of(str(tmp_path), **{permission: True}, **version, **elsewhere)
        assert (model.id, model.revision) == (str(tmp_path), None)
        assert model.tokenizer == (None if permission == "trust_remote_code" else "evil/c"), "of pickles it has none"
    model = model_of("moved", **version, **elsewhere)
    assert (model.id, model.revision, model.tokenizer) == ("moved", "refs/pr/1", "evil/c"), "neither can run code"

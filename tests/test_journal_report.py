"""`zoscale journal`: what it prints and draws of journals whole, torn, empty, odd and broken."""

from __future__ import annotations

import builtins
import json
import math
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, environment, status_of
from test_journal import HEADER, INF, NAN, NUM_STEPS, RECORDS, START, record, write

from zoscale import cli
from zoscale.recovery.journal import Journal, JournalWriter
from zoscale.recovery.journal_format import Header, Record

Call = Callable[..., str]
FULL = {
    **HEADER.config,
    "task": {"name": "sst2"},
    "probe": {"name": "block", "rows": 0.5},
    "estimator": {"name": "two_point", "tau": 0.001, "num_directions": 2},
}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The output of the command, which must succeed."""

    def call_(*arguments: object) -> str:
        assert cli.main(["journal", *map(str, arguments)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return call_


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Call:
    """What the command says against its arguments: one line, no traceback, nothing on stdout."""

    def refused_(*arguments: object) -> str:
        assert status_of("journal", *map(str, arguments)) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("zoscale journal: error: expected ") and err.count("\n") == 1
        return err

    return refused_


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "journal.bin", header=replace(HEADER, config=FULL))
    return tmp_path / "run"


def some(path: Path, records: list[Record], header: Header = HEADER) -> Path:
    """A journal of any records at `path`."""
    writer = JournalWriter.create(path, header, sync_every=10**9)
    for item in records:
        writer.append(item)
    writer.close()
    return path


def constant(step: int, value: float) -> Record:
    return Record(step, (value,) * 4, 1.0, (value,) * 2, (value,) * 2, False)


# ------------------------------------------------------------ text


def test_the_header_names_the_run(call: Call, run_dir: Path) -> None:
    facts = dict(line.split(maxsplit=1) for line in call(run_dir).partition("\n\n")[0].splitlines())
    journal = Journal.read(run_dir / "journal.bin")
    assert facts == {
        "run": "tiny, configuration 0123456789",
        "seed": "7",
        "methods": "task sst2, probe block, estimator two_point, optimizer zo_sgd",
        "code": "0.1.0 c0de",
        "model": "base",
        "trainable": "lora",
        "data": "rows",
        "steps": "12 of 12",
        "skipped": "1: step 3",
        "bytes": f"{journal.header.record_bytes} per step, {journal.num_bytes:,} in all",
    }


def test_a_run_directory_and_its_journal_are_the_same(call: Call, run_dir: Path) -> None:
    assert call(run_dir) == call(run_dir / "journal.bin")


def test_the_table_has_both_ends_of_a_long_run(call: Call, run_dir: Path) -> None:
    heads, *rows = table(call(run_dir))
    assert heads == ["step", "loss", "projected", "grads", "lr"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "...", "7", "8", "9", "10", "11"]
    for row in rows[:5] + rows[6:]:
        expected = record(int(row[0]))
        numbers = [sum(expected.losses) / 4, *expected.projected_grads, *expected.lrs]
        assert row[1:6] == [f"{number:.6g}" for number in numbers]
        assert row[6:] == (["skipped"] if row[0] == "3" else [])


def table(out: str) -> list[list[str]]:
    return [line.split() for line in out.partition("\n\n")[2].splitlines()]


@pytest.mark.parametrize(("num_steps", "cut"), [(0, False), (1, False), (11, False), (12, True), (13, True)])
def test_a_short_run_is_shown_whole(call: Call, tmp_path: Path, num_steps: int, cut: bool) -> None:
    some(tmp_path / "j", [constant(step, 0.5) for step in range(num_steps)])
    shown = [row[0] for row in table(call(tmp_path / "j"))[1:]]
    steps = [str(step) for step in range(num_steps)]
    assert shown == ([*steps[:5], "...", *steps[-5:]] if cut else steps)


@pytest.mark.parametrize(("num", "shown"), [(0, []), (1, [11]), (3, [9, 10, 11]), (12, range(12)), (99, range(12))])
def test_last_shows_the_last_steps_and_all_of_them(call: Call, run_dir: Path, num: int, shown: list[int]) -> None:
    assert [row[0] for row in table(call(run_dir, "--last", num))[1:]] == [str(step) for step in shown]
    lines = call(run_dir, "--last", num, "--json").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(shown)


def test_many_numbers_are_counted(call: Call, tmp_path: Path) -> None:
    header = replace(HEADER, num_directions=40, num_groups=5)
    some(tmp_path / "j", [Record(0, (1.0,) * 4, 1.0, (0.25,) * 40, (0.5,) * 5, False)], header)
    assert call(tmp_path / "j").endswith("   0     1  0.25 0.25 0.25 ... (40)  0.5 0.5 0.5 ... (5)\n")


def test_torn_bytes_are_told(call: Call, run_dir: Path) -> None:
    path = run_dir / "journal.bin"
    path.write_bytes(path.read_bytes()[:-5])
    out = call(run_dir)
    torn = Journal.read(path).num_torn
    assert f"\ntorn       {torn} bytes" in out and "\nsteps      11 of 12\n" in out
    assert f" {path.stat().st_size:,} in all" in out


def test_many_skipped_steps_are_counted(call: Call, tmp_path: Path) -> None:
    some(tmp_path / "j", [replace(constant(step, NAN), skipped=True) for step in range(5)])
    assert "\nskipped    5: step 0 1 2 ... (5)\n" in call(tmp_path / "j")


@pytest.mark.parametrize(
    "config", [{}, {"name": None, "task": 3, "train": [], "optimizer": {}}, {"train": {"steps": {}}}]
)
def test_a_journal_of_any_configuration_is_shown(call: Call, tmp_path: Path, config: dict[str, Any]) -> None:
    some(tmp_path / "j", RECORDS, replace(HEADER, config=config))
    assert "\nseed       7\n" in call(tmp_path / "j")


def test_what_a_file_says_cannot_command_the_terminal(call: Call, tmp_path: Path) -> None:
    header = replace(HEADER, config={"name": "\x1b[2J\nx"}, code="\x07" * 500, model="\u202e")
    out = call(some(tmp_path / "j", [], header))
    assert "\\x1b[2J\\nx" in out and "\\u202e" in out
    assert all(char.isprintable() for char in out if char != "\n") and max(map(len, out.splitlines())) < 120


# ------------------------------------------------------------ JSON


def test_json_has_every_step_as_a_line_that_strict_readers_take(call: Call, run_dir: Path) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in call(run_dir, "--json").splitlines()]
    assert len(rows) == NUM_STEPS
    for row, expected in zip(rows, RECORDS, strict=True):
        assert list(row) == ["step", "loss", "losses", "count", "projected_grads", "lrs", "skipped"]
        assert (row["step"], row["count"], row["skipped"]) == (expected.step, expected.count, expected.step == 3)
        assert tuple(row["projected_grads"]) == expected.projected_grads and tuple(row["lrs"]) == expected.lrs
        if expected.step != 3:
            assert row["loss"] == sum(expected.losses) / 4 and tuple(row["losses"]) == expected.losses
    assert (rows[3]["loss"], rows[3]["losses"]) == ("nan", [3.1, "inf", "nan", "-inf"])


@pytest.mark.parametrize(
    ("estimator", "loss"),
    [
        ({"name": "two_point", "num_directions": 1}, 1.5),  # of ZO-SGD-Cons: three trials follow
        ({"name": "two_point", "num_directions": 2}, 3.75),
        ({"name": "one_sided", "num_directions": 2}, 1.0),
        ({"name": "fzoo", "num_directions": 2}, 1.0),
        ({"name": "forward_grad", "num_directions": 1}, 1.0),
        ({"name": "backpropagation"}, 1.0),
        ({"name": "two_point", "num_directions": 9}, 6.2),
        ({"name": "two_point", "num_directions": 1.5}, 6.2),
        ({"name": "of tomorrow"}, 6.2),
        ({"name": ["fzoo"]}, 6.2),
        ("fzoo", 6.2),
        ({}, 6.2),
    ],
)
def test_the_loss_is_what_the_estimator_makes_of_the_losses(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: Any, loss: float
) -> None:
    """In the table, in JSON and in the picture; of an estimator that is none of ours, their mean."""
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: [drawn.append(a[1]), *plot(self, *a, **k)])
    losses = (1.0, 2.0, 4.0, 8.0, 16.0)
    header = replace(HEADER, config={"estimator": estimator}, num_losses=len(losses))
    some(tmp_path / "j", [Record(0, losses, 1.0, (0.5,) * 2, (0.5,) * 2, False)], header)
    assert table(call(tmp_path / "j", "--plot", tmp_path / "a.png"))[1][1] == f"{loss:g}"
    assert json.loads(call(tmp_path / "j", "--json"))["loss"] == loss
    assert drawn[0].tolist() == [[loss]]


# ------------------------------------------------------------ picture


def picture(path: Path) -> tuple[int, int]:
    """Width and height of a PNG that is whole, by its checksums."""
    content, place, kinds = path.read_bytes(), 8, []
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        kind, body = content[place + 4 : place + 8], content[place + 4 : place + 8 + length]
        assert struct.unpack_from(">I", content, place + 8 + length)[0] == zlib.crc32(body)
        kinds.append(kind)
        place += 12 + length
    assert kinds[0] == b"IHDR" and b"IDAT" in kinds and kinds[-1] == b"IEND"
    width, height = struct.unpack_from(">II", content, 16)
    return width, height


def test_plot_draws_the_values(call: Call, run_dir: Path, tmp_path: Path) -> None:
    assert call(run_dir, "--plot", tmp_path / "a.png") == call(run_dir), "the table is printed all the same"
    width, height = picture(tmp_path / "a.png")
    assert width > 600 and height > 600
    some(tmp_path / "flat", [constant(step, 0.5) for step in range(NUM_STEPS)])
    call(tmp_path / "flat", "--plot", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_plot_draws_loss_with_its_mean_and_absolute_projected_grads_and_lrs(
    call: Call, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    seen: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: [seen.append(self), savefig(self, *a, **k)])
    some(tmp_path / "j", [replace(constant(step, -2.0), losses=(float(step),) * 4) for step in range(60)])
    call(tmp_path / "j", "--plot", tmp_path / "a.png", "--last", 50)
    loss, grads, lrs = seen[0].axes
    assert [axes.get_ylabel() for axes in (loss, grads, lrs)] == ["loss", "|projected grad|", "lr"]
    dots, mean = (line.get_ydata() for line in loss.lines)
    assert list(loss.lines[0].get_xdata()) == list(dots) == list(range(10, 60))
    assert list(mean[:3]) == [10.0, 10.5, 11.0] and mean[-1] == 58.0, "of the last three"
    assert all(value == 2.0 for line in grads.lines for value in line.get_ydata())
    assert all(value == -2.0 for line in lrs.lines for value in line.get_ydata())


def test_the_running_mean_leaves_out_what_is_not_finite(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: [drawn.append(a[1]), *plot(self, *a, **k)])
    values = [1.0, NAN, 3.0, INF, NAN, NAN, 5.0, *[7.0] * 33]
    some(tmp_path / "j", [constant(step, value) for step, value in enumerate(values)])
    call(tmp_path / "j", "--plot", tmp_path / "a.png")
    mean = [*drawn[1]]
    assert mean[:5] == [1.0, 1.0, 2.0, 3.0, 3.0] and math.isnan(mean[5]) and mean[6:9] == [5.0, 6.0, 19 / 3]


@pytest.mark.parametrize("value", [NAN, INF, 0.0, 1e308, -1e308, 1e99, 5e-324, -1.0])
@pytest.mark.parametrize("num_steps", [1, 30])
def test_plot_takes_any_numbers_without_a_warning(call: Call, tmp_path: Path, value: float, num_steps: int) -> None:
    some(tmp_path / "j", [constant(step, value if step % 3 else -value) for step in range(num_steps)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(tmp_path / "j", "--plot", tmp_path / "a.png")
    assert picture(tmp_path / "a.png")


def test_a_picture_that_cannot_be_made_is_an_error(
    refused: Call, capsys: pytest.CaptureFixture[str], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some(run_dir / "empty", [])
    assert "at least one step" in refused(run_dir / "empty", "--plot", run_dir / "a.png")
    assert not (run_dir / "a.png").exists()
    assert cli.main(["journal", str(run_dir), "--plot", str(run_dir / "nowhere" / "a.png")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("zoscale journal: error: ") and "nowhere" in err and err.count("\n") == 1

    def import_(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("no matplotlib here")
        return imported(name, *arguments)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", import_)
    assert "pip install matplotlib" in refused(run_dir, "--plot", run_dir / "a.png")


# ------------------------------------------------------------ mistakes


def test_a_bad_path_or_file_is_one_line_on_stderr(refused: Call, run_dir: Path, tmp_path: Path) -> None:
    assert "journal.bin" in refused(tmp_path)
    assert "nowhere" in refused(tmp_path / "nowhere")
    assert "journal.bin" in refused("/dev/null"), "a device may be endless"
    assert "check the path" in refused("a\0b")
    path = run_dir / "journal.bin"
    content = path.read_bytes()
    path.write_bytes(content[: START + 200] + b"\0\0\0" + content[START + 200 :])
    assert "corruption at byte" in refused(run_dir)
    path.write_bytes(b"{}")
    assert "another kind of file" in refused(run_dir)


def test_a_bad_option_ends_with_status_2(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], [str(run_dir), "--last", "x"], [str(run_dir), "--last", "-1"], [str(run_dir), "--lost"]):
        assert status_of("journal", *arguments) == 2
        assert "zoscale journal: error: " in capsys.readouterr().err


@pytest.mark.parametrize("num_steps", [5, 5000])
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, num_steps: int) -> None:
    """`zoscale journal RUN --json | head -0`, with less and with more than a buffer of output."""
    some(tmp_path / "j", [constant(step, 0.5) for step in range(num_steps)])
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "zoscale", "journal", str(tmp_path / "j"), "--json"]
    env = environment(PYTHONUNBUFFERED="")
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")

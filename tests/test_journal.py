"""The step journal: what is read is what was written, and no damage goes unnoticed or costs an earlier record."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import signal
import statistics
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import JobServer, run_dir_of
from processes import ROOT, environment, run

import zoscale.recovery.journal
from zoscale.config import ConfigError
from zoscale.recovery.journal import Journal, JournalWriter
from zoscale.recovery.journal_format import FORMAT, Header, Record

HEADER = Header(
    seed=7,
    config={"name": "tiny", "optimizer": {"name": "zo_sgd", "lr": 0.001}, "train": {"steps": 12}},
    config_hash="0123456789",
    code="0.1.0 c0de",
    model="base",
    trainable="lora",
    data="rows",
    num_losses=4,
    num_directions=2,
    num_groups=2,
)
NUM_STEPS = 12
INF, NAN = float("inf"), float("nan")


def record(step: int) -> Record:
    """Made-up values; step 3 was skipped."""
    losses = (0.1 + step, INF, NAN, -INF) if step == 3 else tuple(1 / (step + k + 1) for k in range(4))
    return Record(step, losses, 16.0, (step - 5.5, -1e-300 * step), (1e-3 / (step + 1), 0.0), step == 3)


def same(one: list[Record], other: list[Record]) -> bool:
    """Whether the bits are equal: nan is nan here."""

    def bits(r: Record) -> tuple[object, ...]:
        values = (r.losses, (r.count,), r.projected_grads, r.lrs)
        return (r.step, r.skipped, *(struct.pack(f"<{len(part)}d", *part) for part in values))

    return [bits(r) for r in one] == [bits(r) for r in other]


def write(path: Path, num_steps: int = NUM_STEPS, header: Header = HEADER) -> bytes:
    """A journal of `num_steps` at `path`; returns its content."""
    writer = JournalWriter.create(path, header)
    for step in range(num_steps):
        writer.append(record(step))
    writer.close()
    return path.read_bytes()


START = 12 + len(json.dumps({**HEADER.__dict__}, separators=(",", ":"))) + 4
"""Where the records start, by the format as documented."""
SIZE = 8 + 1 + 8 * (4 + 1 + 2 + 2) + 4
RECORDS = [record(step) for step in range(NUM_STEPS)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.bin"


@pytest.fixture
def content(path: Path) -> bytes:
    return write(path)


def read(path: Path, content: bytes) -> Journal:
    path.write_bytes(content)
    return Journal.read(path)


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Journal.read(path)
    return str(caught.value)


# ------------------------------------------------------------ round trip


def test_what_is_read_is_what_was_written_to_the_bit(path: Path, content: bytes) -> None:
    journal = Journal.read(path)
    assert journal.header == HEADER
    assert same(journal.records, RECORDS)
    assert journal.records[3].skipped and math.isnan(journal.records[3].losses[2])
    assert (journal.num_bytes, journal.num_torn) == (len(content), 0)


def test_the_layout_is_the_documented_one(content: bytes) -> None:
    """Read here with `struct` and `json` alone, so that the format cannot drift."""
    magic, length = struct.unpack_from("<8sI", content)
    assert magic == b"ZOJRNL\r\n"
    assert json.loads(content[12 : 12 + length]) == {**HEADER.__dict__, "format": FORMAT}
    (header_sum,) = struct.unpack_from("<I", content, 12 + length)
    assert header_sum == zlib.crc32(content[: 12 + length])
    assert 12 + length + 4 == START
    body = content[START + 5 * SIZE : START + 6 * SIZE - 4]
    step, flags, *values = struct.unpack("<QB9d", body)
    expected = record(5)
    assert (step, flags) == (5, 0)
    assert tuple(values) == (*expected.losses, expected.count, *expected.projected_grads, *expected.lrs)
    (record_sum,) = struct.unpack_from("<I", content, START + 6 * SIZE - 4)
    assert record_sum == zlib.crc32(body, header_sum)


@pytest.mark.parametrize(("k", "q", "groups"), [(1, 1, 1), (2, 1, 1), (33, 32, 3)])
def test_record_bytes_is_the_growth_of_the_file(path: Path, k: int, q: int, groups: int) -> None:
    header = replace(HEADER, num_losses=k, num_directions=q, num_groups=groups)
    writer = JournalWriter.create(path, header)
    sizes = [path.stat().st_size]
    for step in range(3):
        writer.append(Record(step, (0.5,) * k, 1.0, (0.25,) * q, (0.125,) * groups, False))
        sizes.append(path.stat().st_size)
    writer.close()
    assert {after - before for before, after in itertools.pairwise(sizes)} == {header.record_bytes}
    read_back = Journal.read(path).records[2]
    assert (len(read_back.losses), len(read_back.projected_grads), len(read_back.lrs)) == (k, q, groups)


def test_a_journal_without_records_is_one(path: Path) -> None:
    content = write(path, 0)
    assert Journal.read(path) == Journal(HEADER, [], len(content))


def test_a_journal_goes_on_where_it_was_read(path: Path) -> None:
    content = write(path, 5)
    journal = Journal.read(path)
    writer = JournalWriter(path, journal.header, journal.num_bytes)
    for step in range(5, NUM_STEPS):
        writer.append(record(step))
    writer.close()
    assert path.read_bytes()[: len(content)] == content
    assert same(Journal.read(path).records, RECORDS)


def test_a_header_that_another_version_spells_otherwise_can_be_continued(path: Path) -> None:
    """The JSON of equal values may change with the library that writes it (spaces, 1e-05 for 0.00001)."""
    text = json.dumps(HEADER.__dict__, indent=1).encode()
    head = b"ZOJRNL\r\n" + struct.pack("<I", len(text)) + text
    path.write_bytes(head + struct.pack("<I", zlib.crc32(head)))
    journal = Journal.read(path)
    writer = JournalWriter(path, journal.header, journal.num_bytes)
    writer.append(record(0))
    writer.close()
    again = Journal.read(path)
    assert same(again.records, RECORDS[:1]) and again.num_torn == 0


# ------------------------------------------------------------ a torn end


def test_every_torn_tail_loses_only_the_record_it_cuts(path: Path, content: bytes) -> None:
    """Cut at every byte of the last two records."""
    for end in range(len(content) - 2 * SIZE, len(content)):
        journal = read(path, content[:end])
        whole, torn = divmod(end - START, SIZE)
        assert same(journal.records, RECORDS[:whole])
        assert (journal.num_bytes, journal.num_torn) == (end - torn, torn)


def test_every_torn_tail_is_cut_off_and_the_journal_goes_on(path: Path, content: bytes) -> None:
    for end in range(len(content) - 2 * SIZE, len(content)):
        journal = read(path, content[:end])
        writer = JournalWriter(path, journal.header, journal.num_bytes)
        assert path.read_bytes() == content[: journal.num_bytes]
        for step in range(len(journal.records), NUM_STEPS):
            writer.append(record(step))
        writer.close()
        assert path.read_bytes() == content


@pytest.mark.parametrize("torn", [0, 1, SIZE - 1])
@pytest.mark.parametrize("zeros", [1, SIZE - 1, SIZE, 3 * SIZE + 5, 4096])
def test_a_tail_of_zeros_is_torn(path: Path, content: bytes, torn: int, zeros: int) -> None:
    """A power cut may leave a file longer than what was written to it."""
    journal = read(path, content[: START + 7 * SIZE + torn] + bytes(zeros))
    assert same(journal.records, RECORDS[:7])
    assert journal.num_torn == torn + zeros


def test_a_wrong_byte_in_the_last_record_is_a_torn_end(path: Path, content: bytes) -> None:
    for place in range(len(content) - SIZE, len(content)):
        journal = read(path, flipped(content, place))
        assert same(journal.records, RECORDS[:-1])
        assert journal.num_torn == SIZE


def test_a_long_end_without_records_is_searched_only_so_far(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that may hold records is no torn end: a writer would cut them off."""
    monkeypatch.setattr(zoscale.recovery.journal, "_MAX_SEARCH", 400 * SIZE)  # 400 places
    assert read(path, content + bytes(400 + SIZE - 1)).num_torn == 400 + SIZE - 1
    message = refusal(path, content + bytes(400 + SIZE))
    assert f"corruption at byte {len(content)} (step {NUM_STEPS}), before {SIZE} bytes too many" in message
    assert f"{2 * SIZE} bytes too many" in refusal(path, content + bytes(400 + SIZE) + content[-SIZE:])
    message = refusal(path, content[:-1] + b"?" + content[START:] + bytes(9999))
    assert f"before an intact record at byte {len(content)}" in message, "what is found first counts"


# ------------------------------------------------------------ damage within


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


@pytest.mark.parametrize("step", [0, 4, NUM_STEPS - 2])
def test_a_flipped_bit_in_any_byte_of_a_middle_record_is_refused(path: Path, content: bytes, step: int) -> None:
    place = START + step * SIZE
    for byte in range(place, place + SIZE):
        message = refusal(path, flipped(content, byte, byte % 8))
        assert f"corruption at byte {place} (step {step})" in message
        assert f"intact record at byte {place + SIZE}" in message
        assert str(path) in message


@pytest.mark.parametrize("num", [1, 7, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE])
def test_bytes_missing_in_the_middle_are_refused(path: Path, content: bytes, num: int) -> None:
    for byte in range(START + 4 * SIZE, START + 5 * SIZE, 3):
        message = refusal(path, content[:byte] + content[byte + num :])
        assert f"corruption at byte {START + 4 * SIZE} (step 4)" in message


@pytest.mark.parametrize("num", [1, 7, SIZE, 5000])
def test_bytes_too_many_in_the_middle_are_refused(path: Path, content: bytes, num: int) -> None:
    for byte in range(START + 4 * SIZE, START + 5 * SIZE, 9):
        message = refusal(path, content[:byte] + b"\x5a" * num + content[byte:])
        assert f"corruption at byte {START + 4 * SIZE} (step 4)" in message


def test_a_rewrite_of_line_ends_is_refused(path: Path, content: bytes) -> None:
    assert "another kind of file" in refusal(path, content.replace(b"\r\n", b"\n"))


@pytest.mark.parametrize("order", [[0, 1, 3], [0, 2, 1, 3], [1, 2], [0, 1, 1], [0, 0], [5]])
def test_whole_records_at_a_wrong_step_are_refused(path: Path, content: bytes, order: list[int]) -> None:
    """Their checksums are right."""
    parts = [content[START + step * SIZE : START + (step + 1) * SIZE] for step in order]
    good = next(i for i, step in enumerate(order) if step != i)
    message = refusal(path, content[:START] + b"".join(parts))
    assert f"corruption at byte {START + good * SIZE} (step {good})" in message


def test_a_writer_that_skips_a_step_is_found_out(path: Path) -> None:
    writer = JournalWriter.create(path, HEADER)
    for step in (0, 1, 3):
        writer.append(record(step))
    writer.close()
    assert "(step 2)" in refusal(path, path.read_bytes())


@pytest.mark.parametrize("other", [replace(HEADER, seed=8), replace(HEADER, model="bas3")])
def test_records_of_another_journal_are_no_records(path: Path, content: bytes, other: Header) -> None:
    foreign = write(path, NUM_STEPS, other)
    assert len(foreign) == len(content)
    journal = read(path, content[:START] + foreign[START:])
    assert not journal.records and journal.num_torn == NUM_STEPS * SIZE
    journal = read(path, content[: START + 5 * SIZE] + foreign[START + 5 * SIZE :])
    assert same(journal.records, RECORDS[:5])


def test_any_damage_to_the_header_is_refused(path: Path, content: bytes) -> None:
    for byte in range(START):
        for bit in (0, 3, 7):
            message = refusal(path, flipped(content, byte, bit))
            assert ("an intact header" if byte >= 8 else "another kind of file") in message


def test_a_header_cut_at_any_byte_is_refused(path: Path, content: bytes) -> None:
    for end in range(START):
        assert str(path) in refusal(path, content[:end])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"format": FORMAT + 1}, f"journal format {FORMAT}"),
        ({"num_losses": 0}, "an intact header"),
        ({"num_groups": 2**40}, "an intact header"),
        ({"config": [1]}, "an intact header"),
    ],
)
def test_a_header_with_a_right_checksum_and_wrong_values_is_refused(
    path: Path, change: dict[str, object], part: str
) -> None:
    text = json.dumps({**HEADER.__dict__, **change}).encode()
    head = b"ZOJRNL\r\n" + struct.pack("<I", len(text)) + text
    assert part in refusal(path, head + struct.pack("<I", zlib.crc32(head)))


def test_a_path_without_a_journal_is_the_users_mistake(tmp_path: Path) -> None:
    for bad in (tmp_path / "nowhere", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(ConfigError, match="a journal at"):
            Journal.read(bad)


# ------------------------------------------------------------ starting


def test_a_new_journal_is_whole_before_it_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace_(aside: Path, target: Path) -> None:
        assert synced and not path.exists()
        assert Journal(HEADER, [], START) == Journal.read(aside)
        os.replace(aside, target)

    synced: list[int] = []
    monkeypatch.setattr(Path, "replace", replace_)
    monkeypatch.setattr(os, "fsync", synced.append)
    JournalWriter.create(path, HEADER).close()
    assert Journal.read(path).header == HEADER


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_start_that_fails_leaves_no_journal(path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path if step == "replace" else os, step, full)
        with pytest.raises(OSError, match="full"):
            JournalWriter.create(path, HEADER)
    assert not path.exists()
    JournalWriter.create(path, HEADER).close()
    assert Journal.read(path).header == HEADER


@pytest.mark.parametrize(
    "header", [replace(HEADER, config={"x": "y" * 2**20}), replace(HEADER, num_directions=2**16 + 1)]
)
def test_what_could_not_be_read_back_is_not_started(path: Path, header: Header) -> None:
    with pytest.raises(ConfigError):
        JournalWriter.create(path, header)
    assert not path.exists()


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "full")


# ------------------------------------------------------------ appending


def test_a_full_disk_leaves_the_last_whole_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = JournalWriter.create(path, HEADER)
    for step in range(5):
        writer.append(record(step))
    whole, os_write = path.read_bytes(), os.write

    def short(num: int) -> Callable[[int, bytes], int]:
        return lambda file, content: os_write(file, content[:num])

    for attempt in (full, *(short(num) for num in range(SIZE))):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", attempt)
            with pytest.raises(OSError) as caught:  # noqa: PT011
                writer.append(record(5))
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == whole
    for step in range(5, NUM_STEPS):
        writer.append(record(step))
    writer.close()
    assert same(Journal.read(path).records, RECORDS)


FULL_DISK = """
import pathlib, resource, signal, sys
import test_journal as t
from zoscale.recovery.journal import Journal, JournalWriter
path = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (t.START + 5 * t.SIZE + int(sys.argv[2]), hard))
writer = JournalWriter.create(path, t.HEADER)
for step in range(5):
    writer.append(t.record(step))
for _ in range(2):
    try:
        writer.append(t.record(5))
    except OSError as error:
        print(type(error).__name__, path.stat().st_size - t.START - 5 * t.SIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
for step in range(5, t.NUM_STEPS):
    writer.append(t.record(step))
writer.close()
"""


@pytest.mark.parametrize("room", [0, SIZE // 2])
def test_a_file_size_limit_leaves_the_last_whole_record(path: Path, room: int) -> None:
    """The same by the kernel's hand: a short write, then none at all."""
    done = run([sys.executable, "-c", FULL_DISK, str(path), str(room)], PYTHONPATH=f"{ROOT}/tests:{ROOT}")
    assert done.stdout.split("\n")[-3:] == ["OSError 0", "OSError 0", ""]
    assert same(Journal.read(path).records, RECORDS)


def test_a_failing_fsync_is_told_and_keeps_the_file_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = JournalWriter.create(path, HEADER)
    writer.append(record(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="full"):
            writer.append(record(1))
    writer.close()
    journal = Journal.read(path)
    assert same(journal.records, RECORDS[: len(journal.records)]) and journal.num_torn == 0


@pytest.mark.parametrize(("sync_every", "due"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [0, 0, 1, 1, 1, 2, 2])])
def test_fsync_is_called_once_for_every_so_many_records(
    path: Path, monkeypatch: pytest.MonkeyPatch, sync_every: int, due: list[int]
) -> None:
    writer = JournalWriter.create(path, HEADER, sync_every=sync_every)
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    seen = []
    for step in range(7):
        writer.append(record(step))
        seen.append(len(calls))
    assert seen == due
    assert path.stat().st_size == START + 7 * SIZE, "each record is with the kernel at once"
    writer.close()
    assert len(calls) == due[-1] + 1
    writer.close()
    assert len(calls) == due[-1] + 1, "close is idempotent"


ENDLESS = """
import itertools, pathlib, sys
import test_journal as t
from zoscale.recovery.journal import JournalWriter
writer = JournalWriter.create(pathlib.Path(sys.argv[1]), t.HEADER, sync_every=int(sys.argv[2]))
for step in itertools.count():
    writer.append(t.record(step))
    print(step, flush=True)
"""


@pytest.mark.parametrize("sync_every", [1, 1000])
def test_a_killed_process_leaves_every_acknowledged_record(path: Path, sync_every: int) -> None:
    env = environment(PYTHONPATH=f"{ROOT}/tests:{ROOT}")
    command = [sys.executable, "-c", ENDLESS, str(path), str(sync_every)]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(40):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        acknowledged = 40 + process.stdout.read().count("\n")
    assert process.returncode == -signal.SIGKILL
    journal = Journal.read(path)
    assert acknowledged <= len(journal.records) <= acknowledged + 1
    assert same(journal.records, [record(step) for step in range(len(journal.records))])


@pytest.mark.measured
def test_a_record_costs_less_than_a_hundredth_of_a_step(server: JobServer) -> None:
    """At the quickstart's size, each record on the disk before the next step."""
    options = ["train.steps=10", "train.eval_every=0", "data.num_validation=8", "tracking.mlflow=false"]
    server.run(2, "--config", "launch/recipes/quickstart.yaml", *options, f"output_dir={server.folder}")
    run_dir = run_dir_of(server.folder)
    assert run_dir is not None
    step_seconds = 1 / json.loads((run_dir / "summary.json").read_text())["session"]["steps_per_second"]
    journal = Journal.read(run_dir / "journal.bin")
    assert len(journal.records) == 10
    writer = JournalWriter.create(run_dir / "copy.bin", journal.header)
    times = []
    for own in journal.records * 10:
        started = time.perf_counter()
        writer.append(own)
        times.append(time.perf_counter() - started)
    writer.close()
    assert statistics.median(times) < 0.01 * step_seconds

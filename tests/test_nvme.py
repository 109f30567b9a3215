"""What an offload to NVMe is given, and what it is refused; `test_zero3.py` runs it."""

import errno
import fcntl
import json
import multiprocessing
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plain_aio
import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
from processes import ROOT

from zoscale import nvme
from zoscale.config import ConfigError, RunConfig
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.sizes import ModelSize
from zoscale.nvme import check_offload, ready_nvme
from zoscale.runtime import fill_deepspeed_config, read_deepspeed_config

FILE = ROOT / "ds_configs/zero3_nvme.json"


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's reader needs no compiler."""
    for name in ("is_compatible", "load"):
        monkeypatch.setattr(AsyncIOBuilder, name, getattr(AsyncIOBuilder, name))
    plain_aio.plant()


def filled(place: Path) -> dict[str, Any]:
    size = ModelSize(1000, 300, 100, largest_in_block=75, matrices_in_block=6, matrices_outside=2)
    config = fill_deepspeed_config(read_deepspeed_config(FILE), "float32", size, shard_size=2)
    config["zero_optimization"]["offload_param"]["nvme_path"] = str(place)
    return config


@pytest.mark.usefixtures("reader")
def test_a_folder_of_its_own_and_buffers_for_two_blocks(tmp_path: Path) -> None:
    """What a killed process left is removed, what a living one holds is not."""
    for name in ("zoscale-left", "zoscale-held", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.lock").touch()
    held = os.open(tmp_path / "zoscale-held.lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    config = filled(tmp_path)
    ready_nvme(config)
    options = config["zero_optimization"]["offload_param"]
    assert options["buffer_count"] == 2 * 6 + 2 and options["buffer_size"] == 38
    own = Path(options["nvme_path"])
    assert own.parent == tmp_path and own.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(
        ["mine", "zoscale-held", own.name]
    )
    os.close(held)


@pytest.mark.usefixtures("reader")
def test_what_no_buffer_holds_stays_in_memory(tmp_path: Path) -> None:
    """Buffers are as large as a block needs, which a large vocabulary's embedding is not part of."""
    ready_nvme(filled(tmp_path))
    swapper = SimpleNamespace(swap_element_size=2, min_aio_bytes=2**20, elements_per_buffer=2**20)
    is_swappable = partial(AsyncPartitionedParameterSwapper.swappable_tensor, swapper)
    assert [is_swappable(numel=numel) for numel in (2**19 - 1, 2**19, 2**20, 2**20 + 1)] == [False, True, True, False]


def test_ranks_that_start_together_have_a_folder_each(tmp_path: Path) -> None:
    """They clear away what killed processes left, and nothing of each other's."""
    fork, num, rounds = multiprocessing.get_context("fork"), 8, 20
    start, made = fork.Barrier(num, timeout=60), fork.Barrier(num, timeout=60)

    def rank(number: int) -> None:
        nvme.atexit.register = lambda *call: None  # they stay, to be counted: from Python 3.13 on a fork tidies up
        for turn in range(rounds):
            left = tmp_path / f"zoscale-left_{number}_{turn}"
            left.mkdir()
            left.with_suffix(".lock").touch()
            start.wait()
            own = nvme._own_folder(tmp_path)
            made.wait()
            assert own.is_dir() and own.with_suffix(".lock").is_file()

    processes = [fork.Process(target=rank, args=(number,)) for number in range(num)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * num
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == num * rounds


def test_a_folder_of_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock cannot be opened: the default place, the folder for temporary files, is everybody's."""
    (tmp_path / "zoscale-theirs").mkdir()
    (tmp_path / "zoscale-theirs.lock").touch()

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(nvme, "open", refuse, raising=False)
    at_the_end: list[tuple[Any, ...]] = []
    monkeypatch.setattr(nvme.atexit, "register", lambda *call: at_the_end.append(call))
    own = nvme._own_folder(tmp_path)
    assert own.is_dir() and own.with_suffix(".lock").exists()
    for work, *given in at_the_end:
        work(*given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoscale-theirs", "zoscale-theirs.lock"]


@pytest.mark.usefixtures("reader")
def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"expected an nvme_path that takes files .* got .*file"):
        ready_nvme(filled(tmp_path / "file"))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(ConfigError, match=r"expected libaio and its header .* install libaio-dev"):
        ready_nvme(filled(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    monkeypatch.setattr(AsyncIOBuilder, "load", lambda self, verbose: os.path.join(None, "include"))  # type: ignore[call-overload]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"and a CUDA toolkit \(CUDA_HOME\) of torch's version .* got expected str"):
        ready_nvme(filled(tmp_path))  # CUDA_HOME is None
    for offload in (["nvme"], {"device": "tape"}):
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": offload}}))
        with pytest.raises(ConfigError, match="with device none, cpu or nvme"):
            read_deepspeed_config(tmp_path / "zero.json")


@pytest.mark.parametrize(
    ("changes", "zero", "message"),
    [
        ({"adapter": None}, {}, "expected an adapter beside offload_param.device nvme, got none"),
        ({"optimizer": {"name": "fo_sgd", "lr": 1e-3}}, {}, "expected a zero-order optimizer beside"),
        ({}, {"zero_hpz_partition_size": 2}, "expected no zero_hpz_partition_size beside"),
        ({"mesh": {"shard_size": 1}}, {}, "expected another mesh.shard_size beside offload_param.device nvme, got 1"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], zero: dict[str, Any], message: str) -> None:
    deepspeed = read_deepspeed_config(FILE)
    check_offload(RunConfig.from_dict({"model": {"id": "x"}}, TABLES, DEFAULTS), deepspeed)
    deepspeed["zero_optimization"] |= zero
    config = RunConfig.from_dict({"model": {"id": "x"}, **changes}, TABLES, DEFAULTS)
    with pytest.raises(ConfigError, match=message):
        check_offload(config, deepspeed)
    check_offload(config, {"zero_optimization": {}})

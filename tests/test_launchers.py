"""Every launcher that users have: the same two ranks, the same bytes; what contradicts the run is refused."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.default import write_basic_config
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from jobs import SHORT, SIGN, result_bytes, run_dir_of
from processes import free_port, run

from zoscale import launcher
from zoscale.config import ConfigError

TRAIN = ["launch/train.py", *SHORT, *SIGN, "train.steps=4"]
ACCELERATE = ["-m", "accelerate.commands.launch"]
DEEPSPEED = ["-c", "from deepspeed.launcher.runner import main; main()"]
TWO = ["--num_processes", "2"]
LAUNCHERS: dict[str, list[str]] = {
    "accelerate_with_file": [*ACCELERATE, "--config_file", "launch/accelerate/gpu_8.yaml", *TWO, "--main_process_port"],
    "accelerate_without_file": [*ACCELERATE, "--use_deepspeed", *TWO, "--main_process_port"],
    "accelerate_with_defaults_of_two_gpus": [*ACCELERATE, *TWO, "--main_process_port"],
    "accelerate_with_defaults_of_a_cpu": [*ACCELERATE, "--main_process_port"],
    "deepspeed": [*DEEPSPEED, "--num_gpus", "2", "--master_port"],
}
DEFAULTS = {
    "accelerate_with_defaults_of_two_gpus": {"distributed_type": "MULTI_GPU", "use_cpu": False},
    "accelerate_with_defaults_of_a_cpu": {},
}
"""What `accelerate config default` writes, but for these: no word of DeepSpeed."""


def train(
    command: list[str], out: Path, world_size: int, after: Callable[[], object] = lambda: None, **variables: str
) -> tuple[bytes, bytes]:
    """The journal and the weights of a short run, which is removed: the journal names its folder."""
    shown = run([sys.executable, *command, *TRAIN, f"output_dir={out}"], **variables).stdout
    after()
    slices = [16384 // world_size] * world_size
    assert f"ranks: {world_size}, {world_size} per copy; slices: {slices}" in shown, "ZeRO-3 over all ranks"
    run_dir = run_dir_of(out)
    assert run_dir is not None
    assert json.loads((run_dir / "summary.json").read_text())["world_size"] == world_size
    result = (run_dir / "journal.bin").read_bytes(), result_bytes(out)
    shutil.rmtree(out)
    return result


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them write, one after the other."""
    return tmp_path_factory.mktemp("launchers") / "out"


@pytest.fixture(scope="module")
def by_torchrun(out: Path) -> tuple[bytes, bytes]:
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    return train(command, out, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_give_the_same_bytes(name: str, by_torchrun: tuple[bytes, bytes], out: Path, tmp_path: Path) -> None:
    """ZeRO-3 over all ranks, whatever the launcher knows of it; one rank gives the bytes of two."""
    if name in DEFAULTS:
        file = tmp_path / "accelerate/default_config.yaml"
        write_basic_config(save_location=str(file))
        file.write_text(json.dumps(json.loads(file.read_text()) | DEFAULTS[name]))
    command, ranks = [*LAUNCHERS[name], str(free_port())], 1 if name.endswith("a_cpu") else 2
    assert train(command, out, ranks, HF_HOME=str(tmp_path)) == by_torchrun


@pytest.mark.slow
def test_two_nodes_as_the_file_says(by_torchrun: tuple[bytes, bytes], out: Path) -> None:
    """`gpu_2x8.yaml` with one rank per node: the command of each node, both on this machine."""
    command = [*ACCELERATE, "--config_file", "launch/accelerate/gpu_2x8.yaml", *TWO, "--main_process_port"]
    command += [str(free_port()), "--main_process_ip", "127.0.0.1", "--machine_rank"]
    with ThreadPoolExecutor() as pool:
        other = pool.submit(run, [sys.executable, *command, "1", *TRAIN, f"output_dir={out}"])
        assert train([*command, "0"], out, 2, after=other.result) == by_torchrun


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a launcher."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION",
                 "ACCELERATE_USE_CPU"):  # fmt: skip
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ["fp16 and bfloat16", "model.dtype=float16"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ["fp8 and bfloat16", "leave it out"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["DeepSpeed ZeRO-3", "FSDP from the launcher"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["Megatron-LM from the launcher"]),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, ["zero_stage 3", "got 2"]),
    ],
)  # fmt: skip
def test_contradictions_are_refused(variables: dict[str, str], words: list[str], told: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        told.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        launcher.obey("bfloat16")
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(("precision", "dtype"), [("no", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_precision_may_come_from_both_sides(precision: str, dtype: str, told: pytest.MonkeyPatch) -> None:
    told.setenv("ACCELERATE_MIXED_PRECISION", precision)
    launcher.obey(dtype)


def test_processes_that_were_not_started_are_missed(told: pytest.MonkeyPatch) -> None:
    """`accelerate launch --num_processes 2` without GPUs and DeepSpeed starts one process, without a word."""
    for number, fine in ((1, True), (2, False)):
        options = ["--num_processes", str(number), "--num_machines", "1", "--mixed_precision", "no"]
        options += ["--dynamo_backend", "no", "launch/train.py"]
        arguments = launch_command_parser().parse_args(options)
        arguments.use_cpu = True
        _, variables = prepare_simple_launcher_cmd_env(arguments)
        assert "WORLD_SIZE" not in variables
        for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"):
            if name in variables:
                told.setenv(name, variables[name])
        if fine:
            launcher.obey("float32")
            told.delenv("WORLD_SIZE")
            told.delenv("MASTER_PORT")
        else:
            with pytest.raises(ConfigError, match="got only one: use --config_file"):
                launcher.obey("float32")


def test_a_process_alone_does_not_depend_on_a_port_that_was_free(told: pytest.MonkeyPatch) -> None:
    """Seconds pass between the choice and the group; meanwhile others may take the port."""
    launcher.obey("float32")
    with socket.socket() as other:
        if port := int(os.environ["MASTER_PORT"]):
            other.bind(("127.0.0.1", port))
            other.listen()
        torch.distributed.init_process_group("gloo")
    try:
        assert torch.distributed.get_world_size() == 1
    finally:
        torch.distributed.destroy_process_group()


def test_use_cpu_on_a_machine_with_gpus(told: pytest.MonkeyPatch) -> None:
    told.setattr(torch.cuda, "is_available", lambda: True)
    told.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match="use_cpu from the launcher"):
        launcher.obey("float32")


def test_more_ranks_than_gpus(told: pytest.MonkeyPatch) -> None:
    """NCCL and DeepSpeed would say so in words of their own, or a GPU would be shared."""
    told.setattr(torch.cuda, "is_available", lambda: True)
    told.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in (0, 1):
        told.setenv("WORLD_SIZE", "3")
        told.setenv("LOCAL_RANK", str(rank))
        launcher.obey("float32")
    told.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"a GPU for each rank of a node, got 2 for LOCAL_RANK 2"):
        launcher.obey("float32")

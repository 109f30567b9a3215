"""`zoscale doctor`: all right here; and every check finds what it is for."""

import importlib.metadata
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run

from zoscale import cli, doctor
from zoscale.doctor import CHECKS, Finding, Setup
from zoscale.noise import fused

DOCTOR = [sys.executable, "-m", "zoscale", "doctor"]


def wrong(name: str, setup: Setup) -> str:
    """What a check finds wrong, with its remedy."""
    finding = CHECKS[name](setup)
    assert finding.remedy is not None, finding.text
    return f"{finding.text} -> {finding.remedy}"


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path / "runs", None)


def test_this_machine_is_all_right(tmp_path: Path) -> None:
    """As the README has it: every check, a smoke step on two real ranks among them; nothing is left behind."""
    result = run([*DOCTOR, "--output-dir", str(tmp_path)], check=False, timeout=200)
    assert result.returncode == 0, result.stdout
    for name in CHECKS:
        assert f"ok     {name}" in result.stdout
    assert "4 steps on 2 cpu ranks" in result.stdout or torch.cuda.is_available()
    assert not list(tmp_path.iterdir())


def test_status_and_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dead server, and a check that breaks itself."""

    def breaks(_: Setup) -> Finding:
        raise RuntimeError("planted")

    monkeypatch.setitem(CHECKS, "devices", breaks)
    options = ["--output-dir", str(tmp_path), "--tracking-uri", "http://me:secret@127.0.0.1:9"]
    assert cli.main(["doctor", *options, "--only", "tracking", "devices", "disk"]) == 1
    text = capsys.readouterr().out
    assert "WRONG  tracking" in text and "tracking.mlflow=false" in text
    assert "secret" not in text
    assert "WRONG  devices   RuntimeError: planted" in text
    assert "ok     disk" in text
    assert "2 of 3 checks found something wrong" in text


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (Path("/proc/nowhere"), tmp_path / "file" / "runs"):
        assert "set output_dir to a folder that you may write" in wrong("disk", Setup(folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2**20))
    assert "5 MiB free -> make room" in wrong("disk", Setup(tmp_path))


def test_tracking(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert CHECKS["tracking"](setup).remedy is None
    assert not (setup.output_dir / "mlflow.db").exists(), "a check leaves nothing"
    (tmp_path / "text.db").write_text("no database, but a text of more than sixteen bytes")
    assert "not a database" in wrong("tracking", Setup(tmp_path, f"sqlite:///{tmp_path}/text.db"))
    assert (tmp_path / "text.db").read_text().startswith("no database")
    (tmp_path / "short.db").write_text("x")  # so short that SQLite would take it for a new database
    assert "not a database" in wrong("tracking", Setup(tmp_path, f"sqlite:///{tmp_path}/short.db"))
    assert "does not take runs" in wrong("tracking", Setup(tmp_path, "sqlite:////dev/null"))
    assert "does not take runs" in wrong("tracking", Setup(tmp_path, "sqlite:////proc/nowhere/mlflow.db"))


def test_a_store_whose_error_says_nothing(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> None:
        raise AssertionError

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(doctor, "_write_sqlite", fails)
    assert "does not take runs: AssertionError -> start the server" in wrong("tracking", setup)


def test_compiler_is_missing(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert wrong("compiler", setup).startswith("no g++ -> install g++")


def test_compiler_that_does_not_work(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("ld: cannot find -lc")

    fused.compiled.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", fails)
        assert "cannot find -lc -> install g++" in wrong("compiler", setup)
    fused.compiled.cache_clear()


def test_network(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    assert "GLOO_SOCKET_IFNAME=nowhere0: no such interface -> unset" in wrong("network", setup)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^nowhere0,lo")
    assert doctor.check_network(setup).remedy is None, "all interfaces but those"

    def unknown(*_: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "/etc/hosts" in wrong("network", setup)


def test_packages(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def other(name: str) -> str:
        if name in ("deepspeed", "plotly"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "peft" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    text = wrong("packages", setup)
    assert "peft 0.1 (want" in text and "deepspeed not installed" in text and "torch" not in text
    assert "plotly" not in text, "optional"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU of this machine")
def test_devices(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "a torch built for CUDA" in wrong("devices", setup)


def test_a_gpu_that_only_emulates_bf16(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="Tesla V100", total_memory=32 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert wrong("devices", setup) == "Tesla V100 (32 GiB), without bf16 -> set model.dtype=float16"


def test_zero3(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that cannot find each other, and some that do not end."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    assert "2 processes failed: " in wrong("zero3", setup)
    monkeypatch.setattr(doctor, "_PATIENCE", 0.1)
    assert "did not end within" in wrong("zero3", setup)

"""`zoscale doctor`: whether this machine can train, what is wrong, and how to mend it."""

import argparse
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from zoscale.config import first_line
from zoscale.local_job import cause_of, command_of, run_here
from zoscale.noise.generator import Key, Noise, Range
from zoscale.noise.kernels import kernels_on
from zoscale.plan.fit import memory_of_a_rank
from zoscale.tracking.mlflow_store import check_database, short_waits, shown, store_uri

_MIN_FREE = 2**30  # bytes for checkpoints and logs
_PATIENCE = 300.0  # seconds for the smoke step, whose kernels every rank may have to compile
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Setup:
    """What a run would use.

    Args:
        output_dir: folder of run folders.
        tracking_uri: of MLflow; None as in `tracking.uri`.
    """

    output_dir: Path
    tracking_uri: str | None = None


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Args:
        text: what is there.
        remedy: how to mend it; None if nothing is wrong.
    """

    text: str
    remedy: str | None = None


def check_packages(setup: Setup) -> Finding:
    """Installed versions against those that this package asks for."""
    wrong: list[str] = []
    found: list[str] = []
    try:
        lines = importlib.metadata.requires("zoscale") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("zoscale is not installed", "pip install -e . in its folder")
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        fits = version != "not installed" and wanted.specifier.contains(version, prereleases=True)
        (found if fits else wrong).append(f"{wanted.name} {version}" + ("" if fits else f" (want {wanted.specifier})"))
    if wrong:
        return Finding(", ".join(wrong), "pip install --upgrade zoscale, in an environment of its own")
    shown_first = [name for name in found if name.split()[0] in ("torch", "deepspeed", "transformers", "peft")]
    return Finding(f"Python {platform.python_version()}, {', '.join(shown_first)}; all {len(found)} fit")


def check_devices(setup: Setup) -> Finding:
    """GPUs that torch can use."""
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding(f"{names}, without bf16", "set model.dtype=float16")
        return Finding(f"{len(gpus)} x CUDA: {names}")
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        got = f"an NVIDIA driver, which torch {torch.__version__} cannot use"
        return Finding(got, "install a torch built for CUDA whose version the driver supports (see nvidia-smi)")
    return Finding(f"no GPU: {os.cpu_count()} CPUs, {memory_of_a_rank(1) / 2**30:.0f} GiB of memory, gloo")


def check_network(setup: Setup) -> Finding:
    """What gloo and NCCL need to find each other: the own name, and the interfaces that were asked for."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError as error:
        return Finding(f"host name {name} is not known: {error}", f"add '127.0.1.1 {name}' to /etc/hosts")
    present = psutil.net_if_addrs()
    for variable in _INTERFACES:
        names = os.environ.get(variable, "")
        for wanted in [] if names.startswith("^") else filter(None, names.lstrip("=").split(",")):  # ^: all but those
            if not any(interface.startswith(wanted) for interface in present):
                remedy = f"unset {variable}, or name one of {', '.join(present)}"
                return Finding(f"{variable}={wanted}: no such interface", remedy)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not torch.distributed.is_backend_available(backend):
        return Finding(f"torch {torch.__version__} without {backend}", "install a torch with torch.distributed")
    return Finding(f"{name} is {address}; {backend}")


def check_disk(setup: Setup) -> Finding:
    """Whether runs can be written, synced, locked and renamed, and how much room there is."""
    folder = setup.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", delete=False) as file:
            path = Path(file.name)
            try:
                file.write(b"x" * 4096)
                file.flush()
                os.fsync(file.fileno())
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                path = path.rename(path.with_suffix(".renamed"))
            finally:
                path.unlink()
    except OSError as error:
        return Finding(f"{folder} cannot be used: {error}", "set output_dir to a folder that you may write")
    free = shutil.disk_usage(folder).free
    if free < _MIN_FREE:
        return Finding(f"{folder}: {free / 2**20:.0f} MiB free", "make room, or set output_dir to another disk")
    return Finding(f"{folder}: {free / 2**30:.1f} GiB free")


def check_tracking(setup: Setup) -> Finding:
    """Whether MLflow takes runs at the tracking URI."""
    uri = store_uri(setup.output_dir / "run", setup.tracking_uri)
    remedy = "start the server, correct tracking.uri or MLFLOW_TRACKING_URI, or set tracking.mlflow=false"
    try:
        if uri.startswith("sqlite:///"):
            _write_sqlite(Path(uri.removeprefix("sqlite:///")))
        else:
            from mlflow import MlflowClient

            with short_waits():
                MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow and its stores raise any type
        reason = shown(first_line(error))[:200]
        return Finding(f"{shown(uri)} does not take runs: {reason}", remedy)
    return Finding(shown(uri))


def _write_sqlite(path: Path) -> None:
    """Take the write lock of a database, new or old, and leave it as it was."""
    check_database(path)
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=5)
    try:
        database.execute("BEGIN IMMEDIATE")
        database.execute("CREATE TABLE zoscale_doctor (x INTEGER)")
        database.rollback()
    finally:
        database.close()
        if is_new:
            path.unlink(missing_ok=True)


def check_compiler(setup: Setup) -> Finding:
    """Whether the noise generator is compiled; without it large full fine-tuning takes several times longer."""
    compiler = os.environ.get("CXX", "g++")
    remedy = "install g++ (apt-get install g++) or set CXX; or set runtime.noise=eager, and steps are slower"
    if shutil.which(compiler) is None:
        return Finding(f"no {compiler}", remedy)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Noise(0, compiled=True).normal(Key(0), [Range(0, 0, 256)], device)
        kernels_on(torch.device(device))
    failed = [str(warning.message) for warning in caught if "slower" in str(warning.message)]
    return Finding(failed[0], remedy) if failed else Finding(f"{compiler}; the noise is fused on {device}")


def check_zero3(setup: Setup) -> Finding:
    """A few steps under ZeRO-3 on all GPUs of this machine, and on two CPU processes where there are fewer than two."""
    gpus = torch.cuda.device_count()
    found = [_smoke(gpus)] if gpus else []
    if gpus < 2:
        found.append(_smoke(2, CUDA_VISIBLE_DEVICES=""))
    wrong = [finding for finding in found if finding.remedy is not None]
    return wrong[0] if wrong else Finding("; ".join(finding.text for finding in found))


def _smoke(ranks: int, **environment: str) -> Finding:
    try:
        done = run_here(ranks, "zoscale.smoke", timeout=_PATIENCE, **environment)
    except subprocess.TimeoutExpired:
        remedy = "look for a firewall between processes; NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL say more"
        return Finding(f"{ranks} processes did not end within {_PATIENCE:.0f} s", remedy)
    if done.returncode != 0:
        settings = [f"{name}={value}" for name, value in environment.items()]
        by_hand = " ".join([*settings, "python", *command_of(ranks, "zoscale.smoke")[1:]])
        return Finding(f"{ranks} processes failed: {cause_of(done)}", f"run it by hand: {by_hand}")
    report = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    return Finding(f"{len(report['losses'])} steps on {ranks} {report['device']} ranks in {report['seconds']} s")


CHECKS: dict[str, Callable[[Setup], Finding]] = {
    "packages": check_packages,
    "devices": check_devices,
    "network": check_network,
    "disk": check_disk,
    "tracking": check_tracking,
    "compiler": check_compiler,
    "zero3": check_zero3,
}


def doctor_command(argv: Sequence[str]) -> int:
    """Run the checks and print what they find.

    Returns:
        0 if all is right, 1 if something is wrong.
    """
    parser = argparse.ArgumentParser(prog="zoscale doctor", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), metavar="DIR", help="where runs would go")
    parser.add_argument("--tracking-uri", metavar="URI", help="of MLflow, as tracking.uri")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="these checks alone")
    arguments = parser.parse_args(argv)
    setup, wrong = Setup(arguments.output_dir, arguments.tracking_uri), 0
    for name in arguments.only:
        try:
            finding = CHECKS[name](setup)
        except Exception as error:  # a check that breaks is a finding too
            finding = Finding(
                f"{type(error).__name__}: {error}",
                "mend what the message names, or leave the check out with --only and report it",
            )
        wrong += finding.remedy is not None
        print(f"{'ok   ' if finding.remedy is None else 'WRONG'}  {name:<9} {finding.text}", flush=True)
        if finding.remedy is not None:
            print(f"{'':<17}-> {finding.remedy}", flush=True)
    print("all right" if not wrong else f"{wrong} of {len(arguments.only)} checks found something wrong")
    return 1 if wrong else 0

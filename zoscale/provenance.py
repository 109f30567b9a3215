"""What a result must carry: configuration, seed, versions, commit, hardware."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from zoscale.config import RunConfig

_PACKAGES = ("zoscale", "torch", "deepspeed", "accelerate", "transformers", "peft", "datasets", "mlflow")


def facts(config: RunConfig) -> dict[str, Any]:
    """For `summary.json`."""
    return {
        "config_hash": config.hash,
        "seed": config.seed,
        "commit": commit(),
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": _gpus()},
    }


_COMMIT = "COMMIT"  # in a copy of the package: the commit it was taken from


def commit() -> str:
    """The commit of the source tree that runs, with `+` if it was changed since; `unknown` outside a checkout."""
    folder = Path(__file__).parent
    if (folder / _COMMIT).exists():
        return (folder / _COMMIT).read_text(encoding="utf-8")
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # a checkout around it may be of another project
        return _git("describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*words: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()


def code(config: RunConfig | None = None) -> str:
    """Version and content of the package that runs, and of the modules that `config` names: equal for equal text."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    found = [f"{_version('zoscale')} {digest.hexdigest()[:16]}"]
    for module in () if config is None else config.modules:
        spec = importlib.util.find_spec(module)
        if spec and spec.origin and Path(spec.origin).is_file():
            found.append(f"{module} {hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]}")
    return ", ".join(found)


def copy_code(folder: Path) -> None:
    """Copy the package that runs into a folder, from which it can be imported; it keeps its `commit` and `code`."""
    package = Path(__file__).parent
    copy = shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / _COMMIT).write_text(commit(), encoding="utf-8")


def libraries() -> dict[str, str]:
    """Versions of the packages that compute."""
    return {name: _version(name) for name in ("torch", "deepspeed", "transformers", "peft")}


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

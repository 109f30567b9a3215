"""The run directory: what lies where, one writer at a time, files written whole."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoscale.config import ConfigError, RunConfig

_PATIENCE = 20.0  # seconds for the processes of a killed run to end


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run.

    Args:
        path: `<output_dir>/<name>-<hash>`.
    """

    path: Path

    @classmethod
    def of(cls, config: RunConfig) -> "RunDirectory":
        """The folder that a configuration names: its own, or the one to resume."""
        if config.resume in ("auto", "never"):
            return cls(config.run_dir)
        given = Path(config.resume)
        is_checkpoint = given.parent.name == "checkpoints" and not cls(given).config.exists()
        return cls(given.parent.parent if is_checkpoint else given)

    @property
    def config(self) -> Path:
        """The whole configuration; what has one is a run."""
        return self.path / "config.yaml"

    @property
    def journal(self) -> Path:
        """Every step."""
        return self.path / "journal.bin"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """Every evaluation, one JSON object per line."""
        return self.path / "evaluations.jsonl"

    @property
    def choices(self) -> Path:
        """Folder of the choices of adapters, one JSON file each."""
        return self.path / "choices"

    @property
    def adapter(self) -> Path:
        """The result, as Hugging Face libraries read it."""
        return self.path / "adapter"

    @property
    def summary(self) -> Path:
        """Written last: a run that has it is finished."""
        return self.path / "summary.json"

    @property
    def told_to_stop(self) -> Path:
        """Mark of a run that was told to stop and can be continued; gone once it is finished."""
        return self.path / "told_to_stop"

    def chosen_checkpoint(self, config: RunConfig) -> Path | None:
        """The checkpoint that `resume` names, if it names one."""
        given = Path(config.resume)
        return given if given.parent == self.checkpoints else None

    def check_resume(self, config: RunConfig) -> None:
        """Raise `ConfigError` if `resume` names a folder in which no run is."""
        if config.resume not in ("auto", "never") and not self.config.exists():
            raise ConfigError("the folder of a run or of a checkpoint", config.resume, "set resume")

    def open(self, config: RunConfig) -> int:
        """Make the folder, or enter that of a run to continue, and lock it for the life of this process.

        Returns:
            The lock's file descriptor.

        Raises:
            ConfigError: if the configuration does not allow to go on here, or another process is writing.
            OSError: if the folder cannot be written.
        """
        self.check_resume(config)
        exists = self.config.exists()
        if exists and config.resume == "never" and not config.overwrite:
            remedy = "resume=auto to continue it, overwrite=true to start again"
            raise ConfigError("a configuration that has not run yet", f"a run in {self.path}", remedy)
        self.path.mkdir(parents=True, exist_ok=True)
        lock = _lock(self.path)
        if config.overwrite:
            _empty(self.path)
        if not self.config.exists():
            write_text(self.config, config.to_yaml())
        return lock

    def leave_unused(self) -> None:
        """Remove what `open` made of a run that could not start; nothing of one that has taken a step, or of others."""
        if not self.journal.exists():
            self.config.unlink(missing_ok=True)
            (self.path / ".lock").unlink(missing_ok=True)
            with suppress(OSError):  # there is something else in it
                self.path.rmdir()

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None if it is not finished.

        Raises:
            ConfigError: if the file is damaged.
        """
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(
                f"JSON in {self.summary}", str(error), "remove it, and the run is finished anew"
            ) from error
        if not isinstance(summary, dict):
            raise ConfigError(
                f"an object in {self.summary}", repr(summary)[:80], "remove it, and the run is finished anew"
            )
        return summary


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; once this has returned, it outlasts a loss of power."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, as_json(value))


def as_json(value: Mapping[str, Any]) -> str:
    """The text of a JSON file, as `write_json` writes it."""
    return json.dumps(value, indent=2, default=str) + "\n"


def _lock(folder: Path) -> int:
    """An exclusive lock on the folder, which ends with the process. Processes of a killed run get time to end."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            os.close(descriptor)
            got = f"another process that is writing {folder}"
            raise ConfigError("a run directory that nobody writes", got, "wait for it or stop it") from error
        return descriptor


_TURNS = {"summary.json": 0, "journal.bin": 1, "evaluations.jsonl": 3, "config.yaml": 4}
"""Of what is removed; everything else goes between, at 2."""


def _empty(folder: Path) -> None:
    """Remove what a run has left; if that is cut short, what remains is neither finished nor a run to continue.

    Evaluations without a journal say so, and go last.
    """
    for path in sorted(folder.iterdir(), key=lambda path: _TURNS.get(path.name, 2)):
        if path.name == ".lock":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

"""`RunRecord`: what a run has left, read only."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoscale.config import ConfigError, RunConfig, read_yaml
from zoscale.methods import DEFAULTS, TABLES
from zoscale.models.loading import missing_folder
from zoscale.run_directory import RunDirectory


@dataclass(frozen=True)
class RunRecord:
    """A run directory and its configuration.

    Args:
        directory: of the run.
        config: as the run was started, with the base model where it is now.
        base: id or folder of the base model, if the user has named it.
    """

    directory: RunDirectory
    config: RunConfig
    base: str | None = None

    @classmethod
    def read(cls, path: Path | str, base: str | None = None) -> "RunRecord":
        """The record in a folder; whoever loads its base model calls `check_base` first.

        Args:
            base: id or folder of the base model, if it has moved.

        Raises:
            ConfigError: if it is not a run's.
        """
        directory = RunDirectory(Path(path))
        if not directory.config.is_file():
            raise ConfigError("the folder of a run, with config.yaml", str(path), "check the path")
        config = RunConfig.from_dict(read_yaml(directory.config), TABLES, DEFAULTS)
        return cls(directory, with_base(config, base), base)

    def summary(self) -> dict[str, Any]:
        """The summary of the finished run.

        Raises:
            ConfigError: if the run is not finished, or the file is damaged.
        """
        summary = self.directory.read_summary()
        if summary is None:
            remedy = f"finish it, or take its weights now: zoscale replay {self.directory.path} --out DIR"
            raise ConfigError("a finished run, with summary.json", str(self.directory.path), remedy)
        return summary

    def evaluations(self, name: str) -> list[tuple[int, dict[str, Any]]]:
        """(step, metrics) of the evaluations of a name, in the order in which they were taken.

        Raises:
            ConfigError: if the file is damaged.
        """
        path = self.directory.evaluations
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return [(int(row["step"]), dict(row["result"])) for row in rows if row["name"] == name]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"evaluations in {path}", repr(error), "restore the file from a copy") from error


def with_base(config: RunConfig, base: str | None) -> RunConfig:
    """A run's configuration with the base model that the user named, if one was named.

    A folder is all of it: its version, and the tokenizer where that may run code of its own.
    """
    if base is None:
        return config
    model = dataclasses.replace(config.model, id=base)
    if Path(base).is_dir():
        model = dataclasses.replace(
            model, revision=None, tokenizer=None if model.trust_remote_code else model.tokenizer
        )
    return dataclasses.replace(config, model=model)


def check_base(config: RunConfig, base: str | None) -> None:
    """Refuse to load the model of a configuration that came with a run, if it is nowhere or could run code.

    Args:
        config: from `with_base`.
        base: id or folder of the base model, if the user has named it: then it is trusted.

    Raises:
        ConfigError: if the model is a folder that is not there, or the configuration asks to run code that comes with
            it, and the user has not named one, or the run says which version of it, or whose tokenizer, is loaded.
    """
    model = config.model
    if base is None and model.id is not None and (missing := missing_folder(model.id)):
        raise ConfigError(f"the run's base model, {model.id}", missing, "name it where it is now with --base")
    if not (model.trust_remote_code or model.allow_pickle):
        return
    if base is None:
        got = "one that runs the model's code or loads pickles"
        raise ConfigError("a run of a model of safetensors only", got, "name a model that you trust with --base")
    chosen = [model.revision, model.tokenizer if model.trust_remote_code else None]
    if any(chosen):
        got = " and ".join(filter(None, chosen))
        remedy = "download what you trust into one folder and name that with --base"
        raise ConfigError(
            "a run that chooses neither the version of a model that may run code nor its tokenizer", got, remedy
        )

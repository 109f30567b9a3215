"""Records from a Hugging Face dataset id, a local folder, or files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoscale.config import ConfigError

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_QUOTE_NONE = 3  # csv.QUOTE_NONE: GLUE's TSV files hold bare quotation marks


@dataclass(frozen=True)
class Source:
    """Where the splits `train` and `validation` lie.

    Args:
        path: Hugging Face dataset id, or a folder with train.* and validation.* (jsonl, json, csv, tsv, parquet).
        subset: configuration of a Hugging Face dataset.
        files: split to file; overrides `path`.
    """

    path: str | None = None
    subset: str | None = None
    files: Mapping[str, str] | None = None

    def records(self, split: str) -> list[dict[str, Any]]:
        """All records of a split.

        Raises:
            ConfigError: if the split cannot be found or read, or is empty.
        """
        import datasets

        try:
            file = self._file(split)
            if file is not None:
                rows = datasets.load_dataset(
                    _BUILDERS[file.suffix], data_files={split: str(file)}, split=split, **_options(file)
                )
            elif self.path is not None:
                rows = datasets.load_dataset(self.path, self.subset, split=split)
            else:
                raise ConfigError("task.path or task.files", "neither", "name a dataset id, a folder or the files")
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"a readable split {split!r} at {self.files or self.path}", reason, "check task.path and task.files"
            ) from error
        if not len(rows):
            raise ConfigError(
                f"at least one record in split {split!r} of {self.files or self.path}", "none", "check the file"
            )
        return list(rows)

    def _file(self, split: str) -> Path | None:
        if self.files is not None:
            if split not in self.files:
                raise ConfigError(
                    f"a file for split {split!r} in task.files", ", ".join(self.files) or "none", "add it"
                )
            return _known(Path(self.files[split]))
        folder = Path(self.path) if self.path is not None else None
        if folder is None or not folder.is_dir():
            return None
        for suffix in _BUILDERS:
            if (folder / f"{split}{suffix}").is_file():
                return folder / f"{split}{suffix}"
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "an empty folder"
        raise ConfigError(
            f"{split}.jsonl, .csv, .tsv or .parquet in {folder}", found, "add the file or correct task.path"
        )


def _known(file: Path) -> Path:
    if file.suffix not in _BUILDERS:
        raise ConfigError(f"a file that ends in {', '.join(_BUILDERS)}", str(file), "convert it")
    if not file.is_file():
        raise ConfigError("an existing file", str(file), "correct task.files")
    return file


def _options(file: Path) -> dict[str, Any]:
    if file.suffix == ".tsv":
        return {"sep": "\t", "quoting": _QUOTE_NONE, "keep_default_na": False}
    return {"keep_default_na": False} if file.suffix == ".csv" else {}

"""Records from a Hugging Face dataset id, a local folder, or files."""

import glob
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoscale.config import ConfigError, first_line

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_MAX_DEPTH = 64  # of nested lists and objects in a row
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
                records = _read(file, split)
            elif self.path is not None:
                records = list(datasets.load_dataset(self.path, self.subset, split=split))
            else:
                raise ConfigError("task.path or task.files", "neither", "name a dataset id, a folder or the files")
        except ConfigError:
            raise
        except Exception as error:  # the library raises any type at all, StopIteration for an empty file
            reason = first_line(error.__cause__ or error)
            raise ConfigError(
                f"a readable split {split!r} at {self.files or self.path}", reason, "check task.path and task.files"
            ) from error
        if not records:
            raise ConfigError(
                f"at least one record in split {split!r} of {self.files or self.path}", "none", "check the file"
            )
        return records

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


def _read(file: Path, split: str) -> list[dict[str, Any]]:
    import datasets

    builder, name = _BUILDERS[file.suffix], glob.escape(str(file))  # the library takes names for patterns
    if builder == "json":
        _check_json(file)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Length of header")  # pandas: rows longer than it would lose a field
        return list(datasets.load_dataset(builder, data_files={split: name}, split=split, **_options(file)))


def _options(file: Path) -> dict[str, Any]:
    """How the library reads it: text as it stands, and every field under its own name."""
    if file.suffix not in (".csv", ".tsv"):
        return {}
    options: dict[str, Any] = {"keep_default_na": False, "index_col": False}
    return options | {"sep": "\t", "quoting": _QUOTE_NONE} if file.suffix == ".tsv" else options


def _check_json(file: Path) -> None:
    """Read the rows before the library does: a null for a row and deep nesting end the process there.

    Raises:
        ValueError: if they cannot be read, or one of them is like that.
        RecursionError: for much too deep nesting.
    """
    text = file.read_text(encoding="utf-8-sig").rstrip()
    decoder, place = json.JSONDecoder(strict=False), 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        start = place
        value, place = decoder.raw_decode(text, start)
        for row in value if isinstance(value, list) else [value]:
            if row is None or not _is_shallow(row, _MAX_DEPTH):
                what = "null" if row is None else f"more than {_MAX_DEPTH} nested levels"
                raise ValueError(f"{what} for a row (line {text.count(chr(10), 0, start) + 1})")
    if not text:
        raise ValueError("an empty file")


def _is_shallow(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth >= 0 and all(_is_shallow(item, depth - 1) for item in inner)

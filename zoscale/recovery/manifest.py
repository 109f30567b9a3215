"""The manifest of a checkpoint: which slices lie in which file. What has one is complete."""

import json
import shutil
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from zoscale.config import ConfigError
from zoscale.run_directory import sync_folder, write_text

FORMAT = 1
MANIFEST = "manifest.json"
_Natural = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Slice:
    """Elements [offset, offset + length) of a tensor."""

    offset: _Natural
    length: _Natural


@dataclass(frozen=True)
class ShardFile:
    """One rank's file.

    Args:
        name: within the folder.
        num_bytes: its size.
        crc32: of its content.
        slices: by tensor name; the file holds `<key>/<tensor name>` for each key of the manifest that it has.
    """

    name: Annotated[str, Field(pattern=r"^rank_\d{5}\.safetensors$")]
    num_bytes: _Natural
    crc32: _Natural
    slices: dict[str, Slice]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Args:
        step: steps taken.
        config_hash: of the run.
        shapes: of each trainable tensor.
        files: one per rank.
        state: keys of optimizer state that are sharded like the weights.
        scalars: optimizer state that is one number per tensor, by tensor name.
        format: of the checkpoint.
    """

    step: _Natural
    config_hash: str
    shapes: dict[str, list[_Natural]]
    files: list[ShardFile]
    state: list[str] = field(default_factory=list)
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)
    format: int = FORMAT


_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ConfigError: if there is none, or it is malformed.
    """
    path = folder / MANIFEST
    try:
        manifest = _ADAPTER.validate_json(path.read_bytes(), strict=False)
    except OSError as error:
        raise ConfigError(f"a checkpoint in {folder}", str(error), "check the path") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise damaged(path, f"{first['msg']} at {where}") from error
    if manifest.format != FORMAT:
        raise ConfigError(
            f"checkpoint format {FORMAT}", f"{manifest.format} in {path}", "use the version that wrote it"
        )
    if folder.name.rpartition("_")[2].isdecimal() and int(folder.name.rpartition("_")[2]) != manifest.step:
        raise damaged(path, f"step {manifest.step}")
    return manifest


def publish(aside: Path, folder: Path, manifest: Manifest) -> None:
    """Complete a folder of shard files with its manifest, and give it its name."""
    write_text(aside / MANIFEST, json.dumps(asdict(manifest)))
    if folder.exists():  # an incomplete or an equal one
        shutil.rmtree(folder)
    aside.rename(folder)
    sync_folder(folder.parent)


def name_of(step: int, kind: str = "step") -> str:
    """Folder name of a checkpoint."""
    return f"{kind}_{step:08d}"


def complete(folder: Path, kind: str = "step") -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints of a kind, oldest first."""
    found = [(path.name.removeprefix(f"{kind}_"), path) for path in folder.glob(f"{kind}_*") if path.is_dir()]
    return sorted((int(step), path) for step, path in found if step.isdecimal() and (path / MANIFEST).is_file())


def keep_last(folder: Path, count: int, kind: str = "step") -> None:
    """Remove all but the newest complete checkpoints of a kind."""
    for _, path in complete(folder, kind)[:-count]:
        (path / MANIFEST).unlink()  # from here on it is not complete
        shutil.rmtree(path)


def remove_unfinished(folder: Path) -> None:
    """Remove what writes that were interrupted have left."""
    for path in folder.glob("*.tmp"):
        shutil.rmtree(path)


def crc32(path: Path) -> int:
    """Of a file's content."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc


def damaged(path: Path, what: str) -> ConfigError:
    """The error for a file of a checkpoint."""
    return ConfigError(
        f"an intact checkpoint at {path.parent}", f"{what} in {path.name}", "remove it: an older one does"
    )

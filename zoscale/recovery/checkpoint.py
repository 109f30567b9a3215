"""Checkpoints: trainable weights and optimizer state of one step, whole or not there, for any number of ranks.

A checkpoint is a folder of safetensors files, one per rank with its slices, and a manifest. It is written aside, synced
and renamed.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoscale.config import ConfigError
from zoscale.recovery.manifest import MANIFEST, Manifest, ShardFile, Slice, crc32, damaged, publish, read_manifest
from zoscale.shards import ShardedParam, TensorSpec
from zoscale.step import Engine

_WEIGHTS = "weights"


def save(engine: Engine, folder: Path, config_hash: str, *, state: bool = True) -> None:
    """Write a checkpoint of the engine's weights, and optimizer state unless told not to. A collective.

    Raises:
        OSError: if a rank could not write, on all ranks; nothing appears under the folder's name then.
    """
    aside = folder.with_name(f"{folder.name}.tmp")
    mesh = engine.mesh
    try:
        mesh.on_main(lambda: _fresh(aside))
        path = aside / f"rank_{mesh.rank:05d}.safetensors"
        files = mesh.together(lambda: _write_shards(engine, path, state) if mesh.is_first_replica else None)
        states = mesh.gather_objects(_scalars(engine) if state else ([], {}))
        manifest = Manifest(
            engine.num_steps,
            config_hash,
            {spec.name: list(spec.shape) for spec in engine.specs},
            [file for file in files if file is not None],
            sorted({key for keys, _ in states for key in keys}),
            {name: numbers for _, scalars in states for name, numbers in scalars.items()},
        )
        mesh.on_main(lambda: publish(aside, folder, manifest))
    except OSError:
        if mesh.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def load(engine: Engine, folder: Path, config_hash: str) -> None:
    """Put a checkpoint's weights and state into an engine, on any number of ranks. A collective.

    Raises:
        ConfigError: if it is damaged, incomplete or of another run, on all ranks; the engine is unchanged then.
    """
    mesh = engine.mesh
    found: list[tuple[Tensor, dict[str, Any]]] = []
    manifest = mesh.on_main(lambda: read_manifest(folder))
    mesh.together(lambda: found.extend(_read_all(engine, folder, manifest, config_hash)))
    engine.arrange(manifest.shapes)
    for shard, (weights, state) in zip(engine.shards, found, strict=True):
        shard.truth.copy_(weights)
        shard.publish()
        engine.optimizer.load_state_of(shard, _placed(state, shard.truth.device))
    engine.num_steps = manifest.step


def _placed(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()}


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_shards(engine: Engine, path: Path, state: bool) -> ShardFile:
    tensors: dict[str, Tensor] = {}
    for shard in engine.shards:
        if len(shard):
            tensors[f"{_WEIGHTS}/{shard.spec.name}"] = shard.truth
            sharded = _sharded_state(engine, shard) if state else {}
            tensors |= {f"{key}/{shard.spec.name}": value for key, value in sharded.items()}
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    except SafetensorError as error:  # a full disk comes as this
        raise OSError(errno.EIO, f"{path} could not be written: {error}") from error
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    slices = {shard.spec.name: Slice(shard.offset, len(shard)) for shard in engine.shards if len(shard)}
    return ShardFile(path.name, path.stat().st_size, crc32(path), slices)


def _sharded_state(engine: Engine, shard: ShardedParam) -> dict[str, Tensor]:
    state = engine.optimizer.state_of(shard)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _scalars(engine: Engine) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Keys of this rank's sharded state, and the numbers beside it."""
    keys = {key for shard in engine.shards for key in _sharded_state(engine, shard)}
    numbers = {
        shard.spec.name: {k: v for k, v in engine.optimizer.state_of(shard).items() if k not in keys}
        for shard in engine.shards
    }
    return sorted(keys), {name: found for name, found in numbers.items() if found}


def _read_all(
    engine: Engine, folder: Path, manifest: Manifest, config_hash: str
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Weights and state of this rank's slices, in the order of the shards that the engine will have.

    They are in the host's memory: a GPU that is full of weights and state has no room for both once more.
    """
    if manifest.config_hash != config_hash:
        got = f"one of configuration {manifest.config_hash}"
        raise ConfigError(f"a checkpoint of configuration {config_hash} in {folder}", got, "check resume")
    shards = _wanted(engine, manifest)
    wanted = {shard.spec.name: shard for shard in shards}
    used = [file for file in manifest.files if any(_overlap(wanted.get(n), s) for n, s in file.slices.items())]
    with torch.no_grad():
        readers = {file.name: _Reader(folder, file) for file in used}
        for shard in shards:
            weights = torch.empty(len(shard), dtype=shard.truth.dtype)
            if _fill(weights, _WEIGHTS, shard, used, readers) != len(shard):
                raise damaged(folder / MANIFEST, f"slices that do not cover {shard.spec.name}")
            state: dict[str, Any] = dict(manifest.scalars.get(shard.spec.name, {}))
            for key in manifest.state:  # what no rank had yet is zero
                state[key] = torch.zeros(len(shard), dtype=torch.float32)
                _fill(state[key], key, shard, used, readers)
            yield weights, state


def _wanted(engine: Engine, manifest: Manifest) -> Sequence[ShardedParam]:
    """This rank's slices of the tensors that the manifest names, in the order of their names.

    Raises:
        ConfigError: if the engine cannot have such tensors.
    """
    shapes = {spec.name: list(spec.shape) for spec in engine.specs}
    different = [name for name in {**shapes, **manifest.shapes} if shapes.get(name) != manifest.shapes.get(name)]
    if not different:
        return engine.shards
    if engine.adapters is None or not engine.adapters.allows(manifest.shapes):
        name = different[0]
        got = f"{name} {manifest.shapes.get(name)}"
        raise ConfigError(f"a checkpoint with {name} {shapes.get(name)}", got, "it belongs to another model")
    device, mesh = engine.shards[0].truth.device, engine.mesh
    specs = [TensorSpec(i, name, tuple(shape)) for i, (name, shape) in enumerate(sorted(manifest.shapes.items()))]
    return [ShardedParam.outline(spec, *mesh.slice_of(spec.numel), device) for spec in specs]


class _Reader:
    """One rank's file of a checkpoint.

    Raises:
        ConfigError: if it is damaged.
    """

    def __init__(self, folder: Path, said: ShardFile) -> None:
        self.path = folder / said.name
        try:
            if self.path.stat().st_size != said.num_bytes:
                raise damaged(self.path, f"{self.path.stat().st_size} bytes instead of {said.num_bytes}")
            if crc32(self.path) != said.crc32:
                raise damaged(self.path, "a wrong checksum")
            file: Any = safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise damaged(self.path, str(error)) from error
        self.file = file
        self.names = frozenset(file.keys())  # which makes a list of all each time


def _fill(target: Tensor, key: str, shard: ShardedParam, files: list[ShardFile], readers: Mapping[str, _Reader]) -> int:
    """Copy what the files hold of a slice; returns the number of elements."""
    filled, name = 0, f"{key}/{shard.spec.name}"
    for file in files:
        held = file.slices.get(shard.spec.name)
        both = _overlap(shard, held)
        reader = readers[file.name]
        if held is None or both is None or name not in reader.names:
            continue
        start, stop = both
        values = reader.file.get_slice(name)
        if list(values.get_shape()) != [held.length]:
            raise damaged(reader.path, f"{name} of shape {values.get_shape()}")
        target[start - shard.offset : stop - shard.offset] = values[start - held.offset : stop - held.offset]
        filled += stop - start
    return filled


def _overlap(shard: ShardedParam | None, held: Slice | None) -> tuple[int, int] | None:
    """Elements of the tensor that are in both."""
    if shard is None or held is None:
        return None
    start = max(shard.offset, held.offset)
    stop = min(shard.offset + len(shard), held.offset + held.length)
    return (start, stop) if start < stop else None

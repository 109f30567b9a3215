"""The step journal: an append-only binary file from which a run is rebuilt without any forward pass.

    magic (8 bytes) | length of the header (uint32) | header (JSON, UTF-8) | CRC-32 of all before (uint32)
    record 0 | record 1 | ...

Little-endian. Every record has the same size, which the header gives: step (uint64), flags (uint8, 1 = skipped),
K losses, the count that they are means over, q projected gradients as used, the lr of each parameter group (all
float64), CRC-32 (uint32, started from the header's). Record i is step i.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, TypeAdapter, ValidationError

from zoscale.config import ConfigError

FORMAT = 1
_MAGIC = b"ZOJRNL\r\n"  # a transfer that rewrites line ends breaks it
_MAX_HEADER = 2**20
_MAX_SEARCH = 2**28  # bytes to checksum in search of a record behind a torn one: seconds
_LENGTH = struct.Struct("<I")
_HEADER_ROOM = len(_MAGIC) + _LENGTH.size + _MAX_HEADER + _LENGTH.size
_Count = Annotated[int, Field(ge=1, le=2**16)]


@dataclass(frozen=True)
class Header:
    """What a run is, beside its steps.

    Args:
        seed: of all directions.
        config: `RunConfig.to_dict()`.
        config_hash: `RunConfig.hash`.
        code: version and fingerprint of the package that started the run.
        model: fingerprint of the base model's weights.
        trainable: fingerprint of the trainable tensors: names, shapes and values before the first step.
        data: fingerprint of the examples.
        num_losses: K, losses per step.
        num_directions: q, projected gradients per step.
        num_groups: parameter groups of the optimizer.
        format: of the file.
    """

    seed: int
    config: dict[str, Any]
    config_hash: str
    code: str
    model: str
    trainable: str
    data: str
    num_losses: _Count
    num_directions: _Count
    num_groups: _Count
    format: int = FORMAT

    @property
    def record_bytes(self) -> int:
        """Size of one record."""
        return self._layout.size + _LENGTH.size

    @property
    def _layout(self) -> struct.Struct:
        return struct.Struct(f"<QB{self.num_losses + 1 + self.num_directions + self.num_groups}d")


_HEADER: TypeAdapter[Header] = TypeAdapter(Header)


@dataclass(frozen=True)
class Record:
    """One step, as it was used.

    Args:
        step: from 0.
        losses: of the K candidates; not finite where the step was skipped.
        count: number of things that each loss is the mean of.
        projected_grads: rho_1 .. rho_q.
        lrs: learning rate of each parameter group.
        skipped: whether nothing was updated.
    """

    step: int
    losses: tuple[float, ...]
    count: float
    projected_grads: tuple[float, ...]
    lrs: tuple[float, ...]
    skipped: bool


@dataclass(frozen=True)
class Journal:
    """A journal as read.

    Args:
        header: of the file.
        records: the intact records, step 0 on.
        num_bytes: up to the end of the last of them.
        num_torn: bytes after that: the end of a write that was cut off.
    """

    header: Header
    records: list[Record]
    num_bytes: int
    num_torn: int = 0

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a journal and check every record. A torn or corrupt end is left out and counted in `num_torn`.

        Raises:
            ConfigError: for a file that cannot be read or is no journal, and for corruption that intact records
                follow, or may follow, with its offset.
        """
        try:
            content = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            raise ConfigError(f"a journal at {path}", str(error), "check the run directory") from error
        header, start, seed = _read_header(content, path)
        size = header.record_bytes
        records: list[Record] = []
        place = start
        while (record := _read_record(content, place, header, seed)) is not None and record.step == len(records):
            records.append(record)
            place += size
        if (corruption := _look_behind(content, place, header, seed)) is not None:
            raise ConfigError(
                f"intact records up to the end of {path}",
                f"corruption at byte {place} (step {len(records)}), before {corruption}",
                "restore the file from a copy: what follows cannot be trusted",
            )
        return cls(header, records, place, len(content) - place)


class JournalWriter:
    """Appends records, each with one write.

    Args:
        path: of the journal.
        header: its header.
        num_bytes: where to append; what lies behind is cut off.
        sync_every: records between `fsync`s; 1 = none is ever lost.
    """

    def __init__(self, path: Path, header: Header, num_bytes: int, *, sync_every: int = 1) -> None:
        self.path = path
        self._layout, self._size, self._sync_every = header._layout, num_bytes, sync_every
        self._record_bytes = header.record_bytes
        self._unsynced = 0
        with path.open("rb") as file:  # the file's own spelling of the header, not ours of today
            *_, self._seed = _read_header(file.read(_HEADER_ROOM), path)
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        os.ftruncate(self._file, num_bytes)
        os.fsync(self._file)
        os.lseek(self._file, num_bytes, os.SEEK_SET)

    @classmethod
    def create(cls, path: Path, header: Header, *, sync_every: int = 1) -> Self:
        """Start a journal; the file appears with its header complete.

        Raises:
            OSError: if it cannot be written.
            ConfigError: for a header that could not be read back: over 1 MiB, or with counts over 65536.
        """
        content = _write_header(header)
        _read_header(content, path)
        aside = path.with_suffix(".tmp")
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
        return cls(path, header, len(content), sync_every=sync_every)

    def append(self, record: Record) -> None:
        """Write a record, and `fsync` if it is due.

        Raises:
            OSError: if it cannot be written; the file ends with the last whole record then.
        """
        values = (*record.losses, record.count, *record.projected_grads, *record.lrs)
        body = self._layout.pack(record.step, int(record.skipped), *values)
        content = body + _LENGTH.pack(zlib.crc32(body, self._seed))
        try:
            written = os.write(self._file, content)
            if written != len(content):
                raise OSError(28, "No space left on device", str(self.path))
            self._size += len(content)
            self._unsynced += 1
            if self._unsynced >= self._sync_every:
                self.sync()
        except OSError:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise

    def cut(self, num_records: int) -> None:
        """Take the last records away: their steps will be taken again.

        Raises:
            OSError: if it cannot be written.
        """
        self._size -= num_records * self._record_bytes
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)
        self.sync()

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        os.fsync(self._file)
        self._unsynced = 0

    def close(self) -> None:
        """Sync and close. Idempotent."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_header(header: Header) -> bytes:
    text = _HEADER.dump_json(header)
    content = _MAGIC + _LENGTH.pack(len(text)) + text
    return content + _LENGTH.pack(zlib.crc32(content))


def _read_header(content: bytes, path: Path) -> tuple[Header, int, int]:
    """The header, where the records start, and its checksum, which theirs start from.

    Not the checksum of all the bytes before the records: that of data with its own checksum is the same for all.
    """
    fixed = len(_MAGIC) + _LENGTH.size
    if content[: len(_MAGIC)] != _MAGIC or len(content) < fixed:
        raise ConfigError(f"a zoscale journal at {path}", "another kind of file", "check the path")
    (length,) = _LENGTH.unpack_from(content, len(_MAGIC))
    end = fixed + length
    if length > _MAX_HEADER:
        raise _bad_header(path, f"one of {length} bytes")
    if len(content) < end + _LENGTH.size:
        raise _bad_header(path, "its end is missing")
    (checksum,) = _LENGTH.unpack_from(content, end)
    if checksum != zlib.crc32(content[:end]):
        raise _bad_header(path, "its checksum is wrong")
    try:
        header = _HEADER.validate_json(content[fixed:end])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _bad_header(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if header.format != FORMAT:
        raise ConfigError(f"journal format {FORMAT} in {path}", str(header.format), "use the version that wrote it")
    return header, end + _LENGTH.size, checksum


def _bad_header(path: Path, what: str) -> ConfigError:
    return ConfigError(f"an intact header in {path}", what, "restore the file from a copy")


def _read_record(content: bytes, place: int, header: Header, seed: int) -> Record | None:
    """The record at a place; None if there is no intact one."""
    layout = header._layout
    end = place + layout.size
    if end + _LENGTH.size > len(content):
        return None
    if _LENGTH.unpack_from(content, end)[0] != zlib.crc32(content[place:end], seed):
        return None
    step, flags, *values = layout.unpack_from(content, place)
    k, q = header.num_losses, header.num_directions
    losses, (count,), rhos, lrs = values[:k], values[k : k + 1], values[k + 1 : k + 1 + q], values[k + 1 + q :]
    return Record(step, tuple(losses), count, tuple(rhos), tuple(lrs), bool(flags & 1))


def _look_behind(content: bytes, place: int, header: Header, seed: int) -> str | None:
    """What lies at or after the first place without the next record; None for nothing, a torn end.

    An intact record may lie at any offset: bytes may be missing or too many. The search is bounded.
    """
    last = len(content) - header.record_bytes
    stop = place + _MAX_SEARCH // header.record_bytes
    for behind in range(place, min(last + 1, stop)):
        if _read_record(content, behind, header, seed) is not None:
            return f"an intact record at byte {behind}"
    return f"{len(content) - stop} bytes too many to be searched for records" if stop <= last else None

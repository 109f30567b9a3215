"""The format of the step journal: a header that says what a run is, and one record per step.

    magic (8 bytes) | length of the header (uint32) | header (JSON, UTF-8) | CRC-32 of all before (uint32)
    record 0 | record 1 | ...

Little-endian. Every record has the same size, which the header gives: step (uint64), flags (uint8, 1 = skipped),
K losses, the count that they are means over, q projected gradients as used, the lr of each parameter group (all
float64), CRC-32 (uint32, started from the header's). Record i is step i.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from zoscale.config import ConfigError

FORMAT = 1
_MAGIC = b"ZOJRNL\r\n"  # a transfer that rewrites line ends breaks it
_MAX_HEADER = 2**20
_LENGTH = struct.Struct("<I")
HEADER_ROOM = len(_MAGIC) + _LENGTH.size + _MAX_HEADER + _LENGTH.size
"""Bytes that hold any header."""
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


def pack_header(header: Header) -> bytes:
    """A header as it is written."""
    text = _HEADER.dump_json(header)
    content = _MAGIC + _LENGTH.pack(len(text)) + text
    return content + _LENGTH.pack(zlib.crc32(content))


def unpack_header(content: bytes, path: Path) -> tuple[Header, int, int]:
    """The header, where the records start, and its checksum, which theirs start from.

    Not the checksum of all the bytes before the records: that of data with its own checksum is the same for all.

    Args:
        content: of the file, from its beginning.
        path: of the file.

    Raises:
        ConfigError: for another kind of file, or a header that is not intact.
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


def pack_record(record: Record, header: Header, seed: int) -> bytes:
    """A record as it is written; `seed` is the header's checksum."""
    values = (*record.losses, record.count, *record.projected_grads, *record.lrs)
    body = header._layout.pack(record.step, int(record.skipped), *values)
    return body + _LENGTH.pack(zlib.crc32(body, seed))


def unpack_record(content: bytes, place: int, header: Header, seed: int) -> Record | None:
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

"""The step journal: an append-only binary file from which a run is rebuilt without any forward pass.

`journal_format` has its bytes.
"""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from zoscale.config import ConfigError
from zoscale.recovery.journal_format import (
    HEADER_ROOM,
    Header,
    Record,
    pack_header,
    pack_record,
    unpack_header,
    unpack_record,
)
from zoscale.run_directory import RunDirectory, write_bytes

_MAX_SEARCH = 2**28  # bytes to checksum in search of a record behind a torn one: seconds


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
        header, start, seed = unpack_header(content, path)
        size = header.record_bytes
        records: list[Record] = []
        place = start
        while (record := unpack_record(content, place, header, seed)) is not None and record.step == len(records):
            records.append(record)
            place += size
        if (corruption := _look_behind(content, place, header, seed)) is not None:
            raise ConfigError(
                f"intact records up to the end of {path}",
                f"corruption at byte {place} (step {len(records)}), before {corruption}",
                "restore the file from a copy: what follows cannot be trusted",
            )
        return cls(header, records, place, len(content) - place)


def find_journal(path: Path) -> Path:
    """The journal of a run directory, or the one that lies at the path.

    Raises:
        ConfigError: if there is none.
    """
    file = RunDirectory(path).journal if path.is_dir() else path
    if not file.is_file():
        raise ConfigError("a run directory with journal.bin, or a journal", str(path), "check the path")
    return file


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
        self._header, self._size, self._sync_every = header, num_bytes, sync_every
        self._unsynced = 0
        with path.open("rb") as file:  # the file's own spelling of the header, not ours of today
            *_, self._seed = unpack_header(file.read(HEADER_ROOM), path)
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
        content = pack_header(header)
        unpack_header(content, path)
        write_bytes(path, content)
        return cls(path, header, len(content), sync_every=sync_every)

    def append(self, record: Record) -> None:
        """Write a record, and `fsync` if it is due.

        Raises:
            OSError: if it cannot be written; the file ends with the last whole record then.
        """
        content = pack_record(record, self._header, self._seed)
        try:
            written = os.write(self._file, content)
            if written != len(content):
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
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
        self._size -= num_records * self._header.record_bytes
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


def _look_behind(content: bytes, place: int, header: Header, seed: int) -> str | None:
    """What lies at or after the first place without the next record; None for nothing, a torn end.

    An intact record may lie at any offset: bytes may be missing or too many. The search is bounded.
    """
    last = len(content) - header.record_bytes
    stop = place + _MAX_SEARCH // header.record_bytes
    for behind in range(place, min(last + 1, stop)):
        if unpack_record(content, behind, header, seed) is not None:
            return f"an intact record at byte {behind}"
    return f"{len(content) - stop} bytes too many to be searched for records" if stop <= last else None

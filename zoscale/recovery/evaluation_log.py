"""`EvaluationLog`: every evaluation of a run on disk, so that a resumed run takes none twice."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, TypeAdapter, ValidationError

from zoscale.config import ConfigError
from zoscale.evaluate import Evaluation
from zoscale.mesh import Mesh


def _counted(result: dict[str, float]) -> dict[str, float]:
    if "count" not in result or not result["count"].is_integer():
        raise ValueError("a result needs a count of examples")
    return result


@dataclass(frozen=True)
class Entry:
    """One evaluation, as it stands on a line of the file.

    Args:
        name: of the split, as in the metrics.
        step: steps taken before it.
        result: `count`, the number of examples, and the metrics by name.
    """

    name: str
    step: int
    result: Annotated[dict[str, float], AfterValidator(_counted)]

    @property
    def evaluation(self) -> Evaluation:
        """The result."""
        metrics = {name: value for name, value in self.result.items() if name != "count"}
        return Evaluation(int(self.result["count"]), metrics)


_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)


class EvaluationLog:
    """Evaluations by (name, step); rank 0 appends them to a file, all ranks know them.

    Args:
        path: of the file. What is there is read; the end of a line that was cut off is removed.
        mesh: the ranks.

    Raises:
        ConfigError: for a malformed file.
    """

    def __init__(self, path: Path, mesh: Mesh) -> None:
        self.path = path
        self.mesh = mesh
        entries = mesh.on_main(lambda: _read(path))
        self._known = {(entry.name, entry.step): entry.evaluation for entry in entries}

    def get(self, name: str, step: int) -> Evaluation | None:
        """The evaluation of that name at that step, if it was taken."""
        return self._known.get((name, step))

    def series(self, name: str) -> list[tuple[int, Evaluation]]:
        """All evaluations of a name, by step."""
        return sorted((step, result) for (found, step), result in self._known.items() if found == name)

    def add(self, name: str, step: int, result: Evaluation) -> None:
        """Keep one more.

        Raises:
            OSError: on rank 0, if the file cannot be written.
        """
        self._known[name, step] = result
        if self.mesh.is_main:
            with self.path.open("ab") as file:
                row = {"name": name, "step": step, "result": result.flat()}
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


def _read(path: Path) -> list[Entry]:
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    try:
        return [_ENTRY.validate_json(line) for line in whole.splitlines()]
    except ValidationError as error:
        problem = str(error.errors()[0]["msg"])
        raise ConfigError(f"evaluations in {path}", problem, "restore the file from a copy") from error

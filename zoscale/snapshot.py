"""`Snapshot`: the trainable weights of one moment on disk, each rank its own slices."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from zoscale.engine import ZeroOrderEngine


class Snapshot:
    """One set of trainable weights, overwritten by each `save`. Safetensors, written aside and renamed.

    Args:
        folder: where the ranks' files lie.
        engine: whose weights are kept.
    """

    def __init__(self, folder: Path, engine: ZeroOrderEngine) -> None:
        self.engine = engine
        mesh = engine.mesh
        self.file = folder / f"rank_{mesh.rank:05d}_of_{mesh.world_size:05d}.safetensors"

    def save(self) -> None:
        """Write this rank's truth slices."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_suffix(".tmp")
        save_file({shard.spec.name: shard.truth.contiguous() for shard in self.engine.shards}, aside)
        aside.replace(self.file)

    def load(self) -> None:
        """Put the saved weights back; the next forward sees them."""
        saved = load_file(self.file)
        for shard in self.engine.shards:
            shard.truth.copy_(saved[shard.spec.name])
            shard.publish()

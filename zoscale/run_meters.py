"""`RunMeters`: throughput, memory and gathered bytes of every rank of a run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from zoscale.engine import StepResult, ZeroOrderEngine
from zoscale.meters import CommMeter, Counts, MemoryMeter, ThroughputMeter, Traffic, count_allgathers


class RunMeters:
    """This rank's meters and the collectives that bring all ranks' numbers together.

    Peak memory is that of training: loading and evaluation are measured as phases of their own.

    Args:
        engine: whose steps are measured.
    """

    def __init__(self, engine: ZeroOrderEngine) -> None:
        self.mesh = engine.mesh
        self.num_losses = engine.num_losses
        self.memory = MemoryMeter(engine.mesh.device)
        self.throughput = ThroughputMeter()
        self.comm = CommMeter()
        self._steps = 0
        self._gathered = Traffic(0, 0)
        self._mesh_taken = Traffic(self.mesh.gathered_bytes, self.mesh.num_gathers)
        self._totals = Counts()

    @contextmanager
    def training(self) -> Iterator[None]:
        """The training loop; time and traffic are counted within."""
        self.throughput = ThroughputMeter()
        with ExitStack() as stack:
            stack.enter_context(self.memory.phase("train"))
            stack.enter_context(count_allgathers(self.comm))
            yield
        self._totals = self.throughput.totals()

    @contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """Something else within the loop: its time, memory and traffic do not count for training."""
        self._add_traffic()
        with self.throughput.pause(), self.memory.phase(phase):
            yield
        self._take_traffic()

    def count(self, result: StepResult) -> None:
        """Add one step."""
        self._steps += 1
        losses = result.losses
        self.throughput.count(tokens=losses.local_tokens, samples=losses.local_samples, forwards=self.num_losses)

    def take(self) -> dict[str, float]:
        """Rates since the last call and memory, by rank as `rank_<r>/...`. A collective; all ranks get the same."""
        rates, memory = self.throughput.rates(), self.memory.read()
        self.throughput.reset()
        self._add_traffic()
        own = {
            **vars(rates),
            "memory_bytes": float(memory.current),
            "peak_memory_bytes": float(memory.peak),
            "gathered_bytes_per_step": self._gathered.num_bytes / max(1, self._steps),
            "gathers_per_step": self._gathered.num_calls / max(1, self._steps),
        }
        ranks = self.mesh.gather_objects(own)
        named = {f"rank_{rank}/{name}": value for rank, row in enumerate(ranks) for name, value in row.items()}
        named["train/tokens_per_second"] = sum(row["tokens_per_second"] for row in ranks)
        return named

    def _take_traffic(self) -> Traffic:
        """What ZeRO-3 and the mesh gathered since the last call."""
        own = Traffic(self.mesh.gathered_bytes, self.mesh.num_gathers)
        since, self._mesh_taken = own - self._mesh_taken, own
        return self.comm.take() + since

    def _add_traffic(self) -> None:
        self._gathered += self._take_traffic()

    def summary(self) -> dict[str, Any]:
        """Totals of the training loop, per rank where ranks differ. A collective."""
        totals = self._totals
        self._add_traffic()
        own = {
            "tokens_per_second": totals.tokens / totals.seconds if totals.seconds else 0.0,
            "peak_memory_bytes": self.memory.phases.get("train", self.memory.read().peak),
            "peak_memory_bytes_by_phase": dict(self.memory.phases),
            "gathered_bytes_per_step": self._gathered.num_bytes / max(1, self._steps),
            "gathers_per_step": self._gathered.num_calls / max(1, self._steps),
        }
        ranks = self.mesh.gather_objects(own)
        return {
            "training_seconds": totals.seconds,
            "steps_per_second": self._steps / totals.seconds if totals.seconds else 0.0,
            "tokens_per_second": sum(row["tokens_per_second"] for row in ranks),
            "world_size": self.mesh.world_size,
            "ranks": ranks,
        }

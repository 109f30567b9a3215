"""`RunMeters`: throughput, memory, gathered bytes and the split of the time of every rank of a run."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from zoscale.answers import AnswerModel
from zoscale.generation import Generator
from zoscale.meters import CommMeter, Counts, MemoryMeter, ThroughputMeter, Traffic, count_allgathers
from zoscale.phases import PHASES, PhaseTimer, timed
from zoscale.step import Engine, StepResult


class RunMeters:
    """This rank's meters and the collectives that bring all ranks' numbers together.

    Peak memory is that of training: loading and evaluation are measured as phases of their own.

    Args:
        engine: whose steps are measured.
        earlier: metrics that the run had logged when it was stopped; its totals go on from there, without the time of
            steps after the last that was logged.
    """

    def __init__(self, engine: Engine, earlier: Mapping[str, float] | None = None) -> None:
        self.engine = engine
        self.mesh = engine.mesh
        self.earlier = earlier or {}
        self.num_forwards = engine.num_forwards
        self.memory = MemoryMeter(engine.mesh.device)
        self.throughput = ThroughputMeter()
        self.comm = CommMeter()
        self.phases = PhaseTimer(engine.mesh.device)
        self._seconds_by_phase = dict.fromkeys(PHASES, 0.0)
        self._steps = 0
        self._steps_taken = 0
        self._gathered = Traffic(0, 0)
        self._mesh_taken = Traffic(self.mesh.gathered_bytes, self.mesh.num_gathers)
        self._totals = Counts()

    @contextmanager
    def training(self) -> Iterator[None]:
        """The training loop; time and traffic are counted within."""
        self.throughput, self.phases = ThroughputMeter(), PhaseTimer(self.mesh.device)
        with ExitStack() as stack:
            stack.enter_context(self.memory.phase("train"))
            stack.enter_context(count_allgathers(self.comm))
            for span in _spans(self.engine, self.phases):
                stack.enter_context(span)
            yield
        self._totals = self.throughput.totals()
        self._take_phases()

    @contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """Something else within the loop: its time, memory and traffic do not count for training."""
        self._add_traffic()
        with self.throughput.pause(), self.phases.pause(), self.memory.phase(phase):
            yield
        self._take_traffic()

    def count(self, result: StepResult) -> None:
        """Add one step."""
        self._steps += 1
        losses = result.losses
        self.throughput.count(tokens=losses.local_tokens, samples=losses.local_samples, forwards=self.num_forwards)
        self.phases.settle()

    def take(self) -> dict[str, float]:
        """Rates and the split of the time since the last call and memory, by rank as `rank_<r>/...`; running totals.

        A collective.
        """
        rates, memory, num_steps = self.throughput.rates(), self.memory.read(), max(1, self._steps - self._steps_taken)
        self.throughput.reset()
        self._steps_taken = self._steps
        self._add_traffic()
        own = {
            **vars(rates),
            "memory_bytes": float(memory.current),
            "peak_memory_bytes": float(memory.peak),
            "gathered_bytes_per_step": self._gathered.num_bytes / max(1, self._steps),
            "gathers_per_step": self._gathered.num_calls / max(1, self._steps),
            **{f"seconds_per_step/{name}": value / num_steps for name, value in self._take_phases().items()},
        }
        ranks = self.mesh.gather_objects(own)
        named = {f"rank_{rank}/{name}": value for rank, row in enumerate(ranks) for name, value in row.items()}
        named["train/tokens_per_second"] = sum(row["tokens_per_second"] for row in ranks)
        return named | self._running_totals()

    def _running_totals(self) -> dict[str, float]:
        """Time spent on training by the whole run, evaluations and checkpoints left out."""
        seconds = self.throughput.totals().seconds
        hours = seconds * self.mesh.world_size / 3600
        return {
            "train/seconds": self.earlier.get("train/seconds", 0.0) + seconds,
            "train/device_hours": self.earlier.get("train/device_hours", 0.0) + hours,
        }

    def _take_phases(self) -> dict[str, float]:
        taken = self.phases.take()
        for name, seconds in taken.items():
            self._seconds_by_phase[name] += seconds
        return taken

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
            "seconds_by_phase": dict(self._seconds_by_phase),
        }
        ranks = self.mesh.gather_objects(own)
        return {
            "training_seconds": totals.seconds,
            "steps_per_second": self._steps / totals.seconds if totals.seconds else 0.0,
            "tokens_per_second": sum(row["tokens_per_second"] for row in ranks),
            "world_size": self.mesh.world_size,
            "ranks": ranks,
        }


def _spans(engine: Engine, timer: PhaseTimer) -> list[AbstractContextManager[None]]:
    """What counts for which phase. Gathers are taken where ZeRO-3 fetches the tensors of a block, waiting included."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    first_order = engine.estimator.num_backwards > 0
    return [
        timed(timer, "noise", engine, "directions"),
        *([timed(timer, "forward", type(engine.forward), "backward")] if first_order else []),
        timed(timer, "other" if first_order else "noise", type(engine.forward), "losses"),
        timed(timer, "noise", engine.noise, "words", "uniform", "normal", "rademacher"),
        timed(timer, "forward", engine, "objective"),
        timed(timer, "forward", AnswerModel, "answer_logprobs"),
        timed(timer, "forward", Generator, "texts"),
        timed(timer, "gather", PartitionedParameterCoordinator, "fetch_sub_module"),
        timed(timer, "gather", engine.mesh, "gather_flats"),
        timed(timer, "exchange", engine.mesh, "gather_items"),
        timed(timer, "update", engine.optimizer, "step"),
    ]

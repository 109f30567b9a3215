"""`RunMeters`: throughput, memory, gathered bytes and the split of the time of every rank of a run."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from zoscale.meters import CommMeter, Counts, MemoryMeter, ThroughputMeter, Traffic, count_allgathers
from zoscale.models.answers import AnswerModel
from zoscale.models.generation import Generator
from zoscale.phases import PHASES, PhaseTimer, timed
from zoscale.step import Engine, StepResult

MANY = 64  # ranks that are logged one by one


class RunMeters:
    """This rank's meters and the collectives that bring all ranks' numbers together.

    Peak memory is that of training: loading and evaluation are measured as phases of their own.

    Args:
        engine: whose steps are measured.
        earlier: metrics that the run had logged when it was stopped; its totals go on from there, without the time and
            the tokens of steps after the last that was logged.
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

        Of more than `MANY` ranks every so many are named, and of all the slowest and the highest peak. A collective.
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
        totals = self.throughput.totals()
        ranks, tokens = zip(*self.mesh.gather_objects((own, totals.tokens)), strict=True)
        stride = -(-len(ranks) // MANY)
        chosen = [(rank, row) for rank, row in enumerate(ranks) if rank % stride == 0]
        named = {f"rank_{rank}/{name}": value for rank, row in chosen for name, value in row.items()}
        if stride > 1:
            named["train/slowest_rank"] = float(min(range(len(ranks)), key=lambda r: ranks[r]["tokens_per_second"]))
            named["train/peak_memory_bytes"] = max(row["peak_memory_bytes"] for row in ranks)
        named["train/tokens_per_second"] = sum(row["tokens_per_second"] for row in ranks)
        return named | self._running_totals(totals.seconds, sum(tokens))

    def _running_totals(self, seconds: float, tokens: int) -> dict[str, float]:
        """What the whole run has spent on training, evaluations and checkpoints left out.

        Args:
            seconds: of this session.
            tokens: of this session, of all ranks.
        """
        own = {
            "train/seconds": seconds,
            "train/device_hours": seconds * self.mesh.world_size / 3600,
            "train/tokens": float(tokens),
        }
        return {name: self.earlier.get(name, 0.0) + value for name, value in own.items()}

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

    def summary(self, session_seconds: float) -> dict[str, Any]:
        """Totals of the whole run's training, and what this session was like, by rank too. A collective.

        Args:
            session_seconds: that this session took, evaluations included.
        """
        seconds = self._totals.seconds
        self._add_traffic()
        own = {
            "tokens_per_second": _rate(self._totals.tokens, seconds),
            "peak_memory_bytes": self.memory.phases.get("train", self.memory.read().peak),
            "peak_memory_bytes_by_phase": dict(self.memory.phases),
            "gathered_bytes_per_step": self._gathered.num_bytes / max(1, self._steps),
            "gathers_per_step": self._gathered.num_calls / max(1, self._steps),
            "seconds_by_phase": dict(self._seconds_by_phase),
        }
        ranks, tokens = zip(*self.mesh.gather_objects((own, self._totals.tokens)), strict=True)
        run = self._running_totals(seconds, sum(tokens))
        return {
            "training_seconds": run["train/seconds"],
            "device_hours": run["train/device_hours"],
            "tokens_per_second": _rate(run["train/tokens"], run["train/seconds"]),
            "world_size": self.mesh.world_size,
            "session": {
                "steps": self._steps,
                "seconds": session_seconds,
                "training_seconds": seconds,
                "steps_per_second": _rate(self._steps, seconds),
                "tokens_per_second": _rate(sum(tokens), seconds),
            },
            "ranks": list(ranks),
        }


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds else 0.0


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

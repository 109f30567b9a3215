"""Who holds a job up: a pure judgement of what each rank last said of itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TICK = 1.0  # seconds between two looks

_WAITING = ("torch.distributed", "torch.cuda", "deepspeed", "zoscale.mesh")
"""Modules in which a rank waits for others: collectives of gloo block, on a GPU whatever reads an event or a result."""


@dataclass(frozen=True)
class State:
    """What a rank tells the others; `limit` seconds without a move (a beat, a phase entered or left) are normal.

    A pass is `entered` where it begins and has its beat where it ends.
    """

    limit: float
    phase: str = "start"
    beat: int = 0
    entered: int = 0
    moves: int = 0
    post: int = 0
    ended: str = ""
    place: str = ""
    host: str = ""
    pid: int = 0


@dataclass(frozen=True)
class Sight:
    """A rank as another sees it: seconds since its last post and its last move, and whether its process is stopped."""

    state: State
    quiet: float
    idle: float
    stopped: bool = False

    def name(self, rank: int) -> str:
        """The rank and its process."""
        return f"rank {rank}" + f" (host {self.state.host}, pid {self.state.pid})" * bool(self.state.pid)

    def tell(self, rank: int, how: str, seconds: float) -> str:
        """A sentence on what the rank does."""
        phase = f" in phase {self.state.phase!r}" * bool(self.state.phase)
        notes = f", last at {self.state.place}" * bool(self.state.place) + ", stopped" * self.stopped
        notes += f", ended by {self.state.ended}" * bool(self.state.ended)
        return f"{self.name(rank)} has {how} for {seconds:.0f} s at beat {self.state.beat}{phase}{notes}"


class Stillness:
    """For how long values have not changed, on a clock that stands still while this process is stopped or starved."""

    def __init__(self) -> None:
        self._now, self._read = 0.0, float("inf")
        self._since: dict[str, tuple[object, float]] = {}

    def tick(self, read: float) -> None:
        """Advance to a reading of the monotonic clock, by 2 ticks at most."""
        self._now += max(0.0, min(read - self._read, 2 * TICK))
        self._read = read

    def of(self, name: str, value: object) -> float:
        """Seconds since `name` first had this value."""
        before, since = self._since.get(name, (None, self._now))
        self._since[name] = (value, since if before == value else self._now)
        return self._now - self._since[name][1]


def judge(sights: Mapping[int, Sight], stall_seconds: float) -> tuple[str, Sequence[int]] | None:
    """A sentence on the ranks that hold the job up, and these ranks; None if all is well.

    The silent ones: their whole process stands still. Else those of the fewest beats, and of these those that entered
    the fewest passes, once they are over their limits; where all are equal, those that are not in a collective while
    others are. A rank in a slow phase and within its limit excuses all: they may wait for it.
    """
    seen = {rank: sight for rank, sight in sights.items() if sight.state.ended != "finished"}
    limits = {rank: s.state.limit if s.state.phase and not s.stopped else stall_seconds for rank, s in seen.items()}
    silent = [rank for rank, sight in seen.items() if sight.quiet > limits[rank]]
    if silent:
        return "; ".join(seen[rank].tell(rank, "been silent", seen[rank].quiet) for rank in silent[:8]), silent
    beats = sorted({sight.state.beat for sight in seen.values()})
    come = {rank: (sight.state.beat, sight.state.entered) for rank, sight in seen.items()}
    behind = [rank for rank in seen if come[rank] == min(come.values())]
    in_time = [rank for rank, sight in seen.items() if sight.idle <= sight.state.limit]
    if not seen or any(rank in behind or seen[rank].state.phase for rank in in_time):
        return None
    busy = [rank for rank in behind if not seen[rank].state.place.startswith(_WAITING)]
    blamed = busy if len(behind) == len(seen) and busy else behind
    told = [seen[rank].tell(rank, "made no progress", seen[rank].idle) for rank in blamed[:8]]
    if len(beats) > 1:
        told.append(f"the others are at {' to '.join(map(str, sorted({beats[1], beats[-1]})))}")
    elif len(blamed) < len(seen):
        told.append("the others wait in a collective at the same beat")
    return "; ".join(told), blamed

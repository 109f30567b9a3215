"""`Watchdog`: real jobs that stall, are stopped, lose their launcher, or are only slow."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import watchdog_worker
from processes import ROOT, environment, free_port
from torch.distributed import HashStore
from watchdog_worker import STALL

from zoscale.stillness import TICK, Sight, State, Stillness, judge
from zoscale.watchdog import EXIT_STALLED, GRACE, READS, Watchdog

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["zoscale.watchdog"])

SOON = STALL + 3 * TICK + GRACE + TICK + 3.0
"""Seconds within which a stalled job must have ended, and its launcher too."""


class Job:
    """Processes of the worker script.

    Args:
        folder: for the output and the process ids.
        what: the method of the worker's `Rank` to call.
        ranks: how many processes.
        launcher: start them by torchrun; else they are forks, and rank 0 hosts the store.
    """

    def __init__(self, folder: Path, what: str, *, ranks: int = 2, launcher: bool = False) -> None:
        self.folder, self.ranks = folder, ranks
        self.launcher: subprocess.Popen[str] | None = None
        self.forks: list[ForkServerProcess] = []
        folder.mkdir(exist_ok=True)
        port = str(free_port())
        if launcher:
            torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]
            command = [sys.executable, *torchrun, watchdog_worker.__file__, what, str(folder)]
            with (folder / "out").open("w") as output:
                self.launcher = subprocess.Popen(
                    command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), text=True,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            return
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        for rank in range(ranks):
            arguments = what, folder, folder / f"out{rank}", {**shared, "RANK": str(rank)}
            self.forks.append(FORKS.Process(target=watchdog_worker.forked, args=arguments))
            self.forks[-1].start()

    def pids(self) -> list[int]:
        """The ranks' process ids, once they are in their steps."""
        files = [self.folder / f"pid{rank}" for rank in range(self.ranks)]
        wait_until(lambda: all(file.exists() for file in files), 60, self.output)
        return [int(file.read_text()) for file in files]

    def wait(self, seconds: float) -> list[int]:
        """The exit statuses."""
        wait_until(lambda: None not in self._statuses(), seconds, self.output)
        return [status for status in self._statuses() if status is not None]

    def _statuses(self) -> list[int | None]:
        return [self.launcher.poll()] if self.launcher else [fork.exitcode for fork in self.forks]

    def output(self) -> str:
        return "".join(file.read_text() for file in sorted(self.folder.glob("out*")))

    def kill(self) -> None:
        for fork in self.forks:
            fork.kill()
            fork.join()
        if self.launcher:
            self.launcher.kill()
            self.launcher.wait()
            for pid in (int(file.read_text()) for file in self.folder.glob("pid?")):
                with suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if str(self.folder) in process.cmdline():
                        process.kill()


def wait_until(condition: Callable[[], bool], seconds: float, output: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s:\n{output()}"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


ALARMS = {
    "sleeps": (0, "has made no progress for", "in sleeps"),
    "beats_and_sleeps": (1, "the others wait in a collective", "in beats_and_sleeps"),
    "waits": (1, "the others are at", "in waits"),
    "keeps_lock": (1, "has been silent for [345] s", ""),
    "slow_then_keeps_lock": (1, "has been silent for [345] s", ""),
    "fails": (1, "ended by OSError", ""),
    "takes_too_long": (1, "in phase 'write'", "in takes_too_long"),
}
HEALTHY = ["slow", "irregular", "ends_later", "goes_on"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """All at once, because they mostly sleep."""
    folder = tmp_path_factory.mktemp("jobs")
    started = {what: Job(folder / what, what, ranks=1 if what == "sleeps" else 2) for what in [*ALARMS, *HEALTHY]}
    started["endless"] = Job(folder / "endless", "endless")
    try:
        (host, _) = started["endless"].pids()
        time.sleep(3 * TICK)  # in which rank 1 reads what process rank 0 is
        os.kill(host, signal.SIGSTOP)
        suspended = started["goes_on"].pids()
        for pid in reversed(suspended):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(1.5 * TICK)  # in which rank 0 looks at rank 1, stopped already
        time.sleep(3 * STALL)
        for pid in suspended:
            os.kill(pid, signal.SIGCONT)
            time.sleep(TICK)  # in which rank 0 looks at rank 1, stopped still
        (started["goes_on"].folder / "resumed").touch()
        yield started
    finally:
        for job in started.values():
            job.kill()


@pytest.mark.parametrize("what", HEALTHY)
def test_a_healthy_job_ends_well(what: str, jobs: dict[str, Job]) -> None:
    """A phase that takes long and keeps Python's lock; irregular beats; ranks that end seconds apart, the store's
    host first; a job that is suspended and resumed."""
    assert jobs[what].wait(50) == [0, 0], jobs[what].output()
    assert "zoscale: " not in jobs[what].output()


@pytest.mark.parametrize("what", ALARMS)
def test_a_stalled_rank_ends_the_job_and_is_named(what: str, jobs: dict[str, Job]) -> None:
    job, (rank, reason, stack) = jobs[what], ALARMS[what]
    statuses = job.wait(40)
    assert EXIT_STALLED in statuses and set(statuses) <= {EXIT_STALLED, -signal.SIGKILL}, job.output()
    lines = [line for line in job.output().splitlines() if line.endswith("stopping the job")]
    assert lines, job.output()
    for line in lines:
        assert f"rank {rank} (host" in line and f"pid {job.pids()[rank]}" in line and re.search(reason, line)
        assert f"rank {1 - rank} (host" not in line
    assert stack in job.output()
    assert job.output().count("is here") == (1 if stack else 0), "the stack of that rank and of no other"


def test_a_stopped_host_of_the_store_ends_the_job(jobs: dict[str, Job]) -> None:
    """The store does not answer then, and blocks whoever asks it."""
    job = jobs["endless"]
    assert job.wait(40) == [-signal.SIGKILL, EXIT_STALLED], job.output()
    host = rf"its host is rank 0 \(host .*, pid {job.pids()[0]}\)"
    assert re.search(f"the job's store has not answered for . s; {host}; stopping the job", job.output())


def test_a_stopped_rank_ends_a_launched_job(tmp_path: Path) -> None:
    job = Job(tmp_path, "endless", launcher=True)
    try:
        pids = job.pids()
        os.kill(pids[1], signal.SIGSTOP)
        assert job.wait(SOON) == [1], job.output()
        assert f"pid {pids[1]}) has been silent" in job.output() and ", stopped; stopping the job" in job.output()
        assert not any(is_alive(pid) for pid in pids)
    finally:
        job.kill()


def test_a_killed_launcher_ends_the_ranks(tmp_path: Path) -> None:
    job = Job(tmp_path, "endless", launcher=True)
    try:
        pids = job.pids()
        job.launcher.kill()
        wait_until(lambda: not any(is_alive(pid) for pid in pids), 2 * TICK + 2, job.output)
        assert f"the launcher (pid {job.launcher.pid}) is gone" in job.output()
    finally:
        job.kill()


def sights(*beats: int, idle: float = 40.0, **state: object) -> dict[int, Sight]:
    """Ranks that posted just now."""
    common = replace(State(limit=30.0, phase="", host="h", place="data:5 (read)"), **state)  # type: ignore[arg-type]
    return {
        rank: Sight(replace(common, beat=beat, pid=100 + rank), quiet=1.0, idle=idle) for rank, beat in enumerate(beats)
    }


def change(sight: Sight, **state: object) -> Sight:
    return replace(sight, state=replace(sight.state, **state))  # type: ignore[arg-type]


class TestJudge:
    def test_all_is_well_within_the_limits(self) -> None:
        assert judge({}, 30) is None
        assert judge(sights(5, 5, idle=30.0), 30) is None
        assert judge(sights(5, 4, limit=50.0), 30) is None, "a rank's own limit counts"

    def test_the_fewest_beats_are_to_blame(self) -> None:
        verdict = judge(sights(58, 57, 59), 30)
        assert verdict is not None and verdict[1] == [1]
        assert verdict[0] == (
            "rank 1 (host h, pid 101) has made no progress for 40 s at beat 57, last at data:5 (read); "
            "the others are at 58 to 59"
        )

    def test_a_rank_ahead_that_moves_excuses_nobody_behind(self) -> None:
        seen = sights(58, 57)
        verdict = judge({0: replace(seen[0], idle=1.0), 1: seen[1]}, 30)
        assert verdict is not None and verdict[1] == [1]
        assert judge({0: seen[0], 1: replace(seen[1], idle=1.0)}, 30) is None, "nor does one who waits blame others"

    def test_among_equals_those_outside_a_collective_are_to_blame(self) -> None:
        seen = sights(57, 57, 57, place="torch.distributed.distributed_c10d:3012 (all_reduce)")
        seen[1] = change(seen[1], place="zoscale.mesh:107 (gather_items)")  # on a GPU, whose host waits for the result
        everyone = judge(seen, 30)
        assert everyone is not None and everyone[1] == [0, 1, 2]
        seen[2] = change(seen[2], place="data:5 (read)")
        one = judge(seen, 30)
        assert one is not None and one[1] == [2]
        assert one[0].endswith("the others wait in a collective at the same beat")

    @pytest.mark.parametrize("place", ["torch.cuda.streams:245 (synchronize)", "transformers.generation.utils:9 (f)"])
    def test_among_equal_beats_those_that_entered_fewer_passes_are_to_blame(self, place: str) -> None:
        """On a GPU the others wait anywhere within the next pass: their host runs ahead of its gathers."""
        seen = sights(57, 57, 57, place=place, entered=58)
        seen[2] = change(seen[2], place="data:5 (read)", entered=57)
        verdict = judge(seen, 30)
        assert verdict is not None and verdict[1] == [2] and "others wait in a collective" in verdict[0]
        seen[0] = change(seen[0], beat=56)
        verdict = judge(seen, 30)
        assert verdict is not None and verdict[1] == [0], "beats count first"
        seen[2] = change(seen[2], beat=56)
        verdict = judge(seen, 30)
        assert verdict is not None and verdict[1] == [2]

    def test_waiting_for_an_event_of_a_gpu_is_waiting_for_others(self) -> None:
        seen = sights(57, 57, place="torch.cuda.streams:245 (synchronize)")
        seen[1] = change(seen[1], place="data:5 (read)")
        verdict = judge(seen, 30)
        assert verdict is not None and verdict[1] == [1]

    def test_a_silent_rank_is_blamed_before_the_fewest_beats(self) -> None:
        seen = sights(58, 57)
        verdict = judge({0: replace(seen[0], quiet=31.0), 1: seen[1]}, 30)
        assert verdict is not None and verdict[1] == [0] and "has been silent for 31 s" in verdict[0]
        patient = replace(change(seen[0], limit=1200.0), quiet=31.0)
        assert judge({0: patient, 1: seen[1]}, 30) == verdict, "long steps give it time to move, not to be silent"

    def test_a_slow_phase_excuses_all_up_to_its_limit(self) -> None:
        seen = sights(57, 57)
        for beat in (56, 57, 58):
            seen[1] = replace(change(seen[1], phase="write", limit=600.0, beat=beat), quiet=599.0, idle=599.0)
            assert judge(seen, 30) is None
        for late in (replace(seen[1], idle=601.0, quiet=1.0), replace(seen[1], quiet=601.0)):
            verdict = judge({0: seen[0], 1: change(late, beat=56)}, 30)
            assert verdict is not None and verdict[1] == [1] and "in phase 'write'" in verdict[0]

    def test_a_stopped_process_is_not_excused_by_a_slow_phase(self) -> None:
        seen = sights(57, 57, phase="write", limit=600.0)
        verdict = judge({0: seen[0], 1: replace(seen[1], quiet=31.0, stopped=True)}, 30)
        assert verdict is not None and verdict[1] == [1] and verdict[0].endswith(", stopped")

    def test_a_rank_that_has_finished_is_not_watched(self) -> None:
        seen = sights(57, 58)
        seen[0] = replace(change(seen[0], ended="finished"), quiet=1000.0)
        assert judge({0: seen[0], 1: replace(seen[1], idle=1.0)}, 30) is None
        verdict = judge(seen, 30)
        assert verdict is not None and verdict[1] == [1]
        assert judge({0: seen[0]}, 30) is None

    def test_a_rank_that_was_never_seen(self) -> None:
        never = Sight(State(limit=600.0), quiet=601.0, idle=601.0)
        verdict = judge({0: sights(0)[0], 1: never}, 30)
        assert verdict == ("rank 1 has been silent for 601 s at beat 0 in phase 'start'", [1])


def test_stillness_does_not_count_the_own_absence() -> None:
    stillness = Stillness()
    for now in (1000.0, 1001.0, 1002.0):
        stillness.tick(now)
        still = stillness.of("a", "x")
    assert still == 2.0
    stillness.tick(1100.0)
    assert stillness.of("a", "x") == 2.0 + 2 * TICK
    assert stillness.of("a", "y") == 0.0 and stillness.of("b", "x") == 0.0


def test_long_intervals_raise_the_limit_and_slow_phases_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    dog, now = Watchdog(rank=0, world_size=1), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def limit_after(seconds: float) -> float:
        now[0] += seconds
        dog.beat()
        return dog._state().limit

    assert dog._state().limit == 600.0 and dog._state().phase == "start"
    assert limit_after(100.0) == 30.0, "the time before the first beat is no interval"
    assert limit_after(2.0) == 40.0
    assert limit_after(1.0) == 40.0
    with dog.slow("write"):
        assert limit_after(300.0) == 600.0
        now[0] += 300.0
    assert limit_after(0.0) == 40.0
    with dog.slow("first step", repeats=True):
        now[0] += 50.0
    assert limit_after(0.0) == 100.0, "the next may take as long, and tells nothing meanwhile"


def test_an_error_of_the_watchdog_ends_the_watch_only(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zoscale.watchdog.judge", lambda sights, stall_seconds: 1 / 0)
    with Watchdog(rank=0, world_size=1) as dog:
        wait_until(lambda: not any(thread.is_alive() for thread in dog._threads), 5 * TICK, str)
        dog.beat()
    assert capfd.readouterr().err.count("the watchdog failed and ends its watch: ZeroDivisionError") == 1


@pytest.mark.parametrize(("world_size", "stride"), [(8, 1), (362, 1), (512, 2), (1024, 8)])
def test_what_all_ranks_read_stays_bounded(world_size: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They judge by news only, and learn each second that the store answers."""
    dog, reads, judged = Watchdog(rank=3, world_size=world_size), list[int](), list[int]()
    monkeypatch.setattr(dog, "_store", HashStore())
    monkeypatch.setattr("zoscale.watchdog.judge", lambda sights, stall_seconds: judged.append(len(sights)))
    for rank in range(world_size):
        dog._store.set(str(rank), json.dumps(asdict(State(limit=30.0))))
    for second in range(3 * stride):
        before = dog._news
        dog._swap()
        dog._look()
        reads.append(world_size if dog._news[1] is not before[1] else 1)
        assert dog._news[0] == second + 1
    assert judged == [world_size] * 3 and reads == [world_size, *[1] * (stride - 1)] * 3
    assert world_size**2 / stride <= READS


@pytest.mark.measured
def test_a_beat_is_cheap() -> None:
    dog = Watchdog(rank=0, world_size=1)
    fastest = min(timed(dog) for _ in range(5))
    assert fastest < 10e-6, f"{fastest * 1e6:.1f} us"


def timed(dog: Watchdog, number: int = 10_000) -> float:
    start = time.perf_counter()
    for _ in range(number):
        dog.beat()
    return (time.perf_counter() - start) / number


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 < stall_seconds <= slow_seconds, got 30 and 10"):
        Watchdog(rank=0, world_size=1, slow_seconds=10)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why watchdogs would have ended their jobs."""
    found: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, message, *_: found.append(message))
    return found


@pytest.mark.parametrize("status", [psutil.STATUS_RUNNING, psutil.STATUS_STOPPED])
@pytest.mark.parametrize("beats", [0, 1])
def test_a_store_that_does_not_answer(
    beats: int, status: str, ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take long before the first beat, where many processes start at once, but for a host seen stopped."""
    dog = Watchdog(rank=1, world_size=2, stall_seconds=STALL, slow_seconds=60)
    for _ in range(beats):
        dog.beat()
    monkeypatch.setattr(Watchdog, "_sibling", lambda self, state: SimpleNamespace(status=lambda: status))
    monkeypatch.setattr(time, "monotonic", iter(range(6)).__next__)
    dog._news = (1, [State(STALL, host="h", pid=7)] * 2)
    for _ in range(6):
        dog._look()
    impatient = beats or status == psutil.STATUS_STOPPED
    assert bool(ends) == impatient
    assert set(ends) <= {
        f"the job's store has not answered for {s} s; its host is rank 0 (host h, pid 7)" for s in (4, 5)
    }


def test_a_store_that_does_not_answer_is_blamed_though_its_host_posted_before_the_last_answer(
    ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its host is silent for longer, by what was read last."""
    now, state = [0.0], State(limit=STALL, beat=3, post=1, host="h", pid=7)
    dog = Watchdog(rank=1, world_size=2, stall_seconds=STALL, slow_seconds=60)
    dog.beat()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Watchdog, "_sibling", lambda self, state: SimpleNamespace(status=lambda: psutil.STATUS_STOPPED))
    for look in range(5):
        if look < 2:
            dog._news = (look + 1, [state, replace(state, post=look + 1)])
        dog._look()
        now[0] += 1.01 * TICK
    assert ends == ["the job's store has not answered for 3 s; its host is rank 0 (host h, pid 7)"]


def test_the_first_answer_of_the_store_may_take_long(ends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    swap = Watchdog._swap

    def late(self: Watchdog) -> None:
        if not self._news[0]:
            time.sleep(2.5 * TICK)
        swap(self)

    monkeypatch.setattr(Watchdog, "_swap", late)
    with Watchdog(rank=0, world_size=1, stall_seconds=TICK / 2, slow_seconds=60):
        time.sleep(3 * TICK)
    assert not ends

"""`Watchdog`: a rank that stands still, or a launcher that is gone, takes the whole job down, and is named."""

import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from socket import gethostname
from typing import Any, Self, cast

import psutil
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from zoscale.stillness import TICK, Sight, State, Stillness, judge

EXIT_STALLED = 70  # EX_SOFTWARE of sysexits.h
GRACE = 2.0  # seconds from a rank's message to its end: the others say theirs, and a stuck rank shows its stack
PATIENCE = 20.0  # a rank may take so many times its longest interval between two beats
READS = 2**17  # posts per second that the ranks together read from the store, some 35 MB: above 362 ranks less often


class Watchdog:
    """Ends the job when a rank stands still or its launcher is gone; needs no collective's time-out.

    Within `with watchdog:` all ranks call `beat` at the same places of their main threads, best before they wait for
    each other. Two daemon threads per rank post its state to the job's store and look at the others' once a second, or
    less often where ranks are many (`READS`); each rank judges by its own clock. A collective, a read or a sleep
    releases Python's lock: such a rank still posts, is named by its lowest beat, and shows its stack. A rank that is
    stopped, or that keeps Python's lock inside C++, cannot post: the others find it silent for `stall_seconds`. `slow`
    announces a phase that may take long or keep the lock: it is given `slow_seconds`, and so is the time before the
    first beat; there only a process that is seen stopped on the observer's host is found sooner. A job suspended and
    resumed as a whole goes on.

    Every rank says why in one line on stderr; `GRACE` seconds later it kills the stalled processes of the same
    launcher, which may not heed SIGTERM, and exits with `EXIT_STALLED`. The same if the job's store is gone, and
    at once if torchrun is. Where rank 0 hosts the store, the ranks must meet after the `with` before it ends.
    An error of the watchdog itself is told and ends the watch, never the job.

    Args:
        rank: of this process.
        world_size: number of ranks; more than one need the default process group.
        stall_seconds: without progress that end the job; or `PATIENCE` intervals between beats, or twice the time of
            the longest phase that `repeats`, if that is longer.
        slow_seconds: the same in a slow phase.

    Raises:
        ValueError: unless 0 < stall_seconds <= slow_seconds.
    """

    def __init__(self, *, rank: int, world_size: int, stall_seconds: float = 30.0, slow_seconds: float = 600.0) -> None:
        if not 0 < stall_seconds <= slow_seconds:
            got = f"{stall_seconds:g} and {slow_seconds:g}"
            raise ValueError(f"expected 0 < stall_seconds <= slow_seconds, got {got}: raise slow_seconds")
        self.rank, self.world_size = rank, world_size
        self.stall_seconds, self.slow_seconds = stall_seconds, slow_seconds
        self._beats, self._num_entered, self._num_turns, self._num_posts = 0, 0, 0, 0
        self._beaten: float | None = None  # the last beat, if no phase has begun or ended since
        self._longest, self._repeated = 0.0, 0.0
        self._phase, self._ended, self._lost = "", "", ""
        self._parent, self._main = os.getppid(), threading.get_ident()
        self._halt, self._posting = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._repeat, args=[w], daemon=True) for w in (self._swap, self._look)]
        self._store: Store = HashStore()
        self._stride = math.ceil(world_size**2 / READS)  # every so many swaps bring news
        self._news: tuple[int, list[State]] = (0, [])  # number of swaps, and the ranks' states by the last news
        self._judged: list[State] = []
        self._stillness = Stillness()

    def __enter__(self) -> Self:
        """Start to watch, once, on all ranks.

        Raises:
            ValueError: if there is more than one rank and no process group.
            torch.distributed.DistError: if the job's store cannot be reached.
        """
        if self.world_size > 1:  # a connection of its own: blocking calls of the main thread do not block it
            self._store = cast(Any, _get_default_store()).clone()
        watch = self._store.add(f"zoscale/watchdog/{self.rank}", 1)
        self._store = PrefixStore(f"zoscale/watchdog/{watch}", self._store)
        for rank in range(self.world_size):  # from here on no read waits for a missing key
            self._store.compare_set(str(rank), "", json.dumps({"limit": self.slow_seconds}))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop to watch; after an error the other ranks go on to expect the end of this process."""
        self._leave(kind.__name__ if kind else "finished")
        for thread in self._threads:
            thread.join(GRACE)

    def beat(self) -> None:
        """Tell that the main thread has come this far."""
        now = time.monotonic()
        if self._beaten is not None:
            self._longest = max(self._longest, now - self._beaten)
        self._beaten = now
        self._beats += 1
        if self._beats == 1:
            self._post()  # now: the others still expect a slow start

    def enter(self) -> None:
        """Tell that a pass begins whose beat is yet to come: on a GPU ranks wait within it for those that have not."""
        self._num_entered += 1

    def move(self) -> None:
        """Tell of progress that is no beat, where ranks do not count alike."""
        self._num_turns += 1

    @contextmanager
    def slow(self, what: str, *, repeats: bool = False) -> Iterator[None]:
        """A phase that may take `slow_seconds` between two moves, for instance loading or the first step.

        Args:
            what: its name in messages.
            repeats: it is one of many alike, of which the others are no slow phases.
        """
        began, outer, self._phase = time.monotonic(), self._phase, what
        self._beaten = None
        self._num_turns += 1
        self._post()  # now: the phase may keep Python's lock from the threads
        try:
            yield
        finally:
            if repeats:
                self._repeated = max(self._repeated, min(time.monotonic() - began, self.slow_seconds))
            self._phase, self._beaten = outer, None
            self._num_turns += 1
            self._post()

    def _state(self) -> State:
        phase = "" if self._ended else self._phase or ("" if self._beats else "start")
        limit = self.slow_seconds if phase else max(self.stall_seconds, PATIENCE * self._longest, 2 * self._repeated)
        counts = self._beats, self._num_entered, self._beats + self._num_turns, self._num_posts
        frame = sys._current_frames()[self._main]
        while frame.f_back and frame.f_globals.get("__name__") in (__name__, "contextlib"):
            frame = frame.f_back  # `beat` and `slow` post too
        place = f"{frame.f_globals.get('__name__')}:{frame.f_lineno} ({frame.f_code.co_name})"
        return State(limit, phase, *counts, self._ended, place, gethostname(), os.getpid())

    def _post(self) -> None:
        with self._posting, suppress(dist.DistError):  # that the store is lost is found by `_swap`
            self._num_posts += 1
            self._store.set(str(self.rank), json.dumps(asdict(self._state())))

    def _leave(self, how: str) -> None:
        self._ended = how
        self._post()
        self._halt.set()

    def _repeat(self, work: Callable[[], None]) -> None:
        try:
            while not self._halt.is_set():
                work()
                self._halt.wait(TICK)
        except Exception as error:
            if not self._halt.is_set():
                sys.stderr.write(f"zoscale: rank {self.rank}: the watchdog failed and ends its watch: {error!r}\n")
                self._leave("finished")

    def _swap(self) -> None:
        """Post, and read all posts or the own: blocks for ever when the store's host is stopped or its machine gone."""
        if self._lost:
            return
        self._post()
        num_swaps, states = self._news
        all_ranks = num_swaps % self._stride == 0
        try:
            posts = self._store.multi_get([str(r) for r in range(self.world_size)] if all_ranks else [str(self.rank)])
        except dist.DistError as error:
            self._lost = str(error).partition("\n")[0] or "no reason given"
        else:
            self._news = (num_swaps + 1, [State(**json.loads(post)) for post in posts] if all_ranks else states)

    def _look(self) -> None:
        """Judge, and end the job if it must: never blocks."""
        self._stillness.tick(time.monotonic())
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent:
            self._end(f"the launcher (pid {self._parent}) is gone", [], {})
        num_swaps, states = self._news
        sights = {rank: self._sight(rank, state) for rank, state in enumerate(states)}
        unanswered = self._stillness.of("store", num_swaps)
        watched = self._beats or (sights and sights[0].stopped)  # at the start all processes may want the CPU
        patience = self.stall_seconds if watched else self.slow_seconds
        if self._lost and sights and sights[0].state.ended == "finished":
            self._halt.set()  # rank 0 was its host and has ended well
        elif unanswered > (3 * TICK if self._lost else patience):
            in_rank_0 = sights and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            host = sights[0].name(0) if in_rank_0 else "the launcher"
            how = f"is lost ({self._lost})" if self._lost else f"has not answered for {unanswered:.0f} s"
            self._end(f"the job's store {how}; its host is {host}", [0] if in_rank_0 else [], sights)
        elif states is not self._judged:  # not by posts of long ago
            self._judged = states
            if verdict := judge(sights, self.stall_seconds):
                self._end(*verdict, sights)

    def _sight(self, rank: int, state: State) -> Sight:
        quiet, idle = self._stillness.of(f"post {rank}", state.post), self._stillness.of(f"move {rank}", state.moves)
        stopped = False
        with suppress(psutil.Error):  # it may end at any moment
            stopped = quiet > 3 * TICK and self._sibling(state).status() == psutil.STATUS_STOPPED
        return Sight(state, quiet, idle, stopped)

    def _sibling(self, state: State) -> psutil.Process:
        """The process of a rank that the same launcher started on this host; else psutil.NoSuchProcess."""
        if state.host == gethostname() and (process := psutil.Process(state.pid)).ppid() == self._parent:
            return process
        raise psutil.NoSuchProcess(state.pid)

    def _end(self, message: str, blamed: Sequence[int], sights: Mapping[int, Sight]) -> None:
        """Say why, kill what may not end by itself, and exit, whatever hangs."""

        def tell() -> None:
            text = f"\nzoscale: rank {self.rank}: {message}; stopping the job\n"
            if self.rank in blamed:
                text += f"zoscale: rank {self.rank} is here (most recent call first):\n"
                for frame, line in traceback.walk_stack(sys._current_frames()[self._main]):
                    text += f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}\n'
            os.write(2, text.encode())
            sys.stdout.flush()

        try:
            teller = threading.Thread(target=tell, daemon=True)
            teller.start()
            teller.join(GRACE)
            if sights:  # a launcher reports the first rank to end as the cause
                time.sleep(GRACE if self.rank in blamed else GRACE + TICK)
            for rank, sight in sights.items():
                if rank != self.rank and (rank in blamed or sight.stopped):
                    with suppress(psutil.Error):
                        self._sibling(sight.state).kill()
        finally:
            os._exit(EXIT_STALLED)

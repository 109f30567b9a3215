"""One rank of a job that test_watchdog.py watches: `watchdog_worker.py WHAT FOLDER` from a launcher, or `forked`."""

import ctypes
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from zoscale.watchdog import Watchdog

STALL = 3.0
"""Seconds without progress that end the job."""


class Rank:
    """What a rank does between its first steps and its last: the method of that name."""

    def __init__(self, watchdog: Watchdog, folder: Path) -> None:
        self.watchdog, self.folder = watchdog, folder
        self.is_second = watchdog.rank == 1

    def steps(self, number: int) -> None:
        for _ in range(number):
            if self.watchdog.world_size > 1:
                dist.all_reduce(torch.ones(1))
            self.watchdog.beat()
            time.sleep(0.1)

    def sleeps(self) -> None:
        time.sleep(60)

    def waits(self) -> None:
        if self.is_second:
            threading.Event().wait(60)
        self.watchdog.beat()

    def beats_and_sleeps(self) -> None:
        self.steps(1)
        if self.is_second:
            time.sleep(60)

    def keeps_lock(self) -> None:
        if self.is_second:
            keep_python_lock(60)

    def fails(self) -> None:
        if self.is_second:
            raise OSError("No space left on device")

    def slow_then_keeps_lock(self) -> None:
        with self.watchdog.slow("write"):
            time.sleep(1.5)
        self.keeps_lock()

    def takes_too_long(self) -> None:
        with self.watchdog.slow("write"):
            if self.is_second:
                time.sleep(60)

    def slow(self) -> None:
        if self.is_second:
            with self.watchdog.slow("write"):
                keep_python_lock(int(STALL) + 2)

    def irregular(self) -> None:
        for interval in (0.2, STALL / 2, 0, STALL / 2, 0.1, STALL * 1.5):
            time.sleep(interval * self.is_second)
            self.steps(1)

    def ends_later(self) -> None:
        for _ in range(11 * self.is_second):
            time.sleep(1)
            self.watchdog.beat()

    def goes_on(self) -> None:
        resumed = torch.zeros(1)
        while not resumed.item():
            resumed.fill_((self.folder / "resumed").exists())
            dist.all_reduce(resumed, dist.ReduceOp.MAX)
            self.steps(1)

    def endless(self) -> None:
        self.steps(600)


def keep_python_lock(seconds: int) -> None:
    ctypes.PyDLL(None).sleep(seconds)


def main(what: str, folder: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))  # longer than any test
    stall_seconds = 3 * STALL if what == "goes_on" else STALL
    watchdog = Watchdog(rank=rank, world_size=world_size, stall_seconds=stall_seconds, slow_seconds=3 * STALL)
    try:
        with watchdog:
            own = Rank(watchdog, folder)
            own.steps(5)
            (folder / f"pid{rank}.tmp").write_text(str(os.getpid()))
            (folder / f"pid{rank}.tmp").rename(folder / f"pid{rank}")
            getattr(own, what)()
            if what != "ends_later":
                own.steps(5)
        print("finished", flush=True)
        time.sleep(
            6 if what == "ends_later" else 2
        )  # rank 1 must see that rank 0 has finished, and then lose the store
        os._exit(0)
    finally:
        time.sleep(60)  # as a library that hangs when its process ends


def forked(what: str, folder: Path, output: Path, variables: dict[str, str]) -> None:
    """The same in a new process that has torch imported already."""
    os.environ |= variables
    torch.set_num_threads(1)
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    main(what, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

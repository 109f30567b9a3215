"""Starts training jobs quickly: everything is imported once, each rank is a fork. Commands on stdin, JSON lines.

{"argv": [...], "ranks": N, "log": PATH} starts a job and answers {"pids": [...]}, and {"statuses": [...]} when all its
processes have ended. "argv" is for `zoscale train` unless its first word is another command; it may be one list per
rank. "plant" is Python code that each rank runs first, with `rank`.
The ranks are real processes with a real process group; only the imports are shared.
"""

import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import datasets  # noqa: F401 (imported for the forks, as what is below)
import deepspeed  # noqa: F401
import mlflow  # noqa: F401
import torch
from processes import free_port

from zoscale import assembly, cli, evaluation_job, run, trainer  # noqa: F401
from zoscale.methods import TABLES  # noqa: F401

LAUNCHER_PATIENCE = 10.0  # seconds; ranks whose process group is complete end sooner by themselves


def start_rank(job: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(0)
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
        exec(job.get("plant", ""), {"rank": rank})
        own = job["argv"][rank] if isinstance(job["argv"][0], list) else job["argv"]
        status = cli.main(own) if own[0] in cli.COMMANDS else cli.train(own)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for(pids: list[int]) -> list[int]:
    """Exit statuses; like a launcher, it ends the others some time after one has failed."""
    statuses: dict[int, int] = {}
    deadline = float("inf")
    while len(statuses) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if statuses[pid]:
                deadline = min(deadline, time.monotonic() + LAUNCHER_PATIENCE)
            continue
        if time.monotonic() > deadline:
            for other in set(pids) - set(statuses):
                os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[pid] for pid in pids]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers.write("ready\n")
    for line in sys.stdin:
        job, port = json.loads(line), free_port()
        pids = [start_rank(job, rank, port) for rank in range(job["ranks"])]
        answers.write(json.dumps({"pids": pids}) + "\n")
        answers.write(json.dumps({"statuses": wait_for(pids)}) + "\n")


if __name__ == "__main__":
    main()

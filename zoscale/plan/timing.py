"""Seconds of the planned step, put together from steps that are taken on this machine."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from zoscale.config import ConfigError, RunConfig
from zoscale.local_job import ranks_here
from zoscale.plan.budget import Job
from zoscale.plan.stopwatch import Course, Method, time_step
from zoscale.provenance import device_name

_TURNS = 2
"""Micro-batches of a rank that are timed at most: the first one of a step may differ, later ones are alike.

Those beside it gather nothing in `fan_out`: with many of them and a slow link, what is said is an upper bound.
"""


def timed(
    config: RunConfig, job: Job, blocks: int, report: Mapping[str, Any], methods: Collection[Method]
) -> dict[str, Any]:
    """Seconds of a step by method; None for what the memory here does not hold.

    If this machine has a device for every rank of the job, all take the steps together, gathers included. Else one of
    them takes the steps of the whole model, and the link is as given.

    Args:
        config: of the run.
        job: as it is planned.
        blocks: of the model.
        report: of the plan.
        methods: which to time.

    Raises:
        ConfigError: for what cannot be timed here.
    """
    if job.offload != "none":
        raise ConfigError("no offloaded weights with --measure", job.offload, "leave one of them out")
    ranks = job.ranks if job.ranks <= ranks_here() else 1
    columns: dict[str, Any] = {}
    for method in methods:
        own = job if method == "zero_order" else replace(job, candidates=1, parts=1)
        size = report[method]["shard_size"] if ranks > 1 else 1
        course = Course(method, ranks, size, _micro_batches(own, ranks), job.tokens, blocks, report["trainable"])
        step = time_step(config, course)
        share = own.turns / min(own.turns, _TURNS)
        if step is None:
            columns[method] = None
        elif ranks > 1 or job.ranks == 1:
            columns[method] = _seconds(share * step.losses, step.update, None, overlaps=False)
        else:
            losses, update = share * step.losses * own.own / own.candidates, step.update / report[method]["shard_size"]
            columns[method] = _seconds(losses, update, report[method]["seconds"]["link"], overlaps=job.prefetch)
    return {
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "ranks": ranks,
        **columns,
    }


def _micro_batches(job: Job, ranks: int) -> int:
    """Of all ranks together, so that each takes as many as are timed."""
    parts = min(job.parts, job.candidates) if ranks > 1 else 1
    return max(1, min(job.turns, _TURNS) * ranks // parts)


def _seconds(losses: float, update: float, link: float | None, *, overlaps: bool) -> dict[str, float | None]:
    """A gather that is prefetched overlaps with what is computed; without a link gathers are part of the losses."""
    step = (max(losses, link or 0.0) if overlaps else losses + (link or 0.0)) + update
    return {"losses": losses, "update": update, "link": link, "step": step}

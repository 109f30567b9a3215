"""Which shard groups fit the memory of a rank: a rough estimate that knows no more of a model than its size."""

import math
import os
from dataclasses import dataclass

import psutil
import torch

from zoscale.models import ModelSize

_USABLE = 0.85
"""Share of the memory that is planned with; the rest is for contexts, buffers of collectives and gaps."""


@dataclass(frozen=True)
class Demand:
    """What a run needs beside the frozen weights.

    Args:
        weight_bytes: bytes per weight in the compute dtype.
        state_bytes: bytes per weight of master copy and optimizer state; 0 with an adapter, whose weights are few.
        rows: of a micro-batch.
        tokens: of the longest row.
        copies: most candidates of one pass; fewer are taken where their activations are large.
    """

    weight_bytes: int
    state_bytes: int = 0
    rows: int = 16
    tokens: int = 512
    copies: int = 2


def rank_bytes(size: ModelSize, demand: Demand, shard_size: int) -> float:
    """Memory of a rank in a step: shard, what is gathered at once, activations and the logits of the answers.

    A block of width h has about 12 h^2 weights, a forward pass without gradients holds about 16 h values per token; see
    `models.tokens_per_pass` for what candidates together may hold.
    """
    shard = size.total * (demand.weight_bytes + demand.state_bytes) / shard_size
    gathered = 2 * size.largest_block + size.outside_blocks if shard_size > 1 else 0
    width = math.sqrt(size.largest_block / 12)
    one_candidate = 16 * width * demand.rows * demand.tokens
    most = max(one_candidate, size.total / 8, 2**30 / demand.weight_bytes)
    activations = min(demand.copies * one_candidate, most)
    logits = 4 * demand.copies * demand.rows * size.outside_blocks / width
    return shard + demand.weight_bytes * (gathered + activations) + (demand.weight_bytes + 8) * logits


def smallest_shard_size(size: ModelSize, demand: Demand, *, world_size: int, ranks_per_node: int, memory: float) -> int:
    """The fewest ranks that can hold the model together; all of them if it fits nowhere else.

    Groups lie within a node or are of whole nodes.

    Args:
        size: of the model.
        demand: of the run.
        world_size: ranks of the job.
        ranks_per_node: ranks that share a node.
        memory: of each rank, in bytes.
    """
    even = [count for count in range(1, world_size) if world_size % count == 0]
    along_nodes = [count for count in even if ranks_per_node % count == 0 or count % ranks_per_node == 0]
    fitting = (count for count in along_nodes if rank_bytes(size, demand, count) <= _USABLE * memory)
    return next(fitting, world_size)


def memory_of_a_rank(ranks_per_node: int) -> float:
    """Bytes that a rank may use: its GPU's, or its part of the node's; all of it, whatever is in use just now."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory)
    return psutil.virtual_memory().total / ranks_per_node

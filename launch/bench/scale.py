"""From which number of GPUs on ZeRO-3's gathers take longer than the arithmetic: plain arithmetic, nothing is run.

The model is blocks of equal size in a row. A block of b bytes is gathered from g ranks by a ring in

    t(b, g) = (g - 1) / g * b / bandwidth + (g - 1) * latency        (0 for g = 1)

and computed in c seconds: all K x B rows of one rank. The next block is gathered while one is computed, so with L
blocks and what lies outside of them (embeddings, head) a step takes

    t(outside, g) + t(b, g) + (L - 1) max(c, t(b, g)) + c + (n - 1) * latency

The last term is the exchange of the losses of n ranks. Communication is hidden if t(b, g) <= c. Within a node the
bandwidth is `node_link`; a group larger than a node runs at the slower of both links, its ring's slowest. `all` shards
over all n ranks (g = n); `groups` shards within groups of g and only losses cross them. The batch of a rank stays the
same at every n. Left out: contention, uneven ranks, and that gathers and kernels slow each other down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Layers:
    """A model's step on one rank.

    Args:
        num_blocks: L.
        block_bytes: b.
        outside_bytes: embeddings, head and final norm.
        block_seconds: c.
    """

    num_blocks: int
    block_bytes: float
    outside_bytes: float
    block_seconds: float


@dataclass(frozen=True)
class Network:
    """Links of one GPU.

    Args:
        link: bytes per second between nodes.
        node_link: bytes per second within a node.
        node: GPUs of a node.
        latency: seconds of one hop of a ring.
    """

    link: float
    node_link: float
    node: int = 8
    latency: float = 5e-6

    def gather_seconds(self, num_bytes: float, ranks: int) -> float:
        """Until each of `ranks` ranks has all `num_bytes`."""
        bandwidth = self.node_link if ranks <= self.node else min(self.link, self.node_link)
        return (ranks - 1) / ranks * num_bytes / bandwidth + (ranks - 1) * self.latency


def simulate(layers: Layers, network: Network, gpus: int, group: int) -> dict[str, Any]:
    """A step of `gpus` ranks in shard groups of `group`."""
    gather = network.gather_seconds(layers.block_bytes, group)
    compute = layers.block_seconds
    seconds = (
        network.gather_seconds(layers.outside_bytes, group)
        + gather
        + (layers.num_blocks - 1) * max(compute, gather)
        + compute
        + (gpus - 1) * network.latency
    )
    return {
        "gpus": gpus,
        "group": group,
        "gather_seconds": gather,
        "compute_seconds": compute,
        "hidden": gather <= compute,
        "seconds_per_step": seconds,
        "efficiency": layers.num_blocks * compute / seconds,
    }


def curve(layers: Layers, network: Network, group: int) -> list[dict[str, Any]]:
    """Rows for sharding over `all` GPUs and within `groups` of `group`."""
    return [
        {"sharding": name, **simulate(layers, network, number, number if name == "all" else min(group, number))}
        for name in ("all", "groups")
        for number in GPUS
    ]


def first_exposed(rows: Sequence[dict[str, Any]], sharding: str) -> int | None:
    """The first number of GPUs at which communication is not hidden; None = it is hidden at all of them."""
    return next((row["gpus"] for row in rows if row["sharding"] == sharding and not row["hidden"]), None)

"""Ranks that were started differently are refused before they compute anything together."""

from collections.abc import Mapping

from zoscale.config import ConfigError
from zoscale.mesh import Mesh


def check_agreement(mesh: Mesh, facts: Mapping[str, object]) -> None:
    """Compare what every rank says of itself with rank 0. A collective.

    Args:
        facts: name -> value, the most telling first.

    Raises:
        ConfigError: on all ranks, naming the first rank and the first fact that differ.
    """
    first, *others = mesh.gather_objects(dict(facts))
    for rank, other in enumerate(others, start=1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"the same {name} on all ranks",
                    f"{first.get(name)!r} on rank 0 and {other.get(name)!r} on rank {rank}",
                    "start all ranks with the same command, files and installation",
                )

"""Forward equivalents: what the passes of a step cost, in forward passes of the batch."""

from typing import Final

BACKWARD: Final = 2
"""Forward passes that a backward pass counts for: it multiplies for the inputs and for the weights (2001.08361).

Where most weights are frozen, as with LoRA, it multiplies for the inputs only, and costs about half of that.
"""


def forward_equivalents(forwards: int, backwards: int) -> int:
    """So many forward passes cost about what these passes cost together."""
    return forwards + BACKWARD * backwards

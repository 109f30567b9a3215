"""`Segment`: a direction z on a part of a tensor, and what is done with it there."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from zoscale.fused import accumulate, chosen, perturb, scalars, visit
from zoscale.streams import Stream, drawn


@dataclass(frozen=True)
class Segment:
    """A direction z on elements [start, start + n) of a tensor.

    Args:
        source: z: float32 [n] (dense), or float32 [s] at `index` (zero elsewhere); or the stream to make it of (dense).
        index: int64 [s], positions relative to start, distinct; None = every element.
        is_compiled: whether its arithmetic is fused by a compiler, like the noise it is made of.
    """

    source: Tensor | Stream
    index: Tensor | None = None
    is_compiled: bool = False

    @property
    def value(self) -> Tensor:
        """z in memory; a stream is drawn anew each time."""
        return values([self])[0]

    def place(self, start: int) -> slice | Tensor:
        """Where it acts in a tensor of which its own element 0 is element `start`."""
        return slice(start, start + len(self.source)) if self.index is None else self.index + start

    def write(self, live: Tensor, truth: Tensor, start: int, radius: float) -> None:
        """live = truth + radius * z from `start` on, rounded once from fp32 to the type of `live`.

        Args:
            live, truth: 1-D, of one length.
            start: where the segment begins.
            radius: signed smoothing radius.
        """
        where = self.place(start)
        if isinstance(self.source, Stream):
            self.source.perturb(live[where], truth[where], radius)
        elif self.index is None:
            chosen(perturb, self.is_compiled)(live[where], truth[where], self.source, *scalars(radius))
        else:
            live[where] = (truth[where].float() + self.source * radius).to(live.dtype)

    def add_to(self, total: Tensor, scale: float) -> None:
        """total += scale * z, as one float32 multiplication and one addition per element."""
        if self.index is None:
            chosen(accumulate, self.is_compiled)(total, self.value, *scalars(scale))
        else:
            total[self.index] = total[self.index] + self.value * scale

    def visit(self, total: Tensor, visits: Tensor, scale: float) -> None:
        """`add_to`, and one more visit where z is not zero."""
        if self.index is None:
            chosen(visit, self.is_compiled)(total, visits, self.value, *scalars(scale))
        else:
            self.add_to(total, scale)
            visits[self.index] += 1


def values(segments: Sequence[Segment]) -> list[Tensor]:
    """z of each in memory; the streams are of one direction, and drawn in one pass."""
    streams = [segment.source for segment in segments if isinstance(segment.source, Stream)]
    made = iter(drawn(streams))
    return [next(made) if isinstance(segment.source, Stream) else segment.source for segment in segments]

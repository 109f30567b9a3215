"""The memory that a call takes, counted by torch's allocator and not by the process: freed memory does not blur it."""

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def highest_point(call: Callable[[], object]) -> int:
    """Most bytes of CPU tensors that a call holds at once, beyond those that lay there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    return max(0, *accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))

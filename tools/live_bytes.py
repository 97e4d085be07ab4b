"""How many bytes of tensors live at once, exact to the byte.

A process's resident memory says little: allocators keep what was freed. torch's profiler is told of every single
allocation and release of the CPU allocator, those inside of operators and of the backward included, which a
`TorchDispatchMode` never sees; their running sum is what lives. It knows nothing of blocks from before it began, so
whatever is to count has to be made under it.
"""

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "live_bytes.measured"


def peak_bytes(measured: Callable[[], object], *, before: Callable[[], object] | None = None) -> int:
    """The most bytes that live during `measured`, of what it and `before` have allocated.

    Args:
        before: what it leaves behind counts, the most it needed doesn't.
    """
    kept = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        if before is not None:
            kept.append(before())
        with record_function(_MARK):
            kept.append(measured())
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = recorded.profiler.kineto_results.events()
    (began,) = (event.start_ns() for event in events if event.name() == _MARK)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = list(accumulate((change for _, change in changes), initial=0))
    first = sum(when < began for when, _ in changes)
    return max(live[first:])

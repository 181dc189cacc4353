"""A second stream, which forks off the current one and joins it again: for launches that may run beside others, and go first where
both wait for SMs.

A thread has its own for each device, so a thread that captures a graph does not draw others into it. Whatever a launch reads,
writes or needs as scratch belongs to the current stream, as it does without: between fork and join nothing is freed.
"""

import threading

import torch


class _Streams(threading.local):
    def __init__(self) -> None:
        self.second: dict[int, torch.cuda.Stream] = {}


_streams = _Streams()


def fork() -> torch.cuda.Stream:
    """The current device's second stream, which waits for what the current one has been given so far."""
    device = torch.cuda.current_device()
    second = _streams.second.get(device)
    if second is None:
        second = _streams.second[device] = torch.cuda.Stream(device, priority=-1)
    second.wait_stream(torch.cuda.current_stream())
    return second


def join(second: torch.cuda.Stream) -> None:
    """The current stream waits for what its second one has been given."""
    torch.cuda.current_stream().wait_stream(second)

"""What tensors live on, and how time is taken there."""

from __future__ import annotations

import torch

from tests.bench.figures import Clock, Work, timed

CPU = "cpu"
CUDA = "cuda"


def missing(device: str) -> str:
    """Why nothing can be measured on ``device``; empty when it can."""
    if device == CUDA and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here"
    return ""


def described(device: str) -> str:
    """The device by the name its maker gave it."""
    if device == CUDA:
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return CPU


def clock_of(device: str) -> Clock:
    """Processor time on the CPU; on a GPU the time between two events in its own stream, so that queueing a call is not taken for it."""
    return _between_events if device == CUDA else timed


def settled(device: str) -> None:
    """Wait until everything that was asked of the device is done."""
    if device == CUDA:
        torch.cuda.synchronize()


def _between_events(work: Work, times: int = 1) -> float:
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    began.record()
    for _ in range(times):
        work()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3 / times

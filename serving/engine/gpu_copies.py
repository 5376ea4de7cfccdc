"""Adapters on their way to the device, beside the steps that are being computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Arrival(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Make what is computed from now on wait for it. The host itself does not wait."""


class Copies(Protocol):
    """From the host to the device. All memory is bytes: (size,) uint8."""

    def stage(self, size: int) -> Tensor:
        """Host memory to fill, from which the device copies without a detour."""

    def send(self, staged: Tensor, target: Tensor) -> Arrival:
        """Copy behind everything that was computed until now, since it may still read what `target` held.

        What is computed afterwards does not wait for the copy unless told to (Arrival.wait). `staged` is the copy's
        from here on; `target` must live until it has been waited for.
        """


class DirectCopies:
    """For a device whose memory is the host's: the copy is done when `send` returns."""

    def stage(self, size: int) -> Tensor:
        """See Copies."""
        return torch.empty(size, dtype=torch.uint8)

    def send(self, staged: Tensor, target: Tensor) -> Arrival:
        """See Copies."""
        target.copy_(staged)
        return _Done()


@dataclass(frozen=True, slots=True)
class _Done:
    def wait(self) -> None:
        pass


class SideStreamCopies:
    """CUDA: pinned memory, one copy on a stream of its own, an event for those who need it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def stage(self, size: int) -> Tensor:
        """See Copies. torch gives pinned memory to nobody else until the copies from it have happened."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def send(self, staged: Tensor, target: Tensor) -> Arrival:
        """See Copies."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            target.copy_(staged, non_blocking=True)
        return _Behind(self._side.record_event(), self._device)


@dataclass(frozen=True, slots=True)
class _Behind:
    event: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)

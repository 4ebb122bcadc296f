"""Where a step's time goes: by phase on the host, and between two points on a device. Must not know: what is timed."""

from __future__ import annotations

import time

import torch


class Clock:
    """Times phase after phase, from when it is made."""

    def __init__(self) -> None:
        self.phase_ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was this phase."""
        now = time.perf_counter()
        self.phase_ms[phase] = (now - self._last) * 1e3
        self._last = now

    def within(self, phase: str, ms: float) -> None:
        """So much of what passes now is of a phase before."""
        self.phase_ms[phase] += ms
        self._last += ms / 1e3


class Span:
    """From when it is made to `end`, as a device passes these points. A GPU does so later than the host: its clock is
    read when the host has waited for it, and says by how much the host waited longer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [self._mark()]

    def _mark(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def end(self) -> None:
        self._marks.append(self._mark())

    def ms(self) -> float:
        first, last = self._marks
        if isinstance(first, float) or isinstance(last, float):
            assert isinstance(first, float)
            assert isinstance(last, float)
            return (last - first) * 1e3
        return float(first.elapsed_time(last))

"""Times between marks inside a step: events on a GPU, the wall clock on a CPU."""

import time

import torch

Marks = list[tuple[str, object]]


class Clock:
    """Call `start()`, then `mark(name)` after every part, then `take()`. Marks do not synchronize with the GPU."""

    def __init__(self, device: str):
        self.device = device
        self._marks: Marks = []

    def start(self) -> None:
        self._marks = [("", self._now())]

    def mark(self, name: str) -> None:
        """Ends the part `name`, which began at the previous mark."""
        self._marks.append((name, self._now()))

    def take(self) -> Marks:
        """The marks since `start()`, for `parts`."""
        return self._marks

    def parts(self, marks: Marks) -> dict[str, float]:
        """Milliseconds by part, in order of first appearance; marks with the same name add up. Synchronizes the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, before), (name, after) in zip(marks, marks[1:], strict=False):
            elapsed = before.elapsed_time(after) if self.device == "cuda" else 1e3 * (after - before)
            found[name] = found.get(name, 0.0) + elapsed
        return found

    def _now(self):
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

"""Cycles and instructions of this process from Linux perf events, in user mode, over all of its threads."""

import ctypes
import fcntl
import os
import platform
import struct
from collections.abc import Mapping

_SYSCALLS = {"x86_64": 298, "aarch64": 241}  # perf_event_open
HARDWARE = {"cycles": (0, 0), "instructions": (0, 1)}
"""Name → type and number of a perf event."""

_DISABLED, _EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 0, 1 << 5, 1 << 6
_ATTRIBUTES = struct.Struct("IIQQQQQ72x")  # type, size, config, sample period, sample type, read format, flags
_ENABLE, _DISABLE = 0x2400, 0x2401  # ioctl requests


class Counters:
    """`counts` by name of what happened while the `with` block ran, in the threads that existed when it began.

    Raises OSError, with the reason, where the kernel or the processor gives no counters.
    """

    def __init__(self, events: Mapping[str, tuple[int, int]] = HARDWARE):
        self._events = events
        self._files: dict[str, list[int]] = {name: [] for name in events}
        self.counts: dict[str, int] = {}

    def __enter__(self) -> "Counters":
        try:
            for thread in os.listdir("/proc/self/task"):
                for name, event in self._events.items():
                    self._files[name].append(opened(event, int(thread)))
        except OSError:
            self._close()
            raise
        self._control(_ENABLE)
        return self

    def __exit__(self, *_: object) -> None:
        self._control(_DISABLE)
        self.counts = {name: sum(_value(file) for file in files) for name, files in self._files.items()}
        self._close()

    def _control(self, request: int) -> None:
        for files in self._files.values():
            for file in files:
                fcntl.ioctl(file, request, 0)

    def _close(self) -> None:
        for files in self._files.values():
            while files:
                os.close(files.pop())


def _value(file: int) -> int:
    return int.from_bytes(os.read(file, 8), "little")


def opened(event: tuple[int, int], thread: int) -> int:
    number = _SYSCALLS.get(platform.machine())
    if platform.system() != "Linux" or number is None:
        raise OSError(f"no perf events on {platform.system()} {platform.machine()}")
    flags = _DISABLED | _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR
    attributes = _ATTRIBUTES.pack(event[0], _ATTRIBUTES.size, event[1], 0, 0, 0, flags)
    libc = ctypes.CDLL(None, use_errno=True)
    file: int = libc.syscall(number, attributes, thread, -1, -1, 0)
    if file < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"perf events: {os.strerror(code)} (see /proc/sys/kernel/perf_event_paranoid)")
    return file

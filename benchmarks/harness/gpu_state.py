"""Clocks, power, temperature, memory and throttling of the GPU in use, from NVML (nvidia-ml-py)."""

import threading

import torch

PERIOD_S = 0.25
_REASONS = {  # NVML's bits for reasons of lowered clocks
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "temperature (driver)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


def _open():
    """(pynvml, handle of PyTorch's device 0). Raises ImportError, or pynvml.NVMLError without a driver."""
    import pynvml

    pynvml.nvmlInit()
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    if uuid is None:
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def header() -> dict:
    """Current NVML state for the header of a result; without NVML only `nvml`, the reason."""
    try:
        nvml, handle = _open()
    except Exception as error:
        return {
            "nvml": f"not read ({type(error).__name__}: {error}); install nvidia-ml-py to see clocks and throttling"
        }
    questions = {
        "driver": lambda: nvml.nvmlSystemGetDriverVersion(),
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "sm_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "gpu_memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
    }
    found = {}
    for name, ask in questions.items():
        try:
            answer = ask()
        except nvml.NVMLError:
            continue  # not supported on every GPU
        found[name] = answer.decode() if isinstance(answer, bytes) else answer
    return found


class Watch:
    """Polls the reasons for lowered clocks four times per second, in a thread, while the `with` block runs. Does
    nothing without a GPU or NVML."""

    def __init__(self, device: str):
        self._seen: set[str] = set()
        self._clocks: list[int] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if device == "cuda":
            try:
                self._nvml, self._handle = _open()
            except Exception:
                return  # the header gives the reason
            self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def take(self) -> dict:
        """Observations since the last call: `throttled`, sorted reasons, and `sm_clock_mhz`, lowest and highest under
        load. Empty without NVML."""
        if not self._thread:
            return {}
        seen, self._seen = self._seen, set()
        clocks, self._clocks = self._clocks, []
        return {"throttled": sorted(seen), "sm_clock_mhz": [min(clocks), max(clocks)] if clocks else None}

    def _run(self) -> None:
        nvml, handle = self._nvml, self._handle
        while not self._stop.wait(PERIOD_S):
            try:
                busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu > 0
                reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
                clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
            except nvml.NVMLError:
                continue
            if busy:
                self._clocks.append(clock)
            self._seen.update(text for bit, text in _REASONS.items() if reasons & bit)

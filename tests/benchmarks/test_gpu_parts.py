"""GPU parts of the benchmarks, with fakes for NVML, Liger-Kernel, CUDA graphs and the device."""

import importlib.machinery
import itertools
import json
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks import run
from benchmarks.harness import cuda_timing, gpu_state, results, timing
from benchmarks.harness.measure import Options, measure
from benchmarks.names import FORWARD, LIGER, PUBLISHED, TRAINING
from benchmarks.ops import modulated_rms_norm
from benchmarks.ops.sizes import Size
from benchmarks.static import profiled_kernels, timed_kernels
from benchmarks.static.figures import BUDGETS, recorded_budgets
from benchmarks.static.machines import MACHINES, largest_bound
from deco_kernels import testing
from tests.installed import installed


@pytest.fixture
def device(monkeypatch):
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.fixture
def nvml(monkeypatch, device):
    """A GPU at its power limit, whose power draw cannot be read."""

    class NVMLError(Exception):
        pass

    def not_supported(handle):
        raise NVMLError("not supported")

    module = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlSystemGetDriverVersion = lambda: b"570.1"
    module.nvmlDeviceGetClockInfo = lambda handle, kind: {1: 1500, 2: 2600}[kind]
    module.nvmlDeviceGetMaxClockInfo = lambda handle, kind: 1980
    module.nvmlDeviceGetPowerUsage = not_supported
    module.nvmlDeviceGetEnforcedPowerLimit = lambda handle: 700_000
    module.nvmlDeviceGetTemperature = lambda handle, kind: 55
    module.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=1 << 30)
    module.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=100)
    module.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x04 | 0x20
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_the_header_holds_what_nvml_answers(nvml):
    found = gpu_state.header()
    assert found["driver"] == "570.1" and found["sm_clock_max_mhz"] == 1980 and found["power_limit_w"] == 700
    assert "power_w" not in found and "nvml" not in found


def test_the_header_says_that_nvml_is_missing(monkeypatch, device):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "install nvidia-ml-py" in gpu_state.header()["nvml"]
    with gpu_state.Watch("cuda") as watch:
        assert watch.take() == {}


def test_the_time_of_a_kernel_excludes_the_host(monkeypatch):
    """The GPU sleeps while the events and the kernel are enqueued."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: order.append("event")
            self.synchronize = lambda: order.append("wait")

        def elapsed_time(self, end):
            return 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"), raising=False)
    assert timing.kernel_milliseconds(lambda: order.append("kernel")) == 0.25
    assert order == ["sleep", "event", "kernel", "event", "wait"]


def test_the_gpu_sleeps_while_the_host_enqueues_an_op(monkeypatch):
    """In every timed round, and longer than the host takes; not unless asked."""
    sleeps = []
    monkeypatch.setattr(
        timing, "milliseconds", lambda call, device, asleep_s: (call(), sleeps.append(asleep_s), 2.0)[2]
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = itertools.count(step=0.5)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    timing.interleaved([lambda _: None], "cuda", 0.0, 3, max_rounds=3, asleep=True)
    assert sleeps == [0.0] + 4 * [0.75]
    sleeps.clear()
    timing.interleaved([lambda _: None], "cuda", 0.0, 3, max_rounds=3)
    assert sleeps == 5 * [0.0]


def test_throttling_is_seen(nvml, monkeypatch):
    monkeypatch.setattr(gpu_state, "PERIOD_S", 0.001)
    looks, looked = itertools.count(), threading.Event()

    def gpu_load(handle):
        if next(looks) == 1:
            looked.set()  # in its second look; what the first one saw is recorded
        return types.SimpleNamespace(gpu=100)

    nvml.nvmlDeviceGetUtilizationRates = gpu_load
    with gpu_state.Watch("cuda") as watch:
        assert looked.wait(600)
        assert watch.take() == {"throttled": ["power limit", "temperature (driver)"], "sm_clock_mhz": [1500, 1500]}


def test_throttled_rows_are_one_line(capsys):
    row = {"op": "adaln_block", "contender": "triton", "status": "ok", "throttled": ["power limit"]}
    result = {name: [] for name in results.LISTS} | {"rows": [row, row], "import_time": None}
    assert run.status_of(result) == 0
    assert capsys.readouterr().err == "benchmarks: the GPU lowered its clocks while rows were timed: power limit\n"


def test_nothing_is_watched_on_a_cpu():
    with gpu_state.Watch("cpu") as watch:
        assert watch.take() == {}


def test_graph_times_are_per_call_and_a_failed_capture_is_said(monkeypatch, device):
    class Graph:
        def replay(self):
            pass

    def capture(step, buffers):
        if step == "bad":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return Graph()

    monkeypatch.setattr(cuda_timing, "capture", capture)
    monkeypatch.setattr("benchmarks.harness.timing.milliseconds", lambda call, device, asleep_s=0.0: (call(), 6.0)[1])
    columns = cuda_timing.graph_columns(["good", "bad"], buffers=[1, 2, 3], budget_s=0.0, min_rounds=2)
    assert columns == [
        {"graph_ms": 2.0},
        {"graph_ms": None, "graph_reason": "operation not permitted when stream is capturing"},
    ]


def test_host_time_is_per_call(device, monkeypatch):
    """With a clock that each call advances by a millisecond."""
    now = [0.0]

    def call(count):
        now[0] += 0.001

    monkeypatch.setattr(cuda_timing.time, "perf_counter", lambda: now[0])
    assert cuda_timing.host_microseconds(call) == pytest.approx(1000)


@pytest.fixture
def liger(monkeypatch):
    """A package with Liger-Kernel's layout and its function in plain PyTorch, scaled by `function.factor`."""

    def liger_modulated_rms_norm(X, W, scale, shift=None, eps=1e-6, offset=0.0, casting_mode="llama", in_place=True):
        assert not in_place
        normed = F.rms_norm(X.double(), W.shape, W.double(), eps) * (1 + scale) + shift
        return (liger_modulated_rms_norm.factor * normed).to(X.dtype)

    liger_modulated_rms_norm.factor = 1.0
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional"):
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["liger_kernel.transformers"].functional = module
    module.liger_modulated_rms_norm = liger_modulated_rms_norm
    return liger_modulated_rms_norm


def liger_rows(dtype, pass_):
    options = Options("cpu", modulated_rms_norm.BACKENDS, compiled=(), budget_s=0.0, min_rounds=2)
    return measure(modulated_rms_norm.PROBLEM, Size(height=32, width=32), dtype, pass_, options)


@pytest.mark.parametrize("pass_", (FORWARD, TRAINING))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_liger_kernel_is_timed_on_its_part(liger, dtype, pass_):
    assert modulated_rms_norm.installed()
    rows = liger_rows(dtype, pass_)
    assert [(row["contender"], row["status"]) for row in rows] == [(PUBLISHED, "ok"), (LIGER, "ok")]
    assert {row["op"] for row in rows} == {"modulated_rms_norm"}


def test_a_wrong_liger_kernel_is_refused(liger):
    liger.factor = 1.01
    assert [row["status"] for row in liger_rows(torch.float32, FORWARD)] == ["ok", "wrong"]


def test_without_liger_kernel(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not modulated_rms_norm.installed()


def test_budgeted_kernels_are_rows_measured_or_not(nvml, monkeypatch):
    def measure_op(op, width, dtype, architecture):
        assert (width, dtype, architecture) == (32, "bfloat16", "sm_90")
        if op == "pixel_decoder":
            found = {"measured_ms": 0.5, "launches": 1, "registers": 200, "spill_bytes": 0}
            yield "pixel_decoder.forward_kernel/D32/bfloat16", found

    monkeypatch.setattr(timed_kernels, "measure_op", measure_op)
    monkeypatch.setattr(timed_kernels, "copy_bandwidth", lambda device: 4e12)
    rows = {row["kernel"]: row for row in timed_kernels.measure_kernels(full=False)}
    budgets = json.loads(BUDGETS.read_text())
    assert {name for name, row in rows.items() if row["architecture"] == "sm_90"} == {
        name for name, found in budgets.items() if "sm_90" in found and name.endswith("/D32/bfloat16")
    }
    of_cuda = {name for name, row in rows.items() if row["architecture"] == "sm_90a"}
    assert {"cuda.pixel_decoder.forward_kernel/D32/bfloat16", "cuda.gradient_sums.sum_kernel"} <= of_cuda
    assert not any("D16" in name or "float16" in name.split("/") for name in of_cuda)
    forward = rows["pixel_decoder.forward_kernel/D32/bfloat16"]
    record = budgets["pixel_decoder.forward_kernel/D32/bfloat16"]["sm_90"]
    at_hand = MACHINES["sm_90"]._replace(multiprocessors=132, clock=1.98e9, bytes_per_second=4e12)
    assert forward["measured_ms"] == 0.5
    assert (forward["bound"], forward["modeled_ms"]) == largest_bound(
        at_hand, record["cycles_per_16_px"], record["bytes_per_px"]
    )
    assert [row["status"] for row in rows.values()] == ["ok"] + ["unavailable"] * (len(rows) - 1)


def test_kernels_of_an_op_that_fails_are_failed_rows(nvml, monkeypatch):
    def measure_op(op, width, dtype, architecture):
        raise RuntimeError(f"{op} broke\nmore")

    monkeypatch.setattr(timed_kernels, "measure_op", measure_op)
    monkeypatch.setattr(timed_kernels, "copy_bandwidth", lambda device: 4e12)
    rows = timed_kernels.measure_kernels(full=False)
    assert {row["status"] for row in rows} == {"failed"}
    assert "pixel_decoder, D 32, bfloat16 failed: RuntimeError: pixel_decoder broke;" in rows[0]["reason"]


def test_an_architecture_without_budgets_is_refused(device, monkeypatch):
    properties = types.SimpleNamespace(major=7, minor=5, multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    with pytest.raises(ValueError, match="no kernel has a budget on sm_75"):
        timed_kernels.measure_kernels(full=False)


def test_profiled_launches_are_told_apart_by_their_order():
    """Two chunks of a decoder with three decoder blocks."""

    def event(name, milliseconds):
        return f"void deco::cuda::(anonymous namespace)::{name}<deco::BFloat16, 32>(Params)", milliseconds

    events = [event("forward_kernel", 1.0), ("void at::native::elementwise_kernel<4>()", 9.0)]
    events += [event("recompute_kernel", 2.0)]
    events += [event("backward_kernel", milliseconds) for milliseconds in (3.0, 4.0, 5.0, 6.0, 7.0, 8.0)]
    events += [event("sum_kernel", 0.1), event("sum_kernel", 0.2)]
    backward = "block_backward.backward_kernel+mlp+tiled"
    assert profiled_kernels.by_variant("pixel_decoder", events) == {
        "pixel_decoder.forward_kernel": [1.0],
        "decoder_recompute.recompute_kernel": [2.0],
        **{f"{backward}{ahead}+first": [3.0, 6.0] for ahead in ("", "+ahead")},
        **{f"{backward}{ahead}": [4.0, 7.0] for ahead in ("", "+ahead")},
        **{f"{backward}{ahead}+last": [5.0, 8.0] for ahead in ("", "+ahead")},
        "gradient_sums.sum_kernel": [0.1, 0.2],
    }
    alone = profiled_kernels.by_variant("adaln_block", [event("backward_kernel", 6.0)])
    assert alone == {"block_backward.backward_kernel+mlp+first+last": [6.0]}


def test_launches_of_the_triton_backend_are_timed_one_by_one(monkeypatch):
    """The recorded launches of the real backend, with a fake for running them."""
    installed("triton")
    ran = []
    monkeypatch.setattr(timed_kernels, "run_launch", lambda launch: ran.append(launch))
    monkeypatch.setattr(timed_kernels, "kernel_milliseconds", lambda call: (call(), 2.0)[1])
    inputs = testing.random_inputs("pixel_decoder", dtype=torch.bfloat16, other_dtype=torch.bfloat16)
    found = timed_kernels.triton_times(inputs, "sm_90")
    budgets = recorded_budgets("triton")
    assert all(f"{name}/D32/bfloat16" in budgets for name in found)
    assert found["pixel_decoder.forward_kernel"]["measured_ms"] == 2.0
    assert len(ran) == sum(entry["launches"] for entry in found.values()) * (1 + timed_kernels.REPEATS)

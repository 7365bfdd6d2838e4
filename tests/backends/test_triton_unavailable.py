"""Refusals of the Triton backend: without a GPU, without Triton, during a capture."""

import builtins
import logging
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deco_kernels import ops
from deco_kernels.backends import triton as backend
from deco_kernels.ops import registry
from deco_kernels.ops.registry import BackendUnavailable, Request
from tests.installed import installed
from tests.ops.cases import small_inputs

uninterpreted = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter takes CPU tensors")


@uninterpreted
def test_cpu_tensors_are_refused_by_name():
    inputs = small_inputs("pixel_decoder")
    with pytest.raises(BackendUnavailable, match="run on GPUs.*TRITON_INTERPRET=1"):
        ops.pixel_decoder(**inputs.tensors, **inputs.options, backend="triton")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "not installed.*pip install triton"),
        (ImportError("libtriton.so: undefined symbol"), "cannot be imported.*undefined symbol.*reinstall"),
        (RuntimeError("bad wheel"), "fails on import.*bad wheel.*reinstall"),
    ],
)
def test_triton_missing_or_broken(monkeypatch, error, reason):
    original = builtins.__import__

    def failing(name, *arguments, **keywords):
        if name == "triton":
            raise error
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", failing)
    message = backend.import_failure.__wrapped__()
    monkeypatch.undo()
    assert re.search(reason, message)


def test_other_devices_are_refused():
    assert "'mps'" in backend.unavailable_reason(torch.device("mps"))


@pytest.fixture
def pretended_gpu(monkeypatch):
    """`torch.cuda` of a machine with one GPU of compute capability 9.0, whose Triton driver works."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended GPU")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backend, "driver_failure", lambda: None)
    for cached in (backend.unavailable_reason, registry.serving_module, registry.log_fallback):
        cached.cache_clear()
    yield
    for cached in (backend.unavailable_reason, registry.serving_module, registry.log_fallback):
        cached.cache_clear()


DRIVER_FAILURE = backend.driver_failure
REQUEST = Request("pixel_decoder", "cuda", (torch.bfloat16, torch.bfloat16), 32, 3, 16, 3)
BROKEN = [
    ("capability", "compute capability 8.0.*Pretended GPU has 7.5.*use backend='reference'"),
    ("import", "not installed; install it"),
    ("driver", "cannot drive the GPU .RuntimeError: no C compiler.*needs a C compiler"),
]


@pytest.mark.parametrize(("broken", "reason"), BROKEN)
def test_what_the_machine_lacks_is_said(pretended_gpu, monkeypatch, caplog, broken, reason):
    """An explicit choice is refused with the reason; the automatic one falls back and logs it."""
    installed("triton")
    cuda = torch.device("cuda", 0)
    assert registry.serving_module("triton", REQUEST, cuda).__name__ == "deco_kernels.backends.triton.pixel_decoder"
    if broken == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    elif broken == "import":
        monkeypatch.setattr(backend, "import_failure", lambda: "Triton is not installed; install it")
    else:
        from triton.runtime import driver

        class Broken:
            def get_current_target(self):
                raise RuntimeError("no C compiler found")

        monkeypatch.setattr(backend, "driver_failure", DRIVER_FAILURE)
        monkeypatch.setattr(driver, "_active", Broken())
    backend.unavailable_reason.cache_clear()
    registry.serving_module.cache_clear()
    with pytest.raises(BackendUnavailable, match=f"'triton' cannot serve pixel_decoder: .*{reason}"):
        registry.serving_module("triton", REQUEST, cuda)
    with caplog.at_level(logging.WARNING, logger="deco_kernels"):
        module = registry.serving_module(registry.AUTO, REQUEST, cuda)
    assert module.__name__ == "deco_kernels.backends.reference.pixel_decoder"
    assert re.search(reason, caplog.text)


def test_an_old_triton_is_refused(monkeypatch):
    triton = installed("triton")
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert "3.2.0 is older than 3.3; update it" in backend.import_failure.__wrapped__()
    monkeypatch.setattr(triton, "__version__", "3.10.0+git1234")
    assert backend.import_failure.__wrapped__() is None


class PretendedDriver:
    """A driver for Triton: an sm_90 device on which launches are only counted. The next one calls `meanwhile`."""

    def __init__(self):
        self.utils, self.launches, self.meanwhile = self, 0, None

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448}

    def load_binary(self, name, kernel, shared, device):
        return None, None, 32, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(*arguments):
            self.launches += 1
            meanwhile, self.meanwhile = self.meanwhile, None
            if meanwhile is not None:
                meanwhile()

        return launch


@pytest.fixture
def pretended_driver(monkeypatch):
    installed("triton")
    from triton.runtime import driver

    from tests.backends import small_kernels

    pretended = PretendedDriver()
    monkeypatch.setattr(driver, "_active", pretended)
    yield pretended
    small_kernels.to_bfloat16.device_caches.clear()


def call(dtype=torch.float32):
    """Launch a small kernel."""
    from deco_kernels.backends.triton import launching
    from deco_kernels.backends.triton.table import Launch
    from tests.backends.small_kernels import to_bfloat16

    launching.launch(to_bfloat16, (1,), Launch(64, 4, 1, 1), torch.zeros(64, dtype=dtype), torch.zeros(64), SIZE=64)


@uninterpreted
def test_a_compile_during_capture_is_refused(pretended_driver, monkeypatch):
    """With Triton's own launch: refused before the kernel has been called with these arguments, accepted afterwards."""
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    message = "to_bfloat16.* has to be compiled.*before the capture"
    capturing = True
    with pytest.raises(RuntimeError, match=message):
        call()
    capturing = False
    call()
    assert pretended_driver.launches == 1
    capturing = True
    call()
    assert pretended_driver.launches == 2
    with pytest.raises(RuntimeError, match=message):
        call(torch.float16)
    capturing = False
    call(torch.float16)
    assert pretended_driver.launches == 3


@uninterpreted
def test_a_compile_beside_a_capture_is_not_refused(pretended_driver, monkeypatch):
    """By another thread, while this one launches a kernel in a capture."""
    call()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    this = threading.current_thread()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: threading.current_thread() is this)
    with ThreadPoolExecutor(1) as other:
        pretended_driver.meanwhile = lambda: other.submit(call, torch.float16).result()
        call()
    assert pretended_driver.launches == 3

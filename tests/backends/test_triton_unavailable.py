"""What the Triton backend refuses, and how: without a GPU, without Triton, during a capture."""

import builtins
import logging
import os

import pytest
import torch

from deco_kernels import ops
from deco_kernels.backends import triton as backend
from deco_kernels.ops import registry
from deco_kernels.ops.registry import BackendUnavailable, Request
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
    message = backend._import_failure.__wrapped__()
    monkeypatch.undo()
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(message)


def test_other_devices_are_refused():
    assert "'mps'" in backend.unavailable_reason(torch.device("mps"))


def test_the_automatic_choice_falls_back_with_a_log_line(monkeypatch, caplog):
    """As on a GPU of a machine without Triton."""
    registry._log_fallback.cache_clear()
    registry._serving_module.cache_clear()
    monkeypatch.setattr(backend, "unavailable_reason", lambda device: "Triton is not installed; install it")
    request = Request("pixel_decoder", "cuda", (torch.bfloat16, torch.bfloat16), 32, 3, 16, 3)
    with caplog.at_level(logging.INFO, logger="deco_kernels"):
        module = registry._serving_module(registry.AUTO, request, torch.device("cuda"))
    registry._serving_module.cache_clear()
    assert module.__name__ == "deco_kernels.backends.reference.pixel_decoder"
    assert "Triton is not installed" in caplog.text


@uninterpreted
def test_a_compile_during_capture_is_refused(monkeypatch):
    """A kernel that asks Triton's hook, as every compile does; the hook is only set while a capture is going on."""
    triton = pytest.importorskip("triton")
    from deco_kernels.backends.triton import common
    from deco_kernels.backends.triton.table import Launch

    class Compiling:
        arg_names = ()

        def __getitem__(self, grid):
            def run(**options):
                hook = triton.knobs.runtime.jit_cache_hook
                if hook is not None:
                    hook(
                        key="",
                        repr="kernel(int32)",
                        fn=None,
                        compile={},
                        is_manual_warmup=False,
                        already_compiled=False,
                    )

            return run

    launch = Launch(64, 4, 1, 1)
    common.launch(Compiling(), (1,), launch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="kernel.int32. has to be compiled.*before the capture"):
        common.launch(Compiling(), (1,), launch)
    assert triton.knobs.runtime.jit_cache_hook is None

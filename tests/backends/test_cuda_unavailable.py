"""Refusals of the CUDA backend: no module, no driver, unsupported GPU; no GPU needed."""

import importlib
import types

import pytest
import torch

from deco_kernels import BackendUnavailable, native
from deco_kernels.backends import cuda
from deco_kernels.ops import registry

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A machine with one GPU of compute capability 9.0 and a module that reports no problem."""
    module = types.SimpleNamespace(problem=lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended GPU")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(native, "load_cuda", lambda: (module, None))
    return module


def reason(device=DEVICE):
    return cuda.unavailable_reason.__wrapped__(device)


def test_a_gpu_that_the_module_serves(pretended_gpu):
    assert reason() is None


@pytest.mark.parametrize(
    "problem",
    [
        "pack_weights: no kernel image is available for execution on the device (code 209)",
        "selecting the device: CUDA driver version is insufficient for CUDA runtime version (code 35)",
    ],
)
def test_a_module_whose_kernels_do_not_run_there(pretended_gpu, problem):
    pretended_gpu.problem = lambda device: problem
    assert "Pretended GPU" in reason() and problem in reason() and "DECO_KERNELS_CUDA_ARCHS=90" in reason()


def test_a_gpu_older_than_ampere(pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 8.0" in reason() and "7.5" in reason()


def test_amd_and_other_devices(pretended_gpu, monkeypatch):
    assert "NVIDIA GPUs" in reason(torch.device("mps"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA GPUs" in reason()


@pytest.mark.parametrize("error", ["No module named 'deco_kernels._native_cuda'", "libstdc++.so.6: cannot open"])
def test_a_missing_or_broken_module(monkeypatch, error):
    def failing(name):
        raise ImportError(error)

    monkeypatch.setattr(importlib, "import_module", failing)
    module, said = native.load_cuda.__wrapped__()
    assert module is None
    assert error in said and "DECO_KERNELS_BUILD=cuda pip install" in said and "nvcc" in said


def test_the_public_error_names_backend_op_and_reason(pretended_gpu, monkeypatch):
    monkeypatch.setattr(native, "load_cuda", lambda: (None, "the module is not built"))
    monkeypatch.setattr(cuda, "unavailable_reason", cuda.unavailable_reason.__wrapped__)
    request = registry.Request("adaln_block", "cuda", (torch.bfloat16,), 32)
    with pytest.raises(BackendUnavailable, match="'cuda' cannot serve adaln_block: the module is not built"):
        registry.serving_module.__wrapped__("cuda", request, DEVICE)

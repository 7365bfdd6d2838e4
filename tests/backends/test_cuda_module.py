"""The real module _native_cuda with nvcc but without a driver: it imports, and calls report what is missing."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.static import cuda_kernels
from deco_kernels.testing.emulation import ROOT

pytestmark = [
    pytest.mark.aot,
    pytest.mark.long,
    pytest.mark.skipif(cuda_kernels.nvcc() is None, reason="no nvcc on PATH, in $CUDA_HOME/bin or /usr/local/cuda/bin"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver"),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The module built only for sm_80."""
    import pybind11

    folder = tmp_path_factory.mktemp("cuda")
    beside = Path(sys.executable).parent
    cmake, ninja = (shutil.which(name) or str(beside / name) for name in ("cmake", "ninja"))
    configure = [cmake, f"-S{ROOT}", f"-B{folder}", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += ["-DDECO_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={cuda_kernels.nvcc()}", "-DDECO_CUDA_ARCHS=80"]
    for command in (configure, [cmake, "--build", str(folder), "--target", "_native_cuda"]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (library,) = folder.glob("_native_cuda*.so")
    spec = importlib.util.spec_from_file_location("without_driver._native_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_says_what_is_missing(module):
    assert "driver" in module.problem(0)
    with pytest.raises(RuntimeError, match="driver"):
        module.device_limits(0)


def test_a_call_that_cannot_be_launched_names_the_op_its_sizes_and_what_cuda_says(module):
    arguments = ((0, 0, 0, 0), 64, 32, (0, 1, 0), (0, 1, 0), (0,) * 16, (0, 1, 0), 1e-6)
    messages = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^adaln_block on \[64, 32\]: .*driver.*\(code \d+\)$") as error:
            module.adaln_block_forward(*arguments)
        messages.append(str(error.value))
    assert messages[0] == messages[1]

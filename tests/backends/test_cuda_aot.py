"""The CUDA kernels compile for every architecture and spill no more than is known; nothing here needs a GPU."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from tests import emulation

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = [pytest.mark.aot, pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH or in /usr/local/cuda/bin")]

ARCHITECTURES = ("80", "90a", "100")
SOURCES = sorted(path.name for path in (emulation.ROOT / "csrc" / "cuda").glob("*.cu"))


class Kernel(NamedTuple):
    name: str  # as in the source
    operand: str  # "BFloat16", "Float16" or ""
    width: int  # D, or 0
    spilled: int  # bytes stored
    registers: int


def compile_source(source: str, architecture: str, folder) -> list[Kernel]:
    """The kernels of a source, from what the assembler reports."""
    csrc = emulation.ROOT / "csrc"
    command = [NVCC, "-std=c++17", "-O3", f"-I{csrc}", f"-I{csrc / 'include'}", "-Xptxas", "-v", "-cubin"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-o", str(folder / f"{source}.{architecture}.cubin"), str(csrc / "cuda" / source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    kernels = []
    for entry in re.split(r"Compiling entry function", result.stderr)[1:]:
        mangled = re.match(r" '(\w+)'", entry)[1]
        name = re.search(r"\d+([a-z_]+_kernel)", mangled)[1]
        operand = re.search(r"\d(BFloat16|Float16)E", mangled)
        width = re.search(r"Li(16|32|64)E", mangled)
        kernels.append(
            Kernel(
                name,
                operand[1] if operand else "",
                int(width[1]) if width else 0,
                int(re.search(r"(\d+) bytes spill stores", entry)[1]),
                int(re.search(r"Used (\d+) registers", entry)[1]),
            )
        )
    return kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(source, architecture) -> its kernels, compiled when first asked for, two at a time ahead of the tests."""
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(2) as pool:
        jobs = {(s, a): pool.submit(compile_source, s, a, folder) for a in ARCHITECTURES for s in SOURCES}
        yield lambda source, architecture: jobs[source, architecture].result()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_compiles(compiled, source, architecture):
    kernels = compiled(source, architecture)
    assert all(kernel.registers <= 255 for kernel in kernels)


def test_published_width_does_not_spill(compiled):
    """D 32 on sm_90a: the decoder's forward and what its backward runs."""
    kernels = [kernel for source in SOURCES for kernel in compiled(source, "90a")]
    names = {kernel.name for kernel in kernels if kernel.width == 32}
    assert {"forward_kernel", "replay_kernel", "backward_kernel", "embedding_kernel", "modulate_kernel"} <= names
    spilling = [kernel for kernel in kernels if kernel.width == 32 and kernel.operand == "BFloat16" and kernel.spilled]
    assert all(kernel.spilled <= 16 for kernel in spilling), spilling
    assert not [kernel for kernel in spilling if kernel.name != "backward_kernel"], spilling


def test_the_loss_does_not_spill(compiled):
    """On sm_90a, but for the gradient with a float32 target."""
    kernels = compiled("flow_matching_loss.cu", "90a") + compiled("flow_matching_loss_backward.cu", "90a")
    assert {"sums_kernel", "losses_kernel", "gradient_kernel", "spectrum_kernel"} <= {kernel.name for kernel in kernels}
    spilling = [kernel for kernel in kernels if kernel.spilled]
    assert len(spilling) <= 2 and all(k.name == "gradient_kernel" and k.spilled <= 40 for k in spilling), spilling


def test_the_module_imports_without_a_driver():
    """The runtime is linked statically: a machine that built the module can import it without libcuda."""
    native = pytest.importorskip("deco_kernels._native_cuda", reason="the CUDA module is not built in this tree")
    linked = subprocess.run(["ldd", native.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in linked
    assert callable(native.pixel_decoder_forward)

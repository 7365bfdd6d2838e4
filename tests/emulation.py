"""Builds the CUDA kernels for the host (csrc/emulation) and registers them as backend "cuda_emulated"."""

import functools
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from deco_kernels import native
from deco_kernels.ops import registry

ROOT = Path(__file__).resolve().parents[1]
BACKEND = "cuda_emulated"
MULTIPROCESSORS = 2
LARGE_SHARED, SMALL_SHARED = 227 << 10, 99 << 10  # bytes one block may use on sm_90, and on small devices


def unavailable_reason() -> str | None:
    """Why the kernels cannot be emulated on this machine, or None."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return f"the emulator runs on x86-64 Linux, this is {platform.machine()} {sys.platform}"
    if "f16c" not in Path("/proc/cpuinfo").read_text():
        return "the emulator needs a processor with F16C"
    if shutil.which("g++") is None:
        return "no g++ to build the emulator with"
    return None


def build(sources: Path, folder: Path):
    """The emulated module, built in `folder` from the tree of `sources` (a csrc folder)."""
    import pybind11

    beside = Path(sys.executable).parent
    cmake = shutil.which("cmake") or str(beside / "cmake")
    ninja = shutil.which("ninja") or str(beside / "ninja")
    configure = [
        *(cmake, f"-S{sources / 'emulation'}", f"-B{folder}", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    ]
    for command in (configure, [cmake, "--build", str(folder)]):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"building the emulator failed:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}")
    (library,) = folder.glob("_native_cuda_emulated*.so")
    return _load(library)


ONLY_D16 = (
    "decoder_geometry.h",
    "  return operand == DType::kBFloat16 ? with_type(BFloat16{}) : with_type(Float16{});",
    "  return run(BFloat16{}, std::integral_constant<int, 16>{});",
)


def build_with_fault(source: str, file: str, text: str, replacement: str, folder: Path):
    """The emulated module of this tree with csrc/cuda/SOURCE.cu compiled again after replacing `text`, which occurs
    once in csrc/cuda/FILE. That source then serves D 16 in bfloat16 alone: the others would only cost time."""
    emulated_module()
    # The compiler looks for headers here before it looks in the tree.
    changed = folder / "cuda"
    changed.mkdir()
    contents = {f: (ROOT / "csrc" / "cuda" / f).read_text() for f in (f"{source}.cu", file, ONLY_D16[0])}
    for name, old, new in ((file, text, replacement), ONLY_D16):
        assert contents[name].count(old) == 1, f"{name} holds {contents[name].count(old)} times: {old}"
        contents[name] = contents[name].replace(old, new)
    for name, content in contents.items():
        (changed / name).write_text(content)
    compiled = folder / f"{source}.o"
    good = [path for path in (ROOT / "build" / "emulation").rglob("*.o") if path.name != f"{source}.cu.o"]
    library = folder / f"_native_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = "-std=c++17 -O1 -march=native -fPIC -fvisibility=hidden -Wno-unknown-pragmas -DDECO_EMULATION".split()
    includes = [f"-I{path}" for path in (folder, ROOT / "csrc", ROOT / "csrc" / "include")]
    subprocess.run(["g++", *flags, *includes, "-xc++", "-c", changed / f"{source}.cu", "-o", compiled], check=True)
    subprocess.run(["g++", "-shared", compiled, *good, "-o", library], check=True)
    module = _load(library)
    module.set_device_limits(MULTIPROCESSORS, LARGE_SHARED)
    return module


def _load(library: Path):
    # Python would hand out the module of the same name again, wherever it lies.
    name = f"emulation_{abs(hash(library.parent))}._native_cuda_emulated"
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache(maxsize=1)
def emulated_module():
    """The emulated module of this tree, built when its sources have changed, and the backend that uses it."""
    module = build(ROOT / "csrc", ROOT / "build" / "emulation")
    module.set_device_limits(MULTIPROCESSORS, LARGE_SHARED)
    native.emulate_cuda(module)
    registry.register_backend(BACKEND, "tests.emulated_cuda")
    return module

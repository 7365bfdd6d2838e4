"""Faults planted in the real kernels are noticed: by the emulator, by the order of warps, or by the rule of error."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from deco_kernels import native, ops, testing
from deco_kernels.testing import emulation

pytestmark = pytest.mark.emulate

CSRC = emulation.ROOT / "csrc"
ONLY_D16 = (
    "decoder_geometry.h",
    "  return operand == DType::kBFloat16 ? with_type(BFloat16{}) : with_type(Float16{});",
    "  return run(BFloat16{}, std::integral_constant<int, 16>{});",
)


def build_with_fault(source: str, file: str, text: str, replacement: str, folder: Path):
    """The emulated module of this tree with csrc/cuda/SOURCE.cu compiled again after replacing `text`, which occurs
    once in csrc/cuda/FILE. That source then serves D 16 in bfloat16 alone: the others would only cost time."""
    # The compiler looks for headers here before it looks in the tree.
    changed = folder / "cuda"
    changed.mkdir()
    contents = {f: (CSRC / "cuda" / f).read_text() for f in (f"{source}.cu", file, ONLY_D16[0])}
    for name, old, new in ((file, text, replacement), ONLY_D16):
        assert contents[name].count(old) == 1, f"{name} holds {contents[name].count(old)} times: {old}"
        contents[name] = contents[name].replace(old, new)
    for name, content in contents.items():
        (changed / name).write_text(content)
    compiled = folder / f"{source}.o"
    good = [path for path in emulation.BUILD.rglob("*.o") if path.name != f"{source}.cu.o"]
    library = folder / f"_native_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = "-std=c++17 -O1 -march=native -fPIC -fvisibility=hidden -Wno-unknown-pragmas -DDECO_EMULATION".split()
    includes = [f"-I{path}" for path in (folder, CSRC, CSRC / "include")]
    subprocess.run(["g++", *flags, *includes, "-xc++", "-c", changed / f"{source}.cu", "-o", compiled], check=True)
    subprocess.run(["g++", "-shared", compiled, *good, "-o", library], check=True)
    module = emulation.load(library)
    module.set_device_limits(emulation.MULTIPROCESSORS, emulation.LARGE_SHARED)
    return module


@pytest.fixture
def plant(emulated, tmp_path):
    """A function that changes one text of csrc/cuda and makes the module so built serve CPU tensors."""

    def build(source, file, text, replacement):
        module = build_with_fault(source, file, text, replacement, tmp_path)
        native.emulate_cuda(module)
        return module

    yield build
    native.emulate_cuda(emulated)


def decoder_inputs(**changes):
    sizes = {"dtype": torch.bfloat16, "width": 16, "depth": 1, "patch_size": 4, "image_size": (1, 32, 32)}
    return testing.random_inputs("pixel_decoder", **(sizes | changes))


def run_forward(inputs):
    with torch.no_grad():
        return ops.pixel_decoder(**inputs.tensors, **inputs.options, backend=emulation.BACKEND)


BARRIER = "        block_barrier();\n        add_tiles();"


def gradients_of_two_seeds(module):
    for seed in (1, 2):
        module.set_seed(seed)
        yield testing.run(decoder_inputs(), emulation.BACKEND).gradients["fc1_weight"]


def test_without_a_fault_the_results_are_right(plant, emulated):
    expected = testing.run(decoder_inputs(), emulation.BACKEND).gradients["fc1_weight"]
    module = plant("block_backward", "block_backward.cu", BARRIER, BARRIER)
    assert module is not emulated
    assert all(torch.equal(gradient, expected) for gradient in gradients_of_two_seeds(module))


def test_a_missing_barrier_before_the_weight_gradients(plant):
    module = plant("block_backward", "block_backward.cu", BARRIER, "        add_tiles();")
    first, second = gradients_of_two_seeds(module)
    assert not torch.isfinite(first).all() or not torch.equal(first, second)


def test_swapped_fragments(plant):
    """Two quadrants of the left operand of the gradient of pixel_weight change places."""
    plant(
        "decoder_embedding",
        "gradient_sums.h",
        "transpose(h.k_step[k][2]), transpose(h.k_step[k][1]),",
        "transpose(h.k_step[k][1]), transpose(h.k_step[k][2]),",
    )
    inputs = decoder_inputs(image_size=(1, 64, 64))
    failed = {row.name for row in testing.compare(inputs, testing.run(inputs, emulation.BACKEND)) if not row.passed}
    assert failed == {"grad pixel_weight"}


def test_rows_read_one_pixel_outside(plant):
    module = plant(
        "pixel_decoder",
        "pixel_decoder.cu",
        "const uint32_t pixel = min(first + 16 * m + 8 * r, p.pixels - 1);",
        "const uint32_t pixel = min(first + 16 * m + 8 * r, p.pixels);",
    )
    with pytest.raises(module.Fault, match="pixel_decoder_forward: read outside"):
        run_forward(decoder_inputs(patch_size=1, image_size=(1, 5, 5)))


def test_a_shuffle_under_divergence(plant):
    module = plant(
        "pixel_decoder",
        "tile.h",
        "  x += shuffle_xor(x, 1);\n  return x + shuffle_xor(x, 2);",
        "  if (lane() < 16) x += shuffle_xor(x, 1);\n  return x + shuffle_xor(x, 2);",
    )
    with pytest.raises(module.Fault, match="diverge|deadlock"):
        run_forward(decoder_inputs())

"""The CUDA kernels compile for every architecture and keep their recorded budgets; no GPU needed."""

import subprocess
from collections.abc import Iterable

import pytest

from benchmarks.static import cuda_kernels, sass, triton_kernels
from benchmarks.static.figures import CONSUMER, CUDA_PREFIX, SHARED_LIMIT, Figures, exceeded, recorded_budgets
from tests.backends.architectures import PARTLY, in_make_test
from tests.installed import installed

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(cuda_kernels.nvcc() is None, reason="no nvcc on PATH, in $CUDA_HOME/bin or /usr/local/cuda/bin"),
]

BUDGETS = recorded_budgets("cuda")
VARIANTS = (cuda_kernels.GENERAL, cuda_kernels.EXTENDED)
PLAIN = {name for name in cuda_kernels.KERNELS if not any(variant in name for variant in VARIANTS)}
# Sources compiled for PARTLY: block_backward contains everything that is written differently for older architectures
# (barriers between kernels, the number of the warp, matrix stores).
SOME = ("block_backward", "pixel_decoder")


def without_ahead(names: Iterable[str]) -> set[str]:
    return {name.replace(cuda_kernels.AHEAD, "") for name in names}


def compiled(
    architecture: str, only_width: int | None = None, variants: bool = True, some: bool = False
) -> dict[str, Figures]:
    """Figures of all kernels by label, or of those for one width in bfloat16, with or without VARIANTS, or
    of the kernels of SOME."""
    reason = cuda_kernels.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    installed("triton", reason="cuobjdump and nvdisasm come with Triton")
    sources = SOME if some else cuda_kernels.sources()
    return {
        k: v for s in sources for k, v in cuda_kernels.source_figures(s, architecture, only_width, variants).items()
    }


def assert_kernels_fit_their_budgets(
    architecture: str, found: dict[str, Figures], kernels: set[str], wanted: set[tuple[int, str]]
):
    """`found` contains these kernels, each with or without AHEAD. All can be launched, and those with a recorded
    (width, dtype) in `wanted` keep the record if the toolchain is the same."""
    assert without_ahead(name.split("/")[0] for name in found) == without_ahead(CUDA_PREFIX + name for name in kernels)
    assert len(without_ahead(found)) == len(found)
    for name, figures in found.items():
        assert figures.registers <= 255 and figures.shared_bytes <= SHARED_LIMIT[architecture.removesuffix("a")], name
    found = {name: figures for name, figures in found.items() if cuda_kernels.is_among(name, wanted)}
    budgets = {name: entry[architecture] for name, entry in BUDGETS.items() if architecture in entry}
    budgets = {
        name: budget
        for name, budget in budgets.items()
        if cuda_kernels.is_among(name, wanted) and name.split("/")[0].removeprefix(CUDA_PREFIX) in kernels
    }
    toolchains = {budget["toolchain"] for budget in budgets.values()}
    assert len(toolchains) == 1
    if cuda_kernels.toolchain() not in toolchains:
        pytest.skip(f"the budgets were recorded with {toolchains.pop()}, this is {cuda_kernels.toolchain()}")
    assert found.keys() == budgets.keys()
    for name, figures in found.items():
        assert not list(exceeded(figures, budgets[name])), name


@pytest.mark.parametrize("architecture", in_make_test(cuda_kernels.ARCHITECTURES))
def test_kernels_for_d32_in_bfloat16_fit_their_budgets(architecture):
    some = architecture == PARTLY
    kernels = {name for name in PLAIN if not some or name.split(".")[0] in SOME}
    found = compiled(architecture, 32, variants=False, some=some)
    assert any(cuda_kernels.AHEAD in name for name in found) == (architecture not in CONSUMER)
    assert_kernels_fit_their_budgets(architecture, found, kernels, {(32, "bfloat16")})


@pytest.mark.aot_all
@pytest.mark.parametrize("architecture", cuda_kernels.ARCHITECTURES)
def test_kernels_for_every_width_and_dtype_fit_their_budgets(architecture):
    """On sm_90a all kernels are recorded, elsewhere only those for D 32 in bfloat16."""
    found = compiled(architecture)
    cases = {(width, dtype) for width in triton_kernels.WIDTHS for dtype in ("bfloat16", "float16")}
    for width, dtype in cases:
        assert len([name for name in found if name.endswith(f"/D{width}/{dtype}")]) == 27
    recorded = cases if architecture == "sm_90a" else {(32, "bfloat16")}
    assert all(cuda_kernels.is_among(name, recorded) for name in BUDGETS if architecture in BUDGETS[name])
    assert_kernels_fit_their_budgets(architecture, found, set(cuda_kernels.KERNELS), recorded)


def test_the_record_reaches_its_goals():
    """D 32, N 3, bfloat16 on sm_90a: issue slots per 16 pixels of the decoder's forward, of its whole backward, of both
    passes of the loss, and of decoder and loss in one pass."""

    def record(kernel, case="D32/bfloat16"):
        return BUDGETS[f"{CUDA_PREFIX}{kernel}/{case}"]["sm_90a"]

    forward = record("pixel_decoder.forward_kernel")
    assert forward["issue_slots_per_16_px"] <= 1000 and forward["spill_bytes"] == 0
    assert record("decoder_recompute.recompute_kernel")["issue_slots_per_16_px"] <= 1140
    steps = [record(f"block_backward.backward_kernel+mlp+tiled+ahead{step}") for step in ("+first", "", "+last")]
    steps += [record("decoder_recompute.recompute_kernel"), record("decoder_embedding.embedding_kernel")]
    # The block backward that copies ahead has more slots than the other one, and takes less time (docs/cuda.md).
    assert sum(step["issue_slots_per_16_px"] for step in steps) <= 4800
    assert all(step["spill_bytes"] <= 8 for step in steps[:3])  # with 128 registers, for 15 warps
    assert all(step["spill_bytes"] == 0 for step in steps[3:])
    for kernel in ("flow_matching_loss.sums_kernel", "flow_matching_loss_backward.gradient_kernel"):
        loss = record(kernel, "bfloat16")
        assert loss["issue_slots_per_16_px"] <= 105 / 2 and loss["spill_bytes"] == 0
    one_pass = [record("pixel_decoder.forward_kernel+keeps"), record("decoder_head.head_kernel"), steps[-1], *steps[:3]]
    one_pass.append(record("flow_matching_loss_backward.gradient_kernel+sums", "bfloat16"))
    assert sum(kernel["issue_slots_per_16_px"] for kernel in one_pass) <= 5050


def code_of(*opcodes: str) -> sass.Code:
    """A kernel with these instructions; "BRA 2" jumps to the third."""
    texts = [f"BRA {16 * int(text.split()[1]):#x}" if text.startswith("BRA") else text for text in opcodes]
    instructions = [sass.Instruction(16 * i, text.split()[0], text) for i, text in enumerate(texts)]
    return sass.Code(32, 0, instructions)


def test_slots_of_a_loop_inside_the_steady_loop():
    """Two warps of 32 pixels each: six instructions per iteration, two of them three times, and a skipped one."""
    code = code_of("MOV", "FADD", "HMMA.16816", "BRA 2", "MOV", "FMUL", "BRA 1", "EXIT")
    launch = cuda_kernels.Launch(warps=2, shared_bytes=0, turn_pixels=64)
    executed = cuda_kernels.per_16_pixels(code, launch, 3, lambda address: address == 16 * 4)
    assert sum(executed.values()) == (3 + 2 * 3) / 2 and executed["HMMA.16816"] == 3 / 2


def test_slots_of_a_loop_with_two_overlapping_branches():
    """The compiler has moved the start of the body behind its end: both backward branches belong to one loop."""
    code = code_of("MOV", "FADD", "HMMA.16816", "BRA 2", "FMUL", "BRA 0", "MOV", "BRA 1", "EXIT")
    launch = cuda_kernels.Launch(warps=2, shared_bytes=0, turn_pixels=64)
    executed = cuda_kernels.per_16_pixels(code, launch, 3, lambda address: False)
    assert sum(executed.values()) == (6 + 2 * 3) / 2


def test_slots_of_warps_with_two_roles():
    """Seven warps run the larger loop on one tile each; five run the other, whose inner loop has seven iterations."""
    chain = ["FADD"] * 9 + ["HMMA.16816", "BRA 0"]
    sums = ["BAR", "HMMA.16816", "BRA 12", "BRA 11"]
    launch = cuda_kernels.Launch(warps=12, shared_bytes=0, turn_pixels=7 * 16)
    executed = cuda_kernels.per_16_pixels(code_of(*chain, *sums, "EXIT"), launch, None, lambda address: False)
    assert sum(executed.values()) == pytest.approx(11 + (2 + 2 * 7) * 5 / 7)


def test_slots_of_warps_without_a_tile():
    """Three of five warps run the chain on one tile each; all five run the inner loop, with three iterations."""
    code = code_of("FADD", "FADD", "HMMA.16816", "BRA 2", "BRA 0", "EXIT")
    launch = cuda_kernels.Launch(warps=5, shared_bytes=0, turn_pixels=3 * 16)
    executed = cuda_kernels.per_16_pixels(code, launch, None, lambda address: False)
    assert sum(executed.values()) == pytest.approx(3 + 5 * 3 * 2 / 3)


def test_the_module_imports_without_a_driver():
    """The runtime is linked statically: the module can be imported without libcuda."""
    native = installed("deco_kernels._native_cuda", "the CUDA module is not built in this tree")
    linked = subprocess.run(["ldd", native.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in linked
    assert callable(native.pixel_decoder_forward)

"""Every Triton kernel compiles ahead of time for every architecture and keeps its recorded budget; no GPU needed."""

import os

import pytest
import torch

from benchmarks.static import triton_kernels
from benchmarks.static.figures import SHARED_LIMIT, Figures, exceeded, recorded_budgets
from deco_kernels import testing
from tests.backends.architectures import PARTLY, in_make_test
from tests.installed import installed
from tests.ops.cases import KERNEL_OPS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter compiles nothing"),
]

OPS = [op for op in testing.OPS if op in KERNEL_OPS]
BUDGETS = recorded_budgets("triton")
# Kernels compiled for the other widths and dtypes; `python -m benchmarks static --everywhere` compiles all.
CORE = ("pixel_decoder.forward_kernel/", "adaln_block.backward_kernel/", "flow_matching_loss.gradient_kernel/")
KEEPING = triton_kernels.KEEPING_KERNELS
OTHERS = [
    pytest.param("sm_90", width, dtype, CORE if width == 32 else CORE[:2], id=f"sm_90-D{width}-{dtype}")
    for dtype in reversed(triton_kernels.DTYPES)
    for width in reversed(triton_kernels.WIDTHS)
    if (width, dtype) != (32, "bfloat16")
] + [
    pytest.param("gfx942", 32, "float32", CORE[:1], id="gfx942-D32-float32"),
    pytest.param("sm_86", 64, "bfloat16", CORE[1:2], id="sm_86-D64-bfloat16"),
]


def checked_figures(architecture: str, width: int, dtype: str, parts: tuple[str, ...]) -> dict[str, Figures]:
    """Figures of the kernels whose names start with one of `parts`, after checking device limits and the record."""
    installed("triton")
    found = triton_kernels.case_figures(architecture, width, dtype, parts)
    for name, figures in found.items():
        assert figures.shared_bytes <= SHARED_LIMIT[architecture], name
        if architecture in BUDGETS.get(name, {}):
            assert not list(exceeded(figures, BUDGETS[name][architecture])), name
    return found


def recorded(architecture: str) -> set[str]:
    return {name for name in BUDGETS if name.endswith("/D32/bfloat16") and architecture in BUDGETS[name]}


@pytest.mark.parametrize("architecture", in_make_test(triton_kernels.ARCHITECTURES))
def test_kernels_for_d32_in_bfloat16_fit_their_budgets(architecture):
    """All but those of the one-pass op and of kept activations, of which most are variants of others; for PARTLY those
    of CORE."""
    expected = {name for name in recorded(architecture) if not name.startswith(KEEPING)}
    if architecture == PARTLY:
        expected = {name for name in expected if name.startswith(CORE)}
        assert len(expected) == len(CORE)
    assert set(checked_figures(architecture, 32, "bfloat16", tuple(expected))) == expected


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name == "sm_90" else pytest.mark.aot_all) for name in triton_kernels.ARCHITECTURES],
)
def test_kernels_that_keep_or_read_activations_fit_their_budgets(architecture):
    """And that of the loss of the one-pass op."""
    expected = {name for name in recorded(architecture) if name.startswith(KEEPING)}
    assert len(expected) == len(KEEPING)
    assert set(checked_figures(architecture, 32, "bfloat16", KEEPING)) == expected


def test_many_blocks_fit_the_shared_memory():
    """The weights of every block are loaded ahead at D 32 in float32, where there is memory for them."""
    installed("triton")
    inputs = testing.random_inputs("pixel_decoder", width=32, depth=4, image_size=(1, 16, 16))
    launch = triton_kernels.launches_of(inputs, "sm_86")[1]
    assert triton_kernels.kernel_name(launch) == "pixel_decoder.forward_kernel"
    assert triton_kernels.figures(launch, "sm_86").shared_bytes <= SHARED_LIMIT["sm_86"]


@pytest.mark.aot_all
@pytest.mark.parametrize(("architecture", "width", "dtype", "parts"), OTHERS)
def test_other_widths_and_dtypes_fit_their_budgets(architecture, width, dtype, parts):
    assert len(checked_figures(architecture, width, dtype, parts)) == len(parts)


ONES = {"depth": 1, "width": 16, "channels": 1, "patch_size": 1, "image_size": (1, 1, 1)}
ONE_TOKEN = {"depth": 1, "width": 16, "image_size": (1, 16, 16)}


@pytest.mark.aot_all
@pytest.mark.parametrize("op", [op for op in OPS if "loss" not in op])
@pytest.mark.parametrize("sizes", [ONES, ONE_TOKEN], ids=["ones", "one_token"])
def test_sizes_of_one_compile(op, sizes):
    """Triton turns an argument of 1 into a compile-time constant, which has another type in the kernel."""
    installed("triton")
    for launch in triton_kernels.launches_of(testing.random_inputs(op, dtype=torch.bfloat16, **sizes), "sm_90"):
        triton_kernels.compile_launch(launch, "sm_90")


QUERY_AND_RMS_HEAD = {
    "pixel_decoder.forward_kernel+query+rms",
    "pixel_decoder.recompute_kernel+query+rms",
    "pixel_decoder.forward_kernel+keeps+query+rms",
    "pixel_decoder_head.head_kernel+rms",
}


def launches_with_query_and_rms_head(architecture: str, **sizes) -> dict:
    """Launches in bfloat16 of the kernels that differ, by kernel."""
    installed("triton")
    launches = {}
    for op in ("pixel_decoder", "pixel_decoder_loss"):
        inputs = testing.random_inputs(op, dtype=torch.bfloat16, query="given", head_norm="rms", **sizes)
        for launch in triton_kernels.launches_of(inputs, architecture):
            launches[triton_kernels.kernel_name(launch)] = launch
    found = {name: launch for name, launch in launches.items() if name.endswith("+rms")}
    assert set(found) == QUERY_AND_RMS_HEAD
    return found


def test_query_and_rms_head_compile():
    launches = launches_with_query_and_rms_head("sm_90", depth=1, width=16, image_size=(1, 16, 16))
    for name in ("pixel_decoder.recompute_kernel+query+rms", "pixel_decoder_head.head_kernel+rms"):
        assert triton_kernels.figures(launches[name], "sm_90").spill_bytes == 0, name


@pytest.mark.aot_all
@pytest.mark.parametrize("architecture", triton_kernels.ARCHITECTURES)
def test_query_and_rms_head_fit_the_device(architecture):
    """With at most four spilled registers on NVIDIA GPUs."""
    launches = launches_with_query_and_rms_head(architecture, other_dtype=torch.bfloat16)
    for name, launch in launches.items():
        figures = triton_kernels.figures(launch, architecture)
        assert figures.shared_bytes <= SHARED_LIMIT[architecture], name
        assert figures.spill_bytes <= 16 or architecture not in triton_kernels.NVIDIA, name


@pytest.mark.aot_all
@pytest.mark.parametrize("op", OPS)
def test_channels_last_and_padded_images_compile(op):
    installed("triton")
    inputs = testing.random_inputs(op, dtype=torch.bfloat16, depth=1, width=16, patch_size=2, image_size=(2, 10, 14))
    for name in ("image", "pred", "target"):
        if name in inputs.tensors:
            inputs.tensors[name] = inputs.tensors[name].to(memory_format=torch.channels_last)
    for launch in triton_kernels.launches_of(inputs, "sm_90"):
        triton_kernels.compile_launch(launch, "sm_90")


def test_the_record_reaches_its_goals():
    """Issue slots per 16 pixels on sm_90: backward of every block, and loss with its gradient. The forward's parameters
    are the fastest measured, with more slots and more warps than others."""
    record = {
        name.removesuffix("/D32/bfloat16"): entry["sm_90"]
        for name, entry in BUDGETS.items()
        if name.endswith("/D32/bfloat16")
    }
    forward = record["pixel_decoder.forward_kernel"]
    assert forward["spill_bytes"] == 0 and forward["registers"] <= 128
    for variant in ("+first", "", "+last", "+first+last"):
        block = record[f"adaln_block.backward_kernel{variant}"]
        assert block["issue_slots_per_16_px"] <= 1310 and block["spill_bytes"] == 0, variant
    loss = [record["flow_matching_loss.sums_kernel"], record["flow_matching_loss.gradient_kernel"]]
    assert sum(kernel["issue_slots_per_16_px"] for kernel in loss) <= 235 / 2
    for width in (16, 64):
        assert BUDGETS[f"pixel_decoder.forward_kernel/D{width}/bfloat16"]["sm_90"]["spill_bytes"] == 0


def test_a_figure_above_the_record_is_noticed():
    figures = Figures("triton 1", 100, 0, 1000, 200.0)
    assert not list(exceeded(figures, figures._asdict()))
    for name, value in (("registers", 104), ("spill_bytes", 8), ("shared_bytes", 1031), ("issue_slots_per_16_px", 207)):
        assert list(exceeded(figures._replace(**{name: value}), figures._asdict())), name
    worse = figures._replace(registers=255)
    assert not list(exceeded(worse, figures._asdict() | {"toolchain": "triton 2"}))

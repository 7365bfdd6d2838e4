"""Launches by the host code of the Triton backend: parameters, grids and workspace; nothing is compiled or run."""

import itertools
import math
import os

import pytest
import torch

from benchmarks.static import triton_kernels
from deco_kernels import testing
from tests.installed import installed
from tests.ops.cases import KERNEL_OPS

pytestmark = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="about compiled kernels")
installed("triton")


def names(launches) -> list[str]:
    return [launch.kernel.fn.__name__ for launch in launches]


def many_images(inputs: testing.Inputs, count: int) -> testing.Inputs:
    """The same inputs for `count` times as many images."""

    def repeated(tensor):
        return tensor.expand(count, *tensor.shape).flatten(0, 1) if len(tensor) == 1 else tensor.repeat(count, 1, 1)

    rows = {"image", "cond", "tokens", "h", "pred", "target"}
    return inputs._replace(
        tensors={name: repeated(t) if name in rows else t for name, t in inputs.tensors.items()},
        grad_outputs=tuple(repeated(g) if g.dim() else g for g in inputs.grad_outputs),
    )


def test_recording_launches_runs_nothing():
    from deco_kernels.backends.triton import launching, pixel_decoder

    inputs = testing.random_inputs("pixel_decoder", dtype=torch.bfloat16, image_size=(1, 32, 32))
    with launching.record_launches("sm_90") as launches:
        pixel_decoder.forward(*inputs.groups(), 16, "layer", 1e-6)
    assert names(launches) == ["pack_kernel", "forward_kernel"]
    assert launches[1].args["D"] == 32 and launches[1].options["num_warps"] == 4


@pytest.mark.parametrize("op", [op for op in testing.OPS if op in KERNEL_OPS])
def test_every_kernel_has_launch_parameters(op):
    """Every width and dtype, forward and backward, on the architectures of the table and on others."""
    for width, dtype in itertools.product(triton_kernels.WIDTHS, triton_kernels.DTYPES.values()):
        inputs = testing.random_inputs(op, dtype=dtype, width=width, patch_size=4, image_size=(1, 8, 8))
        for architecture in (*triton_kernels.ARCHITECTURES, "sm_86", "gfx950"):
            for launch in triton_kernels.launches_of(inputs, architecture):
                block = launch.args.get("BLOCK", 16)
                assert block >= 16 and block & (block - 1) == 0, (width, dtype, architecture)
                assert launch.options["num_warps"] in (1, 2, 4, 8) and launch.options["num_stages"] >= 1


@pytest.mark.parametrize("op", ["adaln_block", "pixel_decoder", "pixel_decoder_loss", "upsample_modulate"])
def test_every_program_has_a_place_for_its_sums(op):
    """On a device with 132 multiprocessors and more tiles than programs, where sums are per program."""
    sums = ("grad_head_weight_ptr", "grad_head_bias_ptr", "grad_matrix_ptr", "grad_bias_ptr")
    found = set()
    for width, dtype in itertools.product(triton_kernels.WIDTHS, (torch.bfloat16, torch.float32)):
        inputs = testing.random_inputs(op, dtype=dtype, width=width, patch_size=16, image_size=(1, 256, 512))
        for architecture in (*triton_kernels.ARCHITECTURES, "sm_86", "gfx950"):
            for launch in triton_kernels.launches_of(inputs, architecture, 132):
                for name in set(sums) & set(launch.args):
                    found.add(launch.kernel.fn.__name__)
                    assert launch.grid[0] <= launch.args[name].shape[0], (architecture, width, dtype, name)
    assert found


def test_parameters_can_be_replaced():
    from deco_kernels.backends.triton import table

    def block():
        return table.launch_parameters("adaln_block", 32, torch.bfloat16, "sm_120").block

    before = block()
    with table.replaced("adaln_block", table.Launch(2 * before, 8, 1, 1)):
        assert block() == 2 * before
    assert block() == before


@pytest.mark.parametrize("images", [32, 48])
@pytest.mark.parametrize("op", ["pixel_decoder", "pixel_decoder_from_tokens"])
def test_the_workspace_does_not_grow_with_the_batch(op, images):
    """The workspace of N + 1 activations and the conditions of a chunk have 2^20 pixels."""
    inputs = testing.random_inputs(op, dtype=torch.bfloat16, token_width=8, image_size=(1, 256, 256))
    recomputes = [
        launch.args
        for launch in triton_kernels.launches_of(many_images(inputs, images), "sm_90")
        if launch.kernel.fn.__name__ == "recompute_kernel"
    ]
    assert {args["states_ptr"].untyped_storage().nbytes() for args in recomputes} == {2**20 * 4 * 64}
    if op == "pixel_decoder_from_tokens":
        assert {args["cond_ptr"].untyped_storage().nbytes() for args in recomputes} == {2**20 * 64}
    assert sum(args["n_tokens"] for args in recomputes) == images * 256


def assert_a_gpu_runs(launches):
    """Only the first size of a grid may exceed 65,535."""
    for launch in launches:
        assert launch.grid[0] < 2**31 and all(0 < size < 2**16 for size in launch.grid[1:]), names([launch])


@pytest.mark.parametrize("op", ["pixel_decoder", "flow_matching_loss"])
def test_grids_of_many_images_can_be_launched(op):
    size = 12 if "loss" in op else 4
    inputs = testing.random_inputs(op, dtype=torch.bfloat16, width=16, patch_size=4, image_size=(1, size, size))
    assert_a_gpu_runs(triton_kernels.launches_of(many_images(inputs, 70_000), "sm_90"))


@pytest.mark.parametrize(("height", "width", "channels"), [(32768, 32768, 3), (26755, 26755, 4)])
def test_images_with_too_many_pixels_are_refused(height, width, channels):
    """Where the stride between channels fits in 32 bits, and its product with a channel does not in any layout."""
    from deco_kernels.backends.triton import launching

    def image(height):
        return torch.empty(1, channels, height, width, device="meta")

    with pytest.raises(ValueError, match=rf"pixels each on backend 'triton', got {height} x {width}; use another"):
        launching.readable_image(image(height))
    for served in (image(height - 1), image(2**31 // width + 1)):
        assert launching.readable_image(served) is served


@pytest.mark.parametrize(
    ("setting", "value", "precision"),
    [("allow_tf32", True, "tf32"), ("fp32_precision", "tf32", "tf32"), ("fp32_precision", "ieee", "tf32x3")],
)
def test_float32_matmuls_follow_both_settings_of_pytorch(setting, value, precision):
    from deco_kernels.backends.triton import launching

    matmul = torch.backends.cuda.matmul
    try:
        setattr(matmul, setting, value)
        with launching.record_launches("sm_90"):
            assert launching.math_options(torch.float32, torch.device("cpu"))["PRECISION"] == precision
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = "none"


@pytest.mark.parametrize("height", [24, 21])  # without and with padding
def test_grids_of_large_images_can_be_launched(height):
    """336 megapixels are more than 65,535 tiles of every kernel."""
    from deco_kernels.backends.triton import flow_matching_loss, launching

    image, weight = torch.empty(2, 3, height, 14_000_000, device="meta"), torch.empty(3, 8, 8, device="meta")
    loss, sample_weight = torch.empty((), device="meta"), torch.empty(2, device="meta")
    needs = [True] * 4
    for architecture in ("sm_80", "sm_90"):
        with launching.record_launches(architecture) as launches:
            flow_matching_loss.forward(image, image, weight, sample_weight, 1.0)
            flow_matching_loss.backward(loss, None, None, image, image, weight, sample_weight, 1.0, needs)
        counts = [math.prod(launch.grid) * launch.args.get("BLOCK", 0) for launch in launches]
        served = dict(zip(names(launches), counts, strict=True))
        assert served["spectrum_kernel"] >= 2 * 3 * 1_750_000  # blocks of 8x8 pixels
        assert ("fold_kernel" in served) == (height == 21)
        assert served.get("fold_kernel", math.inf) >= 2 * 3 * 21 * 14_000_000  # pixels of all planes
        assert_a_gpu_runs(launches)

"""The ops of backend "cuda", their kernels run by the emulator: accuracy, layouts, determinism, bad input."""

from unittest.mock import MagicMock

import pytest
import torch

from benchmarks.static import cuda_traffic
from benchmarks.static.figures import SHARED_LIMIT
from deco_kernels import BackendUnavailable, ops, testing
from deco_kernels.backends import chunk_sizes
from deco_kernels.backends.cuda import pixel_decoder as decoder
from deco_kernels.testing import emulation
from deco_kernels.testing.inputs import SAVE_MEMORY
from tests.golden_files import golden_cases
from tests.ops import test_equal_rows as equal_rows
from tests.ops import test_query
from tests.ops import test_save_memory as save_memory
from tests.ops.cases import (
    BF16,
    CASES,
    DECODER_CASES,
    F16,
    F32,
    aligned,
    gradients_one_by_one,
    offset,
    small_inputs,
    uncovered_pairs,
)

pytestmark = pytest.mark.emulate

BACKEND = emulation.BACKEND
OPS = ("adaln_block", "upsample_modulate", "pixel_decoder", "pixel_decoder_from_tokens")
# About 2,000 pixels each, several turns of every warp of the emulated device.
SIZES = {16: (2, 32, 32), 8: (1, 40, 48), 4: (1, 44, 44), 2: (2, 30, 34), 1: (2, 29, 35)}


def sized(cases):
    return [case._replace(image_size=SIZES[case.patch_size]) for case in cases]


HALF_CASES = {op: sized(case for case in CASES[op] if case.dtype is not F32) for op in OPS}
# Of the decoder's ops, which have their kernels in common, one takes the float32 cases in bfloat16: together all pairs
# of settings. Its other cases are long, and so is the slowest one.
OTHER_CASES = sized(case._replace(dtype=BF16) for case in DECODER_CASES if case.dtype is F32)


EXTENDED = {
    "pixel_decoder": {"query": "given", "head_norm": "rms"},
    "pixel_decoder_from_tokens": {"query": "tokens", "head_norm": "rms"},
    "pixel_decoder_loss": {"query": "given", "head_norm": "rms"},
}
"""Arguments of `random_inputs` by op."""


def extended_inputs(op, dtype, **changes):
    """`small_inputs`, for a decoder with a query and an RMS head."""
    return small_inputs(op, dtype, **EXTENDED.get(op, {}), **changes)


def with_each_choice(cases):
    """Of the decoder, whose kernels depend on `save_memory`: each case with one choice, then with the other."""
    chosen = [case._replace(save_memory=index % 2 == 0) for index, case in enumerate(cases)]
    return chosen + [case._replace(save_memory=not case.save_memory) for case in chosen]


def accuracy_cases():
    for index, case in enumerate(with_each_choice(HALF_CASES["pixel_decoder"])):
        marks = pytest.mark.long if index >= len(HALF_CASES["pixel_decoder"]) else ()
        yield pytest.param("pixel_decoder", case, id=f"pixel_decoder-{case.label}", marks=marks)
    for op, cases in HALF_CASES.items():
        if op == "pixel_decoder":
            continue
        others = OTHER_CASES if op == "pixel_decoder_from_tokens" else []
        for case in dict.fromkeys(cases + others):
            is_long = others and (case not in others or case.width * case.depth > 192)
            marks = pytest.mark.long if is_long else ()
            yield pytest.param(op, case, id=f"{op}-{case.label}", marks=marks)


TRUNCATED = (HALF_CASES["pixel_decoder"] + OTHER_CASES)[::2]

each_op = pytest.mark.parametrize("op", OPS)
# The ops with different kernels; the decoder from tokens runs those of the decoder.
each_op_but_one_long = pytest.mark.parametrize("op", [*OPS[:3], pytest.param(OPS[3], marks=pytest.mark.long)])


def assert_equal(first: testing.Results, second: testing.Results):
    assert all(torch.equal(*pair) for pair in zip(first.outputs, second.outputs, strict=True))
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


def assert_close(first: testing.Results, second: testing.Results, tolerance: float):
    """Gradients of up_weight and query_weight come from PyTorch's matmul, which rounds them to the activation dtype."""
    for output, other in zip(first.outputs, second.outputs, strict=True):
        assert testing.relative_error(output, other) <= tolerance
    for name, gradient in first.gradients.items():
        bound = max(tolerance, torch.finfo(BF16).eps) if name in ("up_weight", "query_weight") else tolerance
        assert testing.relative_error(gradient, second.gradients[name]) <= bound, name


def assert_rule_of_error(inputs, results):
    failed = [str(row) for row in testing.compare(inputs, results) if not row.passed]
    assert not failed, "\n".join(failed)


def test_cases_have_all_pairs_of_settings():
    assert not uncovered_pairs(HALF_CASES["pixel_decoder"] + OTHER_CASES, dtype=(BF16, F16))


@pytest.mark.parametrize(("op", "case"), list(accuracy_cases()))
def test_rule_of_error(emulated, op, case, poisoned_memory):
    """Every second case runs with truncated sums of products and truncated tanh."""
    inputs = case.inputs(op)
    before = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
    emulated.set_truncating(case in TRUNCATED)
    results = testing.run(inputs, BACKEND)
    assert_rule_of_error(inputs, results)
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.tensors.items())
    for name, gradient in results.gradients.items():
        tensor = inputs.tensors[name]
        assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape and gradient.is_contiguous(), name


@pytest.mark.parametrize("path", golden_cases("cod_lite_*"))
def test_golden(emulated, path):
    test_query.check_golden(path, BACKEND, F16, 4 * torch.finfo(F16).eps)


@each_op_but_one_long
@pytest.mark.parametrize("width", [32, 64])
def test_small_shared_memory_and_chunks(emulated, op, width, monkeypatch):
    """A device with 99 KB runs variants that need less shared memory; chunks of pixels give the same sums."""
    depth = 8 if width == 32 else 3  # neither fits in 99 KB at once
    extension = EXTENDED.get(op, {}) if width == 32 else {}
    sizes = {"width": width, "depth": depth, "patch_size": 8, "image_size": (1, 24, 40)}
    inputs = testing.random_inputs(op, dtype=BF16, **sizes, **extension)
    large = testing.run(inputs, BACKEND)
    emulated.set_device_limits(3, emulation.SMALL_SHARED)
    monkeypatch.setattr(chunk_sizes, "chunk_pixels", lambda *_, **__: 300)
    monkeypatch.setattr(chunk_sizes, "MOST_PIXELS", 600)
    small = testing.run(inputs, BACKEND)
    assert_close(small, large, 2e-5)
    if op == "pixel_decoder":  # the others depend on PyTorch's matmul of a chunk
        names = ["image", "cond", *["query"] * (width == 32)]
        assert all(torch.equal(small.gradients[name], large.gradients[name]) for name in names)


@pytest.mark.parametrize("width", [16, 32])
def test_inputs_copied_ahead_give_the_same_result(emulated, width):
    """With less shared memory the block backward has the same warps with pixels, but no copies. A warp has several
    turns, in the last of which some warps have no pixels."""
    inputs = testing.random_inputs("pixel_decoder", dtype=BF16, width=width, patch_size=8, image_size=(1, 24, 40))
    results = {}
    for shared_bytes, name in (
        (emulation.LARGE_SHARED, "block_backward_ahead"),
        (emulation.SMALL_SHARED, "block_backward"),
    ):
        emulated.set_device_limits(emulation.MULTIPROCESSORS, shared_bytes)
        assert name in [launch[0] for launch in emulated.launches_of(lambda: testing.run(inputs, BACKEND))]
        results[name] = testing.run(inputs, BACKEND)
    assert_equal(*results.values())


@each_op_but_one_long
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_order_of_warps_does_not_matter(emulated, op, dtype):
    inputs = testing.random_inputs(op, dtype=dtype, patch_size=8, image_size=(1, 24, 40))
    results = []
    for seed in (1, 2):
        emulated.set_seed(seed)
        results.append(testing.run(inputs, BACKEND))
    assert_equal(*results)


def _reversed_dimensions(tensor):
    order = tuple(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


VIEWS = (aligned, offset, _reversed_dimensions)


@each_op
@pytest.mark.parametrize("view", VIEWS)
def test_views_give_the_same_result(emulated, op, view):
    inputs = extended_inputs(op, BF16)
    viewed = inputs._replace(
        tensors={name: view(tensor) if tensor.dim() > 1 else tensor for name, tensor in inputs.tensors.items()},
        grad_outputs=tuple(view(g) if g.dim() > 1 else g for g in inputs.grad_outputs),
    )
    assert_equal(testing.run(viewed, BACKEND), testing.run(inputs, BACKEND))


@each_op
def test_expanded_inputs_and_stride_0_gradients(emulated, op):
    inputs = extended_inputs(op, BF16)
    for name in ("image", "cond", "query", "h"):
        if name in inputs.tensors:
            inputs.tensors[name] = inputs.tensors[name][:1].expand_as(inputs.tensors[name])
    grads = tuple(torch.ones((), dtype=g.dtype).expand_as(g) for g in inputs.grad_outputs)
    inputs = inputs._replace(grad_outputs=grads)
    contiguous = inputs._replace(
        tensors={name: tensor.contiguous() for name, tensor in inputs.tensors.items()},
        grad_outputs=tuple(gradient.contiguous() for gradient in grads),
    )
    assert_equal(testing.run(inputs, BACKEND), testing.run(contiguous, BACKEND))


@pytest.mark.parametrize("op", SAVE_MEMORY)
def test_hooks_may_move_what_is_kept(emulated, op):
    """Saved tensors come back at an address that the kernels cannot read rows from."""
    inputs = small_inputs(op, BF16, width=16, depth=1)
    inputs = inputs._replace(options=inputs.options | {"save_memory": False})
    expected = testing.run(inputs, BACKEND)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, offset):
        assert_equal(testing.run(inputs, BACKEND), expected)


@pytest.mark.parametrize("op", OPS[2:])
def test_activations_are_kept_unless_memory_is_saved(emulated, op, monkeypatch):
    """Inputs of N blocks and of the head, and SiLU(cond), of rows in multiples of 256."""
    inputs = extended_inputs(op, BF16, image_size=(2, 8, 20))
    depth, width = inputs.tensors["norm_weight"].shape
    monkeypatch.setattr(chunk_sizes, "chunk_pixels", lambda *_, **__: 16)
    save_memory.check_kept_activations(inputs, BACKEND, (depth + 2, 512, width))


def test_the_backward_does_not_copy_a_query_that_the_activations_contain(emulated, monkeypatch):
    inputs = extended_inputs("pixel_decoder", BF16, image_size=(2, 8, 20))
    read = []
    readable_query = decoder.calls.readable_query
    monkeypatch.setattr(decoder.calls, "readable_query", lambda query: (read.append(query), readable_query(query))[1])
    for keep, expected in ((False, [True, True]), (True, [True, False])):
        read.clear()
        testing.run(inputs._replace(options=inputs.options | {"save_memory": not keep}), BACKEND)
        assert [query is not None for query in read] == expected


@pytest.mark.parametrize("pixels", [1, 255, 256, 257, 1 << 31])
def test_memory_for_activations_has_the_rows_of_the_kernels(emulated, pixels):
    assert decoder.activation_shape(pixels, 3, 32) == (5, emulated.padded_rows(pixels), 32)


def test_activations_of_another_call_are_refused(emulated):
    save_memory.check_refused_activations(BACKEND)


@pytest.mark.parametrize("over", [False, True])
def test_offsets_around_32_bits(emulated, over):
    """Two images in float32 of which the second ends or starts at byte 2^32; hardly any of the memory is touched."""
    inputs = testing.random_inputs("pixel_decoder", dtype=BF16, width=16, patch_size=8, image_size=(2, 8, 8))
    inputs.tensors["image"] = image = inputs.tensors["image"].float()
    in_image = image[0].numel()
    start = (1 << 30) - (0 if over else in_image)
    far = torch.empty(start + in_image).as_strided(image.shape, (start, *image.stride()[1:])).copy_(image)
    assert_equal(
        testing.run(inputs._replace(tensors=inputs.tensors | {"image": far}), BACKEND), testing.run(inputs, BACKEND)
    )


@pytest.mark.parametrize("op", OPS[2:])
def test_images_of_the_other_half_precision(emulated, op):
    """The kernels read float32 and the dtype of cond; another dtype gives the bits of its float32 values."""
    inputs = small_inputs(op, BF16)
    half = inputs.tensors["image"].half()
    results = [
        testing.run(inputs._replace(tensors=inputs.tensors | {"image": image}), BACKEND)
        for image in (half, half.float())
    ]
    assert all(torch.equal(*pair) for pair in zip(*(r.outputs for r in results), strict=True))
    read, given = (r.gradients for r in results)
    assert all(torch.equal(read[name], given[name]) for name in read if name != "image")
    assert torch.equal(read["image"], given["image"].half())


@each_op
def test_empty_batch(emulated, op, poisoned_memory):
    inputs = extended_inputs(op, BF16, image_size=(0, 8, 12))
    results = testing.run(inputs, BACKEND)
    assert all(o.shape == g.shape for o, g in zip(results.outputs, inputs.grad_outputs, strict=True))
    for name, gradient in results.gradients.items():
        assert gradient.shape == inputs.tensors[name].shape and not gradient.any(), name


@each_op
def test_only_the_gradients_asked_for(emulated, op):
    inputs = extended_inputs(op, BF16, depth=1)
    expected = testing.run(inputs, BACKEND).gradients
    for name, gradient in gradients_one_by_one(inputs, BACKEND, inputs.tensors):
        assert torch.equal(gradient, expected[name]), name


@each_op
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate(emulated, op, value):
    inputs = small_inputs(op, BF16) if value != value else extended_inputs(op, BF16)
    name = next(n for n in ("image", "h") if n in inputs.tensors)
    inputs.tensors[name].flatten()[5] = value
    results, expected = testing.run(inputs, BACKEND), testing.exact_results(inputs)
    for actual, exact in zip(results.outputs, expected.outputs, strict=True):
        assert torch.equal(actual.isnan(), exact.isnan())
    for argument, gradient in results.gradients.items():
        assert torch.equal(gradient.isnan(), expected.gradients[argument].isnan()), argument


@pytest.mark.parametrize("case", [case for case in equal_rows.cases() if case[0] is not F32], ids=str)
@pytest.mark.parametrize("op", equal_rows.OPS[:3])
def test_nearly_equal_channels(emulated, op, case):
    equal_rows.test_nearly_equal_channels(BACKEND, op, case)


@each_op
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("width", equal_rows.WIDTHS)
def test_equal_channels_normalize_to_zero(emulated, op, dtype, width):
    equal_rows.test_equal_channels_normalize_to_zero(BACKEND, op, dtype, width)


@each_op
@pytest.mark.parametrize("size", [1e19, 1e25])
def test_a_variance_that_overflows_gives_nan(emulated, op, size):
    equal_rows.test_a_variance_that_overflows_gives_nan(BACKEND, op, BF16, size)


@pytest.mark.parametrize(("op", "head_norm"), equal_rows.HEADS)
@pytest.mark.parametrize("sizes", equal_rows.PARTLY_EMPTY, ids=str)
def test_an_eps_of_zero_in_partly_empty_tiles(emulated, op, head_norm, sizes, poisoned_memory):
    equal_rows.test_an_eps_of_zero_in_partly_empty_tiles(BACKEND, op, head_norm, BF16, sizes)


@pytest.mark.parametrize("op", ["pixel_decoder", "pixel_decoder_from_tokens"])
def test_images_without_pixels_have_zero_gradients(emulated, op):
    equal_rows.test_images_without_pixels_have_zero_gradients(BACKEND, op, (2, 0, 12))


@each_op
def test_weights_changed_in_place_are_seen(emulated, op):
    """The bits of a call with other tensors of these values."""
    inputs = small_inputs(op, BF16)
    before = testing.run(inputs, BACKEND)
    inputs.tensors["mod_weight"].data.mul_(2)
    after = testing.run(inputs, BACKEND)
    assert not torch.equal(after.outputs[0], before.outputs[0])
    copies = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
    assert_equal(after, testing.run(inputs._replace(tensors=copies), BACKEND))


@each_op
@pytest.mark.parametrize(
    ("width", "shared_bytes"),
    [(32, emulation.LARGE_SHARED), (64, emulation.SMALL_SHARED), (64, emulation.LARGE_SHARED)],
)
def test_barriers_order_all_accesses_of_shared_memory(emulated, op, width, shared_bytes):
    emulated.set_device_limits(emulation.MULTIPROCESSORS, shared_bytes)
    extension = EXTENDED.get(op, {}) if width == 32 else {}
    inputs = testing.random_inputs(op, dtype=BF16, width=width, depth=2, image_size=(1, 16, 32), **extension)
    with emulation.checked_for_races(emulated):
        testing.run(inputs, BACKEND)


ONE_OF_EACH_LIMIT = ("sm_80", "sm_90", "sm_120")  # of shared memory


@each_op
@pytest.mark.parametrize("architecture", ONE_OF_EACH_LIMIT)
def test_every_architecture_accepts_the_launches(emulated, op, architecture):
    """Thread blocks, threads and shared memory of the largest decoder; nothing runs."""
    emulated.set_device_limits(132, SHARED_LIMIT[architecture])
    sizes = {"width": 64, "depth": 8, "patch_size": 8, "image_size": (1, 16, 32)}
    inputs = testing.random_inputs(op, dtype=BF16, **sizes, **EXTENDED.get(op, {}))
    launches = emulated.launches_of(lambda: testing.run(inputs, BACKEND))
    assert len(launches) >= 4 and all(shared <= SHARED_LIMIT[architecture] for *_, shared in launches)


@pytest.mark.parametrize(("width", "blocks"), [(16, 3), (32, 1), (64, 1)])
def test_thread_blocks_share_a_multiprocessor_with_little_shared_memory(emulated, width, blocks):
    """100 KB per multiprocessor, of which the device takes 1 KB for each thread block."""
    emulated.set_device_limits(7, emulation.SMALL_SHARED)
    inputs = testing.random_inputs("adaln_block", dtype=BF16, width=width, image_size=(1, 64, 64))
    launches = emulated.launches_of(lambda: testing.run(inputs, BACKEND))
    (backward,) = (launch for launch in launches if launch[0] == "block_backward")
    assert backward[1] == 7 * blocks and blocks * (backward[3] + 1024) <= 100 << 10


def test_recorded_accesses(emulated):
    """adaln_block reads and writes every row once, without bank conflicts."""
    inputs = testing.random_inputs("adaln_block", dtype=BF16, width=32, image_size=(1, 16, 32))
    h, cond = inputs.tensors["h"], inputs.tensors["cond"]
    with torch.no_grad():
        pack, forward = emulation.record_accesses(
            lambda: ops.adaln_block(**inputs.tensors, **inputs.options, backend=BACKEND)
        )
    assert (pack.name, forward.name) == ("pack_weights", "adaln_block_forward")
    buffers = {buffer.address: buffer for buffer in forward.buffers}
    for rows in (h, cond):
        assert buffers[rows.data_ptr()].bytes == rows.nbytes
        assert buffers[rows.data_ptr()].read == (rows.nbytes,) * 3
    assert forward.written == (h.nbytes,) * 3
    assert pack.written.distinct > 0 and pack.read.distinct == sum(
        tensor.nbytes for name, tensor in inputs.tensors.items() if name not in ("h", "cond")
    )
    assert forward.shared.accesses > 0 and forward.shared.conflicts == 0


def test_packing_has_a_warp_for_every_row(emulated):
    """Rows of five matrices of N blocks, the embedding, the head and the pixel table: the whole GPU packs them."""
    depth, width, patch_size = 3, 32, 16
    inputs = testing.random_inputs("pixel_decoder", dtype=BF16, width=width, depth=depth, patch_size=patch_size)
    launches = emulated.launches_of(lambda: ops.pixel_decoder(**inputs.tensors, **inputs.options, backend=BACKEND))
    ((blocks, threads),) = [(blocks, threads) for name, blocks, threads, _ in launches if name == "pack_weights"]
    assert blocks >= 132  # multiprocessors of an H100
    assert blocks * threads // 32 >= 5 * depth * width + width + 8 + patch_size**2


def test_bytes_per_pixel_of_the_static_model(emulated):
    """adaln_block's backward reads h, cond and the gradient of the result, and writes the gradients of h and cond."""
    found = cuda_traffic.bytes_per_pixel("cuda.block_backward.backward_kernel+mlp+first+last/D16/bfloat16")
    assert found == 5 * 16 * torch.bfloat16.itemsize


@pytest.mark.parametrize("ahead", ["", "+ahead"])
def test_bytes_per_pixel_do_not_depend_on_copies(emulated, ahead):
    """The decoder's last block also reads the gradient of s."""
    found = cuda_traffic.bytes_per_pixel(f"cuda.block_backward.backward_kernel+mlp+tiled{ahead}+last/D16/bfloat16")
    assert found == 7 * 16 * torch.bfloat16.itemsize


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": F32}, "bfloat16 or float16"),
        ({"width": 48}, "width D"),
        ({"depth": 9}, "1 to 8 blocks"),
        ({"channels": 2}, "image channels"),
        ({"patch_size": 3, "image_size": (1, 6, 6)}, "patch size"),
    ],
)
def test_what_the_backend_does_not_support_is_refused_by_name(emulated, changes, said):
    inputs = testing.random_inputs("pixel_decoder", **({"dtype": BF16, "image_size": (1, 16, 16)} | changes))
    with pytest.raises(BackendUnavailable, match=said):
        testing.run(inputs, BACKEND)


def test_cpu_tensors_are_refused_by_name():
    with pytest.raises(BackendUnavailable, match="NVIDIA GPUs"):
        testing.run(small_inputs("pixel_decoder", BF16), "cuda")


ROWS, IMAGE, ROW_WEIGHTS, DECODER_WEIGHTS, EPS = (0, 1, 0), (0,) * 6, (0,) * 16, (0,) * 24, 1e-6
SMALL_SHAPE, LARGE_SHAPE = (2, 3, 16, 32, 16, 32, 3), (1, 3, 1 << 16, 1 << 15, 16, 32, 3)


def _native_calls(module):
    """Name -> (workspace for 64 rows or a small image, sizes in words, arguments for small sizes and for 2^31 pixels);
    all but the context. Sizes are checked before any argument is read."""
    pixel_rows, activations = (0, 1, 0, 0), 0
    decoder = (IMAGE, pixel_rows, pixel_rows, DECODER_WEIGHTS)

    def rows_of(*others):
        return [(rows, 32, *others, EPS) for rows in (64, 1 << 31)]

    def shapes_of(*others):
        return [(shape, *others) for shape in (SMALL_SHAPE, LARGE_SHAPE)]

    rows, image = r"\[64, 32\]", r"image \[2, 3, 16, 32\].*D 32, N 3"
    decoder_gradients = (IMAGE, pixel_rows, pixel_rows, DECODER_WEIGHTS)
    decoder_backward = shapes_of(IMAGE, *decoder, *decoder_gradients, 0, EPS, activations, 512)
    return {
        "adaln_block_forward": (module.adaln_block_forward_workspace(32), rows, rows_of(ROWS, ROWS, ROW_WEIGHTS, ROWS)),
        "adaln_block_backward": (
            module.adaln_block_backward_workspace(0, 64, 32),
            rows,
            rows_of(ROWS, ROWS, ROWS, ROW_WEIGHTS, ROWS, ROWS, ROW_WEIGHTS),
        ),
        "modulate_forward": (module.modulate_forward_workspace(32), rows, rows_of(ROWS, ROWS, (0,) * 8, ROWS, ROWS)),
        "modulate_backward": (
            module.modulate_backward_workspace(0, 64, 32),
            rows,
            rows_of(ROWS, ROWS, ROWS, ROWS, (0,) * 8, ROWS, ROWS, (0,) * 8),
        ),
        "pixel_decoder_forward": (
            module.pixel_decoder_forward_workspace(SMALL_SHAPE),
            image,
            shapes_of(*decoder, IMAGE, 0, EPS, activations),
        ),
        "pixel_decoder_backward": (
            module.pixel_decoder_backward_workspace(0, *decoder_backward[0]),
            image,
            decoder_backward,
        ),
    }


@pytest.mark.parametrize("name", _native_calls(MagicMock()))
def test_failures_name_the_op_and_its_sizes(emulated, name):
    needed, sizes, (small, large) = _native_calls(emulated)[name]
    op = name.removesuffix("_forward").replace("modulate", "upsample_modulate")
    assert needed > 0
    with pytest.raises(RuntimeError, match=f"{op} on {sizes}.*the workspace is smaller"):
        getattr(emulated, name)((0, 0, 0, needed - 1), *small)
    with pytest.raises(ValueError, match=f"{op} on .*2\\^31 or more pixels in one call; split the batch"):
        getattr(emulated, name)((0, 0, 0, 1 << 60), *large)

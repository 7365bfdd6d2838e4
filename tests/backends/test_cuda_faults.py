"""Faults injected into the real kernels are detected by the emulator, the order of warps, or the rule of error."""

import contextlib
import itertools
import string
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from deco_kernels import native, ops, testing
from deco_kernels.testing import emulation, source_regions

pytestmark = pytest.mark.emulate


def changed_files(changes: dict[str, str]) -> dict[str, str]:
    """File name -> new content of the csrc/cuda files with regions in `changes`; $name in a replacement expands to the
    original content of that region."""
    regions = source_regions.all_regions()
    files = {region.path: region.path.read_text().splitlines(keepends=True) for region in regions.values()}
    contents = {name: "".join(files[path][lines.start - 1 : lines.stop - 1]) for name, (path, lines) in regions.items()}
    changed = {name: string.Template(text).substitute(contents) for name, text in changes.items()}
    for name in sorted(changed, key=lambda name: regions[name].lines.start, reverse=True):
        path, lines = regions[name]
        files[path][lines.start - 1 : lines.stop - 1] = [changed[name]]
    return {path.name: "".join(files[path]) for path in {regions[name].path for name in changes}}


def build_with_fault(source: str, changes: dict[str, str], folder: Path, *options: str, width: int = 16):
    """The emulated module of this tree with csrc/cuda/SOURCE.cu recompiled after `changes` in that folder, with further
    compiler options, for one width in bfloat16."""
    changed = folder / "cuda"
    changed.mkdir()
    unchanged = {f"{source}.cu": (source_regions.CUDA_SOURCES / f"{source}.cu").read_text()}
    for name, content in (unchanged | changed_files(changes)).items():
        (changed / name).write_text(content)
    compiled = folder / f"{source}.o"
    good = [path for path in emulation.BUILD.rglob("*.o") if path.name != f"{source}.cu.o"]
    library = folder / f"_native_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    # -iquote: this folder precedes the tree in the search for headers.
    command = emulation.compile_command(f"-DDECO_ONLY_WIDTH={width}", "-iquote", folder, *options)
    command += ["-c", changed / f"{source}.cu", "-o", compiled]
    subprocess.run(command, check=True)
    subprocess.run(["g++", "-shared", compiled, *good, "-o", library], check=True)
    module = emulation.load(library)
    module.set_device_limits(emulation.MULTIPROCESSORS, emulation.LARGE_SHARED)
    return module


@pytest.fixture
def plant(emulated, tmp_path):
    """A function that changes regions of csrc/cuda and registers the resulting module for CPU tensors."""

    def build(source, **changes):
        module = build_with_fault(source, changes, tmp_path)
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


PLANTED = "DECO_PLANTED_FAULT"  # environment variable: the fault of the switchable module
# Fault → barriers and waits that block_backward.cu leaves out. At D 32 a warp of upsample_modulate runs the chain and
# adds to the weight gradients; a warp of the decoder does one of both, and each of the two kinds has the barriers
# between them. A chain warp of the decoder waits for its copies of the inputs.
LEFT_OUT = {
    "both roles": ["barrier_before_weight_gradients"],
    "reload": ["barrier_before_reload"],
    "before the sums": ["chain_has_written", "sums_may_read"],
    "after the sums": ["chain_may_write", "sums_have_read"],
    "inputs": ["wait_for_inputs"],
    "rows of cond": ["wait_for_rows_of_cond"],
}


@pytest.fixture(scope="module")
def switchable(emulated_session, tmp_path_factory):
    """A module for D 32 with the fault that PLANTED names, or none."""
    left_out = f'std::getenv("{PLANTED}") != nullptr && std::getenv("{PLANTED}") == std::string_view'
    changes = {
        region: f'if (!({left_out}("{fault}"))) ${region}' for fault, regions in LEFT_OUT.items() for region in regions
    }
    includes = ("-include", "cstdlib", "-include", "string_view")
    return build_with_fault("block_backward", changes, tmp_path_factory.mktemp("switchable"), *includes, width=32)


@pytest.fixture
def switched(switchable, emulated):
    switchable.set_device_limits(emulation.MULTIPROCESSORS, emulation.LARGE_SHARED)
    native.emulate_cuda(switchable)
    yield switchable
    native.emulate_cuda(emulated)


def gradient(op, module, seed=1):
    """Of mod_weight; every warp has several turns."""
    module.set_seed(seed)
    sizes = {"width": 32, "depth": 1, "patch_size": 4, "image_size": (1, 24, 32)}
    inputs = testing.random_inputs(op, dtype=torch.bfloat16, **sizes)
    return testing.run(inputs, emulation.BACKEND).gradients["mod_weight"]


@contextlib.contextmanager
def a_race_is_found(module, within):
    race = f"block_backward.*: race: thread .* byte .* after thread .*of the {within}"
    with emulation.checked_for_races(module), pytest.raises(module.Fault, match=race):
        yield


@pytest.fixture
def expected(emulated):
    return {op: gradient(op, emulated) for op in ("pixel_decoder", "upsample_modulate")}


def test_without_a_fault_the_results_are_right(expected, switched):
    for op, seed in itertools.product(expected, (1, 2)):
        with emulation.checked_for_races(switched):
            assert torch.equal(gradient(op, switched, seed), expected[op])


def test_a_missing_barrier_before_the_weight_gradients(switched, monkeypatch):
    monkeypatch.setenv(PLANTED, "both roles")
    first, second = (gradient("upsample_modulate", switched, seed) for seed in (1, 2))
    assert not torch.isfinite(first).all() or not torch.equal(first, second)
    with a_race_is_found(switched, "thread block"):
        gradient("upsample_modulate", switched)


@pytest.mark.parametrize(
    ("fault", "shared_bytes"),
    [
        ("before the sums", emulation.LARGE_SHARED),
        ("before the sums", emulation.SMALL_SHARED),
        ("after the sums", emulation.SMALL_SHARED),
    ],
)
def test_a_missing_barrier_between_chain_and_sums(switched, monkeypatch, fault, shared_bytes):
    """A turn has one barrier with two buffers of operands, and two with one, for which less memory suffices."""
    switched.set_device_limits(emulation.MULTIPROCESSORS, shared_bytes)
    with emulation.checked_for_races(switched):
        gradient("pixel_decoder", switched)
    monkeypatch.setenv(PLANTED, fault)
    with a_race_is_found(switched, "thread block"):
        gradient("pixel_decoder", switched)


def test_a_missing_barrier_of_a_warp(expected, switched, monkeypatch):
    """Every order of threads gives the right results, because lanes meet in other operations in between."""
    monkeypatch.setenv(PLANTED, "reload")
    found = [gradient("pixel_decoder", switched, seed) for seed in (1, 2)]
    assert all(torch.equal(each, expected["pixel_decoder"]) for each in found)
    with a_race_is_found(switched, "warp"):
        gradient("pixel_decoder", switched)


def test_a_missing_wait_for_the_inputs(expected, switched, monkeypatch):
    """Of the first turn's copies, those that take place late are read as NaN."""
    monkeypatch.setenv(PLANTED, "inputs")
    assert not torch.equal(gradient("pixel_decoder", switched), expected["pixel_decoder"])
    switched.set_device_limits(emulation.MULTIPROCESSORS, emulation.SMALL_SHARED)  # no copies
    assert torch.equal(gradient("pixel_decoder", switched), expected["pixel_decoder"])


def test_a_missing_wait_for_the_rows_of_cond(switched, monkeypatch):
    monkeypatch.setenv(PLANTED, "rows of cond")
    with pytest.raises(switched.Fault, match="block_backward_ahead: .*a thread ends while an asynchronous copy"):
        gradient("pixel_decoder", switched)


def test_swapped_fragments(plant):
    """Swaps two quadrants of the left operand of the gradient of pixel_weight."""
    plant(
        "decoder_embedding",
        bottom_left_quadrant="$top_right_quadrant",
        top_right_quadrant="$bottom_left_quadrant",
    )
    inputs = decoder_inputs(image_size=(1, 64, 64))
    failed = {row.name for row in testing.compare(inputs, testing.run(inputs, emulation.BACKEND)) if not row.passed}
    assert failed == {"grad pixel_weight"}


def test_a_fault_in_the_gradient_of_the_loss(plant):
    """The gradient of the velocity's blue channel lacks the frequency loss; the losses are right."""
    inputs = testing.random_inputs(
        "pixel_decoder_loss", dtype=torch.bfloat16, width=16, depth=1, patch_size=8, image_size=(1, 32, 64)
    )
    exact, eager = (results(inputs).gradients["cond"] for results in (testing.exact_results, testing.eager_results))

    def losses_and_whether_cond_passes():
        found = testing.run(inputs, emulation.BACKEND)
        comparison = testing.compare_tensors(
            "cond", found.gradients["cond"], (eager, exact), dtype=torch.bfloat16, gradient=True
        )
        return [loss.item() for loss in found.outputs], comparison.passed

    losses, passed = losses_and_whether_cond_passes()
    assert passed
    plant("flow_matching_loss_backward", frequency_part_of_blue="")
    assert losses_and_whether_cond_passes() == (losses, False)


def test_rows_read_one_pixel_outside(plant):
    """255 pixels: only the last row of the last tile has no pixel."""
    module = plant("pixel_decoder", last_pixel_for_missing_ones="")
    with pytest.raises(module.Fault, match="pixel_decoder_forward: read outside"):
        run_forward(decoder_inputs(patch_size=1, image_size=(1, 15, 17)))


def test_a_shuffle_under_divergence(plant):
    module = plant("pixel_decoder", first_shuffle_of_quad_sum="if (lane() < 16) $first_shuffle_of_quad_sum")
    with pytest.raises(module.Fault, match="diverge|deadlock"):
        run_forward(decoder_inputs())

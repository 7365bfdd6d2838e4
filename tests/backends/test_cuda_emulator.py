"""The emulator in csrc/emulation: collective operations match their definitions, and faults are detected."""

import importlib.util
import os
import subprocess
import sysconfig

import numpy as np
import pytest
import torch

from deco_kernels.testing import emulation

pytestmark = [
    pytest.mark.emulate,
    pytest.mark.skipif(emulation.unavailable_reason() is not None, reason=str(emulation.unavailable_reason())),
]


@pytest.fixture(scope="module")
def kernels(emulated_session, tmp_path_factory):
    library = tmp_path_factory.mktemp("emulator") / f"emulator_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    csrc, here = emulation.ROOT / "csrc", emulation.ROOT / "tests" / "backends"
    machine = (csrc / "emulation" / name for name in ("machine.cpp", "recorder.cpp"))
    sources = (here / "emulator_kernels.cpp", *machine)
    subprocess.run(emulation.compile_command("-shared", *sources, "-o", library), check=True)
    spec = importlib.util.spec_from_file_location("emulator_kernels", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_barrier_shows_in_the_order_of_warps(kernels):
    """With the barrier every seed gives the neighbor's number; without it some warp reads NaN bits or a stale word."""
    expected = np.repeat([1, 2, 3, 0], 32)
    for seed in range(8):
        assert (kernels.neighbor("", seed) == expected).all()
    without = [kernels.neighbor("missing barrier", seed) for seed in range(8)]
    assert all((result != expected).any() for result in without)
    assert any((result != without[0]).any() for result in without)


def test_a_kernel_that_may_start_early_waits_before_it_accesses_global_memory(kernels):
    kernels.overlap(True)
    with pytest.raises(kernels.Fault, match="before wait_for_previous_kernel .*thread 31"):
        kernels.overlap(False)


def test_asynchronous_copies_are_there_after_the_wait(kernels):
    given = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    for seed in range(8):
        assert (kernels.copy("", seed, given) == given.view(np.uint32)).all()
    without = [kernels.copy("no wait", seed, given) for seed in range(8)]
    assert all((copied[:64] != given.view(np.uint32)[:64]).any() for copied in without)


@pytest.mark.parametrize(
    ("fault", "said"), [("under way at the end", "copy is under way"), ("to global memory", "not shared")]
)
def test_faults_of_asynchronous_copies_are_noticed(kernels, fault, said):
    with pytest.raises(kernels.Fault, match=said):
        kernels.copy(fault, 1, np.zeros(128, np.float32))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("shuffle under divergence", "diverge|deadlock"),
        ("different collectives", "divergence"),
        ("barrier under divergence", "deadlock"),
        ("shared memory, one row outside", "read outside"),
        ("global memory, one element outside", "write outside"),
        ("misaligned", "misaligned"),
        ("misaligned row", "misaligned"),
        ("row of global memory", "outside shared memory"),
        ("write to what is read", "only read"),
    ],
)
def test_faults_are_noticed(kernels, fault, said):
    kernels.fault("none")
    with pytest.raises(kernels.Fault, match=said):
        kernels.fault(fault)
    kernels.fault("none")


@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes", "requested", "said"),
    [
        (0, 128, 512, 0, "at least 1 thread block, got 0"),
        (1, 48, 512, 0, "a multiple of 32 threads per thread block, got 48"),
        (1, 160, 512, 0, "at most 128 threads per thread block .*launch bounds.*, got 160"),
        (1, 128, (48 << 10) + 1, 0, "at most 49152 bytes of shared memory .*requested.*, got 49153"),
        (1, 128, 1 + 50_000, 50_000, "at most 50000 bytes of shared memory .*requested.*, got 50001"),
        (1, 128, 232_449, 232_449, "at most 232448 bytes .*device's limit.*, got 232449"),
    ],
)
def test_launches_that_the_device_refuses(kernels, blocks, threads, shared_bytes, requested, said):
    kernels.launch_sizes(1, 128, 232_448, 232_448)
    with pytest.raises(kernels.Fault, match=f"^test: .*expected {said}"):
        kernels.launch_sizes(blocks, threads, shared_bytes, requested)


@pytest.fixture
def checked_for_races(kernels):
    kernels.check_races(True)
    yield
    kernels.check_races(False)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("shuffle in place of a barrier", r"thread \d+ (reads|writes) byte \d+ .* after thread \d+, .*of the warp"),
        ("matrices of the next warp", r"thread \d+ (reads|writes) byte \d+ .* after thread \d+, .*of the thread block"),
        ("write after the reader", r"thread \d+ (reads|writes) byte \d+ .* after thread \d+, .*of the warp"),
    ],
)
def test_races_that_no_order_reveals(kernels, checked_for_races, fault, said):
    """The results are right in every order of threads; the shadow of shared memory names the byte and the threads."""
    expected = np.arange(128).reshape(4, 32)
    expected = np.roll(expected, -1, axis=1).ravel()
    for seed in range(4):
        assert (kernels.next_lane("", seed) == expected).all()
        with pytest.raises(kernels.Fault, match=f"^test: race: {said}"):
            kernels.next_lane(fault, seed)
    kernels.check_races(False)
    if fault == "shuffle in place of a barrier":
        assert all((kernels.next_lane(fault, seed) == expected).all() for seed in range(8))


def test_a_missing_barrier_is_a_race_in_every_order(kernels, checked_for_races):
    for seed in range(4):
        kernels.neighbor("", seed)
        with pytest.raises(kernels.Fault, match="of the thread block"):
            kernels.neighbor("missing barrier", seed)


@pytest.mark.parametrize(
    ("access", "stride", "wavefronts", "phases"),
    [
        ("2 bytes", 1, 1, 1),  # two lanes share a word
        ("4 bytes", 1, 1, 1),
        ("4 bytes", 0, 1, 1),  # one word for all lanes
        ("4 bytes", 2, 2, 1),
        ("4 bytes", 32, 32, 1),
        ("4 bytes", 33, 1, 1),
        ("8 bytes", 1, 2, 2),
        ("8 bytes", 2, 4, 2),
        ("8 bytes", 16, 32, 2),
        ("16 bytes", 1, 4, 4),
        ("16 bytes", 2, 8, 4),
        ("16 bytes", 9, 4, 4),
        ("matrices", 1, 4, 4),
        ("matrices", 4, 16, 4),
        ("matrices", 5, 4, 4),
    ],
)
def test_bank_conflicts(kernels, access, stride, wavefronts, phases):
    shared, _ = kernels.strided(access, stride)
    assert shared == (1, wavefronts, wavefronts - phases)


@pytest.mark.parametrize(("stride", "sectors", "distinct"), [(0, 32, 4), (1, 128, 128), (2, 256, 128), (8, 256, 32)])
def test_bytes_of_global_memory(kernels, stride, sectors, distinct):
    """32 lanes read one float32 each, `stride` apart, of 64: 8 sectors of 32 bytes, which start at multiples of 32."""
    _, read = kernels.strided("4 bytes", stride)
    assert read == (128, sectors, distinct)


def test_truncation(kernels):
    """c + a·b with c = 1 and one product of 1.5 units in the last place: nearest rounds up, truncation down."""
    c, unit = torch.ones(16, 8), 2.0**-23
    a, b = torch.zeros(16, 8), torch.zeros(8, 8)
    a[:, 0], b[0] = 1.5 * unit, 1.0
    packed = torch.cat([a.flatten(), b.flatten(), c.flatten()]).numpy()

    def result():
        return kernels.multiply("bfloat16", 8, packed).view(np.float32)

    assert (result() == 1 + 2 * unit).all()
    kernels.set_truncating(True)
    try:
        assert (result() == 1 + unit).all()
        x = np.random.default_rng(1).normal(size=1000).astype(np.float32)
        errors = np.array([kernels.tanh(value) for value in x]) / np.tanh(x.astype(np.float64)) - 1
        assert (errors <= 1e-7).all() and -(2.0**-11) <= errors.min() < -(2.0**-12)
    finally:
        kernels.set_truncating(False)


def test_uninitialized_shared_memory_is_nan(kernels):
    words = kernels.fault("uninitialized shared memory")[32:]
    assert np.isnan(words.view(np.float32)).all() and np.isnan(words.view(np.float16)).all()


# Matrix i of four holds the rows 8i to 8i + 7 of a 32 x 8 matrix; its element (r, c) has the value 8 * (8i + r) + c.
MATRICES = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)


def words_of(matrices):
    """[lane, matrix]: a lane's word of each matrix, the elements (lane // 4, 2 * (lane % 4)) and the next one."""
    return np.ascontiguousarray(matrices.reshape(4, 32, 2).transpose(1, 0, 2)).view(np.uint32)[..., 0]


@pytest.mark.parametrize("op", ["load_matrices", "load_matrices_transposed", "transpose"])
def test_matrix_loads(kernels, op):
    expected = MATRICES if op == "load_matrices" else MATRICES.transpose(0, 2, 1)
    assert (kernels.collective(op).reshape(32, 4) == words_of(np.ascontiguousarray(expected))).all()


def test_matrix_store(kernels):
    """Row r of all 32 goes to row 31 - r."""
    stored = kernels.collective("store_matrices").view(np.uint16).reshape(32, 8)
    assert (stored == MATRICES.reshape(32, 8)[::-1]).all()


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(kernels, dtype, k):
    generator = torch.Generator().manual_seed(k)
    a, b, c = (torch.randn(shape, generator=generator) for shape in ((16, k), (k, 8), (16, 8)))
    packed = torch.cat([a.flatten(), b.flatten(), c.flatten()]).numpy()
    result = kernels.multiply(str(dtype).removeprefix("torch."), k, packed).view(np.float32).reshape(16, 8)
    expected = a.to(dtype).double() @ b.to(dtype).double() + c.double()
    assert torch.allclose(torch.from_numpy(result).double(), expected, atol=1e-5)


@pytest.fixture
def tree(tmp_path):
    """A small csrc folder."""
    sources = tmp_path / "csrc"
    (sources / "cuda").mkdir(parents=True)
    (sources / "cuda" / "tile.h").write_text("int a;")
    (sources / "bindings.cpp").write_text("int b;")
    return sources


def test_the_module_is_compiled_again_where_contents_have_changed(tree, tmp_path, monkeypatch):
    """Files that are only newer, as in every checkout, do not trigger a compilation."""
    folder, compiled = tmp_path / "build", []

    def compile_tree(sources, folder):
        compiled.append(sources)
        folder.mkdir(exist_ok=True)
        (folder / "_native_cuda_emulated.so").touch()

    monkeypatch.setattr(emulation, "compile_tree", compile_tree)
    monkeypatch.setattr(emulation, "load", lambda library: library.name)

    def builds():
        compiled.clear()
        assert emulation.build(tree, folder) == "_native_cuda_emulated.so"
        return len(compiled)

    assert builds() == 1 and builds() == 0
    for path in tree.rglob("*"):
        os.utime(path, (1, 1))
    assert builds() == 0
    (tree / "cuda" / "tile.h").write_text("int c;")
    assert builds() == 1 and builds() == 0
    (tree / "cuda" / "tile.h").rename(tree / "cuda" / "rows.h")
    assert builds() == 1
    monkeypatch.setenv("CXXFLAGS", "-O0")
    assert builds() == 1 and builds() == 0
    (folder / "_native_cuda_emulated.so").rename(folder / "_native_cuda_emulated.cpython-30-x86_64-linux-gnu.so")
    monkeypatch.setattr(emulation.sys, "version", "another Python")
    assert builds() == 1 and builds() == 0


def test_after_a_failure_the_module_is_compiled_again(tree, tmp_path, monkeypatch):
    folder = tmp_path / "build"
    folder.mkdir()
    (folder / "_native_cuda_emulated.so").touch()
    (folder / "contents.sha256").write_text("of another tree")

    def fail(sources, folder):
        raise RuntimeError("no")

    monkeypatch.setattr(emulation, "compile_tree", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            emulation.build(tree, folder)

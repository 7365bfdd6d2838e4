"""The product of a kept gradient and the incoming gradient on CUDA devices, its kernel run by the emulator."""

import pytest
import torch

from deco_kernels import native, testing
from deco_kernels.backends.cuda import scaled_product
from deco_kernels.ops import one_pass
from deco_kernels.testing import emulation
from tests.backends.test_bindings import Recorder, refuses_other_numbers
from tests.ops.cases import BF16, offset, small_inputs

pytestmark = pytest.mark.emulate

SPECIAL = (torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-39, -3e38)
COUNTS = (0, 1, 7, 8, 4097, 8192, 20005)
FACTORS = (1.3519, -(2.0**-120), torch.inf)


def numbers(count: int) -> torch.Tensor:
    """Random bfloat16 numbers, the SPECIAL ones at both ends."""
    values = torch.randn(count)
    special = torch.tensor(SPECIAL)[:count]
    values[: len(special)] = values[count - len(special) :] = special
    return values.to(BF16)


def assert_product(found: torch.Tensor, values: torch.Tensor, factor: torch.Tensor):
    """`found` has the bits of the formula; a NaN has any bits of a NaN."""
    expected = (values.float() * factor).to(BF16)
    assert found.shape == expected.shape and found.dtype is BF16
    assert torch.equal(found.isnan(), expected.isnan())
    bits = [tensor.masked_fill(tensor.isnan(), 0.0).view(torch.int16) for tensor in (found, expected)]
    assert torch.equal(*bits)


@pytest.fixture
def everywhere(emulated, monkeypatch):
    """The emulated module, used for products on the CPU as on a GPU."""
    monkeypatch.setattr(scaled_product, "unavailable_reason", lambda device: None)
    return emulated


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("count", COUNTS)
def test_bits_of_the_formula(emulated, count, factor, poisoned_memory):
    values, factor = numbers(count), torch.tensor(factor)
    before = values.clone()
    assert_product(scaled_product.product(values, factor), values, factor)
    assert torch.equal(values.view(torch.int16), before.view(torch.int16))


def test_every_number_is_read_and_written_once(emulated):
    """In whole vectors of 16 bytes up to the last five numbers."""
    values, factor = numbers(20005), torch.tensor(0.7)
    (launch,) = emulation.record_accesses(lambda: scaled_product.product(values, factor))
    assert launch.name == "scaled_product" and launch.blocks == 3
    read, _, written = launch.buffers
    for traffic in (read.read, written.written):
        assert traffic.requested == traffic.distinct == 2 * values.numel()


def test_tensors_that_the_kernel_does_not_read(everywhere):
    values, factor = numbers(4096), torch.tensor(1.3519)
    others = {"offset": offset(values), "transposed": values.view(64, 64).T, "every second": values[::2]}
    for name, tensor in others.items():
        call = lambda tensor=tensor: one_pass.scaled([tensor], factor)  # noqa: E731
        assert not everywhere.launches_of(call), name
        assert_product(call()[0], tensor, factor)
    for other in (values.float(), factor.double()):
        pair = (values, other) if other.dim() == 0 else (other, factor)
        assert not scaled_product.supported(*pair)
    assert scaled_product.supported(values, factor)


def test_the_cpu_multiplies_in_pytorch(emulated):
    values, factor = numbers(4097), torch.tensor(1.3519)
    assert not emulated.launches_of(lambda: one_pass.scaled([values], factor))
    assert_product(one_pass.scaled([values], factor)[0], values, factor)


def test_the_backward_multiplies_the_bfloat16_gradient_with_it(everywhere, monkeypatch):
    """Of cond; the other kept gradients are float32."""
    inputs = small_inputs("pixel_decoder_loss", BF16)
    call = lambda: testing.run(inputs, emulation.BACKEND)  # noqa: E731
    found, launches = call(), everywhere.launches_of(call)
    assert [name for name, *_ in launches].count("scaled_product") == 1
    monkeypatch.undo()
    for name, expected in call().gradients.items():
        assert torch.equal(found.gradients[name], expected), name


def test_the_binding_refuses_other_numbers_of_integers(emulated, monkeypatch):
    recorder = Recorder(emulated)
    monkeypatch.setattr(native, "cuda", lambda device: recorder)
    scaled_product.product(numbers(8), torch.tensor(0.7))
    refuses_other_numbers(recorder)

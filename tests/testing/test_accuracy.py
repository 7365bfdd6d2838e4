"""The rule of error: it detects errors and bias above its bounds."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from deco_kernels import ops, testing
from deco_kernels.testing import accuracy, emulation
from tests.ops.cases import BF16, F16

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def inputs(request):
    return testing.random_inputs("pixel_decoder", dtype=request.param, image_size=(1, 64, 64))


def failures(inputs, results):
    return [row.name for row in testing.compare(inputs, results) if not row.passed]


def test_right_results_pass(inputs):
    assert failures(inputs, testing.run(inputs, "reference")) == []


@pytest.mark.parametrize("name", ["cond", "fc1_weight", "mod_bias", "norm_weight", "pixel_table"])
def test_a_wrong_gradient_is_caught(inputs, name):
    results = testing.run(inputs, "reference")
    results.gradients[name].mul_(1.5)
    assert failures(inputs, results) == [f"grad {name}"]


def test_a_transposed_weight_gradient_is_caught(inputs):
    results = testing.run(inputs, "reference")
    results.gradients["fc2_weight"] = results.gradients["fc2_weight"].mT
    assert failures(inputs, results) == ["grad fc2_weight"]


def test_one_unwritten_element_is_caught(inputs):
    results = testing.run(inputs, "reference")
    results.outputs[0].view(-1)[-1] = torch.nan
    assert failures(inputs, results) == ["output 0"]


def test_a_directional_bias_is_caught():
    exact = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bound = 1e-2
    biased = testing.compare_tensors("x", exact + 6e-7, (exact, exact), dtype=torch.float32, gradient=False)
    assert biased.error < biased.bound and not biased.passed
    assert testing.relative_bias(exact + 0.25 * bound, exact) > 0.2 * bound
    assert testing.relative_bias((exact + 1)[:999], exact[:999]) == 0


def test_errors_of_degenerate_tensors():
    zero = torch.zeros(4)
    assert testing.relative_error(zero, zero) == 0
    assert testing.relative_error(zero + 1e-30, zero) == float("inf")
    assert testing.relative_error(torch.tensor([torch.nan]), torch.ones(1)) == float("inf")
    assert testing.relative_error(torch.zeros(0), torch.zeros(0)) == 0
    with pytest.raises(ValueError, match=r"actual: expected shape \[4\] like exact, got \[\]; reshape it"):
        testing.relative_error(torch.tensor(0.0), zero)


@pytest.mark.parametrize("eager", [1.0, float("inf")])
def test_what_is_not_finite_fails_where_the_exact_result_is(eager):
    exact = torch.ones(4)
    pair = (torch.full((4,), eager), exact)
    found = accuracy.compare_tensors("x", torch.full((4,), torch.nan), pair, dtype=torch.float16, gradient=False)
    assert not found.passed
    assert accuracy.compare_tensors("x", exact, pair, dtype=torch.float16, gradient=False).passed


@pytest.mark.parametrize("eager", [torch.inf, torch.nan])
def test_an_eager_result_that_is_not_finite_hides_no_error(eager):
    """Its error counts as eps, and its bias as none."""
    exact = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pair, eps = (torch.full_like(exact, eager), exact), torch.finfo(F16).eps

    def compared(actual):
        return testing.compare_tensors("x", actual, pair, pair, dtype=F16, gradient=False)

    assert compared(exact.half()).passed and compared(exact).bound == 1.2 * eps
    assert not compared(1.01 * exact).passed
    biased = compared(exact + 0.5 * eps)
    assert biased.error < biased.bound and not biased.passed


@pytest.mark.parametrize(
    ("values", "passes"),
    [
        ((1.0, -2.0, torch.inf), True),
        ((1.0, -2.0, torch.nan), True),
        ((1.0, -2.0, 65504.0), False),
        ((1.0, -2.2, torch.inf), False),
        ((1.0, -torch.inf, torch.inf), False),
    ],
)
def test_a_result_is_infinite_where_the_exact_one_does_not_fit_its_dtype(values, passes):
    exact = torch.tensor([1.0, -2.0, 1e6], dtype=torch.float64)
    actual = torch.tensor(values, dtype=F16)
    assert testing.compare_tensors("x", actual, (exact.half(), exact), dtype=F16, gradient=False).passed == passes


@pytest.mark.parametrize(("factor", "passes"), [(0.0, True), (1.1, True), (1.3, False), (torch.nan, False)])
def test_where_the_exact_result_is_zero_eager_gives_the_unit(factor, passes):
    exact, eager = torch.zeros(2000, dtype=torch.float64), torch.randn(2000, generator=torch.Generator().manual_seed(0))
    for others in ((), ((eager, exact),)):
        actual = factor * eager.flip(0)
        found = testing.compare_tensors("x", actual, (eager, exact), *others, dtype=BF16, gradient=False)
        assert found.passed == passes
    assert not testing.compare_tensors("x", eager, (exact, exact), dtype=BF16, gradient=False).passed


def test_overflowing_eager_contenders_hide_no_wrong_result(inputs):
    exact, eager = testing.exact_results(inputs), testing.eager_results(inputs)
    eager.outputs[0].fill_(torch.inf)
    eager.gradients["cond"].fill_(torch.nan)
    wrong = testing.run(inputs, "reference")
    for tensor in (wrong.outputs[0], wrong.gradients["cond"]):
        tensor.mul_(1.2)
    failed = [row.name for row in testing.compare(inputs, wrong, exact, eager) if not row.passed]
    assert failed == ["output 0", "grad cond"]


def test_a_systematic_error_of_a_loss_is_noticed():
    inputs = testing.random_inputs("pixel_decoder_loss", dtype=BF16, image_size=(2, 32, 64))
    right = testing.run(inputs, "reference")
    assert failures(inputs, right) == []
    scaled = right._replace(outputs=(right.outputs[0] * 1.0015, *right.outputs[1:]))
    assert failures(inputs, scaled) == ["output 0"]


def test_an_output_without_gradient_is_refused():
    inputs = testing.random_inputs("adaln_block", image_size=(1, 16, 16))
    with mock.patch.object(ops, "adaln_block", lambda h, *rest, **options: h.detach()):
        with pytest.raises(AssertionError, match="1 of 1 outputs have no gradient"):
            testing.run(inputs, "reference")


def test_bounds():
    assert testing.error_bound(torch.float32, 1e-7, gradient=False) == 2e-6
    assert testing.error_bound(torch.float32, 1e-5, gradient=True) == 2e-5
    assert testing.error_bound(torch.bfloat16, 1e-3, gradient=False) == pytest.approx(1.2e-3)
    assert testing.error_bound(torch.float16, 1e-3, gradient=True) == pytest.approx(1.5e-3)


def test_random_inputs_of_an_unknown_op_are_refused():
    with pytest.raises(ValueError, match="op: expected one of .*'frequency_loss'.*, got 'pixel_encoder'"):
        testing.random_inputs("pixel_encoder")


def test_random_inputs_are_reproducible_and_differ_by_seed():
    first, again, other = (testing.random_inputs("adaln_block", seed=seed) for seed in (0, 0, 1))
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name]) and not torch.equal(tensor, other.tensors[name])
        assert tensor.std() > 0


@pytest.mark.parametrize("name", ["width", "depth", "patch_size", "channels", "token_width"])
def test_sizes_of_random_inputs(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        testing.random_inputs("pixel_decoder_from_tokens", **{name: 0})


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16])
def test_new_tensors_are_poisoned(poisoned_memory, dtype):
    like = torch.zeros(5, 7, dtype=dtype)
    for tensor in (torch.empty(5, 7, dtype=dtype), torch.empty_like(like), like.new_empty(5, 7)):
        assert tensor.isnan().all()


# --- eager as on CUDA devices ----------------------------------------------------------------------------------------

NARROW = dict(width=16, depth=6, patch_size=8, image_size=(3, 24, 64), channels=1)
SMALL_PATCHES = dict(width=16, patch_size=2, image_size=(1, 58, 74), channels=4)


@pytest.fixture
def layer_norm_in_float32(monkeypatch):
    """Autocast as on CUDA devices: LayerNorm is float32, and eager more accurate than on the CPU."""
    layer_norm = F.layer_norm

    def in_float32(x, shape, weight=None, bias=None, eps=1e-5):
        if not torch.is_autocast_enabled("cpu"):
            return layer_norm(x, shape, weight, bias, eps)
        with torch.autocast("cpu", enabled=False):
            return layer_norm(x.float(), shape, *(None if t is None else t.float() for t in (weight, bias)), eps)

    monkeypatch.setattr(F, "layer_norm", in_float32)


def noisy(inputs, factor, seed=50):
    """Results with rounding errors like eager's, `factor` times as large: those of another call, on these results."""
    other, exact = testing.rescaled(inputs, seed), testing.exact_results(inputs)
    rounded, own = testing.eager_results(other), testing.exact_results(other)

    def moved(values, rounded_values, own_values):
        scale = factor * values.double().norm() / own_values.double().norm()
        return values.double() + scale * (rounded_values.double() - own_values.double())

    outputs = tuple(map(moved, exact.outputs, rounded.outputs, own.outputs))
    gradients = {n: moved(g, rounded.gradients[n], own.gradients[n]) for n, g in exact.gradients.items()}
    return testing.Results(outputs, gradients)


@pytest.mark.emulate
@pytest.mark.parametrize(
    ("op", "dtype", "seed", "sizes"),
    [
        ("upsample_modulate", F16, 102, NARROW),
        ("adaln_block", F16, 111, NARROW),
        ("adaln_block", F16, 108, SMALL_PATCHES),
        ("pixel_decoder_from_tokens", BF16, 102, NARROW),
    ],
)
def test_chance_in_the_errors_of_eager_is_no_failure(layer_norm_in_float32, op, dtype, seed, sizes):
    """Eager's error in a gradient of 16 elements is small by chance, or the rounding of few weights gives a bias: each
    exceeds the bounds of its call alone."""
    reason = emulation.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    emulation.emulated_module()
    inputs = testing.random_inputs(op, dtype=dtype, seed=seed, **sizes)
    assert failures(inputs, testing.run(inputs, emulation.BACKEND)) == []


def test_errors_larger_than_eagers_are_caught(layer_norm_in_float32):
    """In every output from 1.5 times eager's error on, and in nearly every gradient from 1.5 times the bound on."""
    inputs = testing.random_inputs("adaln_block", dtype=BF16, **NARROW)
    assert "output 0" not in failures(inputs, noisy(inputs, 1.0))
    assert "output 0" in failures(inputs, noisy(inputs, 1.5))
    rows = testing.compare(inputs, noisy(inputs, 1.5 * 1.5))
    assert sum(not row.passed for row in rows) >= 0.9 * len(rows)


def test_a_bias_beyond_the_noise_is_caught(layer_norm_in_float32):
    """Half of eager's error, and a bias of half the bound on top: the error alone stays within its bound."""
    inputs = testing.random_inputs("adaln_block", dtype=BF16, **NARROW)
    exact, results = testing.exact_results(inputs), noisy(inputs, 0.5)
    row = next(row for row in testing.compare(inputs, results) if row.name == "output 0")
    assert row.passed
    output = results.outputs[0] + 0.5 * row.bound * exact.outputs[0].square().mean().sqrt()
    biased = next(r for r in testing.compare(inputs, results._replace(outputs=(output,))) if r.name == "output 0")
    assert biased.error <= biased.bound and biased.bias > biased.bias_bound

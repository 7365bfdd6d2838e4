"""The rule of error: it detects errors and bias above its bounds."""

import pytest
import torch

from deco_kernels import testing


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
    biased = testing.compare_tensors("x", exact + 6e-7, exact, exact, dtype=torch.float32, gradient=False)
    assert biased.error < biased.bound and not biased.passed
    assert testing.relative_bias(exact + 0.25 * bound, exact) > 0.2 * bound
    assert testing.relative_bias((exact + 1)[:999], exact[:999]) == 0


def test_errors_of_degenerate_tensors():
    zero = torch.zeros(4)
    assert testing.relative_error(zero, zero) == 0
    assert testing.relative_error(zero + 1e-30, zero) == float("inf")
    assert testing.relative_error(torch.tensor([torch.nan]), torch.ones(1)) == float("inf")
    assert testing.relative_error(torch.zeros(0), torch.zeros(0)) == 0


def test_bounds():
    assert testing.error_bound(torch.float32, 1e-7, gradient=False) == 2e-6
    assert testing.error_bound(torch.float32, 1e-5, gradient=True) == 2e-5
    assert testing.error_bound(torch.bfloat16, 1e-3, gradient=False) == pytest.approx(1.2e-3)
    assert testing.error_bound(torch.float16, 1e-3, gradient=True) == pytest.approx(1.5e-3)


def test_random_inputs_are_reproducible_and_differ_by_seed():
    first, again, other = (testing.random_inputs("adaln_block", seed=seed) for seed in (0, 0, 1))
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name]) and not torch.equal(tensor, other.tensors[name])
        assert tensor.std() > 0

"""The path and the distribution of times."""

import math

import pytest
import torch

from deco_kernels import flow


def test_interpolate():
    x, noise, t = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.tensor([0.0, 0.25, 1.0])
    x_t, v = flow.interpolate(x, noise, t)
    assert torch.equal(x_t[0], noise[0]) and torch.equal(x_t[2], x[2])
    torch.testing.assert_close(x_t[1], 0.25 * x[1] + 0.75 * noise[1])
    torch.testing.assert_close(v, x - noise)


@pytest.mark.parametrize("bad", [dict(noise=torch.zeros(2, 3)), dict(t=torch.zeros(3)), dict(t=torch.tensor(0.5))])
def test_interpolate_rejects_other_shapes(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        flow.interpolate(**{**dict(x=torch.zeros(2, 4), noise=torch.zeros(2, 4), t=torch.zeros(2)), **bad})


def cumulative(distribution, shift, t):
    """Probability of a time up to t: undo the shift, then the distribution before it."""
    before = t * shift / (1 - t + t * shift)
    if distribution == "uniform":
        return before
    return 0.5 * (1 + math.erf(math.log(before / (1 - before)) / math.sqrt(2)))


@pytest.mark.parametrize("shift", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("distribution", ["lognormal", "uniform"])
def test_time_distribution(distribution, shift):
    count = 20_000
    generator = torch.Generator().manual_seed(3)
    t = flow.sample_time(count, distribution=distribution, shift=shift, generator=generator)
    assert t.shape == (count,) and t.dtype == torch.float32 and 0 <= t.min() and t.max() <= 1
    ordered = t.double().sort().values.tolist()
    exact = [cumulative(distribution, shift, value) if 0 < value < 1 else value for value in ordered]
    distance = max(max(abs(c - i / count), abs(c - (i + 1) / count)) for i, c in enumerate(exact))
    assert distance < 1.63 / math.sqrt(count)  # Kolmogorov-Smirnov, 1 % level


def test_time_is_repeatable_by_generator():
    first, second = (flow.sample_time(8, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


def test_bad_options():
    with pytest.raises(ValueError, match="distribution: expected one of"):
        flow.sample_time(4, distribution="normal")
    for shift in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="shift: expected a positive"):
            flow.sample_time(4, shift=shift)

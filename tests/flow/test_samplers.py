"""Samplers: golden samples, which calls the velocity sees, and bad input."""

import re

import pytest
import torch

from deco_kernels import flow
from tests.golden_files import OUTPUT_TOLERANCE, golden_cases, load_golden, relative_error

SETTING = re.compile(r"(\w+)/steps(\d+)_cfg([\d.]+)_interval([\d.]+)-([\d.]+)_shift([\d.]+)")


def analytic(x, t, cond):
    """v = sin(1.3 x) + c·cos(2 t) - 0.5 x t, the velocity of the golden samples."""
    t, cond = t.reshape(-1, 1, 1, 1), cond.reshape(-1, 1, 1, 1)
    return torch.sin(1.3 * x) + cond * torch.cos(2 * t) - 0.5 * x * t


@pytest.mark.parametrize("path", golden_cases("samplers"))
def test_samples_match_golden(path):
    tensors = load_golden(path).tensors
    noise, cond, uncond = (tensors[name] for name in ("noise", "cond", "uncond"))
    tested = set()
    for name, expected in tensors.items():
        match = SETTING.fullmatch(name)
        if match is None or match[1] not in flow.SOLVERS:
            continue
        guidance, lo, hi, shift = map(float, match.groups()[2:])
        options = dict(guidance=guidance, guidance_interval=(lo, hi), shift=shift)
        actual = flow.sample(analytic, noise, cond, uncond, solver=match[1], steps=int(match[2]), **options)
        assert relative_error(actual, expected) < OUTPUT_TOLERANCE, name
        tested.add(match[1])
    assert tested == set(flow.SOLVERS)


@pytest.mark.parametrize("path", golden_cases("samplers"))
def test_timesteps_match_golden(path):
    tested = 0
    for name, expected in load_golden(path).group("timesteps").items():
        steps, shift = re.fullmatch(r"steps(\d+)_shift([\d.]+)", name).groups()
        torch.testing.assert_close(flow.timesteps(int(steps), float(shift)), expected, rtol=1e-6, atol=0)
        tested += 1
    assert tested


class Recorder:
    """A velocity that notes what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, cond):
        assert not torch.is_grad_enabled()
        self.calls.append((len(x), round(t[0].item(), 6), cond.tolist()))
        assert t.shape == (len(x),) and t.dtype == torch.float32
        return torch.ones_like(x) * cond.reshape(-1, 1, 1, 1)


def test_doubled_batch_only_inside_the_interval():
    velocity = Recorder()
    noise, cond, uncond = torch.zeros(2, 3, 4, 4), torch.tensor([5.0, 6.0]), torch.tensor([1.0, 1.0])
    out = flow.sample(velocity, noise, cond, uncond, steps=4, guidance=2.0, guidance_interval=(0.25, 0.5))
    single, doubled = [5.0, 6.0], [1.0, 1.0, 5.0, 6.0]
    assert velocity.calls == [(2, 0.0, single), (2, 0.25, single), (4, 0.5, doubled), (2, 0.75, single)]
    guided = 1 + 2.0 * (cond - 1)
    expected = (0.75 * cond + 0.25 * guided).reshape(-1, 1, 1, 1).expand_as(noise)
    torch.testing.assert_close(out, expected)
    assert not noise.any()


def test_guidance_one_never_doubles_and_needs_no_uncond():
    velocity = Recorder()
    flow.sample(velocity, torch.zeros(1, 3, 4, 4), torch.tensor([5.0]), steps=3)
    assert [size for size, _, _ in velocity.calls] == [1, 1, 1]


def test_state_keeps_float32_for_half_precision_noise():
    noise, cond = torch.ones(1, 3, 4, 4, dtype=torch.bfloat16), torch.tensor([1.0])
    dtypes = set()

    def velocity(x, t, cond):
        dtypes.add(x.dtype)
        return torch.full_like(x, 0.5)

    out = flow.sample(velocity, noise, cond, steps=1000)
    assert dtypes == {torch.bfloat16} and out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), torch.full((1, 3, 4, 4), 1.5))


def test_progress_gives_the_same_sample(capsys):
    pytest.importorskip("tqdm")
    noise, cond = torch.randn(2, 3, 4, 4), torch.tensor([0.3, -0.2])
    plain = flow.sample(analytic, noise, cond, steps=3)
    shown = flow.sample(analytic, noise, cond, steps=3, progress=True)
    assert torch.equal(plain, shown)
    assert "3/3" in capsys.readouterr().err


GOOD = dict(solver="euler", steps=2, guidance=2.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(steps=0), ValueError, "steps: expected at least 1, got 0"),
        (dict(steps=2.5), TypeError, "steps: expected an int"),
        (dict(solver="rk45"), ValueError, r"solver: expected one of \[.*'euler'.*\], got 'rk45'"),
        (dict(guidance_interval=(0.5, 0.2)), ValueError, "guidance_interval"),
        (dict(guidance_interval=(-0.1, 1.0)), ValueError, "guidance_interval"),
        (dict(guidance_interval=(0.0, 1.5)), ValueError, "guidance_interval"),
        (dict(guidance_interval=(0.0,)), ValueError, "guidance_interval"),
        (dict(guidance_interval=(float("nan"), 1.0)), ValueError, "guidance_interval"),
        (dict(guidance_interval=0.5), TypeError, "guidance_interval: expected a pair of numbers"),
        (dict(guidance_interval=("0", "1")), TypeError, "guidance_interval: expected a pair of numbers"),
        (dict(shift=0.0), ValueError, "shift: expected a positive"),
        (dict(guidance=None), TypeError, "guidance: expected a number"),
        (dict(guidance=float("nan")), ValueError, "guidance: expected a finite"),
        (dict(noise=torch.zeros(2, 3, 4, 4, dtype=torch.int64)), TypeError, "noise: expected a floating"),
        (dict(noise=None), TypeError, "noise: expected a tensor"),
        (dict(cond=torch.zeros(3)), ValueError, "cond: expected the batch"),
        (dict(uncond=None), ValueError, "uncond: expected a tensor when guidance"),
        (dict(uncond=torch.zeros(1)), ValueError, "uncond: expected the shape"),
        (dict(velocity=lambda x, t, c: x[:, :1]), ValueError, "velocity: expected it to return the shape of x"),
        (dict(velocity=lambda x, t, c: x[:1]), ValueError, "velocity: expected it to return the shape of x"),
        (dict(velocity=lambda x, t, c: None), TypeError, "velocity: expected it to return a tensor"),
    ],
)
def test_bad_input(change, error, message):
    call = dict(velocity=analytic, noise=torch.zeros(2, 3, 4, 4), cond=torch.ones(2), uncond=torch.zeros(2), **GOOD)
    flow.sample(**call)
    with pytest.raises(error, match=message):
        flow.sample(**{**call, **change})

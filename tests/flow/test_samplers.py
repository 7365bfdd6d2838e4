"""Samplers: golden samples, calls of the velocity, and bad input."""

import re

import pytest
import torch

from deco_kernels import flow
from tests.golden_files import OUTPUT_TOLERANCE, golden_cases, load_golden, relative_error
from tests.installed import installed

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
        if match is None:
            continue
        solver = match[1].replace("adam", "adams")
        guidance, lo, hi, shift = map(float, match.groups()[2:])
        options = dict(guidance=guidance, guidance_interval=(lo, hi), shift=shift)
        actual = flow.sample(analytic, noise, cond, uncond, solver=solver, steps=int(match[2]), **options)
        assert relative_error(actual, expected) < OUTPUT_TOLERANCE, name
        tested.add(solver)
    assert tested == set(flow.SOLVERS) - {"adams1"}


def test_adams1_is_euler():
    noise, cond = torch.randn(2, 3, 4, 4), torch.tensor([0.3, -0.2])
    options = dict(steps=5, guidance=2.0, guidance_interval=(0.1, 0.7), shift=2.0)
    euler, adams = (flow.sample(analytic, noise, cond, -cond, solver=name, **options) for name in ("euler", "adams1"))
    torch.testing.assert_close(adams, euler)


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("heun", 2), ("heun_exact", 2), ("adams2", 2), ("adams3", 2)]
)
def test_order_of_convergence(solver, order):
    """Halving the steps divides the error by 2^order; Heun ends and Adams starts with Euler's step."""
    noise, cond = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0.3, -0.2], dtype=torch.float64)
    exact = flow.sample(analytic, noise, cond, solver="heun_exact", steps=1000)
    errors = [relative_error(flow.sample(analytic, noise, cond, solver=solver, steps=n), exact) for n in (20, 40)]
    assert errors[0] / errors[1] > 0.85 * 2**order and errors[0] < 0.05


@pytest.mark.parametrize("path", golden_cases("samplers"))
def test_timesteps_match_golden(path):
    tested = 0
    for name, expected in load_golden(path).group("timesteps").items():
        steps, shift = re.fullmatch(r"steps(\d+)_shift([\d.]+)", name).groups()
        torch.testing.assert_close(flow.timesteps(int(steps), float(shift)), expected, rtol=1e-6, atol=0)
        tested += 1
    assert tested


class Recorder:
    """A velocity that records its arguments."""

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


CALLS_OF_FOUR_STEPS = {
    "euler": [0.0, 0.25, 0.5, 0.75],
    "heun": [0.0, 0.25, 0.5, 0.75],
    "heun_exact": [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75],
    "adams1": [0.0, 0.25, 0.5, 0.75],
    "adams2": [0.0, 0.25, 0.5, 0.75],
    "adams3": [0.0, 0.25, 0.5, 0.75],
}


@pytest.mark.parametrize("solver", CALLS_OF_FOUR_STEPS)
@pytest.mark.parametrize(
    ("interval", "guided"), [((0.0, 1.0), (0.25, 0.5, 0.75)), ((0.3, 0.5), (0.5,)), ((0.8, 1.0), ())]
)
def test_calls_of_every_solver(solver, interval, guided):
    """Number of calls per solver, doubled only in steps that start inside the interval."""
    if solver.startswith("adams"):
        guided = tuple(t for t in guided if t < interval[1])
    velocity, one = Recorder(), torch.ones(2)
    options = dict(solver=solver, steps=4, guidance=2.0, guidance_interval=interval)
    flow.sample(velocity, torch.zeros(2, 3, 4, 4), one, one, **options)
    assert [t for _, t, _ in velocity.calls] == CALLS_OF_FOUR_STEPS[solver]
    if solver == "heun_exact":
        steps = [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75]
    elif solver == "heun":
        steps = [0.0, 0.0, 0.25, 0.5]  # the first step evaluates twice, the last one not at all
    else:
        steps = [0.0, 0.25, 0.5, 0.75]
    assert [size for size, _, _ in velocity.calls] == [4 if start in guided else 2 for start in steps]


@pytest.mark.parametrize("solver", CALLS_OF_FOUR_STEPS)
def test_no_value_is_read_by_the_host(solver):
    """Tensors on the meta device have no values: reading one fails."""
    noise, cond = torch.zeros(2, 3, 4, 4, device="meta"), torch.zeros(2, device="meta")
    options = dict(solver=solver, steps=4, guidance=2.0, guidance_interval=(0.3, 0.6))
    assert flow.sample(analytic, noise, cond, cond, **options).shape == noise.shape


@pytest.mark.parametrize("solver", CALLS_OF_FOUR_STEPS)
def test_trajectory_on_request(solver):
    noise, cond = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16), torch.tensor([0.3, -0.2])
    alone = flow.sample(analytic, noise, cond, solver=solver, steps=3)
    final, states = flow.sample(analytic, noise, cond, solver=solver, steps=3, trajectory=True)
    assert states[0].data_ptr() != noise.data_ptr()  # changing a state does not change the caller's noise
    assert torch.equal(final, alone) and len(states) == 4
    assert torch.equal(states[0], noise) and torch.equal(states[-1], final)
    assert all(state.dtype == noise.dtype for state in states) and not torch.equal(states[1], states[2])


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
    installed("tqdm")
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
        (dict(noise=torch.zeros(2, 3, 4, 4, dtype=torch.int64)), TypeError, "noise: expected a floating.*; convert it"),
        (dict(noise=None), TypeError, "noise: expected a tensor, got NoneType; pass a tensor"),
        (dict(cond=torch.zeros(3)), ValueError, "cond: expected the batch.*; pass one condition per image"),
        (dict(uncond=None), ValueError, "uncond: expected a tensor when guidance.*; pass the null condition"),
        (dict(uncond=torch.zeros(1)), ValueError, "uncond: expected the shape.*; expand or convert it"),
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

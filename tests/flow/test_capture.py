"""The model's call and the steps of the samplers neither copy from the host nor wait, as CUDA graphs require."""

import contextlib

import pytest
import torch

from deco_kernels import flow
from deco_kernels.flow.solvers import SOLVERS
from tests.flow.test_sampler import GUIDED, sampling_case
from tests.mock_capture import CaptureRefused, mock_capture
from tests.random_models import random_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["deco-tiny", "deco-text-tiny", "dit-tiny"])
def test_the_call_of_a_model(name):
    net, noise, cond, _ = sampling_case(name)
    times = torch.full((len(noise),), 0.3)
    sampler = flow.Sampler(net, steps=1, dtype=torch.bfloat16)
    expected = sampler.graphed.velocity(noise, times, cond)
    with mock_capture():
        actual = sampler.graphed.velocity(noise, times, cond)
    assert torch.equal(actual, expected)


@contextlib.contextmanager
def guarded(call):
    """The call, with copies and waits refused from its first run to the end of the context."""
    with contextlib.ExitStack() as stack:
        calls = []

        def counted(*arguments):
            if not calls:
                stack.enter_context(mock_capture())
            calls.append(arguments)
            return call(*arguments)

        yield counted


def sample_guarded(velocity, *arguments, **options):
    """flow.sample with copies and waits refused from the first call of the velocity to the end."""
    with guarded(velocity) as call:
        return flow.sample(call, *arguments, **options)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_steps_of_a_sampler(solver):
    net, noise, cond, uncond = sampling_case("deco-tiny")
    options = dict(solver=solver, **GUIDED)
    expected = flow.sample(net, noise, cond, uncond, **options)
    assert torch.equal(sample_guarded(net, noise, cond, uncond, **options), expected)


def test_the_steps_of_a_sampler_that_reuses_tokens():
    net, noise, cond, uncond = sampling_case("deco-tiny")
    sampler = flow.Sampler(net, trunk_steps=[0, 2], **GUIDED)
    expected = sampler(noise, cond, uncond)
    with guarded(net.encode) as net.encode:
        actual = sampler(noise, cond, uncond)
    assert torch.equal(actual, expected)


def test_a_wait_between_the_steps_is_refused():
    net, noise, cond, _ = sampling_case("deco-tiny")
    with pytest.raises(CaptureRefused):
        sample_guarded(lambda x, t, y: net(x, t, y) * x.max().item(), noise, cond, steps=2)


def test_labels_out_of_range_are_not_looked_for_on_a_gpu():
    """There the check would wait; the lookup fails on the device."""
    net, y = random_model("deco-tiny"), torch.tensor([0, 1])
    with mock_capture():
        net.check_labels(y)

"""flow.Sampler: same samples as flow.sample, weights cast once, calls replayed as CUDA graphs."""

import copy
import logging

import pytest
import torch

from deco_kernels import flow
from deco_kernels.flow.cuda_graphs import CaptureFailed, GraphedVelocity
from tests.golden_files import relative_error
from tests.random_models import random_model

GUIDED = dict(steps=3, guidance=2.0, guidance_interval=(0.1, 0.5))


def sampling_case(name, device="cpu", batch=2):
    """A random model with noise, conditions and null conditions for it."""
    net = random_model(name).to(device)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(batch, 3, 32, 32, generator=generator)
    if name == "deco-text-tiny":
        cond = torch.randn(batch, 7, 20, generator=generator)
        uncond = torch.randn(1, 7, 20, generator=generator).expand(batch, -1, -1)
    else:
        cond = torch.arange(batch)
        uncond = torch.full((batch,), net.null_label)
    return net, *(tensor.to(device) for tensor in (noise, cond, uncond))


@pytest.mark.parametrize("solver", ["euler", "heun", "adams2"])
def test_samples_are_those_of_flow_sample(solver):
    net, noise, cond, uncond = sampling_case("deco-tiny")
    expected = flow.sample(net, noise, cond, uncond, solver=solver, **GUIDED)
    sampler = flow.Sampler(net, solver=solver, **GUIDED)
    assert torch.equal(sampler(noise, cond, uncond), expected)
    final, states = sampler(noise, cond, uncond, trajectory=True)
    assert torch.equal(final, expected) and len(states) == 4
    assert sampler.model is net


@pytest.mark.parametrize("name", ["deco-tiny", "deco-text-tiny", "dit-tiny"])
def test_cast_weights_give_the_samples_of_autocast(name):
    net, noise, cond, uncond = sampling_case(name)
    before = copy.deepcopy(net.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = flow.sample(net, noise, cond, uncond, **GUIDED)
    sampler = flow.Sampler(net, dtype=torch.bfloat16, **GUIDED)
    assert torch.equal(sampler(noise, cond, uncond), expected)
    full = flow.sample(net, noise, cond, uncond, **GUIDED)
    assert 1e-5 < relative_error(expected, full) < 5e-2
    # The copy is cast and frozen, except for its norms; the original is unchanged.
    block = sampler.model.trunk.blocks[0]
    assert block.attn.qkv.weight.dtype == torch.bfloat16 and block.norm1.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in sampler.model.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(sampler(noise, cond, uncond), expected)


@pytest.mark.parametrize("trunk_steps", [None, 2])
def test_on_step_sees_every_state_and_may_change_it(trunk_steps):
    net, noise, cond, uncond = sampling_case("deco-tiny")
    sampler, seen = flow.Sampler(net, trunk_steps=trunk_steps, **GUIDED), []
    final, states = sampler(
        noise, cond, uncond, trajectory=True, on_step=lambda step, x: seen.append((step, x.clone()))
    )
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(torch.equal(x, state) for (_, x), state in zip(seen, states[1:], strict=True))
    half = sampler(noise, cond, uncond, on_step=lambda step, x: x.mul_(0.5) if step == 2 else None)
    assert torch.equal(half, 0.5 * final)


class ReplayedCall:
    """A capture without a GPU: static arguments and one output that every replay overwrites, as in a CUDA graph."""

    def __init__(self, velocity, *arguments):
        self.velocity, self.arguments = velocity, [argument.clone() for argument in arguments]
        self.output = velocity(*self.arguments)
        self.replays = 0

    def __call__(self, *arguments):
        for static, argument in zip(self.arguments, arguments, strict=True):
            static.copy_(argument)
        self.output.copy_(self.velocity(*self.arguments))
        self.replays += 1
        return self.output.clone()


def test_one_capture_for_each_kind_of_call():
    net, noise, cond, uncond = sampling_case("deco-tiny")
    graphed = GraphedVelocity(net, ReplayedCall)
    for seed in (0, 1):
        noise = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed))
        for solver in ("heun", "adams3"):
            options = dict(solver=solver, **GUIDED)
            expected = flow.sample(net, noise, cond, uncond, **options)
            assert torch.equal(flow.sample(graphed, noise, cond, uncond, **options), expected)
    assert len(graphed.graphs) == 2  # the doubled and the single batch
    assert sum(graph.replays for graph in graphed.graphs.values()) == 2 * (3 + 3)
    flow.sample(graphed, noise[:1], cond[:1], **{**GUIDED, "guidance": 1.0})
    assert len(graphed.graphs) == 3


def test_failed_capture_falls_back_and_says_so_once(caplog):
    net, noise, cond, uncond = sampling_case("deco-tiny")
    attempts = []

    def capture(velocity, *arguments):
        attempts.append(arguments)
        raise CaptureFailed("operation not permitted when stream is capturing")

    graphed = GraphedVelocity(net, capture)
    with caplog.at_level(logging.WARNING, logger="deco_kernels"):
        actual = flow.sample(graphed, noise, cond, uncond, **GUIDED)
    assert torch.equal(actual, flow.sample(net, noise, cond, uncond, **GUIDED))
    assert len(attempts) == 1
    (record,) = caplog.records
    assert "without CUDA graphs" in record.message and "not permitted when stream is capturing" in record.message


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(steps=0), ValueError, "steps: expected at least 1, got 0"),
        (dict(solver="rk45"), ValueError, "solver: expected one of"),
        (dict(shift=-1.0), ValueError, "shift: expected a positive"),
        (dict(guidance=None), TypeError, "guidance: expected a number"),
        (dict(guidance_interval=(1.0, 0.0)), ValueError, "guidance_interval: expected"),
        (dict(dtype=torch.int8), TypeError, r"dtype: expected None or one of \[torch.bfloat16, torch.float16\]"),
        (dict(model=lambda x, t, y: x, dtype=torch.bfloat16), TypeError, "model: expected a module when dtype"),
        (dict(model=lambda x, t, y: x, compile_trunk=True), TypeError, "model: expected one that has compile_trunk"),
    ],
)
def test_bad_settings_are_refused_at_once(options, error, message):
    options = dict(model=random_model(), steps=2) | options
    with pytest.raises(error, match=message):
        flow.Sampler(options.pop("model"), **options)

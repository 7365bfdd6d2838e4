"""compile_trunk: one compilation per kind of block, same results and gradients, no other changes."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from deco_kernels import flow
from deco_kernels.model.dit import PatchTransformer
from tests.golden_files import relative_error
from tests.random_models import random_batch, random_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "kinds"), [("deco-tiny", 1), ("dit-tiny", 1), ("deco-text-tiny", 2)])
def test_blocks_of_one_kind_compile_once(name, kinds):
    eager = random_model(name, depth=5, **(dict(text_depth=3) if kinds == 2 else {}))
    compiled, counter = copy.deepcopy(eager), CompileCounterWithBackend("aot_eager")
    compiled.compile_trunk(backend=counter, fullgraph=True)
    x, t, y = random_batch()
    if kinds == 2:
        y = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(5))
    gradients = []
    for net in (eager, compiled):
        net(x, t, y).square().mean().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert counter.frame_count == kinds
    assert all(relative_error(actual, expected) < 1e-5 for expected, actual in zip(*gradients, strict=True))
    with torch.no_grad():
        assert relative_error(compiled(x, t, y), eager(x, t, y)) < 1e-5
    assert list(compiled.state_dict()) == list(eager.state_dict())


def test_a_copy_is_not_compiled_and_a_sampler_compiles_its_own():
    net, counter = random_model(), CompileCounterWithBackend("eager")
    net.compile_trunk(backend=counter)
    noise, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    expected = flow.sample(copy.deepcopy(net), noise, y, steps=2)
    assert counter.frame_count == 0
    assert relative_error(flow.Sampler(net, steps=2)(noise, y), expected) < 1e-5
    assert counter.frame_count == 1


def test_sampler_compiles_on_request(monkeypatch):
    """The sampler compiles its copy, not the given model."""
    net, counter, compile_blocks = random_model(), CompileCounterWithBackend("eager"), PatchTransformer.compile_blocks
    monkeypatch.setattr(PatchTransformer, "compile_blocks", lambda trunk: compile_blocks(trunk, backend=counter))
    noise, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    options = dict(steps=2, dtype=torch.bfloat16)
    compiled = flow.Sampler(net, compile_trunk=True, **options)
    assert torch.equal(compiled(noise, y), flow.Sampler(net, **options)(noise, y))
    assert counter.frame_count == 1
    flow.sample(net, noise, y, steps=1)
    assert counter.frame_count == 1

"""flow.Sampler on a GPU: graphs vs. direct calls, no synchronization between steps, the fallback."""

import contextlib
import copy
import logging

import pytest
import torch

from deco_kernels import flow, testing
from deco_kernels.flow import cuda_graphs
from tests.flow.test_sampler import GUIDED, sampling_case
from tests.golden_files import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("name", ["deco-tiny", "deco-text-tiny"])
@pytest.mark.parametrize("solver", ["euler", "heun", "heun_exact", "adams2"])
def test_graphs_give_the_same_samples_on_a_gpu(name, solver):
    """Captured, and replayed with other arguments: as close to float64 samples as direct calls, by the rule of error.
    Bits may differ, because libraries may choose other kernels during capture."""
    net, noise, cond, uncond = sampling_case(name, "cuda", batch=4)
    options = dict(solver=solver, dtype=torch.bfloat16, **GUIDED)
    sampler, direct = flow.Sampler(net, **options), flow.Sampler(net, cuda_graph=False, **options)
    exact = flow.Sampler(copy.deepcopy(net).double(), solver=solver, cuda_graph=False, **GUIDED)
    for arguments in ((noise, cond, uncond), (noise.flip(0), cond.flip(0), uncond)):
        expected = exact(arguments[0].double(), *arguments[1:])
        error = relative_error(direct(*arguments), expected)
        bound = testing.error_bound(torch.bfloat16, error, gradient=False)
        assert relative_error(sampler(*arguments), expected) <= bound
    assert len(sampler.graphed.graphs) == 2 and not sampler.graphed.failed


def test_reused_tokens_with_two_graphs_per_batch():
    net, noise, cond, uncond = sampling_case("deco-tiny", "cuda", batch=4)
    reused = dict(trunk_steps=[0, 2], **GUIDED)
    sampler = flow.Sampler(net, dtype=torch.bfloat16, **reused)
    direct = flow.Sampler(net, dtype=torch.bfloat16, cuda_graph=False, **reused)
    exact = flow.Sampler(copy.deepcopy(net).double(), cuda_graph=False, **reused)
    expected = exact(noise.double(), cond, uncond)
    error = relative_error(direct(noise, cond, uncond), expected)
    for _ in range(2):
        bound = testing.error_bound(torch.bfloat16, error, gradient=False)
        assert relative_error(sampler(noise, cond, uncond), expected) <= bound
    assert not any(half.failed for half in sampler.graphed_halves)
    assert [len(half.graphs) for half in sampler.graphed_halves] == [1, 1]


@pytest.mark.parametrize("compile_trunk", [False, True])
def test_a_sampler_joins_the_linears_of_its_copy(compile_trunk):
    net, noise, cond, uncond = sampling_case("deco-tiny", "cuda")
    sampler = flow.Sampler(net, dtype=torch.bfloat16, compile_trunk=compile_trunk, **GUIDED)
    assert sampler.model.trunk.modulation_rows.rows[0].dtype is torch.bfloat16
    assert net.trunk.modulation_rows.rows is None
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = flow.sample(net, noise, cond, uncond, **GUIDED)
    exact = flow.sample(copy.deepcopy(net).double(), noise.double(), cond, uncond, **GUIDED)
    bound = testing.error_bound(torch.bfloat16, relative_error(expected, exact), gradient=False)
    assert relative_error(sampler(noise, cond, uncond), exact) <= bound


def test_steps_do_not_wait_for_the_gpu():
    """After the captures, a second sample runs with synchronizing calls forbidden from the first step on."""
    net, noise, cond, uncond = sampling_case("deco-tiny", "cuda")
    sampler = flow.Sampler(net, dtype=torch.bfloat16, **GUIDED)
    expected = sampler(noise, cond, uncond)
    previous = torch.cuda.get_sync_debug_mode()

    def guarded(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        return sampler.graphed(*arguments)

    try:
        actual = flow.sample(guarded, noise, cond, uncond, **GUIDED)
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    assert torch.equal(actual, expected)


def test_a_model_that_cannot_be_captured_runs_without(caplog):
    def velocity(x, t, cond):
        return x * t.max().item() + cond.reshape(-1, 1, 1, 1)

    noise, cond = torch.randn(2, 3, 8, 8, device="cuda"), torch.tensor([0.1, 0.2], device="cuda")
    with caplog.at_level(logging.WARNING, logger="deco_kernels"):
        actual = flow.Sampler(velocity, steps=3)(noise, cond)
    assert torch.equal(actual, flow.sample(velocity, noise, cond, steps=3))
    assert len(caplog.records) == 1


def hidden_wait(x):
    with contextlib.suppress(RuntimeError):
        x.sum().item()
    return x


FAILING = {
    "wait": lambda x: x * x.sum().item(),
    "host copy": lambda x: x @ x.new_tensor([[1.0] * 8] * 8),
    "hidden wait": hidden_wait,
}


@pytest.mark.parametrize("call", FAILING.values(), ids=FAILING)
def test_a_failed_capture_leaves_the_gpu_as_it_was(call):
    """Stream, random generator and memory: random numbers, an earlier graph with random numbers, a new capture."""
    x, stream = torch.randn(8, 8, device="cuda"), torch.cuda.current_stream()
    before, noise = cuda_graphs.capture(lambda: torch.randn_like(x), warm_up=lambda: torch.randn_like(x))
    with pytest.raises(cuda_graphs.CaptureFailed):
        cuda_graphs.capture(lambda: call(x) + torch.randn_like(x), warm_up=lambda: torch.randn_like(x))
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    first = torch.randn(8, 8, device="cuda")
    assert not torch.equal(torch.randn(8, 8, device="cuda"), first)
    before.replay()
    first = noise.clone()
    before.replay()
    assert not torch.equal(noise, first)
    torch.cuda.empty_cache()
    assert torch.empty(1 << 20, pin_memory=True).is_pinned()
    after, doubled = cuda_graphs.capture(lambda: 2 * x, warm_up=lambda: 2 * x)
    x.fill_(3.0)
    after.replay()
    assert doubled.eq(6.0).all()


def test_garbage_is_not_collected_during_a_capture():
    """A graph in a reference cycle, left by the call, in which Python collects garbage unless that is disabled."""
    x = torch.randn(8, 8, device="cuda")
    cycles = [[cuda_graphs.capture(lambda: 2 * x, warm_up=lambda: 2 * x)[0]]]
    cycles[0].append(cycles[0])

    def call():
        cycles.clear()
        lists = [[] for _ in range(100_000)]
        return 3 * x + len(lists)

    graph, tripled = cuda_graphs.capture(call, warm_up=lambda: 3 * x)
    graph.replay()
    assert torch.equal(tripled, 3 * x + 100_000)

"""The Triton backend on a GPU: the shared cases, PyTorch's machinery, CUDA graphs, streams, devices, processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deco_kernels import ops, testing
from deco_kernels.flow import cuda_graphs
from deco_kernels.ops.registry import BackendUnavailable
from tests.backends.triton_calls import MANY_PIXELS, copied, few_cases, with_views
from tests.ops.cases import BF16, CASES, CHOICES, DEFAULTS, F16, F32, OPS, differentiable, small_inputs, with_choice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ROOT = Path(__file__).resolve().parents[2]


def on_gpu(inputs, device="cuda"):
    return copied(inputs, device)


def assert_equal(actual, expected):
    assert all(torch.equal(*pair) for pair in zip(actual.outputs, expected.outputs, strict=True))
    for name, gradient in actual.gradients.items():
        assert torch.equal(gradient, expected.gradients[name]), name


@pytest.mark.parametrize(("op", "case"), [pytest.param(op, case, id=f"{op}-{case.label}") for op, case in few_cases()])
def test_rule_of_error(op, case):
    inputs = on_gpu(case.inputs(op))
    failed = [str(row) for row in testing.compare(inputs, testing.run(inputs, "triton")) if not row.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_views_give_the_same_result(op, dtype):
    """The same bits, but for sums over a tile of the losses: the layout of its elements follows the strides, and the
    order of the additions follows the layout. At most 24 additions, 16 in a thread and 8 levels of threads, follow
    each other."""
    inputs = on_gpu(small_inputs(op, dtype))
    views, expected = with_views(inputs), testing.run(inputs, "triton")
    actual = testing.run(views, "triton")
    if "loss" in op:
        pairs = [*zip(actual.outputs, expected.outputs, strict=True)]
        pairs.append((actual.gradients.pop("sample_weight"), expected.gradients.pop("sample_weight")))
        assert all(testing.relative_error(*pair) <= 24 * torch.finfo(F32).eps for pair in pairs)
        actual, expected = (results._replace(outputs=()) for results in (actual, expected))
    assert_equal(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    inputs = on_gpu(small_inputs(op, BF16))
    arguments = (*inputs.in_order(), *(inputs.options | DEFAULTS[op]).values(), "triton")
    torch.library.opcheck(getattr(torch.ops.deco_kernels, op).default, arguments)


@pytest.mark.parametrize("op", OPS)
def test_compile_fullgraph(op):
    torch._dynamo.reset()
    inputs = on_gpu(small_inputs(op, BF16))

    def call(tensors):
        outputs = getattr(ops, op)(**tensors, **inputs.options, backend="triton")
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def results(function):
        tensors = {name: tensor.clone().requires_grad_() for name, tensor in inputs.tensors.items()}
        outputs = function(tensors)
        used, grad_outputs = differentiable(outputs, inputs.grad_outputs)
        gradients = torch.autograd.grad(used, list(tensors.values()), grad_outputs, materialize_grads=True)
        return testing.Results(outputs, dict(zip(tensors, gradients, strict=True)))

    assert_equal(results(torch.compile(call, fullgraph=True)), results(call))


@pytest.mark.parametrize(("op", "save_memory"), CHOICES)
def test_repeated_runs_give_the_same_bits(op, save_memory):
    inputs = with_choice(on_gpu(CASES[op][1].inputs(op)), save_memory)
    first = testing.run(inputs, "triton")
    for _ in range(5):
        assert_equal(testing.run(inputs, "triton"), first)


@pytest.mark.parametrize(("op", "save_memory"), CHOICES)
def test_a_captured_graph_sees_changed_inputs_and_weights(op, save_memory):
    inputs = with_choice(on_gpu(small_inputs(op, BF16)), save_memory)

    def step():
        return testing.run(inputs, "triton")

    graph, captured = cuda_graphs.capture(step, warm_up=step)
    changed = on_gpu(small_inputs(op, BF16, seed=1))
    for name, tensor in inputs.tensors.items():
        tensor.copy_(changed.tensors[name])
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured, step())


def test_compiling_during_capture_is_refused():
    code = """
import torch
from deco_kernels import ops
from tests.ops.cases import small_inputs
inputs = small_inputs("pixel_decoder")
tensors = {name: t.cuda() for name, t in inputs.tensors.items()}
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.pixel_decoder(**tensors, **inputs.options, backend="triton")
except RuntimeError as error:
    assert "before the capture" in str(error), error
else:
    raise AssertionError("not refused")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_two_streams_at_once():
    many = [on_gpu(small_inputs("pixel_decoder", BF16, seed=seed)) for seed in range(2)]
    expected = [testing.run(inputs, "triton") for inputs in many]
    streams = [torch.cuda.Stream() for _ in many]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for inputs, stream in zip(many, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(testing.run(inputs, "triton"))
        torch.cuda.synchronize()
        for pair in zip(results, expected, strict=True):
            assert_equal(*pair)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    inputs = small_inputs("pixel_decoder", BF16)
    first = testing.run(on_gpu(inputs, "cuda:0"), "triton")
    second = testing.run(on_gpu(inputs, "cuda:1"), "triton")
    assert second.outputs[0].device.index == 1
    assert testing.relative_error(second.outputs[0].cpu(), first.outputs[0].cpu()) <= 1e-2


def test_four_processes_share_an_empty_compilation_cache(tmp_path):
    code = """
import torch
from deco_kernels import testing
from tests.ops.cases import CASES
inputs = CASES["pixel_decoder"][1].inputs("pixel_decoder")
inputs = inputs._replace(tensors={n: t.cuda() for n, t in inputs.tensors.items()},
                         grad_outputs=tuple(g.cuda() for g in inputs.grad_outputs))
assert all(row.passed for row in testing.compare(inputs, testing.run(inputs, "triton")))
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) for _ in range(4)]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0, 0, 0]
    finally:
        for process in processes:
            process.kill()


def test_memory_grows_by_the_outputs_and_the_workspace():
    inputs = on_gpu(testing.random_inputs("pixel_decoder", dtype=BF16, image_size=MANY_PIXELS))
    testing.run(inputs, "triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = testing.run(inputs, "triton")
    outputs = sum(t.numel() * t.element_size() for t in (*results.outputs, *results.gradients.values()))
    assert torch.cuda.max_memory_allocated() - before - outputs <= 300e6  # of which a chunk's workspace takes 268 MB


def test_the_condition_of_all_tokens_never_exists_at_inference():
    inputs = on_gpu(testing.random_inputs("pixel_decoder_from_tokens", dtype=BF16, image_size=MANY_PIXELS))

    def velocity():
        with torch.no_grad():
            return ops.pixel_decoder_from_tokens(**inputs.tensors, **inputs.options, backend="triton")

    velocity()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = velocity()
    growth = torch.cuda.max_memory_allocated() - before - output.numel() * output.element_size()
    assert growth <= 80e6  # one chunk of conditions has 67 MB, all of them 134 MB


def test_float64_is_refused_by_name():
    inputs = on_gpu(testing.in_float64(small_inputs("pixel_decoder")))
    with pytest.raises(BackendUnavailable, match="float64"):
        testing.run(inputs, "triton")

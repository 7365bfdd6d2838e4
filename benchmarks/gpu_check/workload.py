"""The calls of the Triton backend in a check, and the distinct kernels that they launch. Nothing is computed.

The calls of the tests are listed in tests/backends/triton_calls.py.
"""

import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.harness.scaling import SIDES
from benchmarks.ops.problem import problem_of
from benchmarks.ops.sizes import Size
from benchmarks.static.triton_kernels import kernel_name
from deco_kernels import ops, signatures, testing
from deco_kernels.testing.inputs import KEEPS_COND, LOSSES, SAVE_MEMORY

BF16 = torch.bfloat16


class Call(NamedTuple):
    """One call of an op, or several that differ in `save_memory`; `needs` says which gradients its backward computes,
    None leaves the backward out."""

    inputs: testing.Inputs
    needs: Sequence[bool] | None
    save_memory: Sequence[bool] = (True, False)  # of the ops in SAVE_MEMORY


class Pointer:
    """Stands for a fake tensor in a kernel's arguments: dtype, and alignment of its address to 16 bytes."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype = tensor.dtype
        self._address = tensor.storage_offset() * tensor.element_size() % 16

    def data_ptr(self) -> int:
        return self._address

    @staticmethod
    def ptr_range() -> int:
        return 0


class Kernel(NamedTuple):
    """A kernel specialized on its arguments. Two kernels of the same `key` are the same; `name` is for people."""

    name: str
    key: str
    function: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]


def calls() -> Iterator[Call]:
    """The calls of all steps, as fake tensors; to be consumed under FakeTensorMode."""
    yield from _selftest()
    for inputs in importlib.import_module("tests.backends.triton_calls").calls("cpu"):
        yield _with_all_gradients(inputs)
    yield from _benchmarks()


def _selftest() -> Iterator[Call]:
    for op in (*testing.OPS, "frequency_loss"):
        yield _with_all_gradients(testing.random_inputs(op, dtype=BF16, image_size=(1, 64, 64)))


def _benchmarks() -> Iterator[Call]:
    """Timed sizes, and the size at which each of them is verified."""
    batch, few, sides = Size(batch=32), dict(dtype=BF16), SIDES["cuda"]
    cases = [(op, size, BF16) for op in testing.OPS for size in (batch, Size())]
    cases += [(op, batch, torch.float16) for op in ("pixel_decoder", "flow_matching_loss")]
    cases += [("pixel_decoder", Size(batch=32, decoder_width=width), BF16) for width in (16, 64)]
    cases += [(op, Size(height=h, width=w), BF16) for op in ("pixel_decoder", "flow_matching_loss") for h, w in sides]
    for op, size, dtype in cases:
        for each in (size, problem_of(op).check_size(size)):
            yield _of_problem(op, each, dtype)
    for op in testing.OPS:  # the budgeted kernels
        sizes = dict(image_size=(32, 256, 256), token_width=1152)
        yield _with_all_gradients(testing.random_inputs(op, other_dtype=BF16, **few, **sizes))


def _with_all_gradients(inputs: testing.Inputs) -> Call:
    needs = [tensor is not None for tensor in inputs.in_order()]
    if inputs.op not in SAVE_MEMORY:
        return Call(inputs, needs)
    default = inspect.signature(getattr(ops, inputs.op)).parameters["save_memory"].default
    return Call(inputs, needs, [inputs.options.get("save_memory", default)])


def _of_problem(op: str, size: Size, dtype: torch.dtype) -> Call:
    """A training step of the benchmarks."""
    problem = problem_of(op)
    shapes = problem.arguments(size)
    names = signatures.OPS[op].names
    tensors = {n: torch.empty(shapes[n], dtype=problem.dtype_of(n, dtype)) for n in names if n in shapes}
    incoming = [torch.empty(shape, dtype=problem.output_dtype(dtype)) for shape in problem.outputs(size).values()]
    constant = {*problem.activations, *problem.constants} - {*problem.trained}
    needs = [name in shapes and name not in constant for name in names]
    return Call(testing.Inputs(op, tensors, problem.options(size), tuple(incoming)), needs)


def launches(call: Call, architecture: str, multiprocessors: int) -> list:
    """Launches of the Triton backend in the forward and backward of a call, recorded without running."""
    from deco_kernels.backends.triton import launching

    inputs = call.inputs
    loss, prefix = inputs.op == "frequency_loss", "frequency_loss_" if inputs.op == "frequency_loss" else ""
    module = importlib.import_module(f"deco_kernels.backends.triton.{'flow_matching_loss' if loss else inputs.op}")
    groups, options = inputs.groups(), [value for name, value in inputs.options.items() if name != "save_memory"]
    if inputs.op not in LOSSES:
        options.append(1e-6)
    with launching.record_launches(architecture, multiprocessors) as recorded:
        if hasattr(module, "forward_with_gradients"):  # one call computes outputs and gradients
            group = signatures.OPS[inputs.op].group(*groups)
            module.forward(group, *options)
            if call.needs is not None:
                module.forward_with_gradients(group, *options, list(call.needs))
        else:
            for kept in kept_tensors(call, module):
                getattr(module, f"{prefix}forward")(*groups, *options, **kept)
                if call.needs is not None:
                    backward = getattr(module, f"{prefix}backward")
                    backward(*inputs.grad_outputs, *groups, *options, list(call.needs), **kept)
    return recorded


def kept_tensors(call: Call, module: ModuleType) -> Iterator[dict[str, torch.Tensor]]:
    """What each choice of `save_memory` keeps between forward and backward, uninitialized."""
    op, tensors = call.inputs.op, call.inputs.tensors
    for save_memory in call.save_memory if op in SAVE_MEMORY else (True,):
        found = {}
        if op in KEEPS_COND and not save_memory:
            rows, width = tensors["up_weight"].shape[0], tensors["mod_weight"].shape[-1]
            found["cond"] = tensors["tokens"].new_empty((*tensors["tokens"].shape[:-1], rows // width, width))
        if hasattr(module, "activation_shape") and not save_memory:
            shape = module.activation_shape(tensors["image"][:, 0].numel(), *tensors["norm_weight"].shape)
            found["activations"] = found.get("cond", tensors.get("cond")).new_empty(shape)
        yield found


def kernels(architecture: str, multiprocessors: int, every_call: Iterable[Call] | None = None) -> list[Kernel]:
    """The distinct kernels of `every_call` (by default of `calls()`) on an architecture such as "sm_90", in the order
    of their launch. Triton's active driver must have that target."""
    with FakeTensorMode():
        every_call = calls() if every_call is None else every_call
        return distinct(launch for call in every_call for launch in launches(call, architecture, multiprocessors))


def distinct(recorded: Iterable[Any]) -> list[Kernel]:
    """The kernels of recorded launches, each once. Nothing is compiled."""
    import triton

    found: dict[tuple[str, str], Kernel] = {}
    keys: list[str] = []

    def keep_key(*, key: str, **_: Any) -> bool:
        keys.append(key)
        return True  # do not compile

    triton.knobs.runtime.jit_cache_hook = keep_key
    try:
        for launch in recorded:
            arguments = {n: Pointer(v) if isinstance(v, FakeTensor) else v for n, v in launch.args.items()}
            arguments |= launch.options
            launch.kernel.warmup(grid=launch.grid, **arguments)
            function = f"{launch.kernel.fn.__module__}.{launch.kernel.fn.__name__}"
            if (function, keys[-1]) not in found:
                name = f"{_label(launch)}#{len(found)}"
                found[function, keys[-1]] = Kernel(
                    name, f"{function} {keys[-1]}", launch.kernel, arguments, launch.grid
                )
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    return list(found.values())


def _label(launch) -> str:
    """The kernel's name with its width, the dtypes of its pointers and its compile-time constants."""
    tensors = [
        str(value.dtype).removeprefix("torch.") for value in launch.args.values() if isinstance(value, torch.Tensor)
    ]
    constants = [f"{name}={launch.args[name]}" for name in ("D", "N", "C", "PATCH") if name in launch.args]
    return f"{kernel_name(launch)}[{', '.join([*constants, *dict.fromkeys(tensors)])}]"

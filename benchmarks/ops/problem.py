"""Base class for the benchmark of an op: tensors, eager formulations, bytes and FLOPs."""

import dataclasses
import importlib
import math

import torch

from benchmarks.ops.sizes import SYMBOLS, Size
from deco_kernels import ops, testing
from deco_kernels.signatures import OPS

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
Outputs = tuple[torch.Tensor, ...]


def problem_of(op: str) -> "Problem":
    return importlib.import_module(f"benchmarks.ops.{op}").PROBLEM


@dataclasses.dataclass
class Operands:
    """Tensors of one problem, by name.

    Attributes:
        activations: tensors that differ from call to call.
        weights: the op's weights, and those of the published formulation that replace some of them.
        incoming: gradients of the leading outputs; the remaining outputs are not differentiated.
    """

    activations: Tensors
    weights: Tensors
    incoming: Outputs

    def tensors(self) -> Tensors:
        return {**self.activations, **self.weights}


class Problem:
    """An op to measure; one subclass per op. Formulations take tensors by name and return all outputs."""

    op: str
    activations: tuple[str, ...]  # arguments that are cold in a training step; they rotate through several buffers
    full_precision: tuple[str, ...] = ()  # activations that are float32 at every activation dtype
    trained: tuple[str, ...]  # activations with gradients in a training step, in addition to the trained weights
    constants: tuple[str, ...] = ()  # weights that are not trained
    autocast = True  # whether eager PyTorch runs this part under autocast
    has_backward_alone = False  # whether the backward operator gets a separate row
    one_pass = False  # whether the forward also computes the gradients, which it keeps
    keeps_gradient = False  # whether it computes the only gradient, which the backward returns

    def arguments(self, size: Size) -> Shapes:
        """Shapes of the op's tensor arguments, in the order of its signature."""
        sizes = {symbol: getattr(size, field) for symbol, field in SYMBOLS.items()}
        return OPS[self.op].shapes(self.leading(size), P=size.patch_pixels, **sizes)

    def leading(self, size: Size) -> tuple[int, ...]:
        """The sizes that "..." stands for in the shapes of the arguments."""
        return (size.tokens,)

    def other_choice(self, backend: str) -> tuple[str, dict[str, bool]] | None:
        """Another contender on the backend: (end of its name, arguments of the op)."""
        return None

    def outputs(self, size: Size) -> Shapes:
        raise NotImplementedError

    def multiply_adds(self, size: Size, training: bool) -> int:
        """Multiply-adds of the matmuls of one call in the best formulation: the forward pass, and in training also the
        gradients of trained tensors, without recomputation."""
        raise NotImplementedError

    def published(self, tensors: Tensors, size: Size) -> Outputs:
        """The published formulation; by default the best one."""
        return self.best_eager(tensors, size)

    @property
    def has_best_eager(self) -> bool:
        """Whether the best eager formulation differs from the published one."""
        return type(self).published is not Problem.published

    def best_eager(self, tensors: Tensors, size: Size) -> Outputs:
        """The op's formula in plain PyTorch: folded input, SiLU(cond) computed once. On float64 tensors it is the
        reference of the verification."""
        return _as_tuple(testing.eager(self.op, self.given(tensors, size), self.options(size)))

    def fused(self, tensors: Tensors, size: Size, backend: str, **choice: bool) -> Outputs:
        """The public op."""
        function = getattr(ops, self.op)
        return _as_tuple(function(**self.given(tensors, size), **self.options(size), **choice, backend=backend))

    def two_ops(self, tensors: Tensors, size: Size, backend: str, **choice: bool) -> Outputs:
        """The two ops that a `one_pass` op joins."""
        raise NotImplementedError

    def given(self, tensors: Tensors, size: Size) -> dict[str, torch.Tensor]:
        """The op's arguments from `tensors`, in the order of its signature."""
        return {name: tensors[name] for name in self.arguments(size)}

    def row_width(self, size: Size) -> int:
        """Channels of the intermediate activations."""
        return size.decoder_width

    def options(self, size: Size) -> dict[str, int | float | str]:
        """The op's non-tensor arguments."""
        return {}

    def backward_alone(self, operands: Operands, size: Size, backend: str) -> Outputs:
        """Calls only the backward operator; returns the gradients of `trained`."""
        raise NotImplementedError

    def check_size(self, size: Size) -> Size:
        """A size of at least 4,096 pixels with the same widths, small enough for float64: whole patches."""
        side = -(-64 // size.patch_size) * size.patch_size
        return dataclasses.replace(size, batch=1, height=side, width=side)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of an argument at a given activation dtype; weights are float32."""
        return dtype if name in self.activations and name not in self.full_precision else torch.float32

    def make_activations(self, size: Size, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Activations from N(0, 1)."""
        return {
            name: _normal(shape, generator).to(self.dtype_of(name, dtype))
            for name, shape in self.arguments(size).items()
            if name in self.activations
        }

    def make_weights(self, size: Size, generator: torch.Generator) -> Tensors:
        """Random weights and biases, matrices scaled by 1/sqrt(fan-in)."""
        return {
            name: _random_weight(name, shape, generator)
            for name, shape in self.arguments(size).items()
            if name not in self.activations
        }

    def make_incoming(self, size: Size, dtype: torch.dtype, generator: torch.Generator) -> Outputs:
        return tuple(_normal(shape, generator).to(self.output_dtype(dtype)) for shape in self.outputs(size).values())

    def make_operands(self, size: Size, dtype: torch.dtype, generator: torch.Generator) -> Operands:
        return Operands(
            self.make_activations(size, dtype, generator),
            self.make_weights(size, generator),
            self.make_incoming(size, dtype, generator),
        )

    # --- cost --------------------------------------------------------------------------------------------------------

    def flops(self, size: Size, training: bool) -> int:
        return 2 * self.multiply_adds(size, training)

    def bytes_moved(self, size: Size, dtype: torch.dtype, training: bool) -> int:
        """Bytes that a fully fused implementation must move: the forward pass reads every argument and writes every
        output. The backward pass is that of `backward_bytes`. An op with `one_pass` writes the gradients in the
        forward, then reads and writes them in the backward; one with `keeps_gradient` only writes them."""
        forward = sum(self._argument_bytes(size, dtype).values()) + self._output_bytes(size, dtype)
        if not training:
            return forward
        if self.one_pass or self.keeps_gradient:
            return forward + (3 if self.one_pass else 1) * self._gradient_bytes(size, dtype)
        return forward + self.backward_bytes(size, dtype)

    def backward_bytes(self, size: Size, dtype: torch.dtype) -> int:
        """Bytes of a backward that reads arguments and incoming gradients, and writes the gradients."""
        read = sum(self._argument_bytes(size, dtype).values()) + self._output_bytes(size, dtype)
        return read + self._gradient_bytes(size, dtype)

    def _argument_bytes(self, size: Size, dtype: torch.dtype) -> dict[str, int]:
        shapes = self.arguments(size).items()
        return {name: math.prod(shape) * self.dtype_of(name, dtype).itemsize for name, shape in shapes}

    def _output_bytes(self, size: Size, dtype: torch.dtype) -> int:
        return sum(math.prod(shape) for shape in self.outputs(size).values()) * self.output_dtype(dtype).itemsize

    def _gradient_bytes(self, size: Size, dtype: torch.dtype) -> int:
        return sum(
            count
            for name, count in self._argument_bytes(size, dtype).items()
            if name in self.trained or (name not in self.activations and name not in self.constants)
        )


def _as_tuple(outputs: torch.Tensor | Outputs) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = _normal(shape, generator)
    if name == "norm_weight":
        return 1 + 0.2 * values
    if name.endswith("_weight"):
        return values / math.sqrt(shape[-1])
    return 0.2 * values if name.endswith("_bias") else values

"""Registration of ops whose forward also computes the gradients, as a scalar loss allows.

The incoming gradient of a scalar is one number, so the gradients of the op's first output, the total, can be computed
while the intermediate results of the forward exist. Each op is registered as three functional operators:

    name                   the outputs only, for calls without gradients
    name_with_gradients    the outputs and the gradients of the total, in one pass
    name_backward          those gradients times the incoming gradient

Gradients are kept between forward and backward in float32, and rounded after the incoming gradient is applied; that of
a bfloat16 activation is kept in bfloat16. They are not changed, so a backward may be repeated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deco_kernels.backends.arguments import empty_kept_gradients
from deco_kernels.backends.cuda import scaled_product
from deco_kernels.backends.support import Request
from deco_kernels.ops.registry import (
    Operation,
    once_differentiable,
    refuse_forward_mode,
    register,
    schema_of_arguments,
    schema_of_results,
    serve,
    with_signature,
    without_none,
)
from deco_kernels.signatures import OPS, grouped


def define_one_pass_op(
    name: str,
    options: str,
    outputs: Sequence[str],
    request: Callable[..., Request],
    fake: Callable[..., tuple[torch.Tensor, ...]],
) -> Operation:
    """Register the operators of an op of which only the first output, a scalar, is differentiable.

    The arguments are those of `registry.define_op`. The backend module has `forward`, which takes the group of tensors
    and the options and returns the outputs, and `forward_with_gradients`, which also takes `needs` and returns
    (outputs, gradients).
    """
    group, count = OPS[name].group, len(OPS[name].arguments)
    schema = schema_of_arguments(name, options)

    def call(function: str, inputs: Sequence[Any], backend: str, *more: Any) -> Any:
        tensors = grouped(group, inputs[:count])
        return serve(function, request(*inputs), inputs[0].device, backend, tensors, *inputs[count:], *more)

    def forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        *inputs, backend = arguments
        return tuple(call("forward", inputs, backend))

    def forward_with_gradients(*arguments: Any) -> tuple[torch.Tensor, ...]:
        *inputs, backend, needs = arguments
        results, gradients = call("forward_with_gradients", inputs, backend, needs)
        return (*results, *without_none(inputs[0], gradients))

    def fake_forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return fake(*arguments[:-1])

    def fake_forward_with_gradients(*arguments: Any) -> tuple[torch.Tensor, ...]:
        *inputs, _, needs = arguments
        kept = without_none(inputs[0], empty_kept_gradients(name, inputs[:count], needs))
        return (*fake(*inputs), *kept)

    def backward(grad_total: torch.Tensor, *kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return scaled(kept, grad_total)

    def fake_backward(grad_total: torch.Tensor, *kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(gradient) for gradient in kept)

    kept_schema = ", ".join(f"Tensor kept_{argument}" for argument in OPS[name].names)
    return _differentiable(
        name,
        len(outputs),
        register(name, f"({schema}) -> {schema_of_results(len(outputs))}", forward, fake_forward),
        register(
            f"{name}_with_gradients",
            f"({schema}, bool[] needs) -> {schema_of_results(len(outputs) + count)}",
            forward_with_gradients,
            fake_forward_with_gradients,
        ),
        register(
            f"{name}_backward",
            f"(Tensor grad_{outputs[0]}, {kept_schema}) -> {schema_of_results(count)}",
            backward,
            fake_backward,
        ),
    )


def scaled(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every gradient * factor, a float32 or float64 scalar, multiplied before the result is rounded to 16 bits.

    Reads and writes each gradient once, in one kernel for all float32 ones on a GPU.
    """
    wide = [gradient for gradient in gradients if gradient.dtype is not torch.bfloat16]
    products = iter(torch._foreach_mul(wide, factor) if wide else ())
    return tuple([next(products) if g.dtype is not torch.bfloat16 else _rounded_product(g, factor) for g in gradients])


def _rounded_product(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """gradient * factor for bfloat16 gradients."""
    if scaled_product.supported(gradient, factor):
        return scaled_product.product(gradient, factor)
    if gradient.device.type == "cpu":
        return gradient * factor
    # PyTorch rounds a scalar on a GPU to the gradient's dtype first, but not a vector.
    return torch.mul(gradient, factor.view(1), out=torch.empty_like(gradient))


def _differentiable(
    name: str, output_count: int, forward_op: Operation, gradients_op: Operation, backward_op: Operation
) -> Operation:
    """The autograd function around the three operators."""
    count = len(OPS[name].arguments)

    def gradients_of(anchor: torch.Tensor, *arguments: Any) -> Any:
        """The anchor only makes the gradients depend on the tensors of the op."""
        return backward_op(*arguments)

    Backward = once_differentiable(name, gradients_of)

    class Forward(torch.autograd.Function):
        """(*tensors, *options, backend, needs) -> (*outputs, *kept gradients, anchor); no gradients if none is needed.

        The anchor is an empty tensor. It is saved in place of an output, which callers may change in place.
        """

        generate_vmap_rule = True

        @staticmethod
        @with_signature
        def forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
            needs = arguments[-1]
            results: tuple[torch.Tensor, ...] = gradients_op(*arguments) if any(needs) else forward_op(*arguments[:-1])
            return (*results, results[0].new_empty(0))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
            *results, anchor = output
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*results[1:])
            ctx.save_for_backward(anchor, *results[output_count:])
            ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:count]]

        @staticmethod
        def backward(ctx: Any, grad_total: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
            anchor, *kept = ctx.saved_tensors
            return _gradients(ctx, anchor, grad_total, kept)

    class EagerForward(Forward):
        """Used outside torch.compile, where functional transforms may hide that a tensor needs a gradient.

        Then the inputs are saved too, and the backward runs the pass again.
        """

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
            Forward.setup_context(ctx, inputs, output)
            pairs = zip(ctx.needs_input_grad[:count], inputs[-1], strict=True)
            ctx.complete = all(kept or not need for need, kept in pairs)
            if not ctx.complete:
                ctx.save_for_backward(output[-1], *inputs[:count])
                ctx.scalars = inputs[count:-1]

        @staticmethod
        def backward(ctx: Any, grad_total: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
            anchor, *kept = ctx.saved_tensors
            if not ctx.complete:
                inputs, needs = kept, list(ctx.needs_input_grad[:count])
                kept = gradients_op(*inputs, *ctx.scalars, needs)[output_count:]
            return _gradients(ctx, anchor, grad_total, kept)

        @staticmethod
        def jvp(ctx: Any, *tangents: torch.Tensor) -> None:
            refuse_forward_mode(name)

    def _gradients(
        ctx: Any, anchor: torch.Tensor, grad_total: torch.Tensor | None, kept: Sequence[torch.Tensor]
    ) -> tuple[Any, ...]:
        """The gradients of Forward's arguments from those that were kept."""
        none = [None] * (len(ctx.needs_input_grad) - count)
        if grad_total is None:
            return (*[None] * count, *none)
        function: Any = Backward
        if torch.is_grad_enabled():
            results = function.apply(anchor, grad_total, *kept)
        else:
            results = backward_op(grad_total, *kept)
        needed = zip(results, ctx.dtypes, ctx.needs_input_grad[:count], strict=True)
        return (*[result.to(dtype) if need else None for result, dtype, need in needed], *none)

    def apply(*arguments: Any) -> Any:
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in arguments[:count]]
        compiling = torch.compiler.is_compiling()
        if compiling and not any(needs):  # torch.compile does not trace an autograd function without a gradient
            return forward_op(*arguments)
        function: Any = Forward if compiling else EagerForward
        return function.apply(*arguments, needs)[:output_count]

    return apply

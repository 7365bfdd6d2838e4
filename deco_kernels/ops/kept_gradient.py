"""Registration of losses whose forward also computes the gradient that a training step asks for.

A training step differentiates the first output of a loss, a scalar, with respect to its first tensor, nearly always
with an incoming gradient of 1. If only that tensor needs a gradient, the forward computes it in the same pass over the
images, and the backward leaves it as it is if the incoming gradient is 1, and computes it otherwise. float16 needs a
loss scale, so its gradient is not kept. Two more operators serve this:

    name_with_gradient   the outputs, and the gradient for an incoming gradient of 1
    name_kept_backward   changes that gradient, in place, into the gradient for the incoming one

The first backward hands the gradient on, so that a second one (retain_graph=True) computes its own. torch.compile and
functional transforms use the operators of `registry.define_op`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deco_kernels.backends.arguments import empty_gradients
from deco_kernels.backends.execution import is_executed
from deco_kernels.backends.support import Request
from deco_kernels.ops.registry import (
    NAMESPACE,
    Operation,
    define_op,
    once_differentiable,
    outputs_of,
    refuse_forward_mode,
    register,
    schema_of_arguments,
    schema_of_results,
    serve,
    serving_module,
    without_none,
)
from deco_kernels.signatures import OPS, grouped


def define_loss_op(
    name: str,
    options: str,
    outputs: Sequence[str],
    request: Callable[..., Request],
    fake: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    prefix: str = "",
) -> Operation:
    """Register the operators of a loss; returns one function of (tensors, options, backend).

    The arguments are those of `registry.define_op`, and so are the functions `forward` and `backward` of the backend
    module. The module may also have

        keeps_gradient(group) -> whether one pass serves the tensors
        forward_with_gradient(group, options) -> (outputs, gradient of the first tensor)
        kept_backward(gradient, incoming gradient, group, options) -> None

    for the group of tensors. The names of the last two begin with `prefix`, too.
    """
    group, count = OPS[name].group, len(OPS[name].arguments)
    schema = schema_of_arguments(name, options)
    functions = (f"{prefix}forward", f"{prefix}backward")
    in_one_pass, of_kept = f"{prefix}forward_with_gradient", f"{prefix}kept_backward"
    in_two_passes = define_op(name, options, outputs, request, fake, functions, scalars=True)
    backward_op = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default

    def keeps(*arguments: Any) -> bool:
        """Whether the backend that serves the call keeps the gradient."""
        *inputs, backend = arguments
        module = serving_module(backend, request(*inputs), inputs[0].device)
        complete = all(hasattr(module, function) for function in ("keeps_gradient", in_one_pass, of_kept))
        return complete and bool(module.keeps_gradient(grouped(group, inputs[:count])))

    def check_keeps(operator: str, arguments: Sequence[Any]) -> None:
        if not keeps(*arguments):
            raise RuntimeError(
                f"{name}_{operator}: the backend computes this gradient in a second pass; "
                f"call {name} and {name}_backward"
            )

    def with_gradient(*arguments: Any) -> tuple[torch.Tensor, ...]:
        check_keeps("with_gradient", arguments)
        *inputs, backend = arguments
        served = (in_one_pass, request(*inputs), inputs[0].device, backend)
        results, gradient = serve(*served, grouped(group, inputs[:count]), *inputs[count:])
        return (*outputs_of(results), gradient)

    def fake_with_gradient(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return (*outputs_of(fake(*arguments[:-1])), *without_none(arguments[0], empty_gradients(arguments[:1], [True])))

    def kept_backward(gradient: torch.Tensor, incoming: torch.Tensor, *arguments: Any) -> None:
        check_keeps("kept_backward", arguments)
        *inputs, backend = arguments
        first = inputs[0]
        if gradient.shape != first.shape or gradient.dtype != first.dtype or not gradient.is_contiguous():
            raise ValueError(
                f"{name}_kept_backward: gradient: expected the result of {name}_with_gradient, contiguous "
                f"{list(first.shape)} in {first.dtype}, got {list(gradient.shape)} in {gradient.dtype} with strides "
                f"{list(gradient.stride())}; pass that result"
            )
        served = (of_kept, request(*inputs), first.device, backend)
        serve(*served, gradient, incoming, grouped(group, inputs[:count]), *inputs[count:])

    def fake_kept_backward(*arguments: Any) -> None:
        pass

    return _differentiable(
        name,
        in_two_passes,
        backward_op,
        keeps,
        register(
            f"{name}_with_gradient",
            f"({schema}) -> {schema_of_results(len(outputs) + 1)}",
            with_gradient,
            fake_with_gradient,
        ),
        register(
            f"{name}_kept_backward",
            f"(Tensor(a!) gradient, Tensor grad_{outputs[0]}, {schema}) -> ()",
            kept_backward,
            fake_kept_backward,
        ),
        count,
    )


def _differentiable(
    name: str,
    in_two_passes: Operation,
    backward_op: Operation,
    keeps: Callable[..., bool],
    with_gradient_op: Operation,
    kept_backward_op: Operation,
    count: int,
) -> Operation:
    """The autograd function around the operators of one pass, and the choice between it and `in_two_passes`."""

    Backward = once_differentiable(name, backward_op)

    class Forward(torch.autograd.Function):
        """(*tensors, *options, backend) -> outputs. The gradient is no saved tensor, since the backward changes it."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *results, gradient = with_gradient_op(*arguments)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*arguments[:count])
            ctx.scalars = arguments[count:]
            ctx.gradient = gradient
            return tuple(results) if len(results) > 1 else results[0]

        @staticmethod
        def backward(ctx: Any, *incoming: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            others = [None] * (len(ctx.needs_input_grad) - 1)
            given = [grad for grad in incoming if grad is not None]
            if not given:
                return (None, *others)
            inputs = (*ctx.saved_tensors, *ctx.scalars)
            gradient, ctx.gradient = ctx.gradient, None
            of_first_alone = len(given) == 1 and given[0] is incoming[0]
            if gradient is not None and of_first_alone and not torch.is_grad_enabled() and is_executed(given[0]):
                kept_backward_op(gradient, given[0], *inputs)
                return (gradient, *others)
            function: Any = Backward
            differentiate = function.apply if torch.is_grad_enabled() else backward_op
            return (differentiate(*incoming, *inputs, [True, *[False] * (count - 1)])[0], *others)

        @staticmethod
        def jvp(ctx: Any, *tangents: torch.Tensor) -> None:
            refuse_forward_mode(name)

    def is_step(tensor: torch.Tensor, *others: torch.Tensor | None) -> bool:
        """Whether the first tensor alone needs a gradient, and no transform hides which ones do."""
        if not torch.is_grad_enabled() or not tensor.requires_grad or tensor.dtype is torch.float16:
            return False
        given = [other for other in others if other is not None]
        return all(map(is_executed, (tensor, *given))) and not any(other.requires_grad for other in given)

    def apply(*arguments: Any) -> Any:
        function: Any = Forward
        one_pass = is_step(*arguments[:count]) and keeps(*arguments)
        return function.apply(*arguments) if one_pass else in_two_passes(*arguments)

    return apply

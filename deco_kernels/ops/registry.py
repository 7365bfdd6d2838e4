"""The operator library "deco_kernels": registration with PyTorch, autograd, and the choice of backend.

Each op is registered as a forward and a backward operator, both functional and of fixed arity. A
`torch.autograd.Function` around them gives first derivatives; second derivatives raise `NotImplementedError`.
The operators take the backend as a string ("auto" or a name) and resolve it when they run, by one pure function of the
device, dtypes and sizes of the call, so that forward and backward agree.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch

from deco_kernels.backends.arguments import empty_gradients
from deco_kernels.backends.execution import requires_grad_tells
from deco_kernels.backends.support import Request
from deco_kernels.signatures import OPS, grouped

Operation = Callable[..., Any]
NAMESPACE = "deco_kernels"
_library: Any = torch.library.Library  # untyped in PyTorch
LIBRARY = _library(NAMESPACE, "DEF")
AUTO = "auto"

_log = logging.getLogger("deco_kernels")
packages = {name: f"deco_kernels.backends.{name}" for name in ("reference", "cpu", "triton", "cuda")}
_selected: str | None = None


class BackendUnavailable(NotImplementedError):
    """An explicitly chosen backend cannot run a call; the message has the reason and the remedy."""


# --- choice of backend -----------------------------------------------------------------------------------------------


def register_backend(name: str, package: str) -> None:
    """Add a backend, which is used only by name.

    `package` is an importable package with `unavailable_reason(device)`, `unsupported_reason(request)` and one module
    per op that it implements; `define_op` describes the functions of a module. Those of upsample_modulate and
    pixel_decoder_from_tokens take the keyword argument `cond`, and those of a decoder whose module has
    `activation_shape(pixels, N, D)` also `activations`. Raises ValueError for the name "auto".
    """
    if name == AUTO:
        raise ValueError(f'backend: "{AUTO}" is reserved for the automatic choice; choose another name')
    packages[name] = package
    serving_module.cache_clear()


def backend_names() -> tuple[str, ...]:
    """All registered backends, including those that this machine cannot run."""
    return tuple(packages)


def check_backend_name(name: str, source: str = "backend") -> str:
    """Returns the name. `source` is what holds it, for the error."""
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected a name or None, got {type(name).__name__}; use one of {_choices()}")
    if name != AUTO and name not in packages:
        raise ValueError(f"{source}: unknown name {name!r}; use one of {_choices()}")
    return name


def _choices() -> str:
    return ", ".join(repr(name) for name in (AUTO, *packages))


class use_backend:
    """Context manager: in `with use_backend("cpu"):`, every op without a `backend=` argument uses that backend.

    The choice applies to all threads of the process. "auto" restores the automatic choice in an outer block. The
    backward pass uses the backend of its forward, also outside the block. Raises ValueError for unknown names.
    """

    def __init__(self, name: str) -> None:
        self.name = check_backend_name(name)
        # a stack: the same object may be entered again in its block
        self.previous: list[str | None] = []

    def __enter__(self) -> "use_backend":
        global _selected
        self.previous.append(_selected)
        _selected = self.name
        return self

    def __exit__(self, *_: object) -> None:
        global _selected
        _selected = self.previous.pop()


_VARIABLE = "DECO_KERNELS_BACKEND"
_environment_choice = os.environ.get(_VARIABLE) or AUTO


def chosen_backend(argument: str | None) -> str:
    """The requested backend: the argument, then `use_backend`, then DECO_KERNELS_BACKEND, then "auto".

    The environment variable is read when the package is imported.
    """
    if argument is not None:
        return check_backend_name(argument)
    if _selected is not None:
        return _selected
    return check_backend_name(_environment_choice, f"the environment variable {_VARIABLE}")


def automatic_candidates(request: Request) -> tuple[str, ...]:
    """Backends of the automatic choice, in order of preference."""
    if torch.float64 in request.dtypes:
        return ("reference",)
    return {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}.get(
        request.device_type, ("reference",)
    )


def refusal(name: str, request: Request, device: torch.device) -> str | None:
    """Reason why backend `name` cannot run the call, or None if it can."""
    if importlib.util.find_spec(packages[name]) is None:
        return f"its package {packages[name]} is not installed; choose another backend or leave the choice automatic"
    package = importlib.import_module(packages[name])
    reason = package.unavailable_reason(device)
    if reason is None and importlib.util.find_spec(f"{packages[name]}.{request.op}") is None:
        reason = f"it does not implement {request.op}; choose another backend or leave the choice automatic"
    if reason is None:
        reason = package.unsupported_reason(request)
    return None if reason is None else str(reason)


@functools.lru_cache(maxsize=1024)
def serving_module(backend: str, request: Request, device: torch.device) -> ModuleType:
    if backend != AUTO:
        reason = refusal(backend, request, device)
        if reason is not None:
            raise BackendUnavailable(f"backend {backend!r} cannot serve {request.public_name}: {reason}")
        return importlib.import_module(f"{packages[backend]}.{request.op}")
    candidates = automatic_candidates(request)
    for name, following in zip(candidates, (*candidates[1:], None), strict=True):
        reason = refusal(name, request, device)
        if reason is None:
            return importlib.import_module(f"{packages[name]}.{request.op}")
        log_fallback(request.public_name, name, following, reason)
    raise AssertionError("the reference backend serves every call")


@functools.cache
def log_fallback(op: str, name: str, following: str | None, reason: str) -> None:
    level = logging.WARNING if following == "reference" else logging.INFO
    _log.log(level, "%s falls back from backend %r to %r: %s", op, name, following, reason)


def shaping_module(backend: str, request: Request, device: torch.device) -> ModuleType | None:
    """The module that serves the call, to ask for shapes: also one that this machine cannot run, for tensors without
    data; None if it does not exist or nothing tells which one serves."""
    if backend == AUTO:
        absent = device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available())
        return None if absent else serving_module(backend, request, device)
    try:
        return importlib.import_module(f"{packages[backend]}.{request.op}")
    except ImportError:
        return None


def serve(function: str, request: Request, device: torch.device, backend: str, *arguments: Any, **kept: Any) -> Any:
    """Call `function` of the backend module for the request, with autocast off."""
    implementation = getattr(serving_module(backend, request, device), function)
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return implementation(*arguments, **kept)
    return implementation(*arguments, **kept)


# --- registration ----------------------------------------------------------------------------------------------------


def define_op(
    name: str,
    options: str,
    outputs: Sequence[str],
    request: Callable[..., Request],
    fake: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    functions: tuple[str, str] = ("forward", "backward"),
    kept: Mapping[str, Callable[..., Sequence[int] | None]] | None = None,
    scalars: bool = False,
) -> Operation:
    """Register the operators `name` and `name_backward`; returns one function of (tensors, options, backend).

    An op with `kept` can keep intermediate tensors between forward and backward. Its third operator, `name_with_kept`,
    returns them after the results, and its function takes `keep`.

    Args:
        name: name of the op; `deco_kernels.signatures` describes its tensors.
        options: schema of the scalar arguments, such as "int patch_size, float eps".
        outputs: names of the results; their gradients are the first arguments of the backward.
        request: (tensors, options) -> Request, whose op names the backend module.
        fake: (tensors, options) -> results without data, with the real shapes, dtypes and strides.
        functions: names of forward and backward in that module; they take the tensors in the groups of the description.
        kept: for each intermediate tensor (tensors, options, backend) -> its shape, or None if the backend does not
            keep it. It has the dtype of the second tensor of the op, the activation dtype. The module's forward takes
            it as a keyword argument and fills it, and its backward takes it in the same way, contiguous; neither gets
            one that is empty.
        scalars: whether the results are scalars. The module's backward then takes None for the gradient of a result
            that is not used, in place of a zero, which would cost a kernel.
    """
    group, count = OPS[name].group, len(OPS[name].arguments)
    kept = kept or {}
    saved = count + len(kept)
    schema = schema_of_arguments(name, options)

    def named(tensors: Iterable[torch.Tensor | None]) -> dict[str, Any]:
        pairs = zip(kept, tensors, strict=True)
        return {key: tensor for key, tensor in pairs if tensor is not None and tensor.numel() > 0}

    def checked(found: dict[str, Any], arguments: Sequence[Any]) -> dict[str, Any]:
        dtype, device = arguments[1].dtype, arguments[1].device
        for key, tensor in found.items():
            shape = kept[key](*arguments)
            if shape is None or (tensor.shape, tensor.dtype, tensor.device) != (tuple(shape), dtype, device):
                expected = "None, for this backend keeps none" if shape is None else f"{list(shape)}, {dtype}, {device}"
                raise ValueError(
                    f"{name}_backward: {key}: expected {expected}, got {list(tensor.shape)}, {tensor.dtype}, "
                    f"{tensor.device}; pass what {name}_with_kept returned for the same tensors, with hooks of saved "
                    "tensors too"
                )
        return {key: tensor.contiguous() for key, tensor in found.items()}

    def call(inputs: Sequence[Any], backend: str, **tensors: Any) -> Any:
        inputs_in_groups = (*grouped(group, inputs[:count]), *inputs[count:])
        return serve(functions[0], request(*inputs), inputs[0].device, backend, *inputs_in_groups, **tensors)

    def forward(*arguments: Any) -> Any:
        *inputs, backend = arguments
        return call(inputs, backend)

    def backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        """Returns an empty placeholder for a gradient that is not needed, since an operator cannot return None."""
        gradients, (*inputs, backend, needs) = arguments[: len(outputs)], arguments[len(outputs) :]
        tensors, scalars = inputs[:count], inputs[saved:]
        found = checked(named(inputs[count:saved]), (*tensors, *scalars, backend))
        served = (functions[1], request(*tensors, *scalars), tensors[0].device, backend)
        results = serve(*served, *gradients, *grouped(group, tensors), *scalars, needs, **found)
        return without_none(tensors[0], results)

    def fake_forward(*arguments: Any) -> Any:
        return fake(*arguments[:-1])

    def fake_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        inputs, needs = arguments[len(outputs) : len(outputs) + count], arguments[-1]
        return without_none(inputs[0], empty_gradients(inputs, needs))

    gradient_schema = ", ".join(f"Tensor{'?' * scalars} grad_{output}" for output in outputs)
    backward_schema = schema_of_arguments(name, options, tuple(kept))
    forward_op = register(name, f"({schema}) -> {schema_of_results(len(outputs))}", forward, fake_forward)
    backward_op = register(
        f"{name}_backward",
        f"({gradient_schema}, {backward_schema}, bool[] needs) -> {schema_of_results(count)}",
        backward,
        fake_backward,
    )
    if not kept:
        return _differentiable(name, forward_op, None, backward_op, count, 0, fake, scalars)

    def new_kept(*arguments: Any) -> tuple[torch.Tensor, ...]:
        shapes = [shape_of(*arguments) for shape_of in kept.values()]
        return tuple(arguments[1].new_empty(0 if shape is None else shape) for shape in shapes)

    def forward_with_kept(*arguments: Any) -> tuple[torch.Tensor, ...]:
        *inputs, backend = arguments
        serving_module(backend, request(*inputs), inputs[0].device)  # refuses the call before memory is allocated
        tensors = new_kept(*arguments)
        return (*outputs_of(call(inputs, backend, **named(tensors))), *tensors)

    def fake_with_kept(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return (*outputs_of(fake(*arguments[:-1])), *new_kept(*arguments))

    results_schema = schema_of_results(len(outputs) + len(kept))
    kept_op = register(f"{name}_with_kept", f"({schema}) -> {results_schema}", forward_with_kept, fake_with_kept)
    return _differentiable(name, forward_op, kept_op, backward_op, count, len(kept), fake, scalars)


def schema_of_arguments(name: str, options: str, kept: Sequence[str] = ()) -> str:
    """Schema of the arguments of op `name`: its tensors, the optional `kept` ones, then `options`, then the backend."""
    tensors = [f"Tensor{'?' * argument.optional} {argument.name}" for argument in OPS[name].arguments]
    return ", ".join([*tensors, *[f"Tensor? {tensor}" for tensor in kept], *[options] * bool(options), "str backend"])


def schema_of_results(number: int) -> str:
    return "Tensor" if number == 1 else f"({', '.join(['Tensor'] * number)})"


def register(name: str, schema: str, implementation: Operation, fake: Operation) -> Operation:
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    operator: Operation = getattr(getattr(torch.ops, NAMESPACE), name).default
    return operator


def without_none(first: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """Empty placeholders like `first` for tensors that do not exist, since an operator cannot return None."""
    return tuple(first.new_empty(0) if tensor is None else tensor for tensor in tensors)


def refuse_second_derivatives(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name}: second derivatives are not implemented; differentiate once, without create_graph=True, "
        "or build the computation from plain PyTorch operations"
    )


def refuse_forward_mode(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name}: forward-mode derivatives (jvp) are not implemented; use reverse mode, such as backward() or "
        "torch.func.vjp, or build the computation from plain PyTorch operations"
    )


_ANY_ARGUMENTS = inspect.Signature([inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)])


def with_signature(forward: Operation) -> Operation:
    """`forward(*arguments)` of an autograd function, with its signature stored: PyTorch asks for it in every call."""
    forward.__signature__ = _ANY_ARGUMENTS  # type: ignore[attr-defined]
    return forward


def once_differentiable(name: str, operation: Operation) -> type[torch.autograd.Function]:
    """The autograd function of `operation`, a part of op `name`, whose derivative raises NotImplementedError."""

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        @with_signature
        def forward(*arguments: Any) -> Any:
            return operation(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> None:
            refuse_second_derivatives(name)

    return Once


def _differentiable(
    name: str,
    forward_op: Operation,
    kept_op: Operation | None,
    backward_op: Operation,
    tensor_count: int,
    kept_count: int,
    fake: Callable[..., Any],
    scalars: bool,
) -> Operation:
    """The autograd function around the operators. Saves the inputs between forward and backward, and the intermediate
    tensors of `kept_op` if the call keeps them.

    A call without a gradient runs the operator alone, unless `requires_grad` does not show whether a derivative is
    needed, as inside functional transforms. Tensors that are not kept for that reason are computed again.
    """

    Backward = once_differentiable(name, backward_op)

    class Forward(torch.autograd.Function):
        """(*tensors, *options, backend, keep) -> results, and what is kept."""

        generate_vmap_rule = True

        @staticmethod
        @with_signature
        def forward(*arguments: Any) -> Any:
            *inputs, keep = arguments
            return kept_op(*inputs) if keep and kept_op else forward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors, ctx.scalars, keep = inputs[:tensor_count], inputs[tensor_count:-1], inputs[-1]
            if keep or scalars:
                ctx.set_materialize_grads(False)  # zeros for the gradient of what is kept would be as large as it
            kept = output[-kept_count:] if keep else (None,) * kept_count
            if keep:
                ctx.mark_non_differentiable(*kept)
            ctx.save_for_backward(*tensors, *kept)
            ctx.keeps = keep

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            needs = list(ctx.needs_input_grad[:tensor_count])
            saved = ctx.saved_tensors
            if ctx.keeps:
                gradients = gradients[:-kept_count]
                if any(gradient is None for gradient in gradients):
                    likes = outputs_of(fake(*saved[:tensor_count], *ctx.scalars[:-1]))
                    pairs = zip(gradients, likes, strict=True)
                    gradients = tuple(torch.zeros_like(like) if given is None else given for given, like in pairs)
            if all(gradient is None for gradient in gradients):
                return (None,) * len(ctx.needs_input_grad)
            function: Any = Backward
            differentiate = function.apply if torch.is_grad_enabled() else backward_op
            results = differentiate(*gradients, *saved, *ctx.scalars, needs)
            wanted = [result if need else None for result, need in zip(results, needs, strict=True)]
            return (*wanted, *[None] * (len(ctx.scalars) + 1))

    class ForwardWithJvp(Forward):
        """Used outside torch.compile, which rejects autograd functions that define jvp."""

        @staticmethod
        def jvp(ctx: Any, *tangents: torch.Tensor) -> None:
            refuse_forward_mode(name)

    def apply(*arguments: Any, keep: bool = False) -> Any:
        compiling = torch.compiler.is_compiling()
        if torch.compiler.is_exporting():  # a program without a backward
            keep = False
        tensors = [tensor for tensor in arguments[:tensor_count] if tensor is not None]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            keep = False
            if compiling or requires_grad_tells():
                return forward_op(*arguments)
        function: Any = Forward if compiling else ForwardWithJvp
        results = function.apply(*arguments, keep)
        if not keep:
            return results
        outputs = results[:-kept_count]
        return outputs if len(outputs) > 1 else outputs[0]

    return apply


def outputs_of(results: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)

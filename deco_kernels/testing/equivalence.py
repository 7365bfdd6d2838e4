"""The rule of error for any function and its reference, such as a fused op and the code that it replaces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from deco_kernels.testing.accuracy import Comparison, Outputs, Results, compare_tensors, pooled
from deco_kernels.testing.inputs import scale_factor

_NARROWEST_FIRST = (torch.bfloat16, torch.float16, torch.float32)
_WEIGHTS_AS_INPUTS = (
    "a reference that converts to a fixed dtype, or has weights in one, cannot give the exact result: pass its weights "
    "as inputs"
)


def assert_equivalent(
    ours: Callable[..., Outputs],
    reference: Callable[..., Outputs],
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    gradients: bool = True,
    seed: int = 0,
) -> list[Comparison]:
    """Assert that a function computes what its reference computes, forward and backward, by the rule of error.

    The reference runs twice: on the inputs, which gives the error of eager PyTorch, and on the inputs converted to
    float64, which gives the exact results. Random numbers N(0, 1) are the gradients of the outputs. Prints a table with
    one row per output and gradient: relative error, bias, and their bounds.

    Args:
        ours: the function under test.
        reference: plain PyTorch of the same signature. It must compute in float64 if its inputs are float64.
        inputs: arguments by name, or positional ones. Gradients are computed for every floating-point tensor; other
            values are passed on as they are.
        autocast: dtype in which both functions are called under autocast; None without. The float64 call is never
            under autocast.
        dtype: dtype in which results are computed, which decides on the bound; by default `autocast`, or the narrowest
            dtype of the floating-point inputs. For a function that computes in float32 on 16-bit inputs, such as a
            loss, give float32.
        gradients: whether to compare gradients.
        seed: seed of the gradients of the outputs.

    Returns:
        The comparisons of outputs ("output 0"), then of gradients ("grad NAME", with the position as name of a
        positional argument).

    Raises:
        AssertionError: a result breaks the rule; the message has the table. Also for outputs of another number or shape
            than the reference's, for an output that is differentiable in one of the two functions only, and if there
            are no gradients to compare.
        TypeError: no floating-point input of 32 or 16 bits, another dtype of autocast, outputs that are not tensors, or
            a reference that does not compute in float64.
        ValueError: results of the reference that are not finite, so that they give no bound.
    """
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"autocast: expected None, torch.bfloat16 or torch.float16, got {autocast!r}; pass one of them")
    call = _Call.of(inputs, autocast, gradients, seed)
    computed_in = dtype or autocast or call.narrowest_dtype()
    if computed_in not in _NARROWEST_FIRST:
        raise TypeError(
            f"dtype: expected float32, bfloat16 or float16, whose rounding the rule of error measures, got "
            f"{computed_in}; convert the inputs"
        )
    exact = _exact(call, reference)

    @functools.cache
    def sample(number: int) -> tuple[Results, Results]:
        """(eager, exact) results on the inputs, or on others with other rounding errors."""
        given = call.rescaled(number) if number else call
        exactly = given.run(reference, float64=True) if number else exact
        return given.run(reference).results, exactly.results

    ours_ = call.run(ours)
    _require_same_form(ours_, exact)
    if gradients and not any(exact.differentiable):
        raise AssertionError("outputs: expected a differentiable one, got none; pass gradients=False")
    actual = ours_.results

    def compared(count: int) -> list[Comparison]:
        samples = [sample(number) for number in range(count)]
        rows = []
        for index, output in enumerate(actual.outputs):
            pairs = [(eager.outputs[index], exactly.outputs[index]) for eager, exactly in samples]
            mean = output.dim() == 0
            rows.append(
                compare_tensors(f"output {index}", output, *pairs, dtype=computed_in, gradient=False, mean=mean)
            )
        for name, gradient in actual.gradients.items():
            pairs = [(eager.gradients[name], exactly.gradients[name]) for eager, exactly in samples]
            rows.append(compare_tensors(f"grad {name}", gradient, *pairs, dtype=computed_in, gradient=True))
        return rows

    rows = pooled(compared)
    table = _table(rows)
    print(table)
    unbounded = ", ".join(_names_of_infinite(*sample(0)))
    if unbounded:
        raise ValueError(
            f"reference: expected finite results, which give the bounds, got others for {unbounded}; give inputs "
            f"without NaN and infinity whose results fit {computed_in}\n{table}"
        )
    if not all(row.passed for row in rows):
        broken = ", ".join(row.name for row in rows if not row.passed)
        raise AssertionError(f"results differ by more than the rule of error allows: {broken}\n{table}")
    return rows


def _exact(call: _Call, reference: Callable[..., Outputs]) -> _Outcome:
    """Results in float64. Raises TypeError for a reference that does not compute in it."""
    try:
        exact = call.run(reference, float64=True)
    except RuntimeError as error:
        call.run(reference)  # raises too if the cause is not float64
        raise TypeError(
            f"reference: expected results for float64 inputs, got {type(error).__name__}: {error}; {_WEIGHTS_AS_INPUTS}"
        ) from error
    wrong = [output.dtype for output in exact.results.outputs if output.dtype != torch.float64]
    if wrong:
        raise TypeError(f"reference: expected float64 results for float64 inputs, got {wrong[0]}; {_WEIGHTS_AS_INPUTS}")
    return exact


class _Outcome(NamedTuple):
    """Results of a function, and which of its outputs are differentiable."""

    results: Results
    differentiable: tuple[bool, ...]


class _Call(NamedTuple):
    """Arguments by name or position, and how the functions are called with them."""

    arguments: dict[str, Any]
    positional: bool
    autocast: torch.dtype | None
    gradients: bool
    seed: int
    factors: int | None = None  # seed of the factors of the gradients of the outputs; None for factors of 1

    @classmethod
    def of(
        cls, inputs: Mapping[str, Any] | Sequence[Any], autocast: torch.dtype | None, gradients: bool, seed: int
    ) -> _Call:
        if not isinstance(inputs, (Mapping, Sequence)):
            raise TypeError(
                f"inputs: expected arguments by name or a list of them, got {type(inputs).__name__}; pass a dictionary "
                "or a list"
            )
        positional = not isinstance(inputs, Mapping)
        arguments = {str(i): value for i, value in enumerate(inputs)} if positional else dict(inputs)
        call = cls(arguments, positional, autocast, gradients, seed)
        if not call.tensors():
            raise TypeError("inputs: expected at least one floating-point tensor, got none")
        return call

    def tensors(self) -> dict[str, torch.Tensor]:
        """The floating-point tensors."""
        given = self.arguments.items()
        return {name: value for name, value in given if isinstance(value, torch.Tensor) and value.is_floating_point()}

    def narrowest_dtype(self) -> torch.dtype:
        dtypes = [tensor.dtype for tensor in self.tensors().values()]
        return next((dtype for dtype in _NARROWEST_FIRST if dtype in dtypes), dtypes[0])

    def rescaled(self, number: int) -> _Call:
        """The same call with each tensor times a factor from 0.9 to 1.1."""
        generator = torch.Generator().manual_seed(number)
        scaled = {name: scale_factor(generator) * tensor.detach() for name, tensor in self.tensors().items()}
        return self._replace(arguments=self.arguments | scaled, factors=number)

    def run(self, function: Callable[..., Outputs], float64: bool = False) -> _Outcome:
        leaves = {
            name: tensor.detach().to(torch.float64 if float64 else tensor.dtype).requires_grad_(self.gradients)
            for name, tensor in self.tensors().items()
        }
        arguments = self.arguments | leaves
        device = next(iter(leaves.values())).device.type
        autocast = None if float64 else self.autocast
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            outputs = function(*arguments.values()) if self.positional else function(**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for output in outputs:
            if not isinstance(output, torch.Tensor):
                raise TypeError(
                    f"outputs: expected each function to return a tensor or a tuple of tensors, got "
                    f"{type(output).__name__}; wrap it"
                )
        differentiable = tuple(output.requires_grad for output in outputs)
        gradients: dict[str, torch.Tensor] = {}
        if any(differentiable):
            pairs = zip(outputs, self._incoming(outputs), strict=True)
            used, incoming = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
            found = torch.autograd.grad(used, list(leaves.values()), incoming, materialize_grads=True)
            gradients = dict(zip(leaves, found, strict=True))
        return _Outcome(Results(tuple(output.detach() for output in outputs), gradients), differentiable)

    def _incoming(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients of the outputs, N(0, 1): the same values in every dtype and on every device."""
        normal, uniform = torch.Generator().manual_seed(self.seed), torch.Generator().manual_seed(self.factors or 0)
        incoming = []
        for output in outputs:
            factor = 1.0 if self.factors is None else scale_factor(uniform)
            incoming.append((factor * torch.randn(output.shape, generator=normal, dtype=torch.float64)).to(output))
        return incoming


def _require_same_form(actual: _Outcome, expected: _Outcome) -> None:
    found, wanted = actual.results.outputs, expected.results.outputs
    if len(found) != len(wanted):
        raise AssertionError(f"outputs: expected {len(wanted)}, as the reference returns, got {len(found)}")
    for index, (output, reference) in enumerate(zip(found, wanted, strict=True)):
        if output.shape != reference.shape:
            raise AssertionError(f"output {index}: expected {tuple(reference.shape)}, got {tuple(output.shape)}")
        if actual.differentiable[index] != expected.differentiable[index]:
            with_gradient = "the reference" if expected.differentiable[index] else "the tested function"
            raise AssertionError(
                f"output {index}: only that of {with_gradient} is differentiable; compare differentiable outputs "
                "alone, or pass gradients=False"
            )


def _names_of_infinite(*samples: Results) -> list[str]:
    """Outputs and gradients that are not finite in one of the samples."""
    names = [f"output {index}" for index in range(len(samples[0].outputs))]
    names += [f"grad {name}" for name in samples[0].gradients]
    found = zip(*((*each.outputs, *each.gradients.values()) for each in samples), strict=True)
    return [name for name, values in zip(names, found, strict=True) if not all(map(_is_finite, values))]


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _table(rows: Sequence[Comparison]) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  {'error':>9}  {'bound':>9}  {'bias':>9}  {'bound':>9}"]
    for row in rows:
        numbers = "  ".join(f"{value:9.2e}" for value in (row.error, row.bound, row.bias, row.bias_bound))
        lines.append(f"{row.name:{width}}  {numbers}  {'' if row.passed else 'wrong'}".rstrip())
    return "\n".join(lines)

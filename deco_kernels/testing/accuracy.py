"""The rule of error, stated in `deco_kernels.testing`, and the comparison of an op's results with it."""

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from deco_kernels import ops
from deco_kernels.signatures import OPS, grouped
from deco_kernels.testing.inputs import LOSSES, ONE_PASS, Inputs, in_float64, rescaled

LARGE = 1000
"""Elements from which the error of one call is a good measure, and from which a bias is looked for."""

OTHER_CALLS = 8
"""Calls with other rounding errors that are pooled with the given one."""

ROUNDING = 0.1
"""A relative error from here on is not one of rounding."""

BIAS_FRACTION = 0.25
"""Of the bound of the relative error: the bound of the bias."""

Pair = tuple[torch.Tensor, torch.Tensor]


class Results(NamedTuple):
    """Outputs in order and gradients by argument name."""

    outputs: tuple[torch.Tensor, ...]
    gradients: dict[str, torch.Tensor]


Outputs = torch.Tensor | tuple[torch.Tensor, ...]


class Comparison(NamedTuple):
    """One output or gradient under the rule of error; `bias` is |mean signed error| / RMS(exact)."""

    name: str
    error: float
    bound: float
    bias: float
    bias_bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound and self.bias <= self.bias_bound

    def __str__(self) -> str:
        return (
            f"{self.name}: relative error {self.error:.3g} (bound {self.bound:.3g}), "
            f"bias {self.bias:.3g} (bound {self.bias_bound:.3g})"
        )


def run(inputs: Inputs, backend: str | None = None) -> Results:
    """Outputs and all gradients of the op, called through its public function."""
    return _differentiate(inputs, lambda tensors: getattr(ops, inputs.op)(**tensors, **inputs.options, backend=backend))


def exact_results(inputs: Inputs) -> Results:
    """Results of the float64 formula on the same values."""
    return run(in_float64(inputs), "reference")


def eager_results(inputs: Inputs) -> Results:
    """Results of plain PyTorch: in float32, or under autocast to the activation dtype with unchanged weights."""
    return _differentiate(inputs, lambda tensors: eager(inputs.op, tensors, inputs.options))


def eager(op: str, tensors: dict[str, torch.Tensor | None], options: dict[str, int | float | str]) -> Outputs:
    """The op's formula in plain PyTorch, as computed by a training script under autocast."""
    module = "flow_matching_loss" if op in LOSSES else op
    reference = importlib.import_module(f"deco_kernels.backends.reference.{module}")
    formula = reference.frequency_formula if op == "frequency_loss" else reference.formula
    options = {name: value for name, value in options.items() if name != "save_memory"}  # it changes no result
    if op not in LOSSES:
        head_norm = {"head_norm": options.get("head_norm", "layer")} if "patch_size" in options else {}
        options = {**options, **head_norm, "eps": options.get("eps", 1e-6)}
    if op in LOSSES:
        given = [None if t is None else t.to(_loss_dtype(t)) for t in map(tensors.get, OPS[op].names)]
        return formula(*given, *options.values())
    activation = _activation(tensors)
    assert activation is not None
    group, names = OPS[op].group, OPS[op].names
    if activation.dtype in (torch.float32, torch.float64):
        converted = (None if t is None else t.to(activation.dtype) for t in map(tensors.get, names))
        return formula(*grouped(group, converted), *options.values())
    table = tensors.get("pixel_table")
    if table is not None:
        tensors = {**tensors, "pixel_table": table.to(activation.dtype)}
    with torch.autocast(activation.device.type, activation.dtype):
        return formula(*grouped(group, map(tensors.get, names)), *options.values())


def _activation(tensors: dict[str, torch.Tensor | None]) -> torch.Tensor | None:
    """The argument whose dtype is the activation dtype; None for the losses of a given prediction."""
    return next((tensors[name] for name in ("cond", "tokens", "h") if name in tensors), None)


def _loss_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _differentiate(inputs: Inputs, function: Callable[[dict[str, torch.Tensor | None]], Outputs]) -> Results:
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()
    }
    outputs = function(leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    pairs = zip(outputs, inputs.grad_outputs, strict=True)
    used = [(output, gradient.to(output.dtype)) for output, gradient in pairs if output.requires_grad]
    if len(used) < (1 if inputs.op in ONE_PASS else len(outputs)):
        raise AssertionError(f"{inputs.op}: {len(outputs) - len(used)} of {len(outputs)} outputs have no gradient")
    differentiable, grad_outputs = zip(*used, strict=True)
    gradients = torch.autograd.grad(differentiable, list(given.values()), grad_outputs, materialize_grads=True)
    detached = tuple(output.detach() for output in outputs)
    return Results(detached, dict(zip(given, gradients, strict=True)))


def relative_error(actual: torch.Tensor, exact: torch.Tensor, unit: torch.Tensor | None = None) -> float:
    """|actual - exact| / |unit| in L2 over all elements, in float64; infinite if a value is not finite.

    unit: by default `exact`. Raises ValueError if the shapes differ.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"actual: expected shape {list(exact.shape)} like exact, got {list(actual.shape)}; reshape it")
    difference = torch.linalg.vector_norm(actual.double() - exact.double()).item()
    norm = torch.linalg.vector_norm((exact if unit is None else unit).double()).item()
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 and math.isfinite(difference) else math.inf


def relative_bias(actual: torch.Tensor, exact: torch.Tensor, unit: torch.Tensor | None = None) -> float:
    """|mean(actual - exact)| / RMS(unit), in float64; 0 for fewer than 1,000 elements. unit: as in `relative_error`."""
    if exact.numel() < LARGE:
        return 0.0
    mean = (actual.double() - exact.double()).mean().abs().item()
    rms = (exact if unit is None else unit).double().square().mean().sqrt().item()
    if mean == 0:
        return 0.0
    return mean / rms if rms > 0 and math.isfinite(mean) else math.inf


def error_bound(dtype: torch.dtype, eager_error: float, *, gradient: bool, mean: bool = False) -> float:
    """Bound of the rule of error for a result computed in `dtype`, given the relative error of eager PyTorch.

    An eager error that is not finite counts as eps of `dtype`. mean: whether the result is a mean over pixels.
    """
    if not math.isfinite(eager_error):
        eager_error = torch.finfo(dtype).eps
    if dtype in (torch.bfloat16, torch.float16):
        least = torch.finfo(dtype).eps / 16 if mean else 0.0
        return max((1.5 if gradient else 1.2) * eager_error, least)
    return max(2 * eager_error, 5e-6 if gradient else 2e-6)


def compare(
    inputs: Inputs, actual: Results, exact: Results | None = None, eager_: Results | None = None
) -> list[Comparison]:
    """Compare every output and gradient of `actual` by the rule of error.

    `exact` and `eager_` default to `exact_results(inputs)` and `eager_results(inputs)`. Eager's errors in other calls
    are computed only if a result exceeds the bounds of this call.
    """
    samples = [
        (
            eager_results(inputs) if eager_ is None else eager_,
            exact_results(inputs) if exact is None else exact,
        )
    ]

    def compared(count: int) -> list[Comparison]:
        others = [rescaled(inputs, seed) for seed in range(len(samples) - 1, count - 1)]
        samples.extend((eager_results(other), exact_results(other)) for other in others)
        return _compare(inputs, actual, samples)

    return pooled(compared)


def pooled(compared: Callable[[int], list[Comparison]]) -> list[Comparison]:
    """Comparisons with one call of eager, and with more calls where results exceed their bounds by rounding errors.

    compared: comparisons with the given call and `count - 1` other calls of eager, for a count.
    """
    rows = compared(1)
    failed = [row for row in rows if not row.passed]
    if not failed or any(not row.error < ROUNDING for row in failed):
        return rows
    more = compared(1 + OTHER_CALLS)
    return [row if row.passed else other for row, other in zip(rows, more, strict=True)]


def _compare(inputs: Inputs, actual: Results, samples: Sequence[tuple[Results, Results]]) -> list[Comparison]:
    """`samples`: (eager, exact) of this call, and of the calls that are pooled with it."""
    activation = _activation(inputs.tensors)
    computed_in = inputs.grad_outputs[0].dtype if activation is None else activation.dtype
    rows = []
    for index, output in enumerate(actual.outputs):
        pairs = [(eager_.outputs[index], exact.outputs[index]) for eager_, exact in samples]
        mean = output.dim() == 0
        rows.append(compare_tensors(f"output {index}", output, *pairs, dtype=computed_in, gradient=False, mean=mean))
    for name in samples[0][1].gradients:
        tensor = inputs.tensors[name]
        dtype = tensor.dtype if inputs.op in LOSSES and tensor is not None else computed_in
        pairs = [(eager_.gradients[name], exact.gradients[name]) for eager_, exact in samples]
        gradient, mean = actual.gradients[name], name == "sample_weight"
        rows.append(compare_tensors(f"grad {name}", gradient, *pairs, dtype=dtype, gradient=True, mean=mean))
    return rows


def compare_tensors(
    name: str,
    actual: torch.Tensor,
    call: Pair,
    *others: Pair,
    dtype: torch.dtype,
    gradient: bool,
    mean: bool = False,
) -> Comparison:
    """Compare one output or gradient, computed in `dtype`, by the rule of error.

    `call` and `others`: (eager, exact) of this call, and of other calls that are pooled with it. `mean` as in
    `error_bound`. Errors are relative to eager's result where the exact one is 0. The error is that of the finite
    elements; it is NaN unless `actual` is finite exactly where `exact`, rounded to its dtype, is.
    """
    eager_result, exact = call
    unit = exact if exact.any() else eager_result
    eager_error, noise = relative_error(eager_result, exact, unit), 0.0
    if others and exact.numel() < LARGE:
        eager_error = root_mean_square([eager_error, *(relative_error(*pair) for pair in others)])
    if others:  # roundings that many elements share, such as those of weights, give eager a bias of either sign
        noise = root_mean_square(relative_bias(*pair) for pair in (call, *others))
    bound = error_bound(dtype, eager_error, gradient=gradient, mean=mean)
    bias_bound = BIAS_FRACTION * bound + 2 * (noise if math.isfinite(noise) else 0.0)
    finite = exact.to(actual.dtype).isfinite()
    diverged = not torch.equal(actual.isfinite(), finite)
    if not diverged and not finite.all():
        actual, exact, unit = actual[finite], exact[finite], unit[finite]
    error = math.nan if diverged else relative_error(actual, exact, unit)
    return Comparison(name, error, bound, relative_bias(actual, exact, unit), bias_bound)


def root_mean_square(values: Iterable[float]) -> float:
    """Over the finite values; infinite if there are none."""
    squares = [value * value for value in values if math.isfinite(value)]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.inf

"""Verification before timing: whether contenders compute the op correctly."""

import dataclasses
import functools

import torch

from benchmarks.harness.steps import Contender, Step, contenders_of, kind_of, require_gradients
from benchmarks.names import BEST_EAGER, COMPILE_MODES, PUBLISHED
from benchmarks.ops.problem import Operands, Problem, Tensors
from benchmarks.ops.sizes import Size
from deco_kernels import BackendUnavailable
from deco_kernels.testing import (
    Comparison,
    compare_tensors,
    error_bound,
    pooled,
    relative_error,
    scale_factor,
)

SEED = 20


@dataclasses.dataclass
class Verification:
    """Outcome of the verification.

    Attributes:
        refused: (status, reason) by contender: "unavailable" (not supported), "failed" (it raised), "wrong".
        worst: largest relative error of "output" and "gradient" by contender, against float64 (compiled: float32).
        limits: largest error allowed by the rule of error, by result.
    """

    refused: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    worst: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    limits: dict[str, float] = dataclasses.field(default_factory=dict)

    def attempt(self, name: str, step: Step, operands: Operands) -> Tensors | None:
        """Results of the step, or None with an entry in `refused` if it raises."""
        try:
            return step.results(operands)
        except Exception as error:
            self.refused[name] = refusal(error)
        return None


def can_be_timed(refused: dict[str, tuple[str, str]], name: str) -> bool:
    """Whether a contender runs: a wrong one is timed, and its rows say that it is wrong."""
    return refused.get(name, ("wrong", ""))[0] == "wrong"


def flagged(rows: list[dict], refused: dict[str, tuple[str, str]]) -> list[dict]:
    """Rows of timed contenders, with status and reason of those that are wrong."""
    marks = {name: {"status": status, "reason": reason} for name, (status, reason) in refused.items()}
    return [row | marks.get(row["contender"], {}) for row in rows]


def refusal(error: Exception) -> tuple[str, str]:
    """(status, reason) of a contender that raised."""
    if isinstance(error, BackendUnavailable):
        return "unavailable", str(error)
    lines = str(error).strip().splitlines()
    return "failed", f"{type(error).__name__}: {lines[0] if lines else ''}"


def verify(
    problem: Problem, size: Size, dtype: torch.dtype, device: str, training: bool, contenders: list[Contender]
) -> Verification:
    """Compares every contender with float64 at a small size and with float32 at the timed size."""
    found = Verification()
    _check_against_float64(found, problem, problem.check_size(size), dtype, device, training, contenders)
    _check_agreement(found, problem, size, dtype, device, training, contenders)
    return found


def _check_against_float64(found, problem, size, dtype, device, training, contenders) -> None:
    """Applies the rule of error, with best eager as eager PyTorch. The published formulation runs in float64: it must
    be the same function but may be less accurate. The compiled one is checked only at the timed size, to be compiled
    once."""
    operands = problem.make_operands(size, dtype, torch.Generator(device).manual_seed(SEED))
    formula = Contender(BEST_EAGER, lambda tensors: problem.best_eager(tensors, size))
    doubles = _converted(operands, torch.float64)
    require_gradients(problem, doubles, training)

    @functools.cache
    def sample(number: int) -> tuple[Tensors, Tensors]:
        """(eager, exact) results on the operands, or on others with other rounding errors."""
        given = _rescaled(operands, number) if number else operands
        exactly = _converted(given, torch.float64)
        for each in (given, exactly):
            require_gradients(problem, each, training)
        eager = Step(problem, formula, dtype, device, training).results(given)
        return eager, Step(problem, formula, torch.float64, device, training).results(exactly)

    def compared(results: Tensors, count: int) -> list[Comparison]:
        rows = []
        for result in results:
            pairs = [tuple(values[result] for values in sample(number)) for number in range(count)]
            gradient, mean = kind_of(result) == "gradient", results[result].dim() == 0
            rule_dtype = dtype if gradient or problem.autocast else problem.output_dtype(dtype)
            rule = {"dtype": rule_dtype, "gradient": gradient, "mean": mean}
            rows.append(compare_tensors(result, results[result], *pairs, **rule))
        return rows

    exact = sample(0)[1]
    found.limits = {row.name: row.bound for row in compared(exact, 1)}
    backends = tuple(dict.fromkeys(contender.backend for contender in contenders if contender.backend))
    for contender in contenders_of(problem, size, backends):
        results = found.attempt(contender.name, Step(problem, contender, dtype, device, training), operands)
        if results is None:
            continue
        shared = {result: values for result, values in results.items() if result in exact}
        found.worst[contender.name] = _worst({row.name: row.error for row in compared(shared, 1)})
        if contender.name == PUBLISHED:
            same = Step(problem, contender, torch.float64, device, training).results(doubles)
            broken = [
                f"{result}: {distance:.2e} from the folded formula in float64"
                for result in shared
                if not (distance := relative_error(same[result], exact[result]))
                <= error_bound(torch.float32, 0.0, gradient=kind_of(result) == "gradient")
            ]
        else:
            rows = pooled(functools.partial(compared, shared))
            found.limits |= {row.name: max(row.bound, found.limits[row.name]) for row in rows}
            broken = [text for row in rows for text in _violations(row)]
        if broken:
            found.refused[contender.name] = ("wrong", "; ".join(broken))


def _check_agreement(found, problem, size, dtype, device, training, contenders) -> None:
    """Compares results at the timed size with the float32 formula on the same values as the exact result. Backends must
    stay within the limits from the small size. The compiled formulation is also allowed the limit that follows from the
    published one by the same rule, because eager 16-bit accumulation errors grow with the size."""
    operands = problem.make_operands(size, dtype, torch.Generator(device).manual_seed(SEED))
    require_gradients(problem, operands, training)
    formula = Contender(BEST_EAGER, lambda tensors: problem.best_eager(tensors, size))
    exact_operands = _converted(operands, torch.float32)
    require_gradients(problem, exact_operands, training)
    exact = Step(problem, formula, torch.float32, device, training).results(exact_operands)
    published: dict[str, float] = {}
    for contender in contenders:
        if contender.name in found.refused or contender.name == BEST_EAGER:
            continue
        results = found.attempt(contender.name, Step(problem, contender, dtype, device, training), operands)
        if results is None:
            continue
        distances = {
            result: relative_error(values, exact[result]) for result, values in results.items() if result in exact
        }
        if contender.name == PUBLISHED:
            published = distances
            continue
        if contender.name in COMPILE_MODES:
            found.worst[contender.name] = _worst(distances)
        broken = []
        for result, distance in distances.items():
            gradient = kind_of(result) == "gradient"
            limit = found.limits[result]
            if contender.eager and result in published:
                limit = max(limit, error_bound(dtype, published[result], gradient=gradient))
            limit += error_bound(torch.float32, 0.0, gradient=gradient)  # error of the float32 formula itself
            if not distance <= limit:
                broken.append(f"{result}: {distance:.2e} from float32 at the timed size, allowed {limit:.2e}")
        if broken:
            found.refused[contender.name] = ("wrong", "; ".join(broken))


def _violations(row: Comparison) -> list[str]:
    found = []
    if not row.error <= row.bound:
        found.append(f"{row.name}: relative error {row.error:.2e}, allowed {row.bound:.2e}")
    if not row.bias <= row.bias_bound:
        found.append(f"{row.name}: bias {row.bias:.2e} of the RMS, allowed {row.bias_bound:.2e}")
    return found


def _worst(distances: dict[str, float]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for result, distance in distances.items():
        worst[kind_of(result)] = max(worst.get(kind_of(result), 0.0), distance)
    return worst


def _converted(operands: Operands, dtype: torch.dtype) -> Operands:
    """Copies of the operands in another dtype."""
    return Operands(
        {name: tensor.detach().to(dtype, copy=True) for name, tensor in operands.activations.items()},
        {name: tensor.detach().to(dtype, copy=True) for name, tensor in operands.weights.items()},
        tuple(tensor.to(dtype, copy=True) for tensor in operands.incoming),
    )


def _rescaled(operands: Operands, seed: int) -> Operands:
    """The operands, each times a factor close to 1."""
    generator = torch.Generator().manual_seed(seed)
    return Operands(
        {name: scale_factor(generator) * tensor.detach() for name, tensor in operands.activations.items()},
        {name: scale_factor(generator) * tensor.detach() for name, tensor in operands.weights.items()},
        tuple(scale_factor(generator) * tensor for tensor in operands.incoming),
    )

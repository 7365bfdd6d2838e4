"""Verification before timing: whether contenders compute the op correctly."""

import dataclasses

import torch

from benchmarks.harness.steps import Contender, Step, contenders_of, kind_of, require_gradients
from benchmarks.names import BEST_EAGER, COMPILE_MODES, PUBLISHED
from benchmarks.ops.problem import Operands, Problem, Tensors
from benchmarks.ops.sizes import Size
from deco_kernels import BackendUnavailable
from deco_kernels.testing import error_bound, relative_bias, relative_error

SEED = 20
_BIAS_FRACTION = 0.25  # of the bound of the relative error


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
    doubles = _converted(operands, torch.float64)
    for each in (operands, doubles):
        require_gradients(problem, each, training)

    formula = Contender(BEST_EAGER, lambda tensors: problem.best_eager(tensors, size), eager=True)
    exact = Step(problem, formula, torch.float64, device, training).results(doubles)
    eager = Step(problem, formula, dtype, device, training).results(operands)
    for result, values in exact.items():
        rule_dtype = problem.output_dtype(dtype) if kind_of(result) == "output" else dtype
        gradient = kind_of(result) == "gradient"
        found.limits[result] = error_bound(rule_dtype, relative_error(eager[result], values), gradient=gradient)

    backends = tuple(contender.name for contender in contenders if not contender.eager)
    for contender in contenders_of(problem, size, backends):
        results = found.attempt(contender.name, Step(problem, contender, dtype, device, training), operands)
        if results is None:
            continue
        shared = {result: values for result, values in results.items() if result in exact}
        distances = {result: relative_error(values, exact[result]) for result, values in shared.items()}
        found.worst[contender.name] = _worst(distances)
        if contender.name == PUBLISHED:
            same = Step(problem, contender, torch.float64, device, training).results(doubles)
            broken = [
                f"{result}: {distance:.2e} from the folded formula in float64"
                for result in shared
                if not (distance := relative_error(same[result], exact[result]))
                <= error_bound(torch.float32, 0.0, gradient=kind_of(result) == "gradient")
            ]
        else:
            broken = [text for result in shared for text in _violations(result, shared, exact, distances, found.limits)]
        if broken:
            found.refused[contender.name] = ("wrong", "; ".join(broken))


def _check_agreement(found, problem, size, dtype, device, training, contenders) -> None:
    """Compares results at the timed size with the float32 formula on the same values as the exact result. Backends must
    stay within the limits from the small size. The compiled formulation is also allowed the limit that follows from the
    published one by the same rule, because eager 16-bit accumulation errors grow with the size."""
    operands = problem.make_operands(size, dtype, torch.Generator(device).manual_seed(SEED))
    require_gradients(problem, operands, training)
    formula = Contender(BEST_EAGER, lambda tensors: problem.best_eager(tensors, size), eager=True)
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


def _violations(result, actual, exact, distances, limits) -> list[str]:
    found = []
    limit = limits[result]
    if not distances[result] <= limit:
        found.append(f"{result}: relative error {distances[result]:.2e}, allowed {limit:.2e}")
    bias = relative_bias(actual[result], exact[result])
    if not bias <= _BIAS_FRACTION * limit:
        found.append(f"{result}: bias {bias:.2e} of the RMS, allowed {_BIAS_FRACTION * limit:.2e}")
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

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
from deco_kernels.testing.accuracy import LARGE, OTHER_CALLS, ROUNDING, root_mean_square

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
            rows.append(compare_tensors(result, results[result], *pairs, **_rule(problem, result, results, dtype)))
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


class _TimedCalls:
    """Errors at the timed size, with the float32 formula on the same values as the exact result.

    Call 0 is the given one. The others have other rounding errors; only results of fewer than LARGE elements are kept.
    """

    def __init__(self, problem: Problem, size: Size, dtype: torch.dtype, device: str, training: bool):
        self.problem, self.dtype, self.device, self.training = problem, dtype, device, training
        self.operands = problem.make_operands(size, dtype, torch.Generator(device).manual_seed(SEED))
        require_gradients(problem, self.operands, training)
        self.formula = Contender(BEST_EAGER, lambda tensors: problem.best_eager(tensors, size))
        self._exact: dict[int, Tensors] = {}
        self._errors: dict[tuple[str, int], dict[str, float]] = {}

    def step(self, contender: Contender, dtype: torch.dtype) -> Step:
        return Step(self.problem, contender, dtype, self.device, self.training)

    def exact(self, number: int) -> Tensors:
        if number not in self._exact:
            given = _converted(self._given(number), torch.float32)
            require_gradients(self.problem, given, self.training)
            results = self.step(self.formula, torch.float32).results(given)
            self._exact[number] = {
                name: tensor for name, tensor in results.items() if number == 0 or tensor.numel() < LARGE
            }
        return self._exact[number]

    def errors(self, contender: Contender, number: int) -> dict[str, float]:
        """Of every result in a call."""
        key = contender.name, number
        if key not in self._errors:
            results = self.step(contender, self.dtype).results(self._given(number))
            self._errors[key] = self.errors_of(results, number)
        return self._errors[key]

    def errors_of(self, results: Tensors, number: int) -> dict[str, float]:
        exact = self.exact(number)
        return {name: relative_error(values, exact[name]) for name, values in results.items() if name in exact}

    def typical_error(self, contender: Contender, result: str) -> float:
        """Root mean square over all calls."""
        return root_mean_square(self.errors(contender, number)[result] for number in range(1 + OTHER_CALLS))

    def _given(self, number: int) -> Operands:
        if number == 0:
            return self.operands
        given = _rescaled(self.operands, number)
        require_gradients(self.problem, given, self.training)
        return given


def _check_agreement(found, problem, size, dtype, device, training, contenders) -> None:
    """Compares results at the timed size with the float32 formula on the same values as the exact result.

    Backends must stay within the limits from the small size or within those that best eager's error at the timed size
    gives: errors follow the values, and relative to a sum that nearly cancels they are large. The compiled formulation
    is also allowed the limit that follows from the published one by the same rule, because eager 16-bit accumulation
    errors grow with the size.
    """
    calls = _TimedCalls(problem, size, dtype, device, training)
    exact = calls.exact(0)
    published: dict[str, float] = {}
    for contender in contenders:
        if contender.name in found.refused or contender.name == BEST_EAGER:
            continue
        results = found.attempt(contender.name, calls.step(contender, dtype), calls.operands)
        if results is None:
            continue
        distances = calls.errors_of(results, 0)
        if contender.name == PUBLISHED:
            published = distances
            continue
        if contender.name in COMPILE_MODES:
            found.worst[contender.name] = _worst(distances)
        broken = []
        for result, distance in distances.items():
            rule = _rule(problem, result, exact, dtype)
            limit = found.limits[result]
            if contender.eager and result in published:
                limit = max(limit, error_bound(dtype, published[result], gradient=rule["gradient"]))
            limit += error_bound(torch.float32, 0.0, gradient=rule["gradient"])  # error of the float32 formula itself
            if not distance <= limit and contender.backend:
                distance, limit = _in_same_calls(calls, contender, result, distance, limit, rule)
            if not distance <= limit:
                broken.append(f"{result}: {distance:.2e} from float32 at the timed size, allowed {limit:.2e}")
        if broken:
            found.refused[contender.name] = ("wrong", "; ".join(broken))


def _in_same_calls(calls, contender, result, distance, limit, rule) -> tuple[float, float]:
    """(error, limit) from best eager's error in the same call and, for a small result, in the same nine calls."""

    def limit_from(eager_error: float) -> float:
        own = error_bound(eager_error=eager_error, **rule) + error_bound(torch.float32, 0.0, gradient=rule["gradient"])
        return max(limit, own)

    allowed = limit_from(calls.errors(calls.formula, 0)[result])
    if distance <= allowed or calls.exact(0)[result].numel() >= LARGE or not distance < ROUNDING:
        return distance, allowed
    return calls.typical_error(contender, result), limit_from(calls.typical_error(calls.formula, result))


def _rule(problem: Problem, result: str, results: Tensors, dtype: torch.dtype) -> dict:
    """Arguments of the rule of error for a result."""
    gradient, mean = kind_of(result) == "gradient", results[result].dim() == 0
    return {
        "dtype": dtype if gradient or problem.autocast else problem.output_dtype(dtype),
        "gradient": gradient,
        "mean": mean,
    }


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

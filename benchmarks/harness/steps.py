"""Contenders, and the call that is verified and timed: a forward pass or a training step of an op."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import torch

from benchmarks.names import BEST_EAGER, COMPILE_MODES, PUBLISHED, REFERENCE, TWO_OPS
from benchmarks.ops.problem import Operands, Outputs, Problem, Tensors
from benchmarks.ops.sizes import Size


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation: `call` takes tensors by name and returns the outputs. `backend` is None for eager ones."""

    name: str
    call: Callable[[Tensors], Outputs]
    backend: str | None = None

    @property
    def eager(self) -> bool:
        return self.backend is None


def contenders_of(
    problem: Problem, size: Size, backends: tuple[str, ...], compiled: tuple[str, ...] = ()
) -> list[Contender]:
    """The eager formulations, the published one compiled in the given modes (keys of COMPILE_MODES), and the op on each
    backend, with the two ops that it joins if it is `one_pass`, and with its `other_choice`."""
    found = [Contender(PUBLISHED, lambda tensors: problem.published(tensors, size))]
    if problem.has_best_eager:
        found.append(Contender(BEST_EAGER, lambda tensors: problem.best_eager(tensors, size)))
    for name in compiled:
        call = torch.compile(found[0].call, dynamic=False, mode=COMPILE_MODES[name])
        found.append(Contender(name, call))
    for backend in backends:
        fused = functools.partial(problem.fused, size=size, backend=backend)
        found.append(Contender(backend, fused, backend))
        if problem.one_pass and backend != REFERENCE:
            two_ops = functools.partial(problem.two_ops, size=size, backend=backend)
            found.append(Contender(backend + TWO_OPS, two_ops, backend))
        other = None if backend == REFERENCE else problem.other_choice(backend)
        if other is not None:
            name, choice = other
            found.append(Contender(backend + name, functools.partial(fused, **choice), backend))
    return found


class Step:
    """One call of a contender: forward without gradients, or forward and backward with gradients in `grad` of the
    trained tensors. Eager contenders run under autocast if the problem sets `autocast`."""

    def __init__(self, problem: Problem, contender: Contender, dtype: torch.dtype, device: str, training: bool):
        self.contender = contender
        self.training = training
        autocast = contender.eager and problem.autocast and dtype in (torch.bfloat16, torch.float16)
        self._autocast = (device, dtype) if autocast else None

    def __call__(self, operands: Operands) -> Outputs:
        tensors = operands.tensors()
        with torch.set_grad_enabled(self.training), self._precision():
            if not self.training:
                return self.contender.call(tensors)
            for tensor in tensors.values():
                tensor.grad = None
            outputs = self.contender.call(tensors)
        incoming = operands.incoming
        torch.autograd.backward(outputs[: len(incoming)], incoming)
        return outputs

    def _precision(self):
        return torch.autocast(*self._autocast) if self._autocast else contextlib.nullcontext()

    def results(self, operands: Operands) -> Tensors:
        """Copies of the outputs by position, and of the gradients by argument name."""
        outputs = self(operands)
        found = {f"output {index}": output.detach().clone() for index, output in enumerate(outputs)}
        if self.training:
            for name, tensor in operands.tensors().items():
                if tensor.grad is not None:
                    found[f"gradient of {name}"] = tensor.grad.clone()
                    tensor.grad = None
        return found


def kind_of(result: str) -> str:
    """Whether an entry of `Step.results` is an output or a gradient."""
    return result.split()[0]


def require_gradients(problem: Problem, operands: Operands, training: bool) -> None:
    for name, tensor in operands.tensors().items():
        fixed = name not in problem.trained if name in problem.activations else name in problem.constants
        tensor.requires_grad_(training and not fixed)

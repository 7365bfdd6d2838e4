"""Calls of the ops whose kernels are examined."""

from deco_kernels import ops, testing
from deco_kernels.signatures import OPS
from deco_kernels.testing.inputs import ONE_PASS


def gradients_needed(inputs: testing.Inputs) -> list[bool]:
    """Every gradient, of ops in ONE_PASS those of training: target has none."""
    given = zip(OPS[inputs.op].names, inputs.in_order(), strict=True)
    return [tensor is not None and not (inputs.op in ONE_PASS and name == "target") for name, tensor in given]


def forward_and_backward(inputs: testing.Inputs, backend: str) -> None:
    """Ops in ONE_PASS compute the gradients in their forward."""
    if inputs.op not in ONE_PASS:
        testing.run(inputs, backend)
        return
    needs = zip(OPS[inputs.op].names, inputs.in_order(), gradients_needed(inputs), strict=True)
    leaves = {name: tensor.detach().requires_grad_(need) for name, tensor, need in needs if tensor is not None}
    getattr(ops, inputs.op)(**leaves, **inputs.options, backend=backend)

"""Inputs of the tests of the Triton backend on a GPU. The GPU check compiles the kernels of all of them beforehand."""

from collections.abc import Iterator

from deco_kernels import testing
from deco_kernels.testing.inputs import LOSSES
from tests.ops.cases import (
    BF16,
    CASES,
    CHOICES,
    F16,
    F32,
    OPS,
    Case,
    in_layout,
    small_inputs,
    transposed,
    with_choice,
)

MANY_PIXELS = (32, 256, 256)


def few_cases() -> Iterator[tuple[str, Case]]:
    """Every dtype and width, but not every case: the GPU check gives all tests two minutes.

    pixel_decoder_loss launches the kernels of two other ops, and its form from tokens those of pixel_decoder_loss.
    """
    for op, cases in CASES.items():
        if op == "pixel_decoder_loss_from_tokens":
            chosen = cases[:2]
        elif op == "pixel_decoder_loss":
            chosen = [*cases[:3], cases[-1]]
        else:
            chosen = cases if op in LOSSES else cases[:3] + cases[4::3]
        for case in chosen:
            yield op, case


def with_views(inputs: testing.Inputs) -> testing.Inputs:
    """The same values with the last two dimensions of every tensor exchanged in memory."""
    return in_layout(inputs, transposed)._replace(grad_outputs=inputs.grad_outputs)


def copied(inputs: testing.Inputs, device: str) -> testing.Inputs:
    """Copies on a device; they keep the strides of dense tensors only."""
    return inputs._replace(
        tensors={name: None if t is None else t.to(device, copy=True) for name, t in inputs.tensors.items()},
        grad_outputs=tuple(gradient.to(device, copy=True) for gradient in inputs.grad_outputs),
    )


def calls(device: str) -> Iterator[testing.Inputs]:
    """The inputs of all tests."""
    for op, case in few_cases():
        yield copied(case.inputs(op), device)
    for op, save_memory in CHOICES:
        for inputs in (CASES[op][1].inputs(op), small_inputs(op, BF16)):
            yield with_choice(copied(inputs, device), save_memory)
    for op in OPS:
        for dtype in (F32, BF16, F16):
            small = copied(small_inputs(op, dtype), device)
            yield small
            yield with_views(small)
    for op in ("pixel_decoder", "pixel_decoder_from_tokens"):
        yield copied(testing.random_inputs(op, dtype=BF16, image_size=MANY_PIXELS), device)

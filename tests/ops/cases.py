"""Shared list of cases for every op, backend and instruction set of this machine."""

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, product
from typing import NamedTuple

import pytest
import torch

from deco_kernels import native, ops, testing
from deco_kernels.testing.inputs import ONE_PASS, SAVE_MEMORY

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def implementations() -> list:
    """(backend, instruction set or None) of all implementations for CPU tensors here, as pytest parameters."""
    found = [pytest.param(("reference", None), id="reference")]
    if native.cpu_unavailable_reason() is None:
        found += [pytest.param(("cpu", isa), id=f"cpu-{isa}") for isa in native.cpu().usable_isas()]
    return found


IMPLEMENTATIONS = implementations()
BACKENDS = IMPLEMENTATIONS[:2]  # each backend once, the cpu backend with its fastest instruction set


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def offset(tensor: torch.Tensor) -> torch.Tensor:
    storage = torch.full((tensor.numel() + 3,), torch.nan, dtype=tensor.dtype)
    return storage[3:].view(tensor.shape).copy_(tensor)


def padded(tensor: torch.Tensor, columns: int = 5) -> torch.Tensor:
    """Unit last stride, larger strides elsewhere: a slice of a wider tensor."""
    wider = torch.full((*tensor.shape[:-1], tensor.shape[-1] + columns), torch.nan, dtype=tensor.dtype)
    return wider[..., : tensor.shape[-1]].copy_(tensor)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`padded`, with rows that still start at multiples of 16 bytes."""
    return padded(tensor, 8)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() == 4 else transposed(tensor)


LAYOUTS = {"contiguous": lambda tensor: tensor, "padded": padded, "channels_last": channels_last}


def in_layout(inputs: testing.Inputs, view: Callable[[torch.Tensor], torch.Tensor]) -> testing.Inputs:
    """The same values; every matrix, image and incoming gradient laid out by `view`."""
    tensors = {name: view(t) if t is not None and t.dim() > 1 else t for name, t in inputs.tensors.items()}
    gradients = tuple(view(gradient) if gradient.dim() > 1 else gradient for gradient in inputs.grad_outputs)
    return inputs._replace(tensors=tensors, grad_outputs=gradients)


class Case(NamedTuple):
    """Arguments of `testing.random_inputs` and a layout; at least 4,096 pixels, as the rule of error requires."""

    dtype: torch.dtype
    width: int = 32
    depth: int = 3
    patch_size: int = 16
    image_size: tuple[int, int, int] = (2, 32, 64)
    channels: int = 3
    layout: str = "contiguous"
    other_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype = F32
    token_width: int = 48
    seed: int = 0
    save_memory: bool = False  # of the ops in SAVE_MEMORY
    query: str | None = None  # "tokens" only for the ops from tokens, for others "given"
    head_norm: str = "layer"

    def inputs(self, op: str) -> testing.Inputs:
        arguments = self._asdict()
        view, save_memory = LAYOUTS[arguments.pop("layout")], arguments.pop("save_memory")
        if self.query == "tokens" and not op.endswith("_from_tokens"):
            arguments["query"] = "given"
        inputs = in_layout(testing.random_inputs(op, **arguments), view)
        return with_choice(inputs, save_memory) if op in SAVE_MEMORY else inputs

    @property
    def label(self) -> str:
        batch, height, width = self.image_size
        kinds = "-".join(str(t).removeprefix("torch.") for t in (self.dtype, self.other_dtype, self.weight_dtype) if t)
        sizes = f"D{self.width}N{self.depth}p{self.patch_size}C{self.channels}-{batch}x{height}x{width}"
        layout = f"-{self.layout}" * (self.layout != "contiguous") + "-saving" * self.save_memory
        return f"{kinds}-{sizes}{layout}" + f"-{self.query}" * bool(self.query) + "-rms" * (self.head_norm == "rms")


def with_choice(inputs: testing.Inputs, save_memory: bool | None) -> testing.Inputs:
    """The same call of an op in SAVE_MEMORY with this choice; None for the other ops."""
    choice = {} if save_memory is None else {"save_memory": save_memory}
    return inputs._replace(options=inputs.options | choice)


# Any two values of dtype, D, N (one, few or many blocks), p, C, layout, save_memory, query and head_norm occur
# together, which a test asserts.
DECODER_CASES = [
    Case(F32),
    Case(BF16, save_memory=True),
    Case(F16, head_norm="rms"),
    Case(F16, 16, 1, 1, (1, 61, 71), 3, "padded", save_memory=True, query="tokens"),
    Case(BF16, 32, 2, 1, (1, 67, 63), 1, token_width=9, query="given"),
    Case(F32, 64, 6, 1, (5, 29, 31), 4, "channels_last", head_norm="rms"),
    Case(BF16, 16, 2, 2, (1, 46, 98), 3, "channels_last", weight_dtype=F16, query="tokens", head_norm="rms"),
    Case(F16, 32, 8, 2, (1, 58, 74), 4, "padded", head_norm="rms"),
    Case(F32, 64, 1, 2, (3, 34, 42), 1, token_width=130, save_memory=True, query="given"),
    Case(BF16, 16, 6, 4, (1, 60, 72), 4, other_dtype=BF16, weight_dtype=BF16, save_memory=True),
    Case(F32, 32, 1, 4, (1, 52, 84), 1, "channels_last", query="tokens"),
    Case(F16, 64, 3, 4, (1, 52, 84), 3, "padded", other_dtype=F16, weight_dtype=F16, query="given", head_norm="rms"),
    Case(
        F32,
        16,
        3,
        8,
        (3, 24, 64),
        4,
        "channels_last",
        other_dtype=BF16,
        save_memory=True,
        query="given",
        head_norm="rms",
    ),
    Case(F16, 32, 6, 8, (1, 56, 80), 3, query="tokens"),
    Case(BF16, 64, 1, 8, (1, 40, 104), 1, "padded", head_norm="rms"),
    Case(F16, 16, 6, 16, (2, 48, 96), 1, "channels_last", query="given"),
    Case(
        F32,
        64,
        1,
        16,
        (1, 16, 272),
        4,
        "padded",
        other_dtype=F16,
        weight_dtype=BF16,
        token_width=33,
        query="tokens",
        head_norm="rms",
    ),
]
ROW_CASES = [case for case in DECODER_CASES if case.depth <= 3]
LOSS_CASES = [
    Case(F32, image_size=(2, 48, 64)),
    Case(F32, image_size=(3, 37, 61)),
    Case(BF16, image_size=(2, 64, 40)),
    Case(F16, image_size=(1, 5, 1100)),
    Case(F32, image_size=(1, 71, 67), other_dtype=BF16),
    Case(BF16, image_size=(2, 33, 72), other_dtype=F32),
    Case(F16, image_size=(5, 40, 23), other_dtype=F16),
]
# Up to the comment whole 8x8 blocks, which the cpu backend computes in one pass.
DECODER_LOSS_CASES = [
    Case(F32),
    Case(BF16),
    Case(F32, 64, 1, 8, (3, 24, 64), layout="padded", other_dtype=BF16, query="given"),
    Case(BF16, 64, 2, 16, (1, 64, 80), layout="channels_last", other_dtype=F16, weight_dtype=F16, head_norm="rms"),
    Case(
        F16,
        16,
        1,
        16,
        (5, 32, 32),
        layout="channels_last",
        other_dtype=BF16,
        weight_dtype=BF16,
        query="tokens",
        head_norm="rms",
    ),  # fmt: skip
    # The two ops one after the other.
    Case(BF16, 32, 2, 4, (2, 32, 64)),
    Case(F16, 16, 1, 4, (2, 32, 64), query="tokens", head_norm="rms"),
]
CASES = {
    "adaln_block": ROW_CASES,
    "upsample_modulate": ROW_CASES,
    "pixel_decoder": DECODER_CASES,
    "pixel_decoder_from_tokens": DECODER_CASES,
    "pixel_decoder_loss": DECODER_LOSS_CASES,
    "pixel_decoder_loss_from_tokens": [DECODER_LOSS_CASES[i] for i in (0, 1, 4, 6)],
    "flow_matching_loss": LOSS_CASES,
    "frequency_loss": LOSS_CASES[:3],
}
OPS = tuple(CASES)
KERNEL_OPS = tuple(op for op in OPS if op not in ONE_PASS)  # with kernels on every backend
# Every op on every implementation; ops made of the kernels of others only with one instruction set.
OPS_ON_IMPLEMENTATIONS = [
    pytest.param(*implementation.values, op, id=f"{implementation.id}-{op}")
    for implementation in IMPLEMENTATIONS
    for op in OPS
    if implementation in BACKENDS or op != "pixel_decoder_loss_from_tokens"
]
DEFAULTS = {op: {} if op in ("flow_matching_loss", "frequency_loss") else {"eps": 1e-6} for op in OPS}


VALUES = {
    "dtype": (F32, BF16, F16),
    "width": (16, 32, 64),
    "blocks": ("one", "few", "many"),
    "patch_size": (1, 2, 4, 8, 16),
    "channels": (1, 3, 4),
    "layout": tuple(LAYOUTS),
    "save_memory": (False, True),
    "query": (None, "given", "tokens"),
    "head_norm": ("layer", "rms"),
}


def uncovered_pairs(cases: Iterable[Case], **values) -> list[tuple]:
    """Pairs of settings that no case combines; `values` replaces entries of VALUES."""
    found = set()
    for case in cases:
        settings = case._asdict() | {"blocks": "one" if case.depth == 1 else "few" if case.depth <= 3 else "many"}
        found |= {pair for pair in combinations([(name, settings[name]) for name in VALUES], 2)}
    settings = [[(name, value) for value in possible] for name, possible in (VALUES | values).items()]
    return [pair for first, second in combinations(settings, 2) for pair in product(first, second) if pair not in found]


def differentiable(outputs: tuple, grad_outputs: tuple) -> tuple[tuple, tuple]:
    """The outputs that have gradients, and those of `grad_outputs`."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(zip(*[p for p in zip(outputs, grad_outputs, strict=True) if p[0].requires_grad], strict=True))


def gradients_one_by_one(
    inputs: testing.Inputs, backend: str, names: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, gradient) for each of the tensors `names`, which alone asks for one; no other tensor may get one."""
    for wanted in names:
        leaves = {name: t.detach().requires_grad_(name == wanted) for name, t in inputs.tensors.items()}
        outputs = getattr(ops, inputs.op)(**leaves, **inputs.options, backend=backend)
        torch.autograd.backward(*differentiable(outputs, inputs.grad_outputs))
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]
        yield wanted, leaves[wanted].grad


CHOICES = [(op, choice) for op in CASES for choice in ((False, True) if op in SAVE_MEMORY else (None,))]
"""(op, save_memory) for `with_choice`."""


def small_inputs(op: str, dtype: torch.dtype = F32, **changes) -> testing.Inputs:
    """Inputs of a few pixels, for tests that do not check accuracy; whole 8x8 blocks for ops in ONE_PASS."""
    patch_size, image_size = (8, (2, 8, 16)) if op in ONE_PASS else (4, (2, 8, 12))
    sizes = {"patch_size": patch_size, "image_size": image_size, "depth": 2, "token_width": 7}
    return testing.random_inputs(op, dtype=dtype, **(sizes | changes))

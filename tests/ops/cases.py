"""The shared list of cases: every backend and instruction set of this machine runs every op through them."""

from typing import NamedTuple

import pytest
import torch

from deco_kernels import native, testing

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def implementations() -> list:
    """(backend, instruction set or None) of everything this machine can run on CPU tensors, as pytest parameters."""
    found = [pytest.param(("reference", None), id="reference")]
    if native.cpu_unavailable_reason() is None:
        found += [pytest.param(("cpu", isa), id=f"cpu-{isa}") for isa in native.cpu().usable_isas()]
    return found


IMPLEMENTATIONS = implementations()
BACKENDS = IMPLEMENTATIONS[:2]  # each backend once, the cpu backend with its fastest instruction set


class Case(NamedTuple):
    """Arguments of `testing.random_inputs`; at least 4,096 pixels, as the rule of error asks."""

    dtype: torch.dtype
    width: int = 32
    depth: int = 3
    patch_size: int = 16
    image_size: tuple[int, int, int] = (2, 32, 64)
    channels: int = 3
    other_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype = F32
    token_width: int = 48
    seed: int = 0

    def inputs(self, op: str) -> testing.Inputs:
        return testing.random_inputs(op, **self._asdict())

    @property
    def label(self) -> str:
        batch, height, width = self.image_size
        kinds = "-".join(str(t).removeprefix("torch.") for t in (self.dtype, self.other_dtype, self.weight_dtype) if t)
        return f"{kinds}-D{self.width}N{self.depth}p{self.patch_size}C{self.channels}-{batch}x{height}x{width}"


DECODER_CASES = [
    Case(F32),
    Case(BF16),
    Case(F16),
    Case(F32, width=16, depth=1, patch_size=4, image_size=(1, 52, 84)),
    Case(BF16, width=16, depth=6, patch_size=8, image_size=(3, 24, 64), channels=1),
    Case(F16, width=16, depth=3, patch_size=2, image_size=(1, 58, 74), channels=4),
    Case(F32, width=64, depth=3, patch_size=8, image_size=(1, 40, 104), channels=4),
    Case(BF16, width=64, depth=6, patch_size=16, image_size=(1, 48, 96)),
    Case(F16, width=64, depth=1, patch_size=1, image_size=(1, 61, 71)),
    Case(F32, depth=8, patch_size=1, image_size=(5, 29, 31), channels=1),
    Case(BF16, depth=1, patch_size=1, image_size=(1, 67, 63), token_width=9),
    Case(F32, depth=6, patch_size=2, image_size=(3, 34, 42), other_dtype=BF16),
    Case(BF16, depth=3, patch_size=4, image_size=(1, 60, 72), other_dtype=BF16, weight_dtype=BF16),
    Case(F16, depth=3, patch_size=8, image_size=(1, 56, 80), other_dtype=F16, weight_dtype=F16),
    Case(F32, depth=2, patch_size=16, image_size=(1, 16, 272), other_dtype=F16, weight_dtype=BF16, token_width=33),
    Case(BF16, width=16, depth=2, patch_size=2, image_size=(1, 46, 98), weight_dtype=F16),
    Case(BF16, width=64, depth=2, patch_size=2, image_size=(1, 46, 98), token_width=130),
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
CASES = {
    "adaln_block": ROW_CASES,
    "upsample_modulate": ROW_CASES,
    "pixel_decoder": DECODER_CASES,
    "pixel_decoder_from_tokens": DECODER_CASES,
    "flow_matching_loss": LOSS_CASES,
    "frequency_loss": LOSS_CASES[:3],
}
OPS = tuple(CASES)


def small_inputs(op: str, dtype: torch.dtype = F32, **changes) -> testing.Inputs:
    """A few pixels of every op, for tests that are not about accuracy."""
    changes = {"patch_size": 4, "image_size": (2, 8, 12), "depth": 2, "token_width": 7} | changes
    return testing.random_inputs(op, dtype=dtype, **changes)

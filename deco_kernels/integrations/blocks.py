"""Runs the decoder blocks inside any model through `ops.adaln_block`.

Source: the module structure of the published DeCo models (arXiv 2511.19365, section 3).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from deco_kernels import ops
from deco_kernels.integrations.structure import SAME, block_parts, randomize, require_unwrapped
from deco_kernels.ops.registry import check_backend_name


class FusedBlock:
    """The forward of a block after the swap. Holds modules, so that `.to()` and `load_state_dict` take effect."""

    def __init__(self, block: nn.Module, path: str, backend: str | None):
        width = getattr(getattr(block, "in_ln", None), "normalized_shape", (0,))[-1]
        self.parts, self.backend = block_parts(block, path, width), backend

    def forward(self, h: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """h [..., D] and cond, broadcast to the shape of h → h after the block."""
        weights = [getattr(module, kind) for module in self.parts for kind in ("weight", "bias")]
        cond = cond.to(h.dtype).expand(h.shape)
        return ops.adaln_block(h, cond, *weights, eps=self.parts[0].eps, backend=self.backend)


class BlockSwap:
    """Handle of swapped blocks; `undo()` restores them.

    Attributes:
        names: paths of the blocks in the model.
    """

    def __init__(self, blocks: dict[str, nn.Module]):
        self.names, self._blocks = list(blocks), blocks

    def undo(self) -> None:
        """Restore the blocks' own forward. Raises ValueError on a second call."""
        if not self._blocks:
            raise ValueError("blocks: expected swapped ones, got blocks that were restored before; call undo once")
        for block in self._blocks.values():
            del block.forward
        self._blocks = {}


def swap_blocks(module: nn.Module, *, backend: str | None = None) -> BlockSwap:
    """Make every decoder block of the published form inside a module run through `ops.adaln_block`.

    Such a block has `in_ln` (LayerNorm with weight and bias), `mlp` (Linear, SiLU, Linear) and `adaLN_modulation`
    (SiLU, Linear to 3D: shift, scale, gate), all of width D, and computes
    h + gate·mlp(in_ln(h)·(1 + scale) + shift) from h and cond [..., D]. Replaces the `forward` of these objects;
    parameters and names do not change. For a whole decoder `swap_decoder` saves more.

    Args:
        module: any module; blocks that are swapped already are left as they are.
        backend: backend of the op; None for the automatic choice.

    Raises:
        TypeError: not a module, or one that is compiled or wrapped.
        ValueError: no such block, a block that computes another function on random weights, which the message names, or
            an unknown backend.
    """
    require_unwrapped(module)
    if backend is not None:
        check_backend_name(backend)
    found = {
        path: block
        for path, block in module.named_modules()
        if all(isinstance(getattr(block, name, None), nn.Module) for name in ("in_ln", "mlp", "adaLN_modulation"))
        and "forward" not in vars(block)
    }
    if not found:
        raise ValueError(
            "module: expected at least one block with in_ln, mlp and adaLN_modulation that is not swapped, got none; "
            "pass a module that has one"
        )
    fused = {path: FusedBlock(block, path or "module", backend) for path, block in found.items()}
    for path, block in found.items():
        _require_same_function(block, path or "module")
    for path, block in found.items():
        block.forward = fused[path].forward
    return BlockSwap(found)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def _require_same_function(block: nn.Module, path: str) -> None:
    """Raise ValueError unless a copy of the block with random weights computes the published function."""
    copied = copy.deepcopy(block).to(device="cpu", dtype=torch.float32).eval()
    generator = torch.Generator("cpu").manual_seed(0)
    randomize(copied, generator)
    fused = FusedBlock(copied, path, "reference")
    sizes = (2, 2, 5, fused.parts[0].normalized_shape[0])
    h, cond = torch.randn(sizes, generator=generator, device="cpu", dtype=torch.float32)
    try:
        own = copied(h, cond)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: expected a block with forward(h, cond), got {found}; leave this block out by calling swap_blocks "
            "on other modules"
        ) from error
    expected = fused.forward(h, cond)
    shape = list(getattr(own, "shape", [type(own).__name__]))
    if shape != list(expected.shape) or not (own - expected).norm() <= SAME * expected.norm():
        raise ValueError(
            f"{path}: expected h + gate·mlp(in_ln(h)·(1 + scale) + shift) on random weights, got a result of shape "
            f"{shape} that differs; leave this block out by calling swap_blocks on other modules"
        )

"""The two halves of a swapped model: `encode` (its trunk) and `decode` (its decoder), as `DeCo` has them.

Source: the published DeCo models (arXiv 2511.19365, section 3), whose forward calls `dec_net` on the pixels and on
SiLU(t_embedder(t) + tokens), the tokens being the result of the last of `blocks`.
"""

from __future__ import annotations

import threading
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from deco_kernels.integrations.fused_forward import FusedForward, remove_methods, without_gradients
from deco_kernels.model.patches import from_patches, to_patches


class SwappedHalves:
    """`encode` and `decode` of a model after the swap; the first call of `encode` checks them against its forward. A
    call with NaN or infinity, which hides differences, is no check.

    Holds modules, not tensors, so that deep copies, `.to()` and `load_state_dict` take effect.
    """

    def __init__(self, model: nn.Module, fused: FusedForward):
        self.model, self.fused = model, fused
        self.checked = False

    def encode(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L, Z] of the trunk alone, in row-major patch order; the arguments are those of the forward.

        Runs the model's forward with a decoder that returns its pixels, so hooks that run after `dec_net` see pixels.

        Raises ValueError in the first call if the forward does not pass SiLU(t_embedder(t) + tokens) and the pixels of
        x to `dec_net`, or changes what `dec_net` returns.
        """
        results: list[torch.Tensor] = []
        thread = threading.get_ident()

        def keep(module: nn.Module, inputs: object, result: torch.Tensor) -> None:
            if threading.get_ident() == thread:
                results.append(result)

        handle = self.model.get_submodule("blocks")[-1].register_forward_hook(keep)  # type: ignore[index]
        try:
            with self.fused.without_decoder() as calls:
                image = self.model(x, t, y)
        finally:
            handle.remove()
        if not self.checked:
            self._check(x, t, image, results, calls)
            self.checked = all(bool(found.isfinite().all()) for found in (image, calls[0][1]))
        return results[0]

    def decode(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Velocity [B, C, H, W] of the decoder alone.

        Args:
            x: noised image [B, C, H, W].
            t: times [B].
            tokens: result [B, L, Z] of `encode`, also of another x and t; L = H·W/p².

        Raises ValueError for shapes that do not fit each other; the ops check the rest.
        """
        p = self.fused.parts.patch_size
        if x.dim() != 4 or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(
                f"x: expected an image [B, C, H, W], H and W multiples of {p}, got {list(x.shape)}; crop or pad it"
            )
        expected = [x.shape[0], x.shape[2] * x.shape[3] // p**2, self.fused.parts.up.in_features]
        if list(tokens.shape) != expected:
            raise ValueError(
                f"tokens: expected shape {expected} for an image {list(x.shape)}, as `encode` returns it, got "
                f"{list(tokens.shape)}; pass those of an image of this size"
            )
        pixels = self.model.get_submodule("x_embedder")(_pixels(self.fused, x))
        velocity = self.model.get_submodule("dec_net")(pixels, self._condition(t, tokens))
        return from_patches(velocity.transpose(1, 2).unflatten(0, tokens.shape[:2]), p, *x.shape[2:])

    def _condition(self, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """SiLU(time embedding + tokens) [T, Z] of times [B] and tokens [B, L, Z]."""
        time = self.model.get_submodule("t_embedder")(t)
        return F.silu(time[:, None] + tokens).flatten(0, 1)

    @without_gradients()
    def _check(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        image: torch.Tensor,
        results: list[torch.Tensor],
        calls: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Raise ValueError unless the forward called its parts as `decode` does.

        Args:
            image: what the forward returned while `dec_net` returned its pixels.
            results: results of the last block. calls: (pixels, condition) of the calls of `dec_net`.
        """
        if len(results) != 1 or len(calls) != 1:
            _differs("to call the last of blocks and dec_net once", f"{len(results)} and {len(calls)} calls")
        (tokens,), ((pixels, condition),) = results, calls
        if not isinstance(tokens, torch.Tensor) or tokens.shape[:1] != x.shape[:1] or tokens.dim() != 3:
            found = list(getattr(tokens, "shape", [type(tokens).__name__]))
            _differs("the last of blocks to return the tokens [B, L, Z]", f"{found}")
        if not _same(condition, self._condition(t, tokens)):
            _differs("to pass SiLU(t_embedder(t) + tokens of the last block) to dec_net", "another condition")
        around = difference_around_decoder(self.fused, x, image, pixels)
        if around is not None:
            _differs(*around)


def difference_around_decoder(
    fused: FusedForward, x: torch.Tensor, image: torch.Tensor, pixels: torch.Tensor
) -> tuple[str, str] | None:
    """(expected, found) if a forward of x without decoder passed other pixels to `dec_net`, or changed its result."""
    if not _same(pixels, _pixels(fused, x).to(pixels.dtype)):
        return "to pass the pixels of the patches, row by row, to dec_net", "other pixels"
    if not _same(image, x.to(image.dtype)):
        return "to return what dec_net returns, as an image", "another result"
    return None


def _pixels(fused: FusedForward, x: torch.Tensor) -> torch.Tensor:
    """Pixels [T, P, C] of the patches of x [B, C, H, W]."""
    return to_patches(x, fused.parts.patch_size).flatten(0, 1).transpose(1, 2)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether both have the same shape and values, NaN included."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def _differs(expected: str, found: str) -> NoReturn:
    raise ValueError(
        f"model: expected its forward {expected}, as the published one does, got {found}; trunk_steps, encode and "
        "decode need the published forward"
    )


def attach_halves(model: nn.Module, fused: FusedForward) -> None:
    """Give a swapped model `encode` and `decode` if it has the published `blocks` and `t_embedder`."""
    blocks, embedder = getattr(model, "blocks", None), getattr(model, "t_embedder", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not isinstance(embedder, nn.Module):
        return
    if not hasattr(model, "encode") and not hasattr(model, "decode"):
        halves = SwappedHalves(model, fused)
        model.encode, model.decode = halves.encode, halves.decode  # type: ignore[assignment]


def detach_halves(model: nn.Module) -> None:
    """Remove what `attach_halves` has added to the model."""
    remove_methods(model, SwappedHalves, "encode", "decode")

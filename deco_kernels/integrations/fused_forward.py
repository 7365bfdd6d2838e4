"""The fused forwards of `x_embedder` and `dec_net` in a swapped model.

Source: the module structure of the published DeCo models (arXiv 2511.19365, section 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deco_kernels import ops
from deco_kernels.integrations.structure import DecoderParts, is_sharded
from deco_kernels.model.pixel_decoder import fold_query


class FusedForward:
    """The forwards of `x_embedder` and `dec_net` after the swap.

    Holds modules, not tensors, so that `.to()`, `load_state_dict`, FSDP and deep copies take effect. Every call checks
    that no module has been replaced, as adapters do: the replacement would have no effect.
    """

    def __init__(self, parts: DecoderParts, save_memory: bool, backend: str | None):
        self.parts, self.save_memory, self.backend = parts, save_memory, backend
        self.places = [*_places("x_embedder", parts.x_embedder), *_places("dec_net", parts.dec_net)]
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @contextlib.contextmanager
    def without_decoder(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """`decode` returns its pixels and appends (pixels, tokens) to the yielded list."""
        self.calls = []
        try:
            yield self.calls
        finally:
            self.calls = None

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Replaces the forward of `x_embedder`: returns the pixels [T, P, C] unchanged."""
        return pixels

    def decode(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Replaces the forward of `dec_net`: pixels [T, P, C] and tokens [T, Z] → velocity [T, P, C].

        Raises TypeError for sharded weights and ValueError for a wrong number of pixels per patch or a module that was
        replaced after the swap; the ops check the rest.
        """
        parts = self.parts
        for path, owner, name, child in self.places:
            if getattr(owner, name, None) is not child:
                raise ValueError(
                    f"{path}: expected the module that was there when the decoder was swapped, got another one; undo "
                    "the swap before replacing modules of the decoder"
                )
        if any(is_sharded(module.weight) for module in parts.with_parameters()):
            raise TypeError(
                "dec_net: expected whole weights, got DTensors; with fully_shard make dec_net one unit and leave "
                "x_embedder in the enclosing unit"
            )
        p = parts.patch_size
        if pixels.dim() != 3 or pixels.shape[1] != p * p:
            raise ValueError(
                f"dec_net: expected the pixels [tokens, {p * p}, channels] that x_embedder returns after the swap, "
                f"got shape {list(pixels.shape)}; pass them to dec_net unchanged"
            )
        if self.calls is not None:
            self.calls.append((pixels, tokens))
            return pixels
        images = pixels.transpose(1, 2).unflatten(2, (p, p))
        up = parts.up
        options: dict[str, Any] = dict(patch_size=p, eps=parts.eps, save_memory=self.save_memory, backend=self.backend)
        velocity = ops.pixel_decoder_from_tokens(images, tokens, up.weight, up.bias, *self._weights(), **options)
        return velocity.flatten(2).transpose(1, 2)

    def _weights(self) -> tuple[torch.Tensor, ...]:
        """The weights of `pixel_decoder` from pixel_weight on: input linears folded, blocks stacked."""
        parts = self.parts
        embed, project, head = parts.embed, parts.input, parts.head
        positions = parts.x_embedder.fused_positions
        assert isinstance(positions, torch.Tensor)
        query = fold_query(embed.weight, embed.bias, project.weight, project.bias, positions)
        stacked = [
            torch.stack([getattr(module, kind) for module in modules])
            for modules in (parts.norms, parts.mods, parts.fc1s, parts.fc2s)
            for kind in ("weight", "bias")
        ]
        return (*query, *stacked, head.weight, head.bias)


def _places(root: str, top: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(path, parent, name in the parent, module) of each module below `top`."""
    for path, owner in top.named_modules(prefix=root):
        for name, child in owner.named_children():
            yield f"{path}.{name}", owner, name, child

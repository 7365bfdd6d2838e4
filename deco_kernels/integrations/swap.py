"""Runs the per-pixel decoder of a model in the published structure through the fused ops.

Source: the module structure of the published DeCo models (arXiv 2511.19365, section 3). Their forward unfolds the
image, calls `x_embedder` on the pixels [T, P, C] of every patch, and `dec_net` on the result and the tokens [T, Z].
After the swap, `x_embedder` returns the pixels unchanged and `dec_net` reads them as T images of p×p pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deco_kernels.integrations.structure import (
    DecoderParts,
    find_parts,
    is_sharded,
    position_features,
    require_same_function,
    require_unwrapped,
)
from deco_kernels.model.pixel_decoder import decode, fold_query

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Swap:
    """Handle of a swapped model; `undo()` restores it."""

    def __init__(self, model: nn.Module):
        self.model = model

    def undo(self) -> None:
        """Restore the model's own forward; parameters keep their current values. Raises ValueError on a second call."""
        undo_swap(self.model)


class FusedForward:
    """The forwards of `x_embedder` and `dec_net` after the swap.

    Holds modules, not tensors, so that `.to()`, `load_state_dict`, FSDP and deep copies take effect. Every call checks
    that no module has been replaced, as adapters do: the replacement would have no effect.
    """

    def __init__(self, parts: DecoderParts, save_memory: bool, backend: str | None):
        self.parts, self.save_memory, self.backend = parts, save_memory, backend
        self.places = [*_places("x_embedder", parts.x_embedder), *_places("dec_net", parts.dec_net)]

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
        images = pixels.transpose(1, 2).unflatten(2, (p, p))
        up = parts.up
        options: dict[str, Any] = dict(patch_size=p, eps=parts.eps, save_memory=self.save_memory, backend=self.backend)
        velocity = decode(images, tokens, up.weight, up.bias, self._weights(), **options)
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


def swap_decoder(model: nn.Module, *, save_memory: bool = False, backend: str | None = None) -> Swap:
    """Make a model of the published structure run its per-pixel decoder through the fused ops.

    Replaces only the `forward` of `model.x_embedder` and `model.dec_net`, on these two objects. Modules, parameters and
    names in the state_dict do not change, so optimizers, checkpoints, averaged copies and `copy.deepcopy` work as
    before. Call it before `torch.compile`, DDP and FSDP.

    Args:
        model: with `x_embedder.embedder`, `dec_net.cond_embed`, `dec_net.input_proj`,
            `dec_net.res_blocks[i].{in_ln, mlp, adaLN_modulation}` and `dec_net.final_layer`, class-to-image or
            text-to-image. Its parameters must not be on the meta device.
        save_memory: use the op that starts from tokens in training too. The pixel conditions [T, P, D] are then never
            stored, and the backward recomputes them.
        backend: backend of the ops; None for the automatic choice.

    Returns:
        The swap; its `undo()` restores the model.

    Warns:
        UserWarning: names the modules whose hooks no longer run or now see pixels.

    Raises:
        TypeError: not a module, or a module that is already compiled or wrapped for data-parallel training.
        ValueError: the structure differs from the published one, or a copy of the modules computes another function on
            random weights (the message names the first difference); or the model is already swapped.
    """
    require_unwrapped(model)
    if is_swapped(model):
        raise ValueError("model: its decoder is already swapped; call undo_swap(model) before swapping it again")
    parts = find_parts(model)
    features = position_features(parts)
    parts.x_embedder.register_buffer("fused_positions", features, persistent=False)
    fused = FusedForward(parts, save_memory, backend)
    try:
        require_same_function(parts, lambda copied: FusedForward(copied, save_memory, "reference"))
    except BaseException:
        del parts.x_embedder.fused_positions
        raise
    _warn_of_hooks(parts)
    parts.x_embedder.forward, parts.dec_net.forward = fused.embed, fused.decode
    return Swap(model)


def is_swapped(model: nn.Module) -> bool:
    """Whether the model itself (not a submodule) runs the fused decoder."""
    forward = getattr(getattr(model, "dec_net", None), "forward", None)
    return isinstance(getattr(forward, "__self__", None), FusedForward)


def undo_swap(model: nn.Module) -> None:
    """Restore a swapped model, or a deep copy of one. Raises ValueError if it is not swapped."""
    if not is_swapped(model):
        raise ValueError("model: expected one that swap_decoder has swapped, got one that runs its own decoder")
    x_embedder, dec_net = model.get_submodule("x_embedder"), model.get_submodule("dec_net")
    del x_embedder.forward, dec_net.forward, x_embedder.fused_positions


def _places(root: str, top: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(path, parent, name in the parent, module) of each module below `top`."""
    for path, owner in top.named_modules(prefix=root):
        for name, child in owner.named_children():
            yield f"{path}.{name}", owner, name, child


def _warn_of_hooks(parts: DecoderParts) -> None:
    hooked = list(_hooked(parts))
    if hooked:
        warnings.warn(
            f"swap_decoder: hooks on {', '.join(hooked)}: in the fused decoder x_embedder and dec_net see pixels, and "
            "the modules inside them and their hooks do not run; remove the hooks, or undo the swap if they are needed",
            stacklevel=3,
        )


def _hooked(parts: DecoderParts) -> Iterator[str]:
    """Names of the modules whose hooks see other tensors or no longer run."""
    for root, top in (("x_embedder", parts.x_embedder), ("dec_net", parts.dec_net)):
        for name, module in top.named_modules(prefix=root):
            # The output of dec_net does not change, so hooks that run after it stay valid.
            kinds = _HOOKS[1:2] if module is parts.dec_net else _HOOKS
            if any(getattr(module, kind, None) for kind in kinds):
                yield name

"""Runs the per-pixel decoder of a model in the published structure through the fused ops.

Source: the module structure of the published DeCo models (arXiv 2511.19365, section 3). Their forward unfolds the
image, calls `x_embedder` on the pixels [T, P, C] of every patch, and `dec_net` on the result and the tokens [T, Z].
After the swap, `x_embedder` returns the pixels unchanged and `dec_net` reads them as T images of p×p pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from deco_kernels.integrations.fused_features import FusedForwardWithFeatures, attach_forward, detach_forward
from deco_kernels.integrations.fused_forward import FusedForward
from deco_kernels.integrations.halves import attach_halves, detach_halves
from deco_kernels.integrations.losses import attach_losses, detach_losses
from deco_kernels.integrations.structure import (
    DECO,
    TOPS,
    TOPS_WITH_FEATURES,
    DecoderParts,
    find_parts,
    holder_of,
    position_features,
    require_same_function,
    require_unwrapped,
)
from deco_kernels.model.deco import PixelDiffusion
from deco_kernels.ops.checks import check_flag
from deco_kernels.ops.registry import check_backend_name

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Swap:
    """Handle of a swapped model; `undo()` restores it.

    Attributes:
        structure: the structure that was recognized, "DeCo", "CoD-Lite" or "Mage-VAE".
    """

    def __init__(self, model: nn.Module, structure: str):
        self.model, self.structure = model, structure

    def undo(self) -> None:
        """Restore the model's own forward; parameters keep their current values. Raises ValueError on a second call."""
        undo_swap(self.model)


def swap_decoder(model: nn.Module, *, save_memory: bool = False, backend: str | None = None) -> Swap:
    """Make a model of a published structure run its per-pixel decoder through the fused ops.

    Replaces the `forward` of `model.x_embedder` and `model.dec_net`, on these two objects; in CoD-Lite (arXiv
    2604.12525), and in the `pipeline` or `decoder_model` of Mage-VAE (arXiv 2607.19064), also that of `y_embedder_x`,
    of `final_layer` and of the module that has them. Modules, parameters and
    names in the state_dict do not change, so optimizers, checkpoints, averaged copies and `copy.deepcopy` work as
    before. Call it before `torch.compile`, DDP and FSDP.

    The own `forward` of a model of DeCo's structure also takes `loss`, for which the model returns the training losses
    in place of the velocity, so that `flow.Objective` computes decoder and loss as one op.

    A model with the published `blocks` and `t_embedder` also gets the methods `encode(x, t, y)` and
    `decode(x, t, tokens)`, its trunk and its decoder, so that `flow.Sampler(trunk_steps=...)` takes it.

    Args:
        model: with `x_embedder.embedder`, `dec_net.cond_embed`, `dec_net.input_proj`,
            `dec_net.res_blocks[i].{in_ln, mlp, adaLN_modulation}` and `dec_net.final_layer`, class-to-image or
            text-to-image; or of the structure of CoD-Lite, with a 1x1 convolution `y_embedder_x` and a `final_layer`
            outside `dec_net` that has an RMSNorm; or Mage-VAE. Its parameters must not be on the meta device.
        save_memory: whether the backward computes the pixel conditions [T, P, D], and on a GPU the activations of the
            blocks, again in training, in place of keeping them.
        backend: backend of the ops; None for the automatic choice.

    Returns:
        The swap; its `undo()` restores the model.

    Warns:
        UserWarning: names the modules whose hooks no longer run or now see pixels.

    Raises:
        TypeError: not a module, or a module that is already compiled or wrapped for data-parallel training; or a
            save_memory that is not a bool.
        ValueError: the structure differs from the nearest published one, or a copy of the modules computes another
            function on random weights (the message names the first difference); the model is already swapped; or an
            unknown backend.
    """
    require_unwrapped(model)
    if isinstance(model, PixelDiffusion):
        raise ValueError(
            f"model: expected one of a published structure, got this package's {type(model).__name__}, whose decoder "
            "runs the fused ops already; use it as it is"
        )
    check_flag("swap_decoder", "save_memory", save_memory)
    if backend is not None:
        check_backend_name(backend)
    if is_swapped(model):
        raise ValueError("model: its decoder is already swapped; call undo_swap(model) before swapping it again")
    holder, structure = holder_of(model)
    require_unwrapped(holder)
    parts = find_parts(holder, structure)
    features = position_features(parts)
    parts.x_embedder.register_buffer("fused_positions", features, persistent=False)
    kind = FusedForward if structure == DECO else FusedForwardWithFeatures
    fused = kind(parts, save_memory, backend)
    try:
        require_same_function(parts, lambda copied: kind(copied, save_memory, "reference"))
        _warn_of_hooks(parts)
    except BaseException:
        del parts.x_embedder.fused_positions
        raise
    for name, forward in fused.forwards().items():
        parts.tops[name].forward = forward
    if structure == DECO:
        attach_halves(model, fused)
        attach_losses(model, fused)
    if isinstance(fused, FusedForwardWithFeatures):
        attach_forward(holder, fused)
    return Swap(model, structure)


def is_swapped(model: nn.Module) -> bool:
    """Whether the model itself (not a submodule) runs the fused decoder."""
    forward = getattr(getattr(holder_of(model)[0], "dec_net", None), "forward", None)
    return isinstance(getattr(forward, "__self__", None), FusedForward)


def undo_swap(model: nn.Module) -> None:
    """Restore a swapped model, or a deep copy of one. Raises ValueError if it is not swapped."""
    if not is_swapped(model):
        raise ValueError(
            "model: expected one that swap_decoder has swapped, got one that runs its own decoder; "
            "pass the swapped model, once"
        )
    holder, structure = holder_of(model)
    for name in TOPS if structure == DECO else (*TOPS, *TOPS_WITH_FEATURES):
        del holder.get_submodule(name).forward
    del holder.get_submodule("x_embedder").fused_positions
    if structure == DECO:
        detach_halves(model)
        detach_losses(model)
    else:
        detach_forward(holder)


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
    last = parts.dec_net if parts.final_layer is None else parts.final_layer
    for root, top in parts.tops.items():
        for name, module in top.named_modules(prefix=root):
            # The output of the last module does not change, so hooks that run after it stay valid.
            kinds = _HOOKS[1:2] if module is last else _HOOKS
            if any(getattr(module, kind, None) for kind in kinds):
                yield name

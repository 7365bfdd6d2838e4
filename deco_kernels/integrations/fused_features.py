"""The fused forwards of a swapped decoder whose query takes features of a condition and whose head has an RMSNorm.

Source: CoD-Lite (arXiv 2604.12525) and Mage-VAE (arXiv 2607.19064), whose forward concatenates the unfolded pixels and
`y_embedder_x(cond)`, and calls `x_embedder`, `dec_net` and `final_layer` on the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deco_kernels import ops
from deco_kernels.integrations.fused_forward import FusedForward, refuse_odd_size, remove_methods
from deco_kernels.model.pixel_decoder import fold_head_norm, fold_query_features


class FusedForwardWithFeatures(FusedForward):
    """The forwards of `y_embedder_x`, `x_embedder`, `dec_net` and `final_layer` after the swap.

    `y_embedder_x` keeps the condition for the next call of `dec_net` in the same thread and returns an image without
    channels, so that the model concatenates only pixels. `dec_net` returns the velocity, `final_layer` passes it on.
    """

    def forwards(self) -> dict[str, Callable[..., torch.Tensor]]:
        return super().forwards() | {"y_embedder_x": self.features, "final_layer": self.finish}

    def features(self, cond: torch.Tensor) -> torch.Tensor:
        """Replaces the forward of `y_embedder_x`: cond [B, Zq, h, w] → no features, [B, 0, h, w]."""
        self.call.cond = cond
        return cond[:, :0]

    def decode(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Replaces the forward of `dec_net`: pixels [T, P, C] and tokens [T, Z] → velocity [T, P, C].

        Raises RuntimeError without a preceding call of `y_embedder_x`; otherwise as that of DeCo.
        """
        self.check(pixels)
        cond, self.call.cond = self.call.cond, None
        if cond is None:
            raise RuntimeError(
                "dec_net: expected a call of y_embedder_x before it in the same thread, got none; after the swap "
                "dec_net takes the condition from it, so checkpoint or compile the decoder as a whole"
            )
        parts, feature_map = self.parts, self.parts.feature_map
        assert feature_map is not None and feature_map.bias is not None
        p, up = parts.patch_size, parts.up
        images = pixels.transpose(1, 2).unflatten(2, (p, p))
        query_weight, query_bias = fold_query_features(
            feature_map.weight.flatten(1), feature_map.bias, self._columns()[1], parts.input.weight
        )
        options: dict[str, Any] = dict(patch_size=p, eps=parts.eps, backend=self.backend, head_norm="rms")
        options |= dict(query_weight=query_weight, query_bias=query_bias, save_memory=self.save_memory)
        query_tokens = cond.flatten(2).transpose(1, 2).flatten(0, 1).to(tokens.dtype)
        weights = (up.weight, up.bias, *self.weights())
        velocity = ops.pixel_decoder_from_tokens(images, tokens, *weights, query_tokens=query_tokens, **options)
        return velocity.flatten(2).transpose(1, 2)

    def finish(self, velocity: torch.Tensor) -> torch.Tensor:
        """Replaces the forward of `final_layer`: returns what `dec_net` returned."""
        return velocity

    def embed_weight(self) -> torch.Tensor:
        pixel, _, position = self._columns()
        return torch.cat((pixel, position), dim=1)

    def head_weight(self) -> torch.Tensor:
        norm = self.parts.head_norm
        assert norm is not None and isinstance(norm.weight, torch.Tensor)
        return fold_head_norm(self.parts.head.weight, norm.weight)

    def _columns(self) -> tuple[torch.Tensor, ...]:
        """The columns of the embedder's weight for pixel, features and position."""
        channels, width = self.parts.channels, self.parts.input.in_features
        weight = self.parts.embed.weight
        return weight.split((channels, width, weight.shape[1] - channels - width), dim=1)


class ConditionedForward:
    """`forward` of the model that calls the four: its own, which leaves no condition behind if it raises.

    Holds modules, not tensors, so that deep copies, `.to()` and `load_state_dict` take effect.
    """

    def __init__(self, model: nn.Module, fused: FusedForwardWithFeatures):
        self.model, self.fused = model, fused

    def forward(self, *inputs: Any, **options: Any) -> Any:
        try:
            return type(self.model).forward(self.model, *inputs, **options)
        except RuntimeError as error:
            refuse_odd_size(error, self.fused, (*inputs, *options.values()))
            raise
        finally:
            self.fused.call.cond = None


def attach_forward(model: nn.Module, fused: FusedForwardWithFeatures) -> None:
    """Give a swapped model its `ConditionedForward`, unless its forward is replaced."""
    if "forward" not in vars(model):
        model.forward = ConditionedForward(model, fused).forward


def detach_forward(model: nn.Module) -> None:
    """Remove what `attach_forward` has added to the model."""
    remove_methods(model, ConditionedForward, "forward")

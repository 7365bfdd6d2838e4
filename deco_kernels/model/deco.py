"""DeCo: the trunk models semantics on patches, the per-pixel decoder adds the detail at full resolution.

Source: DeCo (arXiv 2511.19365), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from deco_kernels.model.dit import Trunk
from deco_kernels.model.pixel_decoder import PixelDecoder


class DeCo(nn.Module):
    """Class-to-image pixel diffusion model: velocity = decoder(x, SiLU(time embedding + trunk tokens)).

    Args:
        width, depth, heads, num_classes, patch_size, channels, mlp_width: of the trunk, see `Trunk`.
        decoder_width, decoder_depth, decoder_patch, interaction, save_memory, backend: of the decoder, see
            `PixelDecoder`.

    `config` holds the arguments: `DeCo(**model.config)` builds the same model afresh.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        num_classes: int,
        patch_size: int = 16,
        channels: int = 3,
        mlp_width: int | None = None,
        decoder_width: int = 32,
        decoder_depth: int = 3,
        decoder_patch: int = 1,
        interaction: str = "adaln",
        save_memory: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        image = dict(patch_size=patch_size, channels=channels)
        trunk = dict(width=width, depth=depth, heads=heads, num_classes=num_classes, mlp_width=mlp_width)
        shared = dict(decoder_patch=decoder_patch, interaction=interaction, save_memory=save_memory, backend=backend)
        self.config = {**trunk, **image, "decoder_width": decoder_width, "decoder_depth": decoder_depth, **shared}
        self.trunk = Trunk(**trunk, **image)
        self.decoder = PixelDecoder(width, width=decoder_width, depth=decoder_depth, **image, **shared)

    @property
    def null_label(self) -> int:
        """Label of the null class."""
        return self.trunk.num_classes

    def reset_parameters(self) -> None:
        """Initialise in place; a fresh model returns exactly 0."""
        self.trunk.reset_parameters()
        self.decoder.reset_parameters()

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, features_after: int | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Predict the velocity.

        Args:
            x: noised image [B, C, H, W], floating; H and W multiples of patch_size, not necessarily equal.
            t: times [B] in [0, 1], 0 noise, 1 image.
            y: labels [B], int64 or int32; `null_label` is the null class.
            features_after: number of a trunk block, counted from 1.

        Returns:
            Velocity [B, C, H, W] in the activation dtype (that of the parameters, or autocast's); with
            `features_after` the pair (velocity, tokens [B, L, Z] after that block).
        """
        self.trunk.check_inputs(x, t, y)
        if features_after is not None and not 1 <= features_after <= len(self.trunk.blocks):
            raise ValueError(
                f"features_after: expected a block from 1 to {len(self.trunk.blocks)}, got {features_after}"
            )
        tokens, time, _, features = self.trunk(x, t, y, features_after)
        velocity = self.decoder(x, F.silu(time[:, None] + tokens))
        return velocity if features_after is None else (velocity, features)

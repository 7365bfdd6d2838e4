"""The text-to-image model: a trunk conditioned on text features, and the same per-pixel decoder.

Source: DeCo (arXiv 2511.19365), section 4, and the published text-to-image checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deco_kernels.model.arguments import require_sizes, require_tensors
from deco_kernels.model.deco import PixelDiffusion
from deco_kernels.model.dit import Attention, Block, PatchTransformer, RMSNorm, reset_by_default
from deco_kernels.model.pixel_decoder import PixelDecoder
from deco_kernels.model.position import rotary_angles

ROTARY_MODES = ("published", "corrected")


class PackedSwiGLU(nn.Module):
    """`SwiGLU` with one input matrix: w2·(SiLU(gate)·up), gate and up the two halves of w13·x, without biases."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w13 = nn.Linear(width, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class TextAttention(Attention):
    """Attention of the patches x [B, L, Z] to each other and to the text [B, S, Z].

    The text adds keys (with the RMS norm of the patches' keys, not rotated) and values. Its padding is not masked.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.text_kv = nn.Linear(width, 2 * width, bias=False)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, rotation: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = self.queries_keys_values(x, rotation)
        text_k, text_v = self.text_kv(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attend(q, torch.cat((k, self.k_norm(text_k)), dim=2), torch.cat((v, text_v), dim=2))


class TextTrunk(PatchTransformer):
    """Text-conditional transformer on patches.

    RMSNorm(text_embed(features)) + text_position passes through the text blocks and gives the image blocks additional
    keys and values. All blocks are modulated by c = SiLU(time embedding).

    Args:
        width: Z, token width.
        depth: number of image blocks.
        heads: number of attention heads; Z/heads must be a multiple of 4.
        text_depth: number of text blocks.
        text_width, text_length: sizes of the text features [B, text_length, text_width].
        patch_size: edge of a patch in pixels.
        channels: image channels.
        mlp_width: hidden width of the SwiGLU, 4·Z by default.
        rotary: "published" places patch columns on linspace(0, H/p, W/p) and rows on linspace(0, W/p, H/p), as the
            published model does. "corrected" ends columns at W/p and rows at H/p. Both agree on square images.

    Raises TypeError or ValueError for invalid arguments.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        text_depth: int,
        text_width: int,
        text_length: int,
        patch_size: int,
        channels: int = 3,
        mlp_width: int | None = None,
        rotary: str = "published",
    ):
        if rotary not in ROTARY_MODES:
            raise ValueError(f"rotary: expected one of {list(ROTARY_MODES)}, got {rotary!r}; choose one of them")
        image = dict(patch_size=patch_size, channels=channels)
        text = dict(text_depth=text_depth, text_width=text_width, text_length=text_length)
        super().__init__(width=width, depth=depth, heads=heads, mlp_width=mlp_width, **image, **text)
        self.rotary, self.text_width, self.text_length = rotary, text_width, text_length
        hidden = 4 * width if mlp_width is None else mlp_width
        self.text_embed = nn.Linear(text_width, width)
        self.text_norm = RMSNorm(width)
        self.text_position = nn.Parameter(torch.empty(1, text_length, width))
        self.text_blocks = nn.ModuleList(
            Block(width, Attention(width, heads), PackedSwiGLU(width, hidden)) for _ in range(text_depth)
        )
        self.blocks = nn.ModuleList(
            Block(width, TextAttention(width, heads), PackedSwiGLU(width, hidden)) for _ in range(depth)
        )
        self.reset_parameters()

    def reset_condition(self) -> None:
        """Initialize the text positions from N(0, 1) and the other text parameters by PyTorch's defaults."""
        for module in (self.text_embed, self.text_norm, self.text_blocks):
            reset_by_default(module)
        nn.init.normal_(self.text_position)

    def rotary_angles(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Rotary angles for a grid of patches, float32 [rows·columns, Z/heads/2]."""
        extent = (rows, columns) if self.rotary == "published" else (columns, rows)
        return rotary_angles(rows, columns, self.width // self.heads, device, extent=extent)

    def check_inputs(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> None:
        """Raise TypeError or ValueError unless x [B, C, H, W], t [B] and y [B, text_length, text_width] fit."""
        self.check_image(x, t)
        require_tensors(y=y)
        expected = (x.shape[0], self.text_length, self.text_width)
        if y.shape != expected:
            raise ValueError(
                f"y: expected text features {list(expected)} for the batch of x, got {list(y.shape)}; encode prompts "
                "padded or truncated to the model's text_length and text_width"
            )
        if not y.is_floating_point():
            raise TypeError(f"y: expected floating-point text features, got {y.dtype}; convert them with .float()")

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, features_after: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run the trunk on x [B, C, H, W], t [B] and text features y [B, text_length, text_width].

        Raises TypeError or ValueError for arguments that do not fit.

        Returns:
            (tokens [B, L, Z] in row-major patch order, time embedding [B, Z], condition c = SiLU(time) [B, Z], and the
            tokens after image block `features_after`, counted from 1, or None).
        """
        self.check_inputs(x, t, y)
        time = self.time_embed(t)
        c = F.silu(time)
        text = self.text_norm(self.text_embed(y.to(self.text_embed.weight.dtype))) + self.text_position
        for block in self.text_blocks:
            text = block(text, c)
        tokens, features = self.transform(x, c, text, features_after=features_after)
        return tokens, time, c, features


class DeCoTextToImage(PixelDiffusion):
    """Text-to-image pixel diffusion model; the condition y is text features [B, text_length, text_width], floating.

    Args:
        width, depth, heads, text_depth, text_width, text_length, patch_size, channels, mlp_width, rotary: arguments of
            the trunk, see `TextTrunk`.
        decoder_width, decoder_depth, save_memory, backend: arguments of the decoder, see `PixelDecoder`.

    Raises TypeError or ValueError for invalid arguments. `config` holds the arguments;
    `DeCoTextToImage(**model.config)` builds another model of the same configuration.
    """

    trunk: TextTrunk

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        text_depth: int = 4,
        text_width: int = 2048,
        text_length: int = 128,
        patch_size: int = 16,
        channels: int = 3,
        mlp_width: int | None = None,
        rotary: str = "published",
        decoder_width: int = 32,
        decoder_depth: int = 3,
        save_memory: bool = False,
        backend: str | None = None,
    ):
        require_sizes(decoder_width=decoder_width, decoder_depth=decoder_depth)
        image: dict[str, Any] = dict(patch_size=patch_size, channels=channels)
        text = dict(text_depth=text_depth, text_width=text_width, text_length=text_length)
        trunk: dict[str, Any] = dict(width=width, depth=depth, heads=heads, mlp_width=mlp_width, rotary=rotary, **text)
        shared: dict[str, Any] = dict(save_memory=save_memory, backend=backend)
        decoder: dict[str, Any] = dict(width=decoder_width, depth=decoder_depth, position_features="text")
        super().__init__(TextTrunk(**trunk, **image), PixelDecoder(width, **decoder, **image, **shared))
        self.config = {**trunk, **image, "decoder_width": decoder_width, "decoder_depth": decoder_depth, **shared}

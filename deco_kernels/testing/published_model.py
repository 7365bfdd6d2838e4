"""The class-to-image model in the published structure: module names, state_dict names and order of operations.

Source: DeCo (arXiv 2511.19365), section 3, and the published checkpoints; for `CodLiteDecoder` CoD-Lite (arXiv
2604.12525). The trunk uses modules of `deco_kernels.model`; the decoder is plain PyTorch on [tokens, pixels of a patch,
channels].
`deco_kernels.integrations.swap_decoder` swaps its decoder and `deco_kernels.model.from_published` reads its state_dict.
"""

import torch
import torch.nn.functional as F
from torch import nn

from deco_kernels.model.dit import TIME_FEATURES, Attention, RMSNorm, SwiGLU
from deco_kernels.model.position import pair_rotation, rotary_angles
from deco_kernels.testing.published import POSITION_FEATURES, fold, position_features


class PixelEmbedder(nn.Module):
    """Pixels [T, P, C], P = p², → [T, P, D]: a linear of the pixel's channels, or channels and features, and its 64
    position features."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.embedder = nn.Sequential(nn.Linear(channels + POSITION_FEATURES, width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens, count, _ = pixels.shape
        positions = position_features(round(count**0.5)).to(pixels)
        return self.embedder(torch.cat((pixels, positions.expand(tokens, -1, -1)), dim=-1))


class ResBlock(nn.Module):
    """h + gate·mlp(in_ln(h)·(1 + scale) + shift); h and cond are [..., D], cond gives shift, scale and gate."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.adaLN_modulation(cond).chunk(3, dim=-1)
        return h + gate * self.mlp(self.in_ln(h) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """[..., D] → velocity [..., C]: LayerNorm without affine, then a linear."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, channels)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm_final(h))


class DecoderNet(nn.Module):
    """Embedded pixels [T, P, D] and tokens [T, Z] → velocity [T, P, C], or h [T, P, D] without the final layer."""

    def __init__(
        self,
        channels: int,
        token_width: int,
        width: int,
        depth: int,
        patch_size: int,
        final_layer: bool = True,
    ):
        super().__init__()
        self.cond_embed = nn.Linear(token_width, patch_size**2 * width)
        self.input_proj = nn.Linear(width, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        if final_layer:
            self.final_layer = FinalLayer(width, channels)

    def forward(self, h: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        h = self.input_proj(h)
        cond = self.cond_embed(tokens).reshape(h.shape)
        for block in self.res_blocks:
            h = block(h, cond)
        return self.final_layer(h) if hasattr(self, "final_layer") else h


class RmsFinalLayer(nn.Module):
    """[..., D] → [..., C]: RMSNorm with a weight, then a linear."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = nn.Linear(width, channels)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(h))


class CodLiteDecoder(nn.Module):
    """The per-pixel decoder of CoD-Lite: image [B, C, H, W], tokens [T, Z] of the trunk and condition
    [B, Zq, H/p, W/p] → [B, C, H, W].

    Pixels and D features per pixel of the condition (a 1x1 convolution) are concatenated and embedded together.
    """

    def __init__(
        self,
        token_width: int,
        query_width: int,
        width: int = 32,
        depth: int = 3,
        patch_size: int = 16,
        channels: int = 3,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.y_embedder_x = nn.Conv2d(query_width, width * patch_size**2, 1)
        self.x_embedder = PixelEmbedder(channels + width, width)
        self.dec_net = DecoderNet(channels, token_width, width, depth, patch_size, final_layer=False)
        self.final_layer = RmsFinalLayer(width, channels)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        pixels = self.patch_size**2
        patches = F.unfold(image, kernel_size=self.patch_size, stride=self.patch_size)
        joined = torch.cat((patches, self.y_embedder_x(cond).flatten(2)), dim=1)  # [B, (C + F)·P, L]
        per_pixel = joined.unflatten(1, (-1, pixels)).permute(0, 3, 2, 1).flatten(0, 1)
        h = self.dec_net(self.x_embedder(per_pixel), tokens)
        return fold(self.final_layer(h), image.shape, self.patch_size)


class PatchEmbedder(nn.Module):
    """Unfolded patches [B, L, C·p²] → [B, L, Z]."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.proj = nn.Linear(features, width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.proj(patches)


class TimeEmbedder(nn.Module):
    """Times [B] → [B, Z]: 256 features cos‖sin(t·10^(-i/128)), then Linear, SiLU, Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = TIME_FEATURES // 2
        angle = t[:, None] * 10.0 ** (-torch.arange(half, device=t.device) / half)
        features = torch.cat((angle.cos(), angle.sin()), dim=-1)
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        return self.mlp(features.to(first.weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels [B] → [B, Z]; the last row of the table is the null class."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(y)


class TrunkBlock(nn.Module):
    """Attention and SwiGLU, each after an adaptive RMS norm and followed by a gate."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = SwiGLU(width, int(2 * 4 * width / 3))
        self.adaLN_modulation = nn.Sequential(nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rotation)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PublishedDeCo(nn.Module):
    """Image [B, C, H, W], times [B], labels [B] → velocity [B, C, H, W], in plain PyTorch."""

    def __init__(
        self,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        num_classes: int = 10,
        patch_size: int = 16,
        channels: int = 3,
        decoder_width: int = 32,
        decoder_depth: int = 3,
    ):
        super().__init__()
        self.patch_size, self.head_dim = patch_size, width // heads
        self.x_embedder = PixelEmbedder(channels, decoder_width)
        self.s_embedder = PatchEmbedder(channels * patch_size**2, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.blocks = nn.ModuleList(TrunkBlock(width, heads) for _ in range(depth))
        self.dec_net = DecoderNet(channels, width, decoder_width, decoder_depth, patch_size)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Decoder linears and patch embedding Xavier-uniform with zero bias; decoder modulation and head zero."""
        for part in (self.x_embedder, self.dec_net, self.s_embedder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        modulations = [block.get_parameter("adaLN_modulation.1.weight") for block in self.dec_net.res_blocks]
        for weight in (*modulations, self.dec_net.final_layer.linear.weight):
            nn.init.zeros_(weight)
        times = [self.t_embedder.get_parameter(f"mlp.{i}.weight") for i in (0, 2)]
        for weight in (self.y_embedder.embedding_table.weight, *times):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        channels, height, width = x.shape[1:]
        p = self.patch_size
        rotation = pair_rotation(rotary_angles(height // p, width // p, self.head_dim, x.device))
        patches = F.unfold(x, kernel_size=p, stride=p).transpose(1, 2)  # [B, L, C·p²]
        time = self.t_embedder(t)[:, None]
        c = F.silu(time + self.y_embedder(y)[:, None])
        tokens = self.s_embedder(patches)
        for block in self.blocks:
            tokens = block(tokens, c, rotation)
        tokens = F.silu(time + tokens).flatten(0, 1)
        pixels = patches.reshape(-1, channels, p * p).transpose(1, 2)  # [T, P, C]
        velocity = self.dec_net(self.x_embedder(pixels), tokens)
        return fold(velocity, x.shape, p)

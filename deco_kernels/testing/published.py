"""The published formulation of decoder and losses in eager PyTorch, the baseline of comparisons and timings.

Source: DeCo (arXiv 2511.19365), section 3, and the published checkpoints. The decoder unfolds the image, concatenates
pixels and positions, runs the two input linears one after the other and evaluates SiLU(cond) in every block; the losses
transform prediction and target separately. `deco_kernels.testing.published_model` has the decoder as modules.
"""

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from deco_kernels import flow
from deco_kernels.backends.reference import flow_matching_loss as reference
from deco_kernels.backends.reference.common import constant
from deco_kernels.flow.objective import Objective
from deco_kernels.model.deco import DeCo
from deco_kernels.model.pixel_decoder import PixelDecoder, TrainingLoss, upsample
from deco_kernels.signatures import BLOCK, OPS

EPS = 1e-6  # of LayerNorm, the default of the ops
POSITION_FEATURES = 64
_BLOCK_WEIGHTS = OPS["adaln_block"].names[2:]


def position_features(patch_size: int) -> torch.Tensor:
    """Position features of the class-conditional model for a patch's pixels, float32 [P, 64].

    cos(pi u f_i) cos(pi v f_j) / (1 + f_i f_j) at index 8 i + j, i over the frequencies in x.
    """
    frequencies = torch.linspace(0, 8, 8)
    waves = torch.cos(math.pi * torch.linspace(0, 1, patch_size)[:, None] * frequencies)
    decay = 1 / (1 + frequencies[:, None] * frequencies)
    grid = waves[None, :, :, None] * waves[:, None, None, :] * decay  # [ky, kx, i, j]
    return grid.reshape(patch_size**2, POSITION_FEATURES)


def fold(pixels: torch.Tensor, shape: torch.Size, patch_size: int) -> torch.Tensor:
    """[T, P, C] -> [B, C, H, W], as F.fold, which fails under torch.compile on the CPU."""
    batch, channels, height, width = shape
    grid = pixels.reshape(batch, height // patch_size, width // patch_size, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(shape)


def decoder(tensors: Mapping[str, torch.Tensor], cond: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The published decoder: velocity [B, C, H, W].

    Args:
        tensors: the arguments of `ops.pixel_decoder` by name, with pixel_weight and pixel_table replaced by the
            input linears emb_weight [D, C + 64], emb_bias [D], in_weight [D, D], in_bias [D] and by positions [P, 64].
        cond: [..., P, D], one condition per pixel.
        patch_size: p.
    """
    image = tensors["image"]
    channels, pixels = image.shape[1], patch_size**2
    patches = F.unfold(image, kernel_size=patch_size, stride=patch_size).transpose(1, 2)
    patches = patches.reshape(-1, channels, pixels).transpose(1, 2)  # [T, P, C]
    positions = tensors["positions"].expand(len(patches), -1, -1).to(patches.dtype)
    h = F.linear(torch.cat((patches, positions), dim=-1), tensors["emb_weight"], tensors["emb_bias"])
    h = F.linear(h, tensors["in_weight"], tensors["in_bias"])
    cond = cond.reshape(h.shape)
    for weights in zip(*(tensors[name] for name in _BLOCK_WEIGHTS), strict=True):
        h = block(h, cond, *weights)
    velocity = F.linear(F.layer_norm(h, h.shape[-1:], eps=EPS), tensors["head_weight"], tensors["head_bias"])
    return fold(velocity, image.shape, patch_size)


def block(
    h: torch.Tensor,
    cond: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    mod_weight: torch.Tensor,
    mod_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
) -> torch.Tensor:
    """One decoder block on h and cond [..., D]."""
    shift, scale, gate = F.linear(F.silu(cond), mod_weight, mod_bias).chunk(3, dim=-1)
    normed = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, EPS)
    modulated = normed * (1 + scale) + shift
    return h + gate * F.linear(F.silu(F.linear(modulated, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def losses(
    pred: torch.Tensor, target: torch.Tensor, frequency_weight: torch.Tensor, frequency_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, pixel, frequency), scalars in the dtype of target [B, 3, H, W]; frequency_weight is [3, 8, 8]."""
    pred = pred.to(target.dtype)
    pixel = ((pred - target) ** 2).mean()
    difference = _dct(pred) - _dct(target)
    frequency = (frequency_weight[:, None, None] * difference**2).mean()
    return pixel + frequency_scale * frequency, pixel, frequency


def _dct(image: torch.Tensor) -> torch.Tensor:
    """DCT coefficients of YCbCr, [B, 3, H/8, W/8, 8, 8]: per channel, padded, split into blocks."""
    red, green, blue = image.unbind(1)
    ycbcr = torch.stack(
        [weights[0] * red + weights[1] * green + weights[2] * blue for weights in reference.RGB_TO_YCBCR], dim=1
    )
    height, width = image.shape[-2:]
    side = BLOCK
    ycbcr = F.pad(ycbcr, (0, -width % side, 0, -height % side), mode="reflect")
    blocks = ycbcr.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).transpose(-2, -3)
    dct = constant(reference.DCT, image)
    return dct @ blocks @ dct.T


class EagerDecoder(PixelDecoder):
    """`PixelDecoder` with decoder patch 1 and AdaLN interaction, without the fused ops. Same parameters."""

    def forward(
        self,
        image: torch.Tensor,
        tokens: torch.Tensor,
        loss: TrainingLoss | None = None,
        query_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The velocity; `loss` and `query_tokens` must be None."""
        assert loss is None and query_tokens is None
        tensors = {
            **dict(self.named_parameters()),
            "image": image,
            "positions": self.position_features,
            "emb_weight": self.embed_weight,
            "emb_bias": self.embed_bias,
            "in_weight": self.input_weight,
            "in_bias": self.input_bias,
        }
        cond = upsample(tokens, self.up_weight, self.up_bias, self.width)
        return decoder(tensors, cond, self.patch_size)


def eager_view(decoder: PixelDecoder) -> EagerDecoder:
    """An `EagerDecoder` that shares the decoder's parameters."""
    view = copy.copy(decoder)
    view.__class__ = EagerDecoder
    assert isinstance(view, EagerDecoder)
    return view


def eager_twin(model: DeCo) -> DeCo:
    """A deep copy of the model whose decoder is an `EagerDecoder`."""
    twin = copy.deepcopy(model)
    twin.decoder = eager_view(twin.decoder)
    return twin


class EagerObjective(Objective):
    """`flow.Objective` in plain PyTorch, without label dropout and REPA.

    Noise and times are drawn in the same order and precision, then cast to the dtype of the model's parameters.
    """

    def forward(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        y, drawn, noise = self.draw(x, y, generator)
        dtype = next(model.parameters()).dtype
        x_t, target = (tensor.to(dtype) for tensor in flow.interpolate(x, noise, drawn))
        pred = model(x_t, drawn, y)
        total, pixel, frequency = losses(pred, target, self.frequency_weight.to(dtype), self.frequency_scale)
        return {"total": total, "pixel": pixel, "frequency": frequency, "t": drawn}

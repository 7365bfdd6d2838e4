"""The eager contender: the same DeCo model and losses in plain PyTorch, in the published formulation.

Its decoder unfolds the image, concatenates pixels and positions, runs the unfolded input linears and evaluates
SiLU(cond) in every block; its loss transforms prediction and target separately.
"""

import copy
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.flow_matching_loss import PROBLEM as LOSS  # noqa: E402
from benchmarks.pixel_decoder import published_decoder  # noqa: E402
from benchmarks.sizes import Size  # noqa: E402
from deco_kernels import flow  # noqa: E402
from deco_kernels.model import DeCo, PixelDecoder  # noqa: E402
from deco_kernels.model.pixel_decoder import upsample  # noqa: E402


class EagerDecoder(PixelDecoder):
    """`PixelDecoder` with decoder patch 1 and AdaLN interaction, without the fused ops. Same parameters."""

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = image.shape
        sizes = dict(decoder_width=self.width, depth=self.depth, token_width=self.token_width)
        size = Size(batch, height, width, channels, self.patch_size, **sizes)
        tensors = {
            **dict(self.named_parameters()),
            "image": image,
            "positions": self.position_features,
            "emb_weight": self.embed_weight,
            "emb_bias": self.embed_bias,
            "in_weight": self.input_weight,
            "in_bias": self.input_bias,
        }
        return published_decoder(tensors, upsample(tokens, self.up_weight, self.up_bias, self.width), size)


def eager_twin(model: DeCo) -> DeCo:
    """A copy of the model, values included, whose decoder is an `EagerDecoder`."""
    fused = model.decoder
    sizes = dict(width=fused.width, depth=fused.depth, patch_size=fused.patch_size, channels=fused.channels)
    twin = copy.deepcopy(model)
    twin.decoder = EagerDecoder(fused.token_width, eps=fused.eps, **sizes).to(fused.up_weight.dtype)
    twin.decoder.load_state_dict(fused.state_dict())
    return twin


class EagerObjective(flow.Objective):
    """`flow.Objective` without label dropping and REPA, its losses in plain PyTorch.

    Noise and times are drawn in the same order and precision, then cast to the dtype of the model's parameters.
    """

    def forward(self, model, x, y, generator=None):
        drawn = flow.sample_time(
            len(x), distribution=self.distribution, shift=self.shift, generator=generator, device=x.device
        )
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        dtype = next(model.parameters()).dtype
        x_t, target = (tensor.to(dtype) for tensor in flow.interpolate(x, noise, drawn))
        pred = model(x_t, drawn, y)
        weight = self.frequency_weight.to(dtype)
        tensors = {"pred": pred, "target": target, "frequency_weight": weight}
        total, pixel, frequency = LOSS.published(tensors, None)
        return {"total": total, "pixel": pixel, "frequency": frequency, "repa": None, "t": drawn}

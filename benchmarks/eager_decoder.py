"""The published decoder as a module, and views of a model that run other parts on the same parameters."""

import copy

import torch
from torch import nn

from benchmarks.pixel_decoder import published_decoder
from benchmarks.sizes import Size
from deco_kernels.model import PixelDecoder
from deco_kernels.model.pixel_decoder import upsample


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


def eager_view(decoder: PixelDecoder) -> EagerDecoder:
    """The decoder's own parameters behind the published forward."""
    view = copy.copy(decoder)
    view.__class__ = EagerDecoder
    return view


def backend_view(decoder: PixelDecoder, backend: str) -> PixelDecoder:
    """The decoder's own parameters behind a chosen backend."""
    view = copy.copy(decoder)
    view.backend = backend
    return view


def with_parts(model: nn.Module, **parts: nn.Module) -> nn.Module:
    """The model's own parameters, with other submodules of the given names; the model stays as it is."""
    view = copy.copy(model)
    view._modules = {**model._modules, **parts}
    return view

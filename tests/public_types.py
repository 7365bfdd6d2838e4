"""Types of public names as a type checker sees them. `make lint` checks this file; nothing runs it."""

from torch import Tensor
from typing_extensions import assert_type

import deco_kernels
from deco_kernels import flow, integrations, model, ops


def check(image: Tensor, cond: Tensor, decoder: model.PixelDecoder, network: model.DeCo) -> None:
    assert_type(deco_kernels.__version__, str)
    assert_type(deco_kernels.ops.frequency_loss(image, image, cond), Tensor)
    assert_type(ops.flow_matching_loss(image, image, cond), tuple[Tensor, Tensor, Tensor])
    assert_type(decoder.fold_input(), tuple[Tensor, Tensor])
    assert_type(network.trunk, model.Trunk)
    assert_type(network.decoder, model.PixelDecoder)
    assert_type(flow.shift_time(cond, 1.0), Tensor)
    assert_type(integrations.is_swapped(network), bool)
    deco_kernels.use_backend("cpu")

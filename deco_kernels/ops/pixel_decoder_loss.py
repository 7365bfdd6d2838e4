"""pixel_decoder_loss: the per-pixel decoder and its training loss as one op, gradients included."""

from typing import Any

import torch

from deco_kernels.backends.support import Request
from deco_kernels.ops import checks
from deco_kernels.ops.one_pass import define_one_pass_op
from deco_kernels.ops.registry import chosen_backend
from deco_kernels.signatures import OPS


def pixel_decoder_loss(
    image: torch.Tensor,
    cond: torch.Tensor,
    target: torch.Tensor,
    pixel_weight: torch.Tensor,
    pixel_table: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    mod_weight: torch.Tensor,
    mod_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor,
    frequency_weight: torch.Tensor,
    *,
    patch_size: int,
    frequency_scale: float = 1.0,
    sample_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`flow_matching_loss(pixel_decoder(image, cond, ...), target, ...)` as one op, for training.

    With velocity = pixel_decoder(image, cond, ...):

        total, pixel, frequency = flow_matching_loss(velocity, target, frequency_weight, ...)

    If a gradient is wanted, the forward computes the gradients of `total` and keeps them; the backward multiplies them
    by the incoming gradient. Without gradients only the losses are computed. Activation checkpointing runs the op
    twice.

    Args:
        image: [B, 3, H, W], the noised image, any strides; float32, bfloat16 or float16. H and W at least 5.
        cond: [..., P, D], as in `pixel_decoder`. Its dtype is the activation dtype; under autocast, float32 is cast to
            the autocast dtype.
        target: [B, 3, H, W], any strides; float32, bfloat16 or float16.
        pixel_weight ... head_bias: the weights of `pixel_decoder`, for C = 3.
        frequency_weight: [3, 8, 8] for Y, Cb, Cr; row = vertical frequency. See `jpeg_frequency_weight`.
        patch_size: p, a divisor of H and W.
        frequency_scale: weight of the frequency part.
        sample_weight: [B], or None for ones; not renormalized.
        eps: added to the variance in LayerNorm.
        backend: as in `pixel_decoder`.

    Returns:
        (total, pixel, frequency), float32 scalars (float64 for float64 arguments); zeros for an empty batch. Only
        `total` is differentiable, with respect to every tensor argument. For gradients of `pixel` or `frequency`, use
        `pixel_decoder` and `flow_matching_loss`.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `pixel_decoder` and `flow_matching_loss`.
    """
    name = "pixel_decoder_loss"
    blocks = (norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    weights = (pixel_weight, pixel_table, *blocks, head_weight, head_bias, frequency_weight)
    given = (image, cond, target, *weights) + (() if sample_weight is None else (sample_weight,))
    patch_size = checks.check_decoder(name, given, patch_size)
    checks.check_loss_images(name, "image", image)
    frequency_scale = checks.check_number(name, "frequency_scale", frequency_scale)
    eps = checks.check_eps(name, eps)
    (cond,) = checks.autocast_activation(cond)
    options = (patch_size, frequency_scale, eps, chosen_backend(backend))
    total, pixel, frequency = _pixel_decoder_loss(image, cond, target, *weights, sample_weight, *options)
    return total, pixel, frequency


# --- operators -------------------------------------------------------------------------------------------------------

_NAMES = OPS["pixel_decoder_loss"].names
_NORM_WEIGHT, _PATCH_SIZE = _NAMES.index("norm_weight"), len(_NAMES)


def _request(*arguments: Any) -> Request:
    image, cond, target = arguments[:3]
    depth, width = arguments[_NORM_WEIGHT].shape
    dtypes = (cond.dtype, image.dtype, target.dtype)
    patch_size, channels = arguments[_PATCH_SIZE], image.shape[1]
    return Request("pixel_decoder_loss", image.device.type, dtypes, width, depth, patch_size, channels)


def _fake_losses(image: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    dtype = torch.float64 if image.dtype is torch.float64 else torch.float32
    return tuple(image.new_empty((), dtype=dtype) for _ in range(3))


_pixel_decoder_loss = define_one_pass_op(
    "pixel_decoder_loss",
    "int patch_size, float frequency_scale, float eps",
    ("total", "pixel", "frequency"),
    _request,
    _fake_losses,
)

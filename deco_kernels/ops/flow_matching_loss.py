"""flow_matching_loss and frequency_loss: the training loss in pixels and in the 8x8 DCT domain of YCbCr."""

from typing import Any

import torch

from deco_kernels.backends.support import Request
from deco_kernels.ops import checks
from deco_kernels.ops.kept_gradient import define_loss_op
from deco_kernels.ops.registry import chosen_backend

# ITU-T T.81 (JPEG), Annex K, tables K.1 and K.2
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)


def flow_matching_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    *,
    frequency_scale: float = 1.0,
    sample_weight: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flow-matching loss of DeCo (arXiv 2511.19365, section 3): squared error in pixels plus frequency-weighted error.

    With d = pred - target, R the reflection padding at bottom and right to multiples of 8, M the RGB -> YCbCr matrix
    and F the orthonormal 8x8 block DCT-II (the frequency mean is over the padded size):

        pixel     = 1/B * sum_b sample_weight[b] * mean(d_b ** 2)
        frequency = 1/B * sum_b sample_weight[b] * mean(frequency_weight * F(R M d_b) ** 2)
        total     = pixel + frequency_scale * frequency

    Args:
        pred, target: [B, 3, H, W], any strides, each float32, bfloat16 or float16; H and W at least 5.
        frequency_weight: [3, 8, 8] for Y, Cb, Cr; row = vertical frequency. See `jpeg_frequency_weight`.
        frequency_scale: weight of the frequency part.
        sample_weight: [B], or None for ones; not renormalized.
        backend: as in `pixel_decoder`.

    Returns:
        (total, pixel, frequency), float32 scalars (float64 for float64 arguments), each differentiable with respect to
        every tensor argument; zeros for an empty batch.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `pixel_decoder`.
    """
    _check("flow_matching_loss", pred, target, frequency_weight, sample_weight)
    frequency_scale = checks.check_number("flow_matching_loss", "frequency_scale", frequency_scale)
    inputs = (pred, target, frequency_weight, sample_weight)
    total, pixel, frequency = _flow_matching_loss(*inputs, frequency_scale, chosen_backend(backend))
    return total, pixel, frequency


def frequency_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    *,
    sample_weight: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Only the frequency part of `flow_matching_loss`; arguments, dtype of the result and errors are the same."""
    _check("frequency_loss", pred, target, frequency_weight, sample_weight)
    inputs = (pred, target, frequency_weight, sample_weight)
    frequency: torch.Tensor = _frequency_loss(*inputs, chosen_backend(backend))
    return frequency


def jpeg_frequency_weight(
    quality: int = 85, mode: str = "inv_gamma", gamma: float = 1.0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Frequency weights from the JPEG quantization tables (DeCo, arXiv 2511.19365, section 3; ITU-T T.81, Annex K).

    Q = clamp(floor((table*s + 50)/100), 1, 255) with s = 5000/quality below 50, else 200 - 2*quality. The weight is 1/Q
    ("inv") or (mean(Q)/Q)**gamma ("inv_gamma"), divided by its mean, separately for luminance and chrominance.

    Args:
        quality: 1 to 100. At 100 every weight is 1.
        mode: "inv_gamma" or "inv".
        gamma: exponent of "inv_gamma".
        device: device of the result; None for PyTorch's default device.

    Returns:
        float32 [3, 8, 8] for Y, Cb, Cr; row = vertical frequency.

    Raises:
        TypeError: quality or gamma is not a number.
        ValueError: quality outside 1 to 100, an unknown mode, or a gamma so large that the weights overflow.
    """
    name = "jpeg_frequency_weight"
    checks.check_number(name, "quality", quality)
    gamma = checks.check_number(name, "gamma", gamma)
    if not 1 <= quality <= 100:
        raise ValueError(f"{name}: quality: expected 1 to 100, got {quality}; 85 is the published choice")
    if mode not in ("inv", "inv_gamma"):
        raise ValueError(
            f"{name}: mode: expected 'inv' or 'inv_gamma', got {mode!r}; 'inv_gamma' is the published choice"
        )
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    planes = []
    for table in (_LUMINANCE, _CHROMINANCE):
        quantizer = ((torch.tensor(table, dtype=torch.float64, device="cpu") * scale + 50) / 100).floor().clamp(1, 255)
        weight = 1 / quantizer if mode == "inv" else (quantizer.mean() / quantizer) ** gamma
        planes.append(weight / weight.mean())
    if not all(plane.isfinite().all() for plane in planes):
        raise ValueError(
            f"{name}: gamma: expected an exponent whose weights are finite, got {gamma}; 1 is the published choice"
        )
    luminance, chrominance = planes
    device = torch.get_default_device() if device is None else device
    return torch.stack((luminance, chrominance, chrominance)).to(dtype=torch.float32, device=device)


def _check(
    op: str,
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
) -> None:
    tensors = (pred, target, frequency_weight) + (() if sample_weight is None else (sample_weight,))
    checks.check_tensors(op, tensors)
    checks.check_shapes(op, tensors)
    checks.check_loss_images(op, "pred", pred)


# --- operators -------------------------------------------------------------------------------------------------------


def _request(pred: torch.Tensor, target: torch.Tensor, *_: Any) -> Request:
    return Request("flow_matching_loss", pred.device.type, (pred.dtype, target.dtype))


def _frequency_request(*arguments: Any) -> Request:
    return _request(*arguments)._replace(called_as="frequency_loss")


def _fake_losses(pred: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(pred.new_empty((), dtype=_loss_dtype(pred)) for _ in range(3))


def _fake_frequency_loss(pred: torch.Tensor, *_: Any) -> torch.Tensor:
    return pred.new_empty((), dtype=_loss_dtype(pred))


def _loss_dtype(pred: torch.Tensor) -> torch.dtype:
    return torch.float64 if pred.dtype is torch.float64 else torch.float32


_flow_matching_loss = define_loss_op(
    "flow_matching_loss",
    "float frequency_scale",
    ("total", "pixel", "frequency"),
    _request,
    _fake_losses,
)
_frequency_loss = define_loss_op(
    "frequency_loss",
    "",
    ("frequency",),
    _frequency_request,
    _fake_frequency_loss,
    prefix="frequency_loss_",
)

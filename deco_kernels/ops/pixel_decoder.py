"""pixel_decoder and pixel_decoder_from_tokens: the whole per-pixel decoder as one op."""

from typing import Any

import torch

from deco_kernels.backends.support import Request
from deco_kernels.ops import checks
from deco_kernels.ops.registry import Operation, chosen_backend, define_op
from deco_kernels.signatures import OPS


def pixel_decoder(
    image: torch.Tensor,
    cond: torch.Tensor,
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
    *,
    patch_size: int,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """Per-pixel decoder of DeCo (arXiv 2511.19365, section 3): N AdaLN-modulated MLP blocks of width D on every pixel.

    For pixel k = ky*p + kx of a p x p patch, with y the pixel's row of `cond`:

        h = pixel_weight @ rgb + pixel_table[k]
        for each of the N blocks:
            shift, scale, gate = chunk3(mod_weight @ SiLU(y) + mod_bias)
            m = LayerNorm(h; norm_weight, norm_bias, eps) * (1 + scale) + shift
            h = h + gate * (fc2_weight @ SiLU(fc1_weight @ m + fc1_bias) + fc2_bias)
        velocity = head_weight @ LayerNorm(h; no affine, eps) + head_bias

    Args:
        image: [B, C, H, W], the noised image, any strides; float32, bfloat16 or float16.
        cond: [..., P, D], P = p*p; leading sizes multiply to B*(H/p)*(W/p), patches in row-major order. Its dtype is
            the activation dtype; under autocast, float32 is cast to the autocast dtype.
        pixel_weight, pixel_table: [D, C], [P, D], the query of a pixel.
        norm_weight, norm_bias: [N, D].
        mod_weight, mod_bias: [N, 3D, D] and [N, 3D], rows ordered shift, scale, gate.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: [N, D, D] (out, in) and [N, D].
        head_weight, head_bias: [C, D], [C].
        patch_size: p, a divisor of H and W.
        eps: added to the variance in LayerNorm.
        backend: name of a backend, or None for the choice by `use_backend`, then DECO_KERNELS_BACKEND, then automatic.

    Returns:
        velocity [B, C, H, W], contiguous, in the activation dtype. Gradients flow to every tensor argument; the forward
        saves only its inputs.

    Weights may have any floating dtype. float64 requires every argument in float64 and runs on the reference backend.

    Raises:
        TypeError: an argument that is not a tensor, an unsupported dtype, or mixed devices.
        ValueError: sizes that do not match, or H or W not divisible by p.
        BackendUnavailable: the explicitly chosen backend cannot run the call.
    """
    name = "pixel_decoder"
    blocks = (norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    weights = (pixel_weight, pixel_table, *blocks, head_weight, head_bias)
    patch_size = checks.check_decoder(name, (image, cond, *weights), patch_size)
    eps = checks.check_eps(name, eps)
    (cond,) = checks.autocast_activation(cond)
    velocity: torch.Tensor = _pixel_decoder(image, cond, *weights, patch_size, eps, chosen_backend(backend))
    return velocity


def pixel_decoder_from_tokens(
    image: torch.Tensor,
    tokens: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
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
    *,
    patch_size: int,
    save_memory: bool = True,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """`pixel_decoder` with cond = tokens @ up_weight.T + up_bias, which is not stored as a whole.

    Args:
        image: [B, C, H, W], as in `pixel_decoder`.
        tokens: [..., Z]; leading sizes multiply to B*(H/p)*(W/p), patches in row-major order. Its dtype is the
            activation dtype; under autocast, float32 is cast to the autocast dtype.
        up_weight, up_bias: [P*D, Z], [P*D]; row k*D + d belongs to channel d of pixel k.
        save_memory: whether the backward computes cond again. With False the forward keeps cond [..., P, D] for the
            backward, in the activation dtype, if a gradient is wanted.

    The other arguments, the result and the errors are those of `pixel_decoder`.
    """
    name = "pixel_decoder_from_tokens"
    blocks = (norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    weights = (up_weight, up_bias, pixel_weight, pixel_table, *blocks, head_weight, head_bias)
    patch_size = checks.check_decoder(name, (image, tokens, *weights), patch_size)
    eps = checks.check_eps(name, eps)
    (tokens,) = checks.autocast_activation(tokens)
    save_memory = checks.check_flag(name, "save_memory", save_memory)
    options = (patch_size, eps, chosen_backend(backend))
    velocity: torch.Tensor = _pixel_decoder_from_tokens(image, tokens, *weights, *options, keep_cond=not save_memory)
    return velocity


# --- operators -------------------------------------------------------------------------------------------------------


def _define_decoder(name: str, upsamples: bool) -> Operation:
    names = OPS[name].names
    norm_weight, patch_size = names.index("norm_weight"), len(names)

    def request(*arguments: Any) -> Request:
        image, activation = arguments[:2]
        depth, width = arguments[norm_weight].shape
        dtypes = (activation.dtype, image.dtype)
        return Request(name, image.device.type, dtypes, width, depth, arguments[patch_size], image.shape[1])

    def fake(image: torch.Tensor, activation: torch.Tensor, *_: Any) -> torch.Tensor:
        return image.new_empty(image.shape, dtype=activation.dtype)

    def new_cond(*arguments: Any) -> torch.Tensor:
        tokens, pixel_table = arguments[1], arguments[names.index("pixel_table")]
        return tokens.new_empty((*tokens.shape[:-1], *pixel_table.shape))

    options, cond = "int patch_size, float eps", new_cond if upsamples else None
    return define_op(name, options, ("velocity",), request, fake, new_cond=cond)


_pixel_decoder = _define_decoder("pixel_decoder", upsamples=False)
_pixel_decoder_from_tokens = _define_decoder("pixel_decoder_from_tokens", upsamples=True)

"""pixel_decoder and pixel_decoder_from_tokens: the whole per-pixel decoder as one op."""

import torch

from deco_kernels.ops import checks
from deco_kernels.ops.registry import Request, chosen_backend, define_op
from deco_kernels.signatures import DECODER_WEIGHTS, TENSORS

_SYMBOLS = (
    "[D, C]",
    "[P, D]",
    "[N, D]",
    "[N, D]",
    "[N, 3D, D]",
    "[N, 3D]",
    "[N, D, D]",
    "[N, D]",
    "[N, D, D]",
    "[N, D]",
    "[C, D]",
    "[C]",
)


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
            the activation dtype; under autocast float32 is cast to the autocast dtype.
        pixel_weight, pixel_table: [D, C], [P, D], the query of a pixel.
        norm_weight, norm_bias: [N, D].
        mod_weight, mod_bias: [N, 3D, D] and [N, 3D], rows ordered shift, scale, gate.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: [N, D, D] (out, in) and [N, D].
        head_weight, head_bias: [C, D], [C].
        patch_size: p, a divisor of H and W.
        eps: added to the variance in LayerNorm.
        backend: a backend's name, or None for the choice made by `use_backend`, the environment, or automatically.

    Returns:
        velocity [B, C, H, W], contiguous, in the activation dtype. Gradients flow to every tensor argument; the forward
        keeps its inputs only.

    Weights may have any floating dtype. float64 needs every argument in float64 and runs on the reference backend.

    Raises:
        TypeError: not a tensor, a dtype that is not supported, mixed devices.
        ValueError: sizes that do not fit each other, H or W not divisible by p.
        BackendUnavailable: the backend chosen by name cannot serve the call.
    """
    name = "pixel_decoder"
    weights = (
        pixel_weight,
        pixel_table,
        norm_weight,
        norm_bias,
        mod_weight,
        mod_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        head_weight,
        head_bias,
    )
    checks.check_tensors(name, TENSORS[name], (image, cond, *weights))
    checks.check_rank(name, "cond", cond, 2, "[..., P, D]", at_least=True)
    token_count = _check_image(name, image, patch_size)
    pixels, width = patch_size * patch_size, cond.shape[-1]
    checks.check_token_count(name, "cond", cond.shape[:-2], token_count)
    checks.check_shape(name, "cond", cond, (*cond.shape[:-2], pixels, width), "[..., P, D]")
    _check_weights(name, weights, image.shape[1], pixels, width)
    eps = checks.check_eps(name, eps)
    (cond,) = checks.autocast_activation(cond)
    return _pixel_decoder(image, cond, *weights, patch_size, eps, chosen_backend(backend))


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
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """`pixel_decoder` with cond = tokens @ up_weight.T + up_bias, which never exists as a whole in memory.

    Args:
        image: [B, C, H, W], as in `pixel_decoder`.
        tokens: [..., Z]; leading sizes multiply to B*(H/p)*(W/p), patches in row-major order. Its dtype is the
            activation dtype; under autocast float32 is cast to the autocast dtype.
        up_weight, up_bias: [P*D, Z], [P*D]; row k*D + d belongs to channel d of pixel k.
        The other arguments, the result and the errors are those of `pixel_decoder`.
    """
    name = "pixel_decoder_from_tokens"
    weights = (
        pixel_weight,
        pixel_table,
        norm_weight,
        norm_bias,
        mod_weight,
        mod_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        head_weight,
        head_bias,
    )
    checks.check_tensors(name, TENSORS[name], (image, tokens, up_weight, up_bias, *weights))
    checks.check_rank(name, "tokens", tokens, 1, "[..., Z]", at_least=True)
    checks.check_rank(name, "pixel_table", pixel_table, 2, "[P, D]")
    token_count = _check_image(name, image, patch_size)
    pixels, width = patch_size * patch_size, pixel_table.shape[-1]
    checks.check_token_count(name, "tokens", tokens.shape[:-1], token_count)
    checks.check_shape(name, "up_weight", up_weight, (pixels * width, tokens.shape[-1]), "[P*D, Z]")
    checks.check_shape(name, "up_bias", up_bias, (pixels * width,), "[P*D]")
    checks.check_nonempty(name, "up_weight", up_weight, "[P*D, Z]")
    _check_weights(name, weights, image.shape[1], pixels, width)
    eps = checks.check_eps(name, eps)
    (tokens,) = checks.autocast_activation(tokens)
    return _pixel_decoder_from_tokens(
        image, tokens, up_weight, up_bias, *weights, patch_size, eps, chosen_backend(backend)
    )


def _check_image(op: str, image: torch.Tensor, patch_size: int) -> int:
    """Returns the number of patches."""
    checks.check_rank(op, "image", image, 4, "[B, C, H, W]")
    batch, _, height, width = image.shape
    checks.check_patch_size(op, patch_size, height, width)
    return batch * (height // patch_size) * (width // patch_size)


def _check_weights(op: str, weights: tuple[torch.Tensor, ...], channels: int, pixels: int, width: int) -> None:
    norm_weight = weights[2]
    checks.check_rank(op, "norm_weight", norm_weight, 2, "[N, D]")
    depth = norm_weight.shape[0]
    shapes = [
        (width, channels),
        (pixels, width),
        (depth, width),
        (depth, width),
        (depth, 3 * width, width),
        (depth, 3 * width),
        (depth, width, width),
        (depth, width),
        (depth, width, width),
        (depth, width),
        (channels, width),
        (channels,),
    ]
    checks.check_shapes(op, DECODER_WEIGHTS, weights, shapes, _SYMBOLS)
    checks.check_nonempty(op, "pixel_weight", weights[0], "[D, C]")
    checks.check_nonempty(op, "norm_weight", norm_weight, "[N, D]")


# --- operators -------------------------------------------------------------------------------------------------------


def _define_decoder(name: str):
    tensors = TENSORS[name]
    norm_weight = tensors.index("norm_weight")
    patch_size = len(tensors)

    def request(*arguments):
        image, activation = arguments[:2]
        depth, width = arguments[norm_weight].shape
        dtypes = (activation.dtype, image.dtype)
        return Request(name, image.device.type, dtypes, width, depth, arguments[patch_size], image.shape[1])

    def fake(*arguments):
        image, activation = arguments[:2]
        return image.new_empty(image.shape, dtype=activation.dtype)

    return define_op(name, tensors, "int patch_size, float eps", ("velocity",), request, fake)


_pixel_decoder = _define_decoder("pixel_decoder")
_pixel_decoder_from_tokens = _define_decoder("pixel_decoder_from_tokens")

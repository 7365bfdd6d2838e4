"""pixel_decoder and pixel_decoder_from_tokens: the whole per-pixel decoder as one op."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deco_kernels.backends.support import Request
from deco_kernels.ops import checks
from deco_kernels.ops.registry import Operation, chosen_backend, define_op, shaping_module
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
    query: torch.Tensor | None = None,
    head_norm: str = "layer",
    save_memory: bool = True,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """Per-pixel decoder of DeCo (arXiv 2511.19365, section 3): N AdaLN-modulated MLP blocks of width D on every pixel.

    For pixel k = ky*p + kx of a p x p patch, with y and q the pixel's rows of `cond` and `query`:

        h = pixel_weight @ rgb + pixel_table[k] + q
        for each of the N blocks:
            shift, scale, gate = chunk3(mod_weight @ SiLU(y) + mod_bias)
            m = LayerNorm(h; norm_weight, norm_bias, eps) * (1 + scale) + shift
            h = h + gate * (fc2_weight @ SiLU(fc1_weight @ m + fc1_bias) + fc2_bias)
        velocity = head_weight @ norm(h) + head_bias

    norm(h) is LayerNorm(h; no affine, eps), or for head_norm "rms" h / sqrt(mean(h^2) + eps), as in the decoders of
    CoD-Lite (arXiv 2604.12525); a weight of the norm is a factor of head_weight's columns.

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
        query: like cond, in its dtype; None for zeros.
        head_norm: "layer" or "rms".
        save_memory: whether the backward computes the activations of the blocks again. With False the forward keeps
            them for the backward if a gradient is wanted, on the backends that gain from it: cuda (N + 2 of D values
            per pixel) and triton (N + 1), in the activation dtype.
        eps: added to the variance in LayerNorm, and to the mean square.
        backend: name of a backend, or None for the choice by `use_backend`, then DECO_KERNELS_BACKEND, then automatic.

    Returns:
        velocity [B, C, H, W], contiguous, in the activation dtype. Gradients flow to every tensor argument; by default
        the forward saves only its inputs.

    Weights may have any floating dtype. float64 requires every argument in float64 and runs on the reference backend.

    Raises:
        TypeError: an argument that is not a tensor, a save_memory that is not a bool, an unsupported dtype, or mixed
            devices.
        ValueError: sizes that do not match, H or W not divisible by p, or another head_norm.
        BackendUnavailable: the explicitly chosen backend cannot run the call.
    """
    name = "pixel_decoder"
    given = checks.given_query(query)
    blocks = (norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    weights = (pixel_weight, pixel_table, *blocks, head_weight, head_bias)
    patch_size = checks.check_decoder(name, (image, cond, *weights, *given), patch_size)
    options = (patch_size, checks.check_head_norm(name, head_norm), checks.check_eps(name, eps))
    cond, queries = checks.check_query(name, cond, given)
    keep = not checks.check_flag(name, "save_memory", save_memory)
    inputs = (image, cond, *weights, *queries, *options, chosen_backend(backend))
    velocity: torch.Tensor = _pixel_decoder(*inputs, keep=keep)
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
    query: torch.Tensor | None = None,
    query_tokens: torch.Tensor | None = None,
    query_weight: torch.Tensor | None = None,
    query_bias: torch.Tensor | None = None,
    head_norm: str = "layer",
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
        query: [..., P, D], in the dtype of tokens; None for zeros.
        query_tokens, query_weight, query_bias: [..., Zq], leading sizes and dtype as tokens; [P*D, Zq] and [P*D], rows
            as those of up_weight. In place of `query`: query = query_tokens @ query_weight.T + query_bias, which is not
            stored as a whole.
        save_memory: whether the backward computes cond and the activations again. With False the forward keeps cond
            [..., P, D] for the backward, in the activation dtype, and the activations as `pixel_decoder` does, if a
            gradient is wanted. Backend cuda then stores cond's gradient, and a query from query tokens, as a whole.

    The other arguments, the result and the errors are those of `pixel_decoder`.
    """
    name = "pixel_decoder_from_tokens"
    given = checks.given_query(query, query_tokens, query_weight, query_bias)
    blocks = (norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    weights = (up_weight, up_bias, pixel_weight, pixel_table, *blocks, head_weight, head_bias)
    patch_size = checks.check_decoder(name, (image, tokens, *weights, *given), patch_size)
    options = (patch_size, checks.check_head_norm(name, head_norm), checks.check_eps(name, eps))
    tokens, queries = checks.check_query(name, tokens, given)
    keep = not checks.check_flag(name, "save_memory", save_memory)
    inputs = (image, tokens, *weights, *queries, *options, chosen_backend(backend))
    velocity: torch.Tensor = _pixel_decoder_from_tokens(*inputs, keep=keep)
    return velocity


# --- operators -------------------------------------------------------------------------------------------------------


def decoder_request(name: str, images: Sequence[str]) -> Callable[..., Request]:
    """(tensors, options) -> Request of an op with a decoder; `images`: its arguments [B, C, H, W]."""
    names = OPS[name].names
    norm_weight, query = names.index("norm_weight"), names.index("query")
    head_norm = len(names) + ("frequency_weight" in names) + 1
    places = [names.index(image) for image in images]

    def request(*arguments: Any) -> Request:
        image, activation = arguments[:2]
        depth, width = arguments[norm_weight].shape
        dtypes = (activation.dtype, *[arguments[place].dtype for place in places])
        has_query = any(tensor is not None for tensor in arguments[query : len(names)])
        sizes = (width, depth, arguments[len(names)], image.shape[1])
        return Request(name, image.device.type, dtypes, *sizes, query=has_query, head_norm=arguments[head_norm])

    return request


def _define_decoder(name: str, upsamples: bool) -> Operation:
    names = OPS[name].names
    pixel_table, norm_weight = names.index("pixel_table"), names.index("norm_weight")  # [P, D], [N, D]
    request = decoder_request(name, ("image",))

    def fake(image: torch.Tensor, activation: torch.Tensor, *_: Any) -> torch.Tensor:
        return image.new_empty(image.shape, dtype=activation.dtype)

    def cond_shape(*arguments: Any) -> Sequence[int]:
        return (*arguments[1].shape[:-1], *arguments[pixel_table].shape)

    def activation_shape(*arguments: Any) -> Sequence[int] | None:
        *inputs, backend = arguments
        image = inputs[0]
        module = shaping_module(backend, request(*inputs).specialized(), image.device)
        if module is None or not hasattr(module, "activation_shape"):
            return None
        batch, _, height, width = image.shape
        shape: Sequence[int] = module.activation_shape(batch * height * width, *inputs[norm_weight].shape)
        return shape

    kept = {"cond": cond_shape} if upsamples else {}
    options = "int patch_size, str head_norm, float eps"
    return define_op(name, options, ("velocity",), request, fake, kept={**kept, "activations": activation_shape})


_pixel_decoder = _define_decoder("pixel_decoder", upsamples=False)
_pixel_decoder_from_tokens = _define_decoder("pixel_decoder_from_tokens", upsamples=True)

"""upsample_modulate: token-to-pixel upsample, modulation and LayerNorm of one decoder block."""

from collections.abc import Sequence
from typing import Any

import torch

from deco_kernels.backends.support import Request
from deco_kernels.ops import checks
from deco_kernels.ops.registry import chosen_backend, define_op


def upsample_modulate(
    h: torch.Tensor,
    tokens: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    mod_weight: torch.Tensor,
    mod_bias: torch.Tensor,
    *,
    save_memory: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """First half of a decoder block from tokens (DeCo, arXiv 2511.19365, section 3), for every pixel k of a token:

        y = up_weight[k*D:(k+1)*D] @ token + up_bias[k*D:(k+1)*D]
        shift, scale, gate = chunk3(mod_weight @ SiLU(y) + mod_bias)
        modulated = LayerNorm(h; norm_weight, norm_bias, eps) * (1 + scale) + shift

    The 3D-wide modulation is never stored as a whole.

    Args:
        h: [..., P, D], the pixels of every token.
        tokens: [..., Z], same leading sizes and dtype as h (the activation dtype; under autocast, float32 is cast to
            the autocast dtype).
        up_weight, up_bias: [P*D, Z], [P*D]; row k*D + d belongs to channel d of pixel k.
        norm_weight, norm_bias: [D].
        mod_weight, mod_bias: [3D, D], [3D], rows ordered shift, scale, gate.
        save_memory: whether the backward computes y [..., P, D] again. By default the forward keeps it for the
            backward, in the activation dtype, if a gradient is wanted.
        eps: added to the variance in LayerNorm.
        backend: as in `pixel_decoder`.

    Returns:
        (modulated, gate), both [..., P, D], contiguous, in the activation dtype. Gradients flow to every tensor
        argument.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `pixel_decoder`.
    """
    name = "upsample_modulate"
    weights = (up_weight, up_bias, norm_weight, norm_bias, mod_weight, mod_bias)
    checks.check_tensors(name, (h, tokens, *weights))
    checks.check_shapes(name, (h, tokens, *weights))
    save_memory = checks.check_flag(name, "save_memory", save_memory)
    eps = checks.check_eps(name, eps)
    h, tokens = checks.autocast_activation(h, tokens)
    checks.check_same_dtype(name, "tokens", tokens, "h", h)
    modulated, gate = _upsample_modulate(h, tokens, *weights, eps, chosen_backend(backend), keep=not save_memory)
    return modulated, gate


# --- operators -------------------------------------------------------------------------------------------------------


def _request(h: torch.Tensor, *_: Any) -> Request:
    pixels, width = h.shape[-2:]
    return Request("upsample_modulate", h.device.type, (h.dtype,), width, pixels=pixels)


def _fake(h: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(h, memory_format=torch.contiguous_format) for _ in range(2))


def _cond_shape(h: torch.Tensor, *_: Any) -> Sequence[int]:
    return h.shape


_upsample_modulate = define_op(
    "upsample_modulate", "float eps", ("modulated", "gate"), _request, _fake, kept={"cond": _cond_shape}
)

"""adaln_block: one AdaLN-modulated MLP block of the decoder."""

from typing import Any

import torch

from deco_kernels.backends.support import Request
from deco_kernels.ops import checks
from deco_kernels.ops.registry import chosen_backend, define_op


def adaln_block(
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
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """One decoder block of DeCo (arXiv 2511.19365, section 3), applied to every row:

        shift, scale, gate = chunk3(mod_weight @ SiLU(cond) + mod_bias)
        m = LayerNorm(h; norm_weight, norm_bias, eps) * (1 + scale) + shift
        out = h + gate * (fc2_weight @ SiLU(fc1_weight @ m + fc1_bias) + fc2_bias)

    Args:
        h, cond: [..., D], same shape and dtype (the activation dtype; under autocast, float32 is cast to the autocast
            dtype).
        norm_weight, norm_bias: [D].
        mod_weight, mod_bias: [3D, D], [3D], rows ordered shift, scale, gate.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: [D, D] (out, in), [D].
        eps: added to the variance in LayerNorm.
        backend: as in `pixel_decoder`.

    Returns:
        [..., D], contiguous, in the activation dtype. Gradients flow to every tensor argument.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `pixel_decoder`.
    """
    name = "adaln_block"
    weights = (norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    checks.check_tensors(name, (h, cond, *weights))
    checks.check_shapes(name, (h, cond, *weights))
    eps = checks.check_eps(name, eps)
    h, cond = checks.autocast_activation(h, cond)
    checks.check_same_dtype(name, "cond", cond, "h", h)
    out: torch.Tensor = _adaln_block(h, cond, *weights, eps, chosen_backend(backend))
    return out


# --- operators -------------------------------------------------------------------------------------------------------


def _request(h: torch.Tensor, *_: Any) -> Request:
    return Request("adaln_block", h.device.type, (h.dtype,), h.shape[-1])


def _fake(h: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


_adaln_block = define_op("adaln_block", "float eps", ("out",), _request, _fake)

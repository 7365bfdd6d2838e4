"""The losses and one decoder block as modules, for models and training loops that are built of modules."""

from __future__ import annotations

import torch
from torch import nn

from deco_kernels import ops
from deco_kernels.model.arguments import require_sizes, require_tensors
from deco_kernels.ops.registry import check_backend_name


class _Loss(nn.Module):
    """Holds the frequency weights and the backend of a loss."""

    frequency_weight: torch.Tensor

    def __init__(self, frequency_weight: torch.Tensor | None, backend: str | None):
        super().__init__()
        if frequency_weight is None:
            frequency_weight = ops.jpeg_frequency_weight()
        require_tensors(frequency_weight=frequency_weight)
        if frequency_weight.shape != (3, 8, 8):
            raise ValueError(
                f"frequency_weight: expected [3, 8, 8], got {list(frequency_weight.shape)}; pass the result of "
                "ops.jpeg_frequency_weight"
            )
        if backend is not None:
            check_backend_name(backend)
        self.register_buffer("frequency_weight", frequency_weight, persistent=False)
        self.backend = backend


class FlowMatchingLoss(_Loss):
    """`ops.flow_matching_loss` as a module: squared error in pixels plus JPEG-weighted error in the 8x8 DCT domain.

    Args:
        frequency_weight: [3, 8, 8]; None for `ops.jpeg_frequency_weight()`, the published choice. A buffer that moves
            with the module and is not part of its state.
        frequency_scale: weight of the frequency part.
        backend: backend of the op; None for the automatic choice.

    Raises TypeError or ValueError for invalid arguments.
    """

    def __init__(
        self,
        frequency_weight: torch.Tensor | None = None,
        frequency_scale: float = 1.0,
        *,
        backend: str | None = None,
    ):
        super().__init__(frequency_weight, backend)
        self.frequency_scale = frequency_scale

    def forward(
        self, pred: torch.Tensor, target: torch.Tensor, sample_weight: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(total, pixel, frequency) of pred and target [B, 3, H, W] with weights [B]; errors as in the op."""
        return ops.flow_matching_loss(
            pred,
            target,
            self.frequency_weight,
            frequency_scale=self.frequency_scale,
            sample_weight=sample_weight,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"frequency_scale={self.frequency_scale}"


class FrequencyLoss(_Loss):
    """`ops.frequency_loss` as a module; arguments as for `FlowMatchingLoss`."""

    def __init__(self, frequency_weight: torch.Tensor | None = None, *, backend: str | None = None):
        super().__init__(frequency_weight, backend)

    def forward(
        self, pred: torch.Tensor, target: torch.Tensor, sample_weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The frequency loss, a scalar, of pred and target [B, 3, H, W] with weights [B]; errors as in the op."""
        return ops.frequency_loss(
            pred, target, self.frequency_weight, sample_weight=sample_weight, backend=self.backend
        )


class AdaLNBlock(nn.Module):
    """One decoder block of DeCo (arXiv 2511.19365, section 3): `ops.adaln_block` with its parameters.

    Args:
        width: D.
        eps: added to the variance in LayerNorm.
        backend: backend of the op; None for the automatic choice.

    Parameters: norm_weight and norm_bias [D], mod_weight [3D, D] (shift, scale, gate), mod_bias [3D], fc1_weight and
    fc2_weight [D, D], fc1_bias and fc2_bias [D]. As in the published model, the modulation is initialized to zero, so
    that a new block returns its input; fc1 and fc2 are Xavier-uniform with zero bias.

    Raises TypeError or ValueError for invalid arguments.
    """

    def __init__(self, width: int = 32, *, eps: float = 1e-6, backend: str | None = None):
        super().__init__()
        require_sizes(width=width)
        if backend is not None:
            check_backend_name(backend)
        self.width, self.eps, self.backend = width, eps, backend
        self.norm_weight = nn.Parameter(torch.empty(width))
        self.norm_bias = nn.Parameter(torch.empty(width))
        self.mod_weight = nn.Parameter(torch.empty(3 * width, width))
        self.mod_bias = nn.Parameter(torch.empty(3 * width))
        self.fc1_weight = nn.Parameter(torch.empty(width, width))
        self.fc1_bias = nn.Parameter(torch.empty(width))
        self.fc2_weight = nn.Parameter(torch.empty(width, width))
        self.fc2_bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the parameters in place."""
        nn.init.ones_(self.norm_weight)
        for weight in (self.fc1_weight, self.fc2_weight):
            nn.init.xavier_uniform_(weight)
        for zero in (self.norm_bias, self.mod_weight, self.mod_bias, self.fc1_bias, self.fc2_bias):
            nn.init.zeros_(zero)

    def forward(self, h: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """The block's output, like h, for h and cond [..., D]; errors are those of the op."""
        weights = (self.norm_weight, self.norm_bias, self.mod_weight, self.mod_bias)
        linears = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        return ops.adaln_block(h, cond, *weights, *linears, eps=self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        return f"width={self.width}, eps={self.eps}"

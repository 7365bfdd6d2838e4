"""The training objective: flow matching in pixels and in JPEG-weighted frequencies, and the dropping of conditions.

Source: DeCo (arXiv 2511.19365), sections 3.3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from deco_kernels import ops
from deco_kernels.flow.path import interpolate, sample_time
from deco_kernels.model.arguments import require_tensors


def drop_labels(
    y: torch.Tensor, null_label: int | torch.Tensor, probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Conditions y [B, ...] with each replaced by `null_label` independently with the given probability.

    y are labels [B] and null_label the label of the null class, or y are text features [B, S, F] and null_label the
    features [S, F] of the empty prompt. y is not changed; the result has its dtype.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: expected a number from 0 to 1, got {probability}")
    if isinstance(null_label, torch.Tensor) and null_label.shape != y.shape[1:]:
        raise ValueError(
            f"null_label: expected the shape of one condition, {list(y.shape[1:])}, got {list(null_label.shape)}"
        )
    device = y.device if generator is None else generator.device
    dropped = torch.rand(len(y), generator=generator, device=device).to(y.device) < probability
    null = null_label.to(y) if isinstance(null_label, torch.Tensor) else null_label
    return torch.where(dropped.reshape(-1, *[1] * (y.dim() - 1)), null, y)


class Objective(nn.Module):
    """Draws noise and times, runs the model and returns its losses.

    total = pixel + frequency_scale·frequency + repa.weight·repa, with pixel the mean of (v̂ - v)² and frequency the mean
    of frequency_weight·(8×8 DCT of the YCbCr of v̂ - v)².

    Args:
        frequency_weight: [3, 8, 8] (channel, vertical, horizontal frequency), as from `ops.jpeg_frequency_weight`.
        frequency_scale: weight of the frequency loss.
        repa: alignment loss or None: a callable (features [B, L, Z], clean image x) → scalar with attributes `block`
            (trunk block, from 1, after which the features are taken) and `weight`. A module is registered.
        distribution, shift: of the training times, see `sample_time`.
        label_dropout: probability of training without a condition.
        null_label: what stands for no condition, required when conditions are dropped: the label of the null class
            (`model.null_label`), or the text features of the empty prompt (`encoder.empty_prompt`).
        backend: passed to the loss op; None leaves the choice to deco_kernels.
    """

    def __init__(
        self,
        frequency_weight: torch.Tensor,
        frequency_scale: float = 1.0,
        repa: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        *,
        distribution: str = "lognormal",
        shift: float = 1.0,
        label_dropout: float = 0.0,
        null_label: int | torch.Tensor | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        require_tensors(frequency_weight=frequency_weight)
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout: expected a number from 0 to 1, got {label_dropout}")
        if label_dropout and null_label is None:
            raise ValueError(
                "null_label: expected the label of the null class or the features of the empty prompt when "
                "label_dropout > 0, got None"
            )
        sample_time(0, distribution=distribution, shift=shift, device="cpu")  # raises for what it does not take
        self.register_buffer("frequency_weight", frequency_weight, persistent=False)
        self.frequency_scale, self.repa = frequency_scale, repa
        self.distribution, self.shift = distribution, shift
        self.label_dropout = label_dropout
        if isinstance(null_label, torch.Tensor):
            self.register_buffer("null_label", null_label, persistent=False)
        else:
            self.null_label = null_label
        self.backend = backend

    def draw(
        self, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What one step draws at random for images x [B, 3, H, W] and conditions y [B, ...].

        Returns:
            (conditions with some dropped [B, ...], times [B], noise like x), drawn from the generator in this order.
        """
        _check_images(x)
        require_tensors(y=y)
        if self.label_dropout:
            y = drop_labels(y, self.null_label, self.label_dropout, generator)
        t = sample_time(len(x), distribution=self.distribution, shift=self.shift, generator=generator, device=x.device)
        noise_device = x.device if generator is None else generator.device
        return y, t, torch.randn(x.shape, generator=generator, device=noise_device, dtype=x.dtype).to(x.device)

    def losses(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Losses at given conditions y [B, ...], times t [B] and noise like x; otherwise as `forward`."""
        _check_images(x)
        require_tensors(y=y, t=t, noise=noise)
        x_t, v = interpolate(x, noise, t)
        if self.repa is None:
            velocity, alignment = model(x_t, t, y), {}
        else:
            velocity, features = model(x_t, t, y, features_after=self.repa.block)
            alignment = {"repa": self.repa(features, x)}
        total, pixel, frequency = ops.flow_matching_loss(
            velocity, v, self.frequency_weight, frequency_scale=self.frequency_scale, backend=self.backend
        )
        if alignment:
            total = total + self.repa.weight * alignment["repa"]
        return {"total": total, "pixel": pixel, "frequency": frequency, **alignment, "t": t}

    def forward(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """Losses of `model` on clean images, at random times and noise.

        Args:
            model: (x_t, t, y) → velocity; with repa also taking `features_after` and returning (velocity, features).
            x: images [B, 3, H, W] in [-1, 1], float32.
            y: labels [B], or text features [B, S, F]. A model with a method `check_labels`, such as DeCo and DiT, sees
                them before any are dropped, so that a label out of range never passes.
            generator: source of what `draw` draws.

        Returns:
            float32 scalars "total", "pixel", "frequency" and, with repa, "repa"; and "t", the times [B].

        Raises:
            TypeError, ValueError: images that are not floating, labels out of range, or what model or loss refuse.
        """
        require_tensors(y=y)
        check_labels = _method(model, "check_labels")
        if self.label_dropout and check_labels is not None:
            check_labels(y)
        return self.losses(model, x, *self.draw(x, y, generator))


def _check_images(x: torch.Tensor) -> None:
    require_tensors(x=x)
    if not x.is_floating_point():
        raise TypeError(
            f"x: expected floating-point images in [-1, 1], got {x.dtype}; convert 8-bit ones by x.float() / 127.5 - 1"
        )


def _method(model: nn.Module, name: str) -> Callable | None:
    """A method of the model, or of the one that a wrapper such as DDP holds as `module`; None where there is none."""
    return getattr(model, name, None) or getattr(getattr(model, "module", None), name, None)

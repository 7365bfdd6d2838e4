"""The training objective: flow matching in pixels and in JPEG-weighted frequencies, with condition dropout.

Source: DeCo (arXiv 2511.19365), sections 3.3 and 4.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from deco_kernels import ops
from deco_kernels.flow.path import interpolate, sample_time
from deco_kernels.model.arguments import require_tensors
from deco_kernels.model.deco import PixelDiffusion
from deco_kernels.model.pixel_decoder import TrainingLoss, awaits_output
from deco_kernels.ops.registry import check_backend_name

_log = logging.getLogger("deco_kernels")


def drop_labels(
    y: torch.Tensor, null_label: int | torch.Tensor, probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Replace each of the conditions y [B, ...] by `null_label` independently with the given probability.

    y are labels [B] and null_label is the label of the null class, or y are text features [B, S, F] and null_label is
    the features [S, F] of the empty prompt. Returns a new tensor of the shape and dtype of y. Raises ValueError for a
    probability outside [0, 1] and for a null_label of another shape.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: expected a number from 0 to 1, got {probability}; choose one in this range")
    if isinstance(null_label, torch.Tensor) and null_label.shape != y.shape[1:]:
        raise ValueError(
            f"null_label: expected the shape of one condition, {list(y.shape[1:])}, got {list(null_label.shape)}; "
            "pass one condition without the batch"
        )
    device = y.device if generator is None else generator.device
    dropped = torch.rand(len(y), generator=generator, device=device).to(y.device) < probability
    null = null_label.to(y) if isinstance(null_label, torch.Tensor) else null_label
    return torch.where(dropped.reshape(-1, *[1] * (y.dim() - 1)), null, y)


class AlignmentLoss(Protocol):
    """(features [B, L, Z], clean image x) → scalar, such as `Alignment`."""

    block: int
    weight: float

    def __call__(self, features: torch.Tensor, x: torch.Tensor, /) -> torch.Tensor: ...


class Objective(nn.Module):
    """Samples noise and times, runs the model and returns its losses.

    total = pixel + frequency_scale·frequency + repa.weight·repa, where pixel is the mean of (v̂ - v)² and frequency the
    mean of frequency_weight·(8×8 DCT of the YCbCr of v̂ - v)².

    Args:
        frequency_weight: [3, 8, 8] (channel, vertical, horizontal frequency), see `ops.jpeg_frequency_weight`.
        frequency_scale: weight of the frequency loss.
        repa: alignment loss or None: a callable (features [B, L, Z], clean image x) → scalar with attributes `block`
            (trunk block, from 1, after which the features are taken) and `weight`. A module is registered.
        distribution, shift: distribution of the training times, see `sample_time`.
        label_dropout: probability of replacing the condition by the null condition.
        null_label: the null condition, required with label_dropout: the label of the null class (`model.null_label`)
            or the text features of the empty prompt (`encoder.empty_prompt`).
        fused: let the model compute decoder and loss as one op (`ops.pixel_decoder_loss_from_tokens`). "total" then is
            the only differentiable loss; otherwise the parts have gradients too. None: where the model can, and the log
            says once why another cannot; True: always; False: never. `DeCo`, `DeCoTextToImage` and models after
            `swap_decoder` can, bare or in DistributedDataParallel, if the decoder is the published one and no hook
            awaits the velocity.
        backend: backend of the loss op; None for the automatic choice.

    Raises TypeError or ValueError for invalid arguments. With `fused=True` a call raises ValueError for a model that
    cannot compute decoder and loss as one op.
    """

    frequency_weight: torch.Tensor
    null_label: int | torch.Tensor | None

    def __init__(
        self,
        frequency_weight: torch.Tensor,
        frequency_scale: float = 1.0,
        repa: AlignmentLoss | None = None,
        *,
        distribution: str = "lognormal",
        shift: float = 1.0,
        label_dropout: float = 0.0,
        null_label: int | torch.Tensor | None = None,
        fused: bool | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        require_tensors(frequency_weight=frequency_weight)
        if not 0 <= label_dropout <= 1:
            raise ValueError(
                f"label_dropout: expected a number from 0 to 1, got {label_dropout}; choose one in this range"
            )
        if label_dropout and null_label is None:
            raise ValueError(
                "null_label: expected the label of the null class or the features of the empty prompt when "
                "label_dropout > 0, got None; pass model.null_label or encoder.empty_prompt"
            )
        if not isinstance(fused, (bool, type(None))):
            raise TypeError(f"fused: expected None, True or False, got {fused!r}; pass one of them")
        if backend is not None:
            check_backend_name(backend)
        sample_time(0, distribution=distribution, shift=shift, device="cpu")  # checks both
        self.register_buffer("frequency_weight", frequency_weight, persistent=False)
        self.frequency_scale, self.repa = frequency_scale, repa
        self.distribution, self.shift = distribution, shift
        self.label_dropout = label_dropout
        if isinstance(null_label, torch.Tensor):
            self.register_buffer("null_label", null_label, persistent=False)
        else:
            self.null_label = null_label
        self.fused, self.backend = fused, backend

    def draw(
        self, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw the random values of one step for images x [B, 3, H, W] and conditions y [B, ...].

        Returns:
            (conditions after dropout [B, ...], float32 times [B], noise like x), drawn in this order.
        """
        _check_images(x)
        require_tensors(y=y)
        if self.label_dropout:
            assert self.null_label is not None
            y = drop_labels(y, self.null_label, self.label_dropout, generator)
        t = sample_time(len(x), distribution=self.distribution, shift=self.shift, generator=generator, device=x.device)
        noise_device = x.device if generator is None else generator.device
        return y, t, torch.randn(x.shape, generator=generator, device=noise_device, dtype=x.dtype).to(x.device)

    def losses(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Losses for given conditions y [B, ...], times t [B] and noise like x; otherwise as `forward`."""
        _check_images(x)
        require_tensors(y=y, t=t, noise=noise)
        x_t, v = interpolate(x, noise, t)
        fused = self._fuses(model, x_t, t, y)
        options: dict[str, Any] = {}
        if fused:
            options["loss"] = TrainingLoss(v, self.frequency_weight, self.frequency_scale, self.backend)
        if self.repa is None:
            result, alignment = model(x_t, t, y, **options), {}
        else:
            result, features = model(x_t, t, y, features_after=self.repa.block, **options)
            alignment = {"repa": self.repa(features, x)}
        if not fused:
            result = ops.flow_matching_loss(
                result, v, self.frequency_weight, frequency_scale=self.frequency_scale, backend=self.backend
            )
        total, pixel, frequency = result
        if self.repa is not None:
            total = total + self.repa.weight * alignment["repa"]
        return {"total": total, "pixel": pixel, "frequency": frequency, **alignment, "t": t}

    def _fuses(self, model: nn.Module, *inputs: torch.Tensor) -> bool:
        """Whether the model computes the losses of these inputs. Raises ValueError if it cannot and `fused` is True."""
        if self.fused is False:
            return False
        reason = _unfused_reason(model, self.backend, *inputs)
        if reason is not None and self.fused:
            raise ValueError(
                "fused: expected None or False for this model, got True; it cannot compute decoder and loss as one op: "
                f"{reason}"
            )
        if reason is not None:
            _log_two_ops(reason)
        return reason is None

    def forward(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """Losses of `model` on clean images, at random times and with random noise.

        Args:
            model: (x_t, t, y) → velocity; with repa it also takes `features_after` and returns (velocity, features).
            x: images [B, 3, H, W] in [-1, 1], float32.
            y: labels [B], or text features [B, S, F]. The model's method `check_labels`, as in DeCo and DiT, checks
                them before dropout, so that every label out of range raises.
            generator: random generator of `draw`.

        Returns:
            float32 scalars "total", "pixel", "frequency" and, with repa, "repa"; and "t", the times [B]. With `fused`,
            "pixel" and "frequency" may have no gradients.

        Raises:
            TypeError, ValueError: images that are not floating, labels out of range, or errors of model and loss.
        """
        require_tensors(y=y)
        check_labels = _method(model, "check_labels")
        if self.label_dropout and check_labels is not None:
            check_labels(y)
        return self.losses(model, x, *self.draw(x, y, generator))


def _unfused_reason(model: nn.Module, backend: str | None, *inputs: torch.Tensor) -> str | None:
    """Why the model, bare or in DistributedDataParallel, cannot compute the losses with its decoder; None if it can."""
    if type(model) is nn.parallel.DistributedDataParallel:
        if awaits_output(model):
            return "a hook on DistributedDataParallel awaits the velocity"
        model = model.module
    if isinstance(model, PixelDiffusion):
        return model.unfused_reason(backend)
    swapped: Callable[..., str | None] | None = vars(model).get("unfused_reason")  # of a model after swap_decoder
    if swapped is not None:
        return swapped(backend, *inputs)
    return f"{type(model).__name__} is neither a DeCo model nor one after swap_decoder"


@functools.cache
def _log_two_ops(reason: str) -> None:
    _log.info("flow.Objective computes decoder and loss as two ops; the model cannot compute them as one: %s", reason)


def _check_images(x: torch.Tensor) -> None:
    require_tensors(x=x)
    if not x.is_floating_point():
        raise TypeError(
            f"x: expected floating-point images in [-1, 1], got {x.dtype}; convert 8-bit ones: x.float() / 127.5 - 1"
        )


def _method(model: nn.Module, name: str) -> Callable[..., None] | None:
    """A method of the model or of its attribute `module` (as in DDP); None if neither has it."""
    return getattr(model, name, None) or getattr(getattr(model, "module", None), name, None)

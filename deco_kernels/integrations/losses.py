"""The forward of a swapped model that computes the training losses with its decoder, as that of `DeCo` does.

Source: the module structure of the published DeCo models (arXiv 2511.19365, section 3).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from deco_kernels.integrations.fused_forward import FusedForward, refuse_odd_size, remove_methods, without_gradients
from deco_kernels.integrations.halves import difference_around_decoder
from deco_kernels.model.pixel_decoder import Losses, TrainingLoss, awaits_output, other_backend


class SwappedLosses:
    """`forward` of a model after the swap, which takes `loss`.

    The op that computes the losses runs in the forward of `dec_net`, so that FSDP gathers its weights. `dec_net` then
    returns total in place of every value of the velocity, and the model an image of it.

    Holds modules, not tensors, so that deep copies, `.to()` and `load_state_dict` take effect.
    """

    def __init__(self, model: nn.Module, fused: FusedForward):
        self.model, self.fused = model, fused
        self.checked = False
        self.difference: tuple[str, str] | None = None

    def forward(self, *inputs: Any, loss: TrainingLoss | None = None, **options: Any) -> Any:
        """The model's own forward; with `loss`, the scalars (total, pixel, frequency) take the place of the velocity.

        Args:
            inputs, options: those of the model's own forward; the first input is the noised image [B, C, H, W].
            loss: asks for the losses. Only total has gradients.

        Raises:
            TypeError: a `loss` of another type, or an image that is given by name.
            ValueError: `loss` for a model with an `unfused_reason`, or the model's own forward fails for an image that
                is not whole patches.
        """
        if loss is None:
            return self._own(*inputs, **options)
        if not isinstance(loss, TrainingLoss):
            raise TypeError(f"loss: expected a TrainingLoss or None, got {type(loss).__name__}; pass one of them")
        if not inputs:
            raise TypeError(
                "x: expected the noised image as the first argument by position; call model(x, t, y, loss=loss)"
            )
        if (reason := self.unfused_reason(loss.backend, *inputs, **options)) is not None:
            raise ValueError(f"loss: expected None, got a TrainingLoss: {reason}; compute the loss of the velocity")
        found: list[torch.Tensor] = []

        def total_as_velocity(pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            found.extend(self.fused.losses(inputs[0], tokens, loss))
            return found[0].expand(pixels.shape)

        with self.fused.decoding_by(total_as_velocity):
            result = self._own(*inputs, **options)
        image, *features = result if isinstance(result, tuple) else (result,)
        total = image[0, 0, 0, 0] if image.numel() else image.sum()
        losses: Losses = (total, found[1], found[2])
        return (losses, *features) if features else losses

    def unfused_reason(self, backend: str | None, x: torch.Tensor, *inputs: Any, **options: Any) -> str | None:
        """Why `forward` cannot take a `TrainingLoss` of this backend; None if it can.

        The first call runs the model's own forward once without gradients, on a random image like x, to see whether it
        passes the pixels of its image to `dec_net`, once, and returns what `dec_net` returns.
        """
        parts = self.fused.parts
        if parts.channels != 3:
            return f"its decoder has {parts.channels} channels, not 3"
        if (other := other_backend(self.fused.backend, backend)) is not None:
            return other
        for module, name in ((parts.dec_net, "dec_net"), (self.model, "the model")):
            if awaits_output(module):
                return f"a hook on {name} awaits the velocity"
        if not self.checked:
            self.difference = self._difference(x, *inputs, **options)
            self.checked = True
        if self.difference is not None:
            expected, found = self.difference
            return f"its forward is expected {expected}, as the published one does, got {found}"
        return None

    def _own(self, *inputs: Any, **options: Any) -> Any:
        try:
            return type(self.model).forward(self.model, *inputs, **options)
        except RuntimeError as error:
            refuse_odd_size(error, self.fused, (*inputs, *options.values()))
            raise

    @without_gradients()
    def _difference(self, x: torch.Tensor, *inputs: Any, **options: Any) -> tuple[str, str] | None:
        """(expected, found) if the forward does not call its decoder as `forward` needs it."""
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(x.shape, generator=generator, device="cpu").to(x)  # finite: NaN would hide a difference
        wide = torch.promote_types(x.dtype, torch.float32)  # dtype of the losses
        calls: list[torch.Tensor] = []

        def pixels_as_velocity(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            calls.append(pixels)
            return pixels.to(wide)

        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.fused.decoding_by(pixels_as_velocity):  # the trunk may have dropout
            result = self.model(x, *inputs, **options)
        if len(calls) != 1:
            return "to call dec_net once", f"{len(calls)} calls"
        image = result[0] if isinstance(result, tuple) else result
        for what, tensor, dtype in (("pass pixels", calls[0], x.dtype), ("return an image", image, wide)):
            if getattr(tensor, "dtype", None) is not dtype:
                found = getattr(tensor, "dtype", type(tensor).__name__)
                return f"to {what} of dtype {dtype}", f"{found}"
        return difference_around_decoder(self.fused, x, image, calls[0])


def attach_losses(model: nn.Module, fused: FusedForward) -> None:
    """Let the forward of a swapped model take `loss`, unless it is replaced or has an argument of this name."""
    if "forward" not in vars(model) and "loss" not in inspect.signature(model.forward).parameters:
        losses = SwappedLosses(model, fused)
        model.forward, model.unfused_reason = losses.forward, losses.unfused_reason  # type: ignore[assignment]


def detach_losses(model: nn.Module) -> None:
    """Remove what `attach_losses` has added to the model."""
    remove_methods(model, SwappedLosses, "forward", "unfused_reason")

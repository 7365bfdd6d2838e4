"""DeCo: a trunk models semantics on patches, and the per-pixel decoder adds the detail at full resolution.

Source: DeCo (arXiv 2511.19365), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from deco_kernels.model.arguments import require_sizes, require_tensors
from deco_kernels.model.dit import PatchTransformer, Trunk
from deco_kernels.model.pixel_decoder import Losses, PixelDecoder, TrainingLoss, awaits_output
from deco_kernels.model.pretrained import PretrainedModel


class PixelDiffusion(PretrainedModel):
    """A trunk and the per-pixel decoder: velocity = decoder(x, SiLU(time embedding + trunk tokens)).

    `encode` runs the trunk alone, `decode` the decoder on given tokens; `forward` is their composition, bit for bit.
    Subclasses differ in the trunk and in the kind of condition.
    """

    def __init__(self, trunk: PatchTransformer, decoder: PixelDecoder):
        super().__init__()
        self.trunk = trunk
        self.decoder = decoder

    def reset_parameters(self) -> None:
        """Initialize the parameters in place; a newly initialized model returns exactly 0."""
        self.trunk.reset_parameters()
        self.decoder.reset_parameters()

    def compile_trunk(self, **options: Any) -> None:
        """Compile the trunk's blocks in place with torch.compile, see `PatchTransformer.compile_blocks`."""
        self.trunk.compile_blocks(**options)

    def unfused_reason(self, backend: str | None = None) -> str | None:
        """Why the losses of this backend cannot take the place of the velocity; None if `forward` takes a
        `TrainingLoss` and no hook on model and decoder awaits the velocity.

        It takes one if the decoder is the published one on images of 3 channels and neither forward has been replaced.
        """
        if type(self).forward is not PixelDiffusion.forward or "forward" in vars(self):
            return "its forward has been replaced"
        if awaits_output(self):
            return "a hook on the model awaits the velocity"
        decoder: Any = self.decoder  # may have been replaced
        if not isinstance(decoder, PixelDecoder):
            return f"its decoder is no PixelDecoder but a module {type(decoder).__name__}"
        return decoder.unfused_reason(backend)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        features_after: int | None = None,
        loss: TrainingLoss | None = None,
    ) -> torch.Tensor | Losses | tuple[torch.Tensor | Losses, torch.Tensor]:
        """Predict the velocity, or the losses of the velocity.

        Args:
            x: noised image [B, C, H, W], floating; H and W are multiples of patch_size and may differ.
            t: times [B] in [0, 1], floating; 0 is noise, 1 is the image.
            y: the condition; the subclass defines its shape and dtype.
            features_after: number of a trunk block, counted from 1.
            loss: asks for the losses, see `PixelDecoder.forward`.

        Returns:
            Velocity [B, C, H, W] in the activation dtype (that of the parameters, or autocast's); with `loss`, the
            scalars (total, pixel, frequency) in its place. With `features_after`, the pair (velocity or losses, tokens
            [B, L, Z] after that block).

        Raises:
            TypeError, ValueError: arguments that do not fit the model or each other.
        """
        tokens, time, _, features = self._run_trunk(x, t, y, features_after)
        asked = {} if loss is None else {"loss": loss}
        result: torch.Tensor | Losses = self.decoder(x, F.silu(time[:, None] + tokens), **asked)
        return result if features is None else (result, features)

    def encode(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L, Z] of the trunk alone, in row-major patch order; arguments and errors as in `forward`."""
        return self._run_trunk(x, t, y)[0]

    def decode(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Velocity [B, C, H, W] of the decoder alone.

        Args:
            x, t: as in `forward`.
            tokens: result [B, L, Z] of `encode`, also of another x and t; L = H·W/patch_size².

        Raises:
            TypeError, ValueError: arguments that do not fit the model or each other.
        """
        self._check_dtype(x)
        self.trunk.check_image(x, t)
        require_tensors(tokens=tokens)
        expected = (x.shape[0], x.shape[2] * x.shape[3] // self.trunk.patch_size**2, self.trunk.width)
        if tokens.shape != expected:
            raise ValueError(
                f"tokens: expected shape {expected} for an image {tuple(x.shape)}, as `encode` returns it, got "
                f"{tuple(tokens.shape)}; pass those of an image of this size"
            )
        return self.decoder(x, F.silu(self.trunk.time_embed(t)[:, None] + tokens))

    def _run_trunk(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, features_after: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        self._check_dtype(x)
        return self.trunk(x, t, y, features_after)

    def _check_dtype(self, x: torch.Tensor) -> None:
        require_tensors(x=x)
        dtype = next(self.parameters()).dtype
        if (x.dtype is torch.float64) != (dtype is torch.float64):
            raise TypeError(
                f"x: expected {dtype} like the model's parameters, got {x.dtype}; convert one of them, float64 is "
                "computed only when both are float64"
            )


class DeCo(PixelDiffusion):
    """Class-to-image pixel diffusion model; the condition y is labels [B], int64 or int32, from 0 to num_classes.

    Label num_classes is the null class. Labels out of range raise ValueError on the CPU. On a GPU and inside
    torch.compile, PyTorch's own assertion fails instead: a check would synchronize with the device.

    Args:
        width, depth, heads, num_classes, patch_size, channels, mlp_width: arguments of the trunk, see `Trunk`.
        decoder_width, decoder_depth, decoder_patch, interaction, save_memory, backend: arguments of the decoder, see
            `PixelDecoder`.

    Raises TypeError or ValueError for invalid arguments. `config` holds the arguments; `DeCo(**model.config)` builds
    another model of the same configuration.
    """

    trunk: Trunk

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        num_classes: int,
        patch_size: int = 16,
        channels: int = 3,
        mlp_width: int | None = None,
        decoder_width: int = 32,
        decoder_depth: int = 3,
        decoder_patch: int = 1,
        interaction: str = "adaln",
        save_memory: bool = False,
        backend: str | None = None,
    ):
        require_sizes(decoder_width=decoder_width, decoder_depth=decoder_depth)
        image: dict[str, Any] = dict(patch_size=patch_size, channels=channels)
        trunk: dict[str, Any] = dict(
            width=width, depth=depth, heads=heads, num_classes=num_classes, mlp_width=mlp_width
        )
        shared: dict[str, Any] = dict(
            decoder_patch=decoder_patch, interaction=interaction, save_memory=save_memory, backend=backend
        )
        super().__init__(
            Trunk(**trunk, **image),
            PixelDecoder(width, width=decoder_width, depth=decoder_depth, **image, **shared),
        )
        self.config = {**trunk, **image, "decoder_width": decoder_width, "decoder_depth": decoder_depth, **shared}

    @property
    def null_label(self) -> int:
        """Label of the null class."""
        return self.trunk.num_classes

    def check_labels(self, y: torch.Tensor) -> None:
        """Raise ValueError for labels out of range, see `Trunk.check_labels`."""
        self.trunk.check_labels(y)

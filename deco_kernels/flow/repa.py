"""Alignment of trunk tokens with a frozen teacher's patch features (REPA).

Source: DeCo (arXiv 2511.19365), section 4; Yu et al., "Representation Alignment for Generation" (arXiv 2410.06940).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TEACHER_PATCH_SIZE = 14


class Alignment(nn.Module):
    """REPA loss: the mean over tokens of 1 - cos(projector(tokens), teacher(image)).

    Args:
        width: Z, token width.
        teacher: callable from clean images [B, 3, H, W] in [-1, 1] to features [B, L, teacher_width], one per token in
            row-major order; called without gradients. It is not part of the module's state.
        teacher_width: feature width of the teacher.
        block: number of the trunk block, from 1, after which the tokens are taken: 8 for class models, 6 for text
            models.
        weight: weight of this loss in the total.

    The projector is Linear - SiLU - Linear - SiLU - Linear, Z → Z → Z → teacher_width.
    """

    def __init__(
        self,
        width: int,
        teacher: Callable[[torch.Tensor], torch.Tensor],
        *,
        teacher_width: int = 768,
        block: int = 8,
        weight: float = 0.5,
    ):
        super().__init__()
        # A tuple, so that a teacher that is a module is not registered, saved or trained.
        self._teacher, self.block, self.weight = (teacher,), block, weight
        self.projector = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, teacher_width)
        )

    def forward(self, features: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The loss, a float32 scalar, for tokens [B, L, Z] and clean images x [B, 3, H, W] in [-1, 1].

        Raises ValueError unless the teacher returns [B, L, teacher_width].
        """
        with torch.no_grad():
            target = self._teacher[0](x)
        projected = self.projector(features)
        if target.shape != projected.shape:
            raise ValueError(
                f"teacher: expected it to return features {tuple(projected.shape)}, got {tuple(target.shape)}; it "
                "needs one feature per token, of width teacher_width"
            )
        return 1 - F.cosine_similarity(projected.float(), target.float(), dim=-1).mean()


class DinoV2Teacher:
    """Normalized patch features of a frozen DINOv2, one per patch of the image: [B, 3, H, W] → [B, L, width].

    Images in [-1, 1] are normalized with ImageNet's mean and standard deviation and resized bicubically to 14 pixels
    per patch.

    Args:
        name: hub id or folder of a DINOv2 for `transformers`, such as facebook/dinov2-base.
        patch_size: patch size of the model that is trained.

    Raises:
        ImportError: transformers is not installed.
        OSError: the teacher is not on disk and cannot be downloaded.
        ValueError: the teacher's patch size is not 14.
    """

    def __init__(self, name: str = "facebook/dinov2-base", patch_size: int = 16):
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            raise ImportError("DinoV2Teacher needs transformers: pip install deco_kernels[train]") from error
        try:
            self.model = Dinov2Model.from_pretrained(name).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise OSError(
                f"teacher: no DINOv2 at {name!r} ({str(error).splitlines()[0]}). Without a network, "
                "download it elsewhere and pass its folder; to train without alignment, set its weight to 0"
            ) from error
        if self.model.config.patch_size != TEACHER_PATCH_SIZE:
            raise ValueError(
                f"teacher: expected patch size 14, got {self.model.config.patch_size} in {name!r}; "
                "give a DINOv2 with this patch size"
            )
        self.width, self.patch_size = self.model.config.hidden_size, patch_size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = (x.new_tensor(each).reshape(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
        size = [edge * TEACHER_PATCH_SIZE // self.patch_size for edge in x.shape[-2:]]
        image = F.interpolate(((x + 1) / 2 - mean) / std, size, mode="bicubic", align_corners=False)
        self.model = self.model.to(x.device)
        return self.model(pixel_values=image).last_hidden_state[:, 1:]

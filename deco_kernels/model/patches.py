"""Conversion between images and sequences of square patches; patches and their pixels are in row-major order."""

from __future__ import annotations

import torch


def to_patches(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, C, H, W] → [B, L, C, P] with L = (H/p)(W/p), P = p², pixel k = ky·p + kx."""
    batch, channels, height, width = image.shape
    p = patch_size
    patches = image.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // p) * (width // p), channels, p * p)


def from_patches(patches: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """[B, L, C, P] → [B, C, H, W], the inverse of `to_patches`."""
    batch, _, channels, _ = patches.shape
    p = patch_size
    image = patches.reshape(batch, height // p, width // p, channels, p, p).permute(0, 3, 1, 4, 2, 5)
    return image.reshape(batch, channels, height, width)

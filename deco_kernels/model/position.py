"""Fixed position features of the pixels in a patch (decoder) and rotary angles of the patches in an image (trunk).

Source: DeCo (arXiv 2511.19365), section 3, and the published checkpoints. Both depend only on
sizes, are computed in float64 and rounded once to float32.
"""

from __future__ import annotations

import math

import torch

NUM_POSITION_FEATURES = 64
"""Number of position features per pixel, for every patch size."""

POSITION_FEATURES = ("class", "text")


def pixel_position_features(
    patch_size: int, kind: str = "class", device: torch.device | str | None = None
) -> torch.Tensor:
    """Position features of the P = patch_size² pixels of a patch, pixel k = ky·patch_size + kx.

    - `"class"`: cos(π u f_i)·cos(π v f_j) / (1 + f_i f_j) at index 8i + j, with the 8 frequencies
      f = linspace(0, 8, 8) and u (of kx), v (of ky) on linspace(0, 1, patch_size).
    - `"text"`: cos(x g_m) at index 2m and cos(y g_m) at 2m + 1, with g_m = 10000^(-4m/128), m = 0..31, and x (of kx),
      y (of ky) on linspace(0, patch_size, patch_size).

    Returns a float32 tensor [P, 64] on `device`. Raises ValueError for any other `kind`.
    """
    if kind not in POSITION_FEATURES:
        raise ValueError(
            f"position_features: expected one of {list(POSITION_FEATURES)}, got {kind!r}; choose one of them"
        )
    extent = 1.0 if kind == "class" else float(patch_size)
    line = torch.linspace(0.0, extent, patch_size, dtype=torch.float64, device=device)
    y, x = (axis.reshape(-1, 1) for axis in torch.meshgrid(line, line, indexing="ij"))
    if kind == "class":
        frequency = torch.linspace(0.0, 8.0, 8, dtype=torch.float64, device=device)
        cos_x = torch.cos(math.pi * x * frequency)
        cos_y = torch.cos(math.pi * y * frequency)
        damping = 1.0 + frequency[:, None] * frequency
        features = (cos_x[:, :, None] * cos_y[:, None, :] / damping).flatten(1)
    else:
        m = torch.arange(32, dtype=torch.float64, device=device)
        frequency = 10000.0 ** (-4.0 * m / 128.0)
        features = torch.stack((torch.cos(x * frequency), torch.cos(y * frequency)), dim=-1).flatten(1)
    return features.float()


def rotary_angles(
    rows: int,
    columns: int,
    head_dim: int,
    device: torch.device | str | None = None,
    *,
    extent: tuple[float, float] = (16.0, 16.0),
) -> torch.Tensor:
    """Angles (radians) of the 2-D rotary embedding, row-major grid of patches, float32 [rows·columns, head_dim/2].

    Pair 2m is rotated by x·f_m and pair 2m + 1 by y·f_m, with f_m = 10000^(-4m/head_dim), m < head_dim/4, x on
    linspace(0, extent[0], columns) and y on linspace(0, extent[1], rows). `head_dim` must be a multiple of 4.
    """
    x = torch.linspace(0.0, extent[0], columns, dtype=torch.float64, device=device)
    y = torch.linspace(0.0, extent[1], rows, dtype=torch.float64, device=device)
    m = torch.arange(head_dim // 4, dtype=torch.float64, device=device)
    frequency = 10000.0 ** (-4.0 * m / head_dim)
    angle_x = (x[:, None] * frequency).expand(rows, columns, -1)
    angle_y = (y[:, None] * frequency)[:, None].expand(rows, columns, -1)
    return torch.stack((angle_x, angle_y), dim=-1).reshape(rows * columns, head_dim // 2).float()


def pair_rotation(angles: torch.Tensor) -> torch.Tensor:
    """(cos, sin) [..., 2] of angles [...], for `rotate_pairs`."""
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate_pairs(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (a, b) of adjacent channels of x [..., head_dim]: (a·cos - b·sin, b·cos + a·sin).

    rotation: (cos, sin) of every pair, [L, head_dim/2, 2] or with other leading sizes that broadcast to those of x, in
    the dtype of x, float32 or float64. The result has the shape and dtype of x.
    """
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which generates no code for complex numbers, and fuses real ones
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    # One product of complex numbers reads and writes x once.
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(rotation)).flatten(-2)

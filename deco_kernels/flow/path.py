"""The straight path from noise (t = 0) to an image (t = 1), and the distribution of training times.

Source: DeCo (arXiv 2511.19365), section 3.3, with the sign and time direction of the published checkpoints.
"""

from __future__ import annotations

import torch

DISTRIBUTIONS = ("lognormal", "uniform")


def interpolate(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The point on the path at time t and its velocity.

    Args:
        x: images [B, ...], floating.
        noise: like x.
        t: times [B] in [0, 1], floating.

    Returns:
        (x_t, v) with x_t = t·x + (1 - t)·noise and v = x - noise, both of the shape of x.

    Raises:
        ValueError: shapes that do not match.
    """
    if noise.shape != x.shape:
        raise ValueError(
            f"noise: expected the shape of x {tuple(x.shape)}, got {tuple(noise.shape)}; "
            "draw it with torch.randn_like(x)"
        )
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"t: expected shape ({x.shape[0]},) like the batch of x, got {tuple(t.shape)}; pass one time per image"
        )
    t = t.reshape(-1, *[1] * (x.dim() - 1))
    return t * x + (1 - t) * noise, x - noise


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """t / (t + (1 - t)·shift). A shift above 1 moves times in [0, 1] toward noise; 0 and 1 do not change.

    Raises ValueError unless shift is positive and finite.
    """
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift: expected a positive finite number, got {shift}; choose one, such as 1")
    return t / (t + (1 - t) * shift)


def sample_time(
    batch: int,
    *,
    distribution: str = "lognormal",
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw training times, float32 [batch].

    Args:
        distribution: "lognormal", sigmoid(N(0, 1)), or "uniform" on [0, 1).
        shift: see `shift_time`.
        generator: random generator; its device may differ from that of the result.
        device: device of the result; by default that of the generator, or the current default device.

    Raises:
        ValueError: an unknown distribution, or a shift that is not positive and finite.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution: expected one of {list(DISTRIBUTIONS)}, got {distribution!r}; choose one of them"
        )
    draw_device = device if generator is None else generator.device
    if distribution == "lognormal":
        t = torch.randn(batch, generator=generator, device=draw_device, dtype=torch.float32).sigmoid()
    else:
        t = torch.rand(batch, generator=generator, device=draw_device, dtype=torch.float32)
    return shift_time(t if device is None else t.to(device), shift)

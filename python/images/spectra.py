"""Energy of images by frequency, in the orthonormal DCT of 8x8 blocks."""

import torch

from deco_kernels.backends.reference.flow_matching_loss import block_dct, block_dct_ycbcr
from deco_kernels.signatures import BLOCK


def zigzag() -> list[tuple[int, int]]:
    """(vertical, horizontal) frequency of the 64 coefficients of a block in JPEG's order, low to high."""

    def place(frequency: tuple[int, int]) -> tuple[int, int]:
        row, column = frequency
        return row + column, row if (row + column) % 2 else column

    return sorted(((row, column) for row in range(BLOCK) for column in range(BLOCK)), key=place)


def energies(signal: torch.Tensor) -> torch.Tensor:
    """Mean squared DCT coefficients, over images, channels and 8x8 blocks, of [B, C, H, W] in zig-zag order, [64].

    The DCT is orthonormal: their mean is the mean square of the signal if no side is padded to a multiple of 8.
    """
    mean = block_dct(signal.float()).square().mean((0, 1, 2, 3))
    rows, columns = zip(*zigzag(), strict=True)
    return mean[list(rows), list(columns)].cpu()


def shares(spectra: dict[float, torch.Tensor]) -> torch.Tensor:
    """Share of each coefficient in the energy at one time, averaged over times, [64]."""
    return torch.stack([energy / energy.sum() for energy in spectra.values()]).mean(0)


def high_share(energy: torch.Tensor) -> float:
    """Energy share of the upper half of the coefficients, 32 to 63 in zig-zag order."""
    return (energy[BLOCK**2 // 2 :].sum() / energy.sum()).item()


def diagonal_energies(images: torch.Tensor) -> list[float]:
    """Mean squared luminance coefficient of the 8x8 block DCT of [n, 3, H, W] on each diagonal u + v = 0..14."""
    energy = block_dct_ycbcr(images)[:, 0].square().mean((0, 1, 2))
    frequency = torch.arange(8)
    diagonal = frequency[:, None] + frequency
    return [energy[diagonal == index].mean().item() for index in range(15)]

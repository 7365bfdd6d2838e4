"""DCT energy spectra of the DiT's output and of the pixel velocity during sampling.

Source: DeCo (arXiv 2511.19365), figure 4.
"""

import torch
from torch import nn

from deco_kernels import flow, model
from deco_kernels.model.patches import from_patches
from deco_kernels.model.pixel_decoder import upsample
from deco_kernels.signatures import BLOCK
from images.spectra import energies

SIGNALS = ("dit_output", "velocity")


class SpectrumRecorder:
    """A velocity function for `flow.sample` that records the spectra of every call by its time.

    The DiT's output is recorded at full resolution: for DeCo the upsampled conditioning of the pixels, D channels; for
    the plain DiT, which has no decoder, the velocity.

    Args:
        network: DeCo, DeCoTextToImage or DiT.
        dtype: autocast dtype, or None to disable autocast.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None = None):
        self.network, self.dtype = network, dtype
        self.images = 0  # batch size; guided calls have twice as many images, the conditional half last
        self.sums: dict[float, dict[str, torch.Tensor]] = {}
        self.counts: dict[float, int] = {}

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            velocity, dit_output = velocity_and_dit_output(self.network, x, t, cond)
        time, kept = t[0].item(), self.images
        sums = self.sums.setdefault(time, {name: torch.zeros(BLOCK**2, dtype=torch.float64) for name in SIGNALS})
        for name, signal in zip(SIGNALS, (dit_output, velocity), strict=True):
            sums[name] += kept * energies(signal[-kept:])
        self.counts[time] = self.counts.get(time, 0) + kept
        return velocity

    def sample(self, noise: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor, **settings) -> None:
        """Samples a batch with `flow.sample` and records the spectra."""
        self.images = len(noise)
        flow.sample(self, noise, cond, uncond, **settings)

    def spectra(self) -> dict[str, dict[float, torch.Tensor]]:
        """Signal → time → energies [64] in zig-zag order, averaged over all images."""
        return {name: {time: sums[name] / self.counts[time] for time, sums in self.sums.items()} for name in SIGNALS}


def velocity_and_dit_output(network: nn.Module, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor):
    """(velocity [B, 3, H, W], output of the DiT at full resolution [B, channels, H, W])."""
    if isinstance(network, model.DiT):
        velocity = network(x, t, cond)
        return velocity, velocity
    decoder, given = network.decoder, []
    handle = decoder.register_forward_pre_hook(lambda _, arguments: given.append(arguments[1]))
    try:
        velocity = network(x, t, cond)
    finally:
        handle.remove()
    pixels = upsample(given[0], decoder.up_weight, decoder.up_bias, decoder.width)
    sides = [side // decoder.decoder_patch for side in x.shape[-2:]]
    return velocity, from_patches(pixels.transpose(-1, -2), decoder.grid, *sides)

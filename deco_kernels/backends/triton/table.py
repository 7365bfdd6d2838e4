"""Launch parameters of the Triton kernels, by kernel, decoder width, storage size and architecture.

Rows for sm_90 are the fastest of those measured on an H100 or H200 (benchmarks/results/gpu_sweep.json), except the
programs of the decoder's forward. The others are chosen from the compiled code (registers, spills, issue slots;
`python -m benchmarks static`). Nothing is tuned at run time. A row without an architecture applies to every
architecture without a separate row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Launch parameters.

    block: pixels, rows or 8x8 blocks per tile.
    programs_per_multiprocessor: size of a persistent grid.
    """

    block: int
    warps: int
    stages: int
    programs_per_multiprocessor: int


# (kernel, width, bytes per element) -> parameters. Width 0: the kernel does not depend on the decoder's width.
_TABLE: dict[tuple[str, int, int], Launch] = {
    ("pixel_decoder", 16, 2): Launch(128, 4, 2, 4),
    ("pixel_decoder", 32, 2): Launch(128, 4, 2, 2),
    ("pixel_decoder", 64, 2): Launch(128, 8, 1, 1),
    ("pixel_decoder", 16, 4): Launch(64, 4, 2, 4),
    ("pixel_decoder", 32, 4): Launch(64, 4, 2, 2),
    ("pixel_decoder", 64, 4): Launch(128, 8, 1, 1),
    ("pixel_decoder_recompute", 16, 2): Launch(128, 4, 2, 4),
    ("pixel_decoder_recompute", 32, 2): Launch(128, 4, 2, 2),
    ("pixel_decoder_recompute", 64, 2): Launch(128, 8, 1, 1),
    ("pixel_decoder_recompute", 16, 4): Launch(64, 4, 2, 4),
    ("pixel_decoder_recompute", 32, 4): Launch(64, 4, 2, 2),
    ("pixel_decoder_recompute", 64, 4): Launch(128, 8, 1, 1),
    ("pixel_decoder_head", 16, 2): Launch(128, 4, 2, 4),
    ("pixel_decoder_head", 32, 2): Launch(128, 4, 2, 2),
    ("pixel_decoder_head", 64, 2): Launch(128, 8, 1, 1),
    ("pixel_decoder_head", 16, 4): Launch(64, 4, 2, 4),
    ("pixel_decoder_head", 32, 4): Launch(64, 4, 2, 2),
    ("pixel_decoder_head", 64, 4): Launch(64, 8, 1, 1),
    # Few programs, which each read and write block·D sums in every chunk; on sm_90 more are faster.
    ("pixel_decoder_embedding", 16, 2): Launch(128, 4, 1, 2),
    ("pixel_decoder_embedding", 32, 2): Launch(128, 4, 1, 2),
    ("pixel_decoder_embedding", 64, 2): Launch(128, 4, 1, 2),
    ("pixel_decoder_embedding", 16, 4): Launch(64, 4, 2, 4),
    ("pixel_decoder_embedding", 32, 4): Launch(64, 4, 2, 4),
    ("pixel_decoder_embedding", 64, 4): Launch(64, 4, 2, 4),
    ("adaln_block", 16, 2): Launch(128, 4, 2, 4),
    ("adaln_block", 32, 2): Launch(128, 4, 2, 2),
    ("adaln_block", 64, 2): Launch(128, 8, 1, 1),
    ("adaln_block", 16, 4): Launch(64, 4, 2, 4),
    ("adaln_block", 32, 4): Launch(64, 4, 2, 2),
    ("adaln_block", 64, 4): Launch(128, 8, 1, 1),
    ("adaln_block_backward", 16, 2): Launch(64, 4, 2, 4),
    ("adaln_block_backward", 32, 2): Launch(64, 4, 2, 2),
    ("adaln_block_backward", 64, 2): Launch(128, 8, 1, 1),
    ("adaln_block_backward", 16, 4): Launch(64, 4, 1, 2),
    ("adaln_block_backward", 32, 4): Launch(32, 4, 1, 2),
    ("adaln_block_backward", 64, 4): Launch(32, 4, 1, 2),
    ("upsample_modulate", 16, 2): Launch(128, 4, 2, 4),
    ("upsample_modulate", 32, 2): Launch(128, 4, 2, 4),
    ("upsample_modulate", 64, 2): Launch(128, 8, 1, 2),
    ("upsample_modulate", 16, 4): Launch(64, 4, 2, 4),
    ("upsample_modulate", 32, 4): Launch(64, 4, 2, 2),
    ("upsample_modulate", 64, 4): Launch(64, 8, 1, 1),
    ("upsample_modulate_backward", 16, 2): Launch(64, 4, 2, 4),
    ("upsample_modulate_backward", 32, 2): Launch(64, 4, 2, 2),
    ("upsample_modulate_backward", 64, 2): Launch(64, 8, 1, 1),
    ("upsample_modulate_backward", 16, 4): Launch(64, 4, 1, 2),
    ("upsample_modulate_backward", 32, 4): Launch(64, 4, 1, 1),
    ("upsample_modulate_backward", 64, 4): Launch(64, 8, 1, 1),
    ("flow_matching_loss", 0, 2): Launch(64, 4, 1, 2),
    ("flow_matching_loss", 0, 4): Launch(64, 8, 1, 1),
    ("flow_matching_loss_backward", 0, 2): Launch(64, 8, 1, 1),
    ("flow_matching_loss_backward", 0, 4): Launch(64, 8, 1, 1),
}
# Architectures on which the table above exceeds the shared memory (64 kB on gfx942, 227 kB on Blackwell data-center
# GPUs under Triton 3.6, which uses more than 3.9), or other parameters are faster.
_ARCHITECTURE_TABLE: dict[tuple[str, int, int, str], Launch] = {
    # One to four of these programs fit a multiprocessor, by N and variant; twelve are full waves of any of them.
    ("pixel_decoder", 32, 2, "sm_90"): Launch(64, 4, 2, 12),
    ("pixel_decoder_recompute", 32, 2, "sm_90"): Launch(128, 4, 1, 2),
    ("pixel_decoder_head", 32, 2, "sm_90"): Launch(128, 4, 1, 4),
    ("pixel_decoder_embedding", 32, 2, "sm_90"): Launch(128, 4, 1, 4),
    ("flow_matching_loss", 0, 2, "sm_90"): Launch(64, 4, 2, 2),
    ("flow_matching_loss_backward", 0, 2, "sm_90"): Launch(64, 4, 2, 2),
    ("pixel_decoder", 32, 4, "gfx942"): Launch(64, 8, 1, 2),
    ("pixel_decoder_recompute", 32, 4, "gfx942"): Launch(64, 4, 1, 2),
    ("pixel_decoder_recompute", 32, 2, "sm_80"): Launch(64, 2, 1, 4),
    ("flow_matching_loss_backward", 0, 2, "sm_80"): Launch(32, 4, 1, 2),
    ("adaln_block_backward", 64, 2, "sm_100"): Launch(64, 8, 1, 1),
    ("adaln_block_backward", 64, 2, "sm_103"): Launch(64, 8, 1, 1),
}
# NVIDIA GPUs outside data centers: 99 kB of shared memory, and mma.sync in place of wgmma.
_CONSUMER = ("sm_86", "sm_89", "sm_120", "sm_121")
_CONSUMER_TABLE: dict[tuple[str, int, int], Launch] = {
    ("pixel_decoder", 32, 2): Launch(128, 4, 1, 2),
    ("pixel_decoder_recompute", 32, 2): Launch(64, 2, 1, 4),
    ("adaln_block_backward", 32, 2): Launch(32, 4, 2, 2),
    ("adaln_block_backward", 64, 2): Launch(64, 8, 1, 1),
    ("upsample_modulate_backward", 32, 2): Launch(64, 4, 1, 2),
    ("flow_matching_loss_backward", 0, 2): Launch(32, 4, 1, 2),
}


KERNELS = tuple(sorted({kernel for kernel, _, _ in _TABLE}))
_REPLACED: dict[str, Launch] = {}


@contextlib.contextmanager
def replaced(kernel: str, parameters: Launch) -> Iterator[None]:
    """Launch a kernel with these parameters on every architecture, to compare them with those of the table."""
    _REPLACED[kernel] = parameters
    try:
        yield
    finally:
        del _REPLACED[kernel]


def launch_parameters(kernel: str, width: int, dtype: torch.dtype, architecture: str, depth: int = 1) -> Launch:
    """Parameters of a kernel; `architecture` is "sm_90", "gfx942" and the like, or "interpreter". `depth`: blocks
    that the kernel computes."""
    if kernel in _REPLACED:
        return _REPLACED[kernel]
    key = (kernel, width, dtype.itemsize)
    if architecture in _CONSUMER and key in _CONSUMER_TABLE:
        return _CONSUMER_TABLE[key]
    found = _ARCHITECTURE_TABLE.get((*key, architecture), _TABLE[key])
    # With two stages the weights of every block take 21 kB of shared memory.
    if depth > 3 and key[1:] == (32, 4) and architecture in (*_CONSUMER, "sm_80", "sm_87"):
        return found._replace(stages=1)
    return found

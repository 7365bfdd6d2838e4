"""A tiny DINOv2 with random weights."""

from pathlib import Path

import torch

TEACHER_WIDTH = 12


def save_tiny_dinov2(folder: Path) -> Path:
    """Writes config and weights for `from_pretrained`; features have TEACHER_WIDTH channels."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=TEACHER_WIDTH, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Dinov2Model(config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    return folder

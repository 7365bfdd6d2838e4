"""Peak memory of contenders: their names, and what it contains."""

import pytest
import torch

from benchmarks.harness import memory
from benchmarks.ops.sizes import Size

BACKENDS = ("reference", "cpu")


def test_contenders():
    assert memory.contenders_in("pixel_decoder", BACKENDS) == ["published", *BACKENDS]
    two_ops = ["cpu two ops keeping cond", "cpu two ops"]
    assert memory.contenders_in("pixel_decoder_loss_from_tokens", BACKENDS) == [*two_ops, "cpu"]


@pytest.mark.parametrize("name", memory.contenders_in("pixel_decoder_loss_from_tokens", ("cpu",)))
def test_growth_contains_the_gradient_of_up_weight(name):
    """Even for a single token."""
    size = Size(height=16, width=16)
    gradient = 4 * size.patch_pixels * size.decoder_width * size.token_width
    assert memory.step_growth("pixel_decoder_loss_from_tokens", size, name, torch.float32, "cpu") >= 0.9 * gradient

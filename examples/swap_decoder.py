"""Fused ops in an existing model: swap, compare, time, undo."""

import time

import torch

from deco_kernels.integrations import swap_decoder
from deco_kernels.testing.published_model import PublishedDeCo  # a stand-in for your model class

torch.manual_seed(0)
model = PublishedDeCo(width=64, depth=1, heads=2, num_classes=10)
for parameter in model.parameters():  # a new model's head is zero; yours is trained
    torch.nn.init.normal_(parameter, std=0.05)
image, t, labels = torch.randn(2, 3, 64, 64), torch.rand(2), torch.tensor([3, 7])


def timed(name):
    start = time.perf_counter()
    velocity = model(image, t, labels)
    velocity.square().mean().backward()
    print(f"{name}: {1e3 * (time.perf_counter() - start):.1f} ms for a forward and backward")
    return velocity.detach()


timed("first call")
before = timed("published")
swap = swap_decoder(model)
timed("first call")
after = timed("fused")
swap.undo()
difference = (after - before).norm() / before.norm()
print(f"relative difference of the velocities: {difference:.1e}")
assert difference < 1e-5

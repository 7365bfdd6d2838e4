"""The fused loss in a training loop of your own: a linear flow from noise to images."""

import torch

from deco_kernels import model

torch.manual_seed(0)
images = torch.rand(8, 3, 64, 64) * 2 - 1  # in place of yours: [B, 3, H, W] in [-1, 1]
net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 3, 3, padding=1))
loss = model.FlowMatchingLoss(frequency_scale=1.0)
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)

totals = []
for step in range(20):
    noise, t = torch.randn_like(images), torch.rand(len(images), 1, 1, 1)
    x_t = (1 - t) * noise + t * images
    total, pixel, frequency = loss(net(x_t), images - noise)
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    totals.append(total.item())
    if step % 5 == 0:
        print(f"step {step}: total {total:.4f} = pixel {pixel:.4f} + frequency {frequency:.4f}")
assert totals[-1] < totals[0]

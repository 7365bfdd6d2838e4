"""Where the time of an op goes: PyTorch's profiler on one op, forward and backward."""

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from deco_kernels import ops, testing

device = "cuda" if torch.cuda.is_available() else "cpu"
inputs = testing.random_inputs("pixel_decoder", dtype=torch.bfloat16, image_size=(1, 256, 256), device=device)
tensors = {name: tensor.requires_grad_() for name, tensor in inputs.tensors.items()}


def step():
    ops.pixel_decoder(**tensors, **inputs.options).sum().backward()


step()  # compiles and allocates
activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
with profile(activities=activities) as profiled:
    for _ in range(3):
        step()
print(profiled.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=12))
trace = Path(sys.argv[1] if len(sys.argv) > 1 else "trace.json")
profiled.export_chrome_trace(str(trace))
print(f"wrote {trace}; open it in chrome://tracing or Perfetto")

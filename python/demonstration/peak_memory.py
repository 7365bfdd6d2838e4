"""Peak memory growth of the first training steps of one contender; runs in a separate process.

`python -m demonstration.peak_memory fused|eager PHOTOGRAPHS SIZE BATCH THREADS` prints the growth in bytes: the peak
resident memory during two steps, gradients and optimizer state included, minus the resident memory before them.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import torch

from deco_kernels.machine import default_heap, peak_bytes, reset_peak
from demonstration.contenders import FULL, Contender, Recipe

PROGRAMS = Path(__file__).resolve().parents[1]
STEPS = 2


def measure(name: str, recipe: Recipe, photographs: int) -> float:
    """Growth in MB (10^6 bytes), in a new process with glibc's default heap, which releases large blocks."""
    sizes = (photographs, recipe.image_size, recipe.batch_size, torch.get_num_threads())
    command = [sys.executable, "-m", "demonstration.peak_memory", name, *map(str, sizes)]
    answer = subprocess.run(command, cwd=PROGRAMS, env=default_heap(), capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"measuring the peak memory of {name} failed:\n{answer.stderr}")
    return int(answer.stdout) / 1e6


def growth(name: str, photographs: int, size: int, batch: int) -> int:
    recipe = dataclasses.replace(FULL, image_size=size, batch_size=batch)
    images = torch.rand(photographs, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    contender = Contender(recipe, images, seed=0, eager=name == "eager")
    with torch.no_grad():
        contender.model(images[:1], torch.zeros(1), contender.labels[:1])  # loads the code and starts the threads
    before = reset_peak("cpu")
    for _ in range(STEPS):
        contender.step()
    return peak_bytes("cpu") - before


if __name__ == "__main__":
    contender_name, *numbers = sys.argv[1:]
    photograph_count, image_size, batch_size, thread_count = map(int, numbers)
    torch.set_num_threads(thread_count)
    print(growth(contender_name, photograph_count, image_size, batch_size))

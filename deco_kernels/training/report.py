"""Output of a run: TensorBoard scalars and sample grids, metrics.jsonl, progress bar, messages."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from deco_kernels.training.images import as_grid, to_pixels


class Report:
    """Writes to the run's folder; shows a progress bar on a terminal and prints lines elsewhere. For one process only.

    Args:
        folder: folder of the run.
        first_step: steps already done; records of later steps are dropped.
        steps: steps of the whole run.
    """

    def __init__(self, folder: Path, first_step: int, steps: int):
        self.folder, self.last_logged, self.steps = folder, first_step, steps
        self._trim(first_step)
        self._metrics = open(folder / "metrics.jsonl", "a", buffering=1, encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        # disable=None shows the bar only on a terminal.
        self._bar = tqdm(total=steps, initial=first_step, unit="step", desc="training", disable=None)

    def step(self) -> None:
        """Advance the progress bar by one step."""
        self._bar.update()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of a step, counted from 1."""
        self.last_logged = step
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        loss, waiting = f"{values['total']:.4f}", f"{values['waiting']:.0%}"
        self._bar.set_postfix(loss=loss, waiting=waiting)
        speed = f"{values['images_per_second']:.1f} images per second"
        self.line(f"step {step} of {self.steps}: loss {loss}, {speed}, waiting {waiting}")

    def samples(self, step: int, images: torch.Tensor) -> None:
        """Record samples [n, 3, H, W] in [-1, 1] as a grid, in TensorBoard and as samples/step_*.png."""
        grid = as_grid(to_pixels(images))
        self._board.add_image("samples", grid, step, dataformats="HWC")
        (self.folder / "samples").mkdir(exist_ok=True)
        Image.fromarray(grid).save(self.folder / "samples" / f"step_{step:09d}.png")

    def line(self, text: str) -> None:
        """Print a line if output goes to a pipe or a file, where there is no progress bar."""
        if not (sys.stdout.isatty() and sys.stderr.isatty()):
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def message(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._metrics.close()

    def _trim(self, first_step: int) -> None:
        """Drop the metrics of steps after `first_step` and an incomplete last line."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line + "\n")
            except ValueError:
                continue
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)

"""What a run tells its user: TensorBoard scalars and sample grids, metrics.jsonl, a progress bar, skipped images."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Report:
    """Writes into the run's folder; made by one process only.

    Args:
        folder: of the run. first_step: where it starts or resumes; what was written for later steps is dropped.
        steps: of the whole run.
    """

    def __init__(self, folder: Path, first_step: int, steps: int):
        self.folder, self.last_logged = folder, first_step
        self._trim(first_step)
        self._metrics = open(folder / "metrics.jsonl", "a", buffering=1, encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        # On a terminal only; disable=None asks tqdm to find out.
        self._bar = tqdm(total=steps, initial=first_step, unit="step", desc="training", disable=None)

    def step(self) -> None:
        """Count a step."""
        self._bar.update()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of a step, counted from 1."""
        self.last_logged = step
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._bar.set_postfix(loss=f"{values['total']:.4f}", waiting=f"{values['waiting']:.0%}")

    def samples(self, step: int, images: torch.Tensor) -> None:
        """Record samples [n, 3, H, W] in [-1, 1] as a grid, in TensorBoard and as samples/step_*.png."""
        grid = as_grid(images)
        self._board.add_image("samples", grid, step, dataformats="HWC")
        (self.folder / "samples").mkdir(exist_ok=True)
        Image.fromarray(grid).save(self.folder / "samples" / f"step_{step:09d}.png")

    def message(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._metrics.close()

    def _trim(self, first_step: int) -> None:
        """Drop the metrics of steps after `first_step`, and a last line cut short by a kill."""
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


def as_grid(images: torch.Tensor) -> np.ndarray:
    """Images [n, 3, H, W] in [-1, 1] → one uint8 image [rows·H, columns·W, 3], nearly as many rows as columns."""
    count, _, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    cells = torch.zeros(rows * columns, 3, height, width, dtype=torch.uint8)
    cells[:count] = pixels
    grid = cells.reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, columns * width, 3).numpy()

"""Fixtures of the training tests: small class folders, and training runs in forked processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "image_size=32", "batch_size=8", "steps=10", "log_every=1", "save_every=5",
    "sample.every=0", "optimizer.lr=1e-2", "optimizer.warmup_steps=0", "data.workers=0",
]  # fmt: skip


def write_images(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (40, 48)) -> Path:
    """Writes JPEG files of smooth random colors, 00000.jpg and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(drawn.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg")
    return folder


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory) -> Path:
    """Two classes of 10 and 13 images."""
    root = tmp_path_factory.mktemp("class_folders")
    write_images(root / "ant", 10)
    write_images(root / "bee", 13, seed=1)
    return root


class Trainer:
    """Starts training runs through the forking process."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def jobs(self, jobs: list[dict]) -> list[int]:
        """Runs jobs concurrently; returns their exit statuses."""
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(
        self,
        out: Path,
        *arguments: str,
        config: Path | None = None,
        processes: int = 1,
        slurm: bool = False,
        resume: bool = False,
        **job,
    ) -> int:
        """Trains into `out` with additional arguments; appends the output to out.log.

        Trains the tiny class model by default, otherwise `config`, equally shortened.
        """
        command = [str(config or ROOT / "python/configs/small.yaml"), *([] if config else ["model.name=deco-tiny"])]
        command += [*SHORT, f"out={out}", *arguments]
        command += ["--resume", "auto"] if resume else []
        job |= {"arguments": command, "output": f"{out}.log"}
        if processes == 1:
            return self.jobs([job])[0]
        return max(self.jobs([{**job, "env": each} for each in environments(processes, slurm)]), key=abs)


def environments(processes: int, slurm: bool = False) -> list[dict[str, str]]:
    """The variables that torchrun, or SLURM on one node, sets for each of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    size = str(processes)
    if slurm:
        shared |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": size, "SLURM_NNODES": "1"}
        shared |= {"SLURM_NTASKS_PER_NODE": size, "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
        return [shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(processes)]
    shared |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


@pytest.fixture(scope="session")
def trainer():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    command = [sys.executable, "-m", "tests.training.forks"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield Trainer(process)
    process.kill()
    process.wait()


def metrics(out: Path) -> list[dict]:
    """The recorded scalars of a run, one dictionary per step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    """Step → total loss."""
    return {each["step"]: each["total"] for each in metrics(out)}


def log(out: Path) -> str:
    """Output of the run."""
    return Path(f"{out}.log").read_text()

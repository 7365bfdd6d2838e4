"""Two processes, with DDP and FSDP2, compute the losses of one; checkpoints work across strategies."""

import os
import subprocess
import sys

import pytest
import torch

from deco_kernels import model
from tests.training.conftest import ROOT, SHORT, log, losses


@pytest.fixture(scope="module")
def one_process(trainer, class_folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_process") / "run"
    assert trainer.run(out, f"data.path={class_folders}", "accumulate=2", "sample.every=10") == 0, log(out)
    found = losses(out)
    assert list(found) == list(range(1, 11)) and found[10] < found[1]
    return found


@pytest.mark.long
def test_under_torchrun(class_folders, one_process, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "python/train.py"]
    command += ["python/configs/small.yaml", "model.name=deco-tiny", *SHORT, f"data.path={class_folders}"]
    command += ["accumulate=2", f"out={tmp_path / 'run'}", "strategy=fsdp2"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert losses(tmp_path / "run") == pytest.approx(one_process, rel=1e-5)


def test_with_the_variables_of_slurm(trainer, class_folders, one_process, tmp_path):
    out = tmp_path / "run"
    arguments = [f"data.path={class_folders}", "accumulate=2", "devices=2"]
    assert trainer.run(out, *arguments, processes=2, slurm=True) == 0, log(out)
    assert losses(out) == pytest.approx(one_process, rel=1e-5)


def test_the_wrapped_model_is_freed_before_the_process_group(class_folders, tmp_path):
    """Else the reducer of DDP frees the group, holding the GIL that the group's threads may need, and both wait."""
    program = """
import gc, sys
import torch.distributed as dist
import train

destroy = dist.destroy_process_group

def checked(*group):
    alive = [type(each).__name__ for each in gc.get_objects() if type(each).__name__ == "DistributedDataParallel"]
    print("at the end of the group:", alive)
    destroy(*group)

dist.destroy_process_group = checked
sys.exit(train.main(sys.argv[1:]))
"""
    arguments = ["python/configs/small.yaml", "model.name=deco-tiny", *SHORT, f"data.path={class_folders}"]
    arguments += ["strategy=ddp", "steps=2", f"out={tmp_path / 'run'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT}"}
    answer = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    ends = [line for line in answer.stdout.splitlines() if line.startswith("at the end")]
    assert ends and set(ends) == {"at the end of the group: []"}, ends


@pytest.mark.long
def test_compiled_trunk(trainer, class_folders, one_process, tmp_path):
    out = tmp_path / "run"
    assert trainer.run(out, f"data.path={class_folders}", "accumulate=2", "compile=true") == 0, log(out)
    assert losses(out) == pytest.approx(one_process, rel=1e-4)
    content = torch.load(out / "checkpoints" / "step_000000010.ckpt", weights_only=True)
    assert type(model.from_published(content)) is model.DeCo


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one(strategy, trainer, class_folders, one_process, tmp_path):
    out = tmp_path / "run"
    arguments = [f"data.path={class_folders}", "accumulate=2", "sample.every=10", f"strategy={strategy}"]
    assert trainer.run(out, *arguments, "steps=4", processes=2) == 0, log(out)
    assert trainer.run(out, *arguments, processes=2, resume=True) == 0, log(out)
    assert losses(out) == pytest.approx(one_process, rel=1e-5)
    assert (out / "samples" / "step_000000010.png").is_file()
    (out / "checkpoints" / "step_000000010.ckpt").unlink()
    assert trainer.run(out, f"data.path={class_folders}", "accumulate=2", resume=True) == 0, log(out)
    assert losses(out) == pytest.approx(one_process, rel=1e-5)

"""Checkpoints: atomic files, damaged ones, other models."""

import pickle

import pytest
import torch

from deco_kernels.training import checkpoints
from deco_kernels.training.ema import MovingAverage
from tests.random_models import random_model, randomize

CONTENT = {"state_dict": {}, "optimizer": {}, "step": 3, "config": {}, "skipped": {}}


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "step_000000003.ckpt"
    checkpoints.write_atomically(CONTENT, path)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        checkpoints.write_atomically({"unpicklable": lambda: None}, path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == [path.name]
    with pytest.raises(checkpoints.CheckpointError, match="GiB are free"):
        checkpoints.write_atomically(CONTENT, tmp_path / "nowhere" / "step_000000004.ckpt")


def test_the_newest_readable_checkpoint_is_read(tmp_path):
    assert checkpoints.read_latest(tmp_path) is None
    for step in (8, 9, 10):
        checkpoints.write_atomically(CONTENT | {"step": step}, tmp_path / f"step_{step:09d}.ckpt")
    (tmp_path / "step_000000010.ckpt").write_bytes((tmp_path / "step_000000010.ckpt").read_bytes()[:200])
    with pytest.warns(UserWarning, match="step_000000010.ckpt cannot be read"):
        assert checkpoints.read_latest(tmp_path)["step"] == 9
    for step in (8, 9):
        (tmp_path / f"step_{step:09d}.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(checkpoints.CheckpointError, match="none of the 3"):
        checkpoints.read_latest(tmp_path)


def test_another_file_is_no_checkpoint(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "published.ckpt")
    with pytest.raises(checkpoints.CheckpointError, match="has no"):
        checkpoints.read(tmp_path / "published.ckpt")
    torch.save(3, tmp_path / "number.ckpt")
    with pytest.raises(checkpoints.CheckpointError, match="number.ckpt is not a checkpoint of a training run"):
        checkpoints.read(tmp_path / "number.ckpt")


def test_what_is_no_file_is_no_checkpoint(tmp_path, make_fifo):
    make_fifo(tmp_path / "step_000000001.ckpt")
    for path, kind in (
        (tmp_path, "a folder"),
        (tmp_path / "absent", "nothing"),
        (tmp_path / "step_000000001.ckpt", "a FIFO"),
    ):
        with pytest.raises(checkpoints.CheckpointError, match=f"{path} cannot be read .* found {kind}; check the path"):
            checkpoints.read(path)
    with pytest.warns(UserWarning, match="a FIFO"), pytest.raises(checkpoints.CheckpointError, match="none of the 1"):
        checkpoints.read_latest(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("model", {"name": "deco-tiny", "options": {"depth": 3}}), ("repa", {"weight": 0.5})]
)
def test_a_checkpoint_of_another_model_is_refused(key, value):
    config = {"model": {"name": "deco-tiny", "options": {}}, "repa": {"weight": 0.0}}
    checkpoints.check_same_model({"config": config, "step": 3}, config)
    with pytest.raises(checkpoints.CheckpointError, match=f"step 3 was written with {key}"):
        checkpoints.check_same_model({"config": config, "step": 3}, config | {key: value})


def test_moving_average_by_formula():
    network = random_model()
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    average = MovingAverage(network, 0.75)
    randomize(network, seed=1)
    average.update()
    now = {name: p.detach().clone() for name, p in network.named_parameters()}
    with average.swapped():
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.detach(), 0.75 * start[name] + 0.25 * now[name])
    assert all(torch.equal(p, now[name]) for name, p in network.named_parameters())

"""Two processes, DDP and FSDP2, compute the losses of one; checkpoints pass from one strategy to the other."""

import pytest

from tests.training.conftest import log, losses


@pytest.fixture(scope="module")
def one_process(trainer, class_folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_process") / "run"
    assert trainer.run(out, f"data.path={class_folders}", "accumulate=2", "sample.every=10") == 0, log(out)
    found = losses(out)
    assert list(found) == list(range(1, 11)) and found[10] < found[1]
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one(strategy, trainer, class_folders, one_process, tmp_path):
    out = tmp_path / "run"
    arguments = [f"data.path={class_folders}", "accumulate=2", "sample.every=10", f"strategy={strategy}"]
    assert trainer.run(out, *arguments, processes=2) == 0, log(out)
    assert losses(out) == pytest.approx(one_process, rel=1e-5)
    assert (out / "samples" / "step_000000010.png").is_file()
    (out / "checkpoints" / "step_000000010.ckpt").unlink()
    assert trainer.run(out, f"data.path={class_folders}", "accumulate=2", resume=True) == 0, log(out)
    assert losses(out) == pytest.approx(one_process, rel=1e-5)

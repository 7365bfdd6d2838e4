"""A killed run continues with the losses of an uninterrupted one; a full disk leaves the last checkpoint."""

import random
import signal

import pytest

from deco_kernels.training import checkpoints
from tests.training.conftest import log, losses

STEPS = 30
OPTIONS = [f"steps={STEPS}", "save_every=1", "keep=2", "batch_size=4", "data.workers=1", "data.prefetch=2"]
OPTIONS += ["optimizer.warmup_steps=20", "optimizer.clip_norm=1"]


@pytest.fixture(scope="module")
def uninterrupted(trainer, class_folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert trainer.run(out, f"data.path={class_folders}", *OPTIONS) == 0, log(out)
    found = losses(out)
    assert len(found) == STEPS and len(set(found.values())) == STEPS
    return found


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_every_resume_continues_with_identical_losses(kills, trainer, class_folders, uninterrupted, tmp_path):
    """A fast machine may complete the last steps of a run before its kill."""
    out, drawn = tmp_path / "run", random.Random(kills)
    resume = dict(resume=True)
    lines, statuses = 0, []
    for remaining in range(kills, 0, -1):
        lines = min(lines + drawn.randint(1, max(1, (STEPS - 2 - lines) // remaining)), STEPS - 2)
        kill = [str(out / "metrics.jsonl"), lines, drawn.uniform(0, 0.05)]
        statuses.append(trainer.run(out, f"data.path={class_folders}", *OPTIONS, kill=kill, **resume))
        assert statuses[0] == -signal.SIGKILL and statuses[-1] in (0, -signal.SIGKILL), log(out)
        assert checkpoints.read_latest(out / "checkpoints") is not None or lines <= 1
        found = losses_before_a_cut(out)
        assert found == {step: uninterrupted[step] for step in found}
        lines = len(found)
    assert trainer.run(out, f"data.path={class_folders}", *OPTIONS, **resume) == 0, log(out)
    assert losses(out) == uninterrupted
    names = [path.name for path in (out / "checkpoints").iterdir()]
    assert sorted(names) == [f"step_{step:09d}.ckpt" for step in (STEPS - 1, STEPS)]


def losses_before_a_cut(out):
    """As `losses`, for a file whose last line may be truncated by a kill."""
    path = out / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text[: text.rfind("\n") + 1])
    return losses(out)


def test_a_full_disk_leaves_the_last_checkpoint(trainer, class_folders, tmp_path):
    out, arguments = tmp_path / "run", [f"data.path={class_folders}", "save_every=4"]
    assert trainer.run(out, *arguments, "steps=4") == 0, log(out)
    assert trainer.run(out, *arguments, resume=True, file_size_limit=200_000) == 2
    said = log(out)
    assert "cannot be written" in said and "GiB are free" in said and "--resume auto" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000000004.ckpt"]
    assert trainer.run(out, *arguments, resume=True) == 0, log(out)
    assert list(losses(out)) == list(range(1, 11))


def test_a_checkpoint_of_another_model_is_refused(trainer, class_folders, tmp_path):
    out, arguments = tmp_path / "run", [f"data.path={class_folders}", "steps=1"]
    assert trainer.run(out, *arguments) == 0, log(out)
    before = (out / "checkpoints" / "step_000000001.ckpt").read_bytes()
    assert trainer.run(out, *arguments, "model.options.depth=3", "steps=2", resume=True) == 2
    assert "error: the checkpoint of step 1 was written with model" in log(out)
    assert trainer.run(out, *arguments, "steps=2", "optimizer.lr=1e-3", resume=True) == 0, log(out)
    assert "resuming with another configuration: optimizer.lr 0.01 -> 0.001, steps 1 -> 2" in log(out)
    assert (out / "checkpoints" / "step_000000001.ckpt").read_bytes() == before


def test_existing_checkpoints_are_not_overwritten(trainer, class_folders, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "step_000000004.ckpt").write_bytes(b"precious")
    assert trainer.run(out, f"data.path={class_folders}") == 2
    assert "--resume auto" in log(out)
    assert (out / "checkpoints" / "step_000000004.ckpt").read_bytes() == b"precious"

"""`python -m benchmarks swap`: a short comparison, its parts, and the committed result vs. the page."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.models import swap

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "benchmarks" / "results" / "swap_epyc_zen4_2_threads.json"
TINY = swap.Recipe(image_size=32, batch=2, width=24, depth=1, heads=2)


def test_losses_of_a_short_training_agree():
    """Swapped and published differ by at most three times the difference of published on one and on two threads, but at
    least one unit in the last place of float32."""
    recipe = swap.Recipe(image_size=64, batch=4, width=64, depth=1, heads=2, learning_rate=3e-3)
    losses = swap.measure_losses(recipe, steps=10, threads=2)
    assert list(losses) == ["published, 2 threads", "swapped, 2 threads", "published, 1 threads"]
    assert all(values[-1] < 0.9 * values[0] for values in losses.values())
    found = swap.differences(losses)
    assert found["swapped"] <= 3 * max(found["threads"], 2**-23)


def test_differences_find_a_wrong_loss():
    losses = {"a": [2.0, 1.0], "b": [2.0, 1.001], "c": [2.0, 1.0001]}
    found = swap.differences(losses)
    assert found == {"swapped": pytest.approx(1e-3), "threads": pytest.approx(1e-4)}
    assert "| 10.00 x | no |" in swap.targets_table({"losses": {"losses": losses}})


def test_both_contenders_train_and_sample_alike():
    """After two steps, when head and modulation are no longer zero."""
    published, swapped = (swap.Training(TINY, fused=fused) for fused in (False, True))
    for training in (published, swapped):
        training.step()
        training.step()
    samples = published.sampling_step()
    torch.testing.assert_close(swapped.sampling_step(), samples, rtol=1e-5, atol=1e-6)
    assert (samples - published.images).abs().max() > 1e-5


def test_times_of_every_part():
    rows = swap.measure_times(TINY, budget_s=0.01, min_rounds=1)
    assert len(rows) == 8 and all(row["ms"] > 0 for row in rows)
    text = swap.markdown({"times": {"rows": rows}})
    assert "| training step |" in text and "decoder's share, sampling" in text


def test_equal_losses_have_no_difference():
    losses = dict.fromkeys("abc", [2.0, 1.0])
    assert "| 0.00 x | yes |" in swap.targets_table({"losses": {"losses": losses}})


def test_bad_arguments(capsys, tmp_path):
    other, recipe = tmp_path / "other.json", tmp_path / "recipe.json"
    other.write_text("[]")
    recipe.write_text('{"recipe": {"batch": 1}}')
    for arguments, said in (
        (["speed"], "invalid choice: 'speed'"),
        (["--threads", "0"], "expected a positive integer"),
        (["losses", "--threads", "1"], "expected at least 2, got 1"),
        (["--output", str(recipe)], "has parts of the recipe {'batch': 1}"),
    ):
        with pytest.raises(SystemExit) as stopped:
            swap.main(arguments)
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    for option in ("--show", "--output"):
        with pytest.raises(ValueError, match=r"other\.json: not a result of"):
            swap.main([option, str(other)])


def test_the_page_shows_the_committed_result(capsys):
    result = json.loads(COMMITTED.read_text())
    page = (ROOT / "docs" / "swap.md").read_text()
    assert f"benchmarks/results/{COMMITTED.name}" in page
    assert swap.main(["--show", str(COMMITTED)]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert line in page, line
    assert all("commit" in result[part]["header"] for part in swap.PARTS)
    assert all(len(losses) == 200 for losses in result["losses"]["losses"].values())

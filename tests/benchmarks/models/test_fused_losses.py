"""Losses with decoder and loss as one op against two ops: the comparison, and the committed result."""

import json
from pathlib import Path

import pytest

from benchmarks.models import fused_losses

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "benchmarks" / "results" / "fused_losses_epyc_zen4.json"


def test_differences():
    losses = {name: [2.0, 1.0] for name in fused_losses.CONTENDERS}
    assert "| ≤ 3 x | 0.00 x | yes |" in fused_losses.markdown({"losses": losses})
    losses[fused_losses.ONE_OP] = [2.0, 1.001]
    losses[fused_losses.ONE_THREAD] = [2.0002, 1.0]
    assert fused_losses.differences(losses) == {"ops": pytest.approx(1e-3), "threads": pytest.approx(1e-4)}
    assert "| ≤ 3 x | 10.00 x | no |" in fused_losses.markdown({"losses": losses})


def test_contenders_train_alike():
    """The first step changes the head, which is zero, and the second the modulation; the third uses both."""
    eager = fused_losses.losses_of(fused_losses.EAGER, 3, batch=1, size=16)
    for name in (fused_losses.ONE_OP, fused_losses.TWO_OPS):
        assert fused_losses.losses_of(name, 3, batch=1, size=16) == pytest.approx(eager, rel=1e-6)
    assert len(set(eager)) == 3


def test_the_page_shows_the_committed_result(capsys):
    result = json.loads(COMMITTED.read_text())
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"benchmarks/results/{COMMITTED.name}" in page and "commit" in result["header"]
    assert fused_losses.main(["--show", str(COMMITTED)]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert line in page, line
    assert all(len(result["losses"][name]) == fused_losses.STEPS for name in fused_losses.CONTENDERS)
    found = fused_losses.differences(result["losses"])
    assert found["ops"] <= fused_losses.MOST * found["threads"]

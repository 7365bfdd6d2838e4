"""The programs in examples/ run as they stand; the tests there are part of the suite (testpaths)."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
OUTPUT = {
    "swap_decoder.py": "relative difference of the velocities",
    "training_loss.py": "step 15: total",
    "profile_op.py": "deco_kernels::pixel_decoder_backward",
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("test_")} == {*OUTPUT}


@pytest.mark.parametrize("name", OUTPUT)
def test_example(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert OUTPUT[name] in capsys.readouterr().out


def test_the_page_shows_the_equivalence_check():
    body = (EXAMPLES / "test_equivalence.py").read_text().split('"""')[2].strip()
    assert body in (EXAMPLES.parent / "docs" / "equivalence.md").read_text()

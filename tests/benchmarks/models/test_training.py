"""The documented figures of data loading match the committed result."""

import json
from pathlib import Path

import pytest

from benchmarks.models import training

ROOT = Path(__file__).parents[3]
RESULT = "benchmarks/results/training/cpu_epyc_zen4_2_threads.json"


def test_the_table_in_the_page_is_the_one_of_the_result():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / RESULT).read_text(encoding="utf-8"))
    assert {"date", "commit"} <= set(result["header"]) and all(row["status"] == "ok" for row in result["rows"])
    assert RESULT in page and training.table(result) in page
    for row in result["rows"]:
        assert row["most_waiting"] < 0.05 and row["loader_images_per_second"] > 2 * row["images_per_second"]


def test_too_few_steps_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        training.main(["--steps", "5"])
    assert stopped.value.code == 2 and "at least 20" in capsys.readouterr().err

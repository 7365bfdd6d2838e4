"""Committed results are complete, and the figures in README and docs are those of the files they name."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import report, results

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results"
MEASURED = "cpu_epyc_zen4_2_threads.json"  # what the README's table of targets shows
RESULTS = [path for path in sorted(FOLDER.glob("*.json")) if json.loads(path.read_text()).get("format")]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_results_that_a_page_names_are_committed(page):
    for name in re.findall(r"benchmarks/results/([\w.-]+\.json)", page.read_text(encoding="utf-8")):
        assert (FOLDER / name).is_file(), name


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_result_is_complete(path):
    result = results.load(str(path))
    assert {"date", "commit"} <= set(result["header"])
    rows = result["rows"] + result["end_to_end"] + result["scaling"]
    assert rows and not result["left_out"]
    for row in rows:
        too_large = row in result["scaling"] and row["status"] == "unavailable" and "GiB" in row["reason"]
        assert row["status"] == "ok" or too_large, row


def test_the_table_in_the_readme_is_the_one_of_the_result():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"benchmarks/results/{MEASURED}" in readme
    table = report.targets_table(results.load(str(FOLDER / MEASURED)))
    for line in table.splitlines():
        if line.startswith("|"):
            assert line in readme, line

"""The figures in the README are those of the result file it names."""

import re
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_the_readme_names_a_committed_result():
    named = re.findall(r"benchmarks/results/([\w.-]+\.json)", (ROOT / "README.md").read_text())
    assert named and set(named) <= {path.name for path in RESULTS}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_result_is_complete(path):
    result = report.load(str(path))
    assert {"date", "commit"} <= set(result["header"])
    assert result["rows"] and all(row["status"] == "ok" for row in result["rows"])


def test_the_table_in_the_readme_is_the_one_of_the_result():
    readme = (ROOT / "README.md").read_text()
    (name,) = set(re.findall(r"benchmarks/results/([\w.-]+\.json)", readme))
    table = report.targets_table(report.load(str(ROOT / "benchmarks" / "results" / name)))
    for line in table.splitlines():
        if line.startswith("|"):
            assert line in readme, line

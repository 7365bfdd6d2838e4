"""The documented figures of compile_trunk match the committed result."""

import json
from pathlib import Path

from benchmarks.models import trunk

ROOT = Path(__file__).parents[3]


def test_the_table_in_the_page_is_the_one_of_the_result():
    page = (ROOT / "docs" / "sampling.md").read_text()
    path = "benchmarks/results/trunk/cpu_epyc_zen4_1_thread.json"
    result = json.loads((ROOT / path).read_text())
    assert {"date", "commit"} <= set(result["header"]) and all(row["status"] == "ok" for row in result["rows"])
    assert path in page and trunk.table(result) in page

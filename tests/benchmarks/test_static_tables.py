"""The compiler's figures in docs/triton.md are those of benchmarks/budgets.json."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import static, static_tables

PAGE = (Path(__file__).parents[2] / "docs" / "triton.md").read_text()
TABLES = (static_tables.main_table, static_tables.other_cases_table)


@pytest.mark.parametrize("table", TABLES)
def test_the_page_shows_the_record(table):
    expected = table(json.loads(static.BUDGETS.read_text()))
    assert expected in PAGE, "`python -m benchmarks static --tables` prints the tables of the page"


@pytest.mark.parametrize(("table", "case"), [(TABLES[0], "D32/bfloat16"), (TABLES[1], "D64/bfloat16")])
def test_another_record_gives_another_table(table, case):
    budgets = json.loads(static.BUDGETS.read_text())
    for figure, change in (("registers", 1), ("spill_bytes", 8), ("issue_slots_per_16_px", 1)):
        changed = copy.deepcopy(budgets)
        changed[f"adaln_block.backward_kernel+last/{case}"]["sm_90"][figure] += change
        assert table(changed) not in PAGE, figure


def test_the_command_prints_the_tables(capsys):
    assert static.main(["--tables"]) == 0
    output = capsys.readouterr().out
    assert all(table(json.loads(static.BUDGETS.read_text())) in output for table in TABLES)

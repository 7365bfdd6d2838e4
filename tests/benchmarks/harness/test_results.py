"""Result files: write, read, merge, compare. The figures of result.json are made up."""

import copy
import json
import pathlib

import pytest

from benchmarks.harness import results
from benchmarks.harness.header import command
from benchmarks.report import __main__ as report_program
from benchmarks.report import comparison

STORED = pathlib.Path(__file__).parents[1] / "result.json"


@pytest.fixture
def stored():
    return results.load(STORED)


def slowed(result, factor, contender="cpu"):
    """A copy in which one contender takes `factor` times as long."""
    other = copy.deepcopy(result)
    for row in other["rows"]:
        if row["contender"] == contender and row["status"] == "ok":
            row |= {name: factor * row[name] for name in ("ms", "ms_p20", "ms_p80")}
    return other


def test_written_and_read_again(stored, tmp_path):
    path = tmp_path / "result.json"
    results.save(stored, str(path))
    assert results.load(path) == stored
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_empty_parts_are_not_written_and_read_as_empty(stored, tmp_path):
    path = tmp_path / "result.json"
    results.save(stored | {"scaling": [], "import_time": None}, str(path))
    assert {"scaling", "import_time"}.isdisjoint(json.loads(path.read_text()))
    assert results.load(path)["scaling"] == [] and results.load(path)["import_time"] is None


def test_runs_are_put_together(stored):
    first = stored | {"rows": stored["rows"][:2], "scaling": [], "import_time": None}
    second = copy.deepcopy(stored) | {"rows": stored["rows"][2:]}
    second["ceilings"]["bytes_per_s"] *= 2
    second["header"]["command"] += " scaling"
    merged = results.merge([first, second])
    assert merged["rows"] == stored["rows"] and merged["scaling"] == stored["scaling"]
    assert merged["import_time"] == stored["import_time"]
    assert merged["ceilings"]["bytes_per_s"] == 2 * stored["ceilings"]["bytes_per_s"]
    assert merged["header"]["command"] == "python -m benchmarks; python -m benchmarks scaling"


def test_the_header_tells_how_to_repeat_the_run():
    files = ["--output", "folder/result.json", "--compare=old.json", "--csv", "rows.csv"]
    assert command(["adaln_block", *files, "--threads=2"]) == "python -m benchmarks adaln_block --threads=2"


def test_nothing_moved(stored):
    pairs, compared = comparison.moved(stored, slowed(stored, 1.01))
    assert pairs == [] and compared == sum(row["status"] == "ok" for row in stored["rows"])
    assert "- 0 of " in comparison.markdown(stored, stored)


def test_what_moved_beyond_the_spread_is_listed(stored):
    new = slowed(stored, 1.5)
    pairs, _ = comparison.moved(stored, new)
    assert {row["contender"] for _, row in pairs} == {"cpu"}
    assert all(row["ms"] == pytest.approx(1.5 * was["ms"]) for was, row in pairs)
    text = comparison.markdown(stored, new)
    assert "| pixel_decoder, float32, forward: cpu | 1,256,256,3,16,32,3,1152 | 12.5 | 18.8 | +50 % |" in text
    assert "not the same" not in text


def test_rows_that_two_runs_of_one_commit_do_not_share_are_unstable(stored):
    new = slowed(stored, 1.06)
    comparison.mark_unstable(stored, new)
    marked = [row["unstable"] for row in new["rows"] if row["contender"] == "cpu" and row["status"] == "ok"]
    assert marked and all(marked)
    others = [row for row in new["rows"] if row["contender"] != "cpu"]
    assert others == [row for row in stored["rows"] if row["contender"] != "cpu"]


@pytest.mark.parametrize(
    "commit, factor", (("fedcba987654", 1.06), ("0123456789ab", 1.04), ("0123456789ab-dirty", 1.06))
)
def test_other_commits_and_close_medians_mark_nothing(stored, commit, factor):
    new = slowed(stored, factor)
    new["header"]["commit"] = commit
    before = copy.deepcopy(new)
    comparison.mark_unstable(
        stored | {"header": stored["header"] | {"commit": commit.replace("fedcba", "012345")}}, new
    )
    assert new == before


def test_another_machine_is_named(stored):
    new = copy.deepcopy(stored)
    new["header"]["processor"] = "Other CPU"
    assert "- not the same processor: Example CPU then, Other CPU now" in comparison.markdown(stored, new)


def test_report_compares_and_merges(stored, tmp_path, capsys):
    old, both = tmp_path / "old.json", tmp_path / "both.json"
    in_float16 = [row | {"dtype": "float16"} for row in stored["rows"]]
    results.save(slowed(stored, 2.0) | {"rows": in_float16}, str(old))
    assert report_program.main([str(STORED), str(old), "--compare", str(old), "--merged", str(both)]) == 0
    assert "rows moved beyond the spread" in capsys.readouterr().out
    assert len(results.load(both)["rows"]) == 2 * len(stored["rows"])


def test_ratios_are_those_of_one_run(stored, tmp_path):
    """A report merges neither machines nor the same row of two runs."""
    again, elsewhere = tmp_path / "again.json", tmp_path / "elsewhere.json"
    results.save(slowed(stored, 2.0), str(again))
    results.save(stored | {"rows": [], "header": stored["header"] | {"threads": 64}}, str(elsewhere))
    for other, said in (
        (again, "rows that an earlier file holds, such as pixel_decoder"),
        (elsewhere, "the threads of"),
    ):
        with pytest.raises(ValueError, match=said):
            report_program.main([str(STORED), str(other)])

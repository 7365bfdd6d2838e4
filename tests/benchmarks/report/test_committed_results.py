"""Committed results are complete, and the figures in README and docs match the files they name."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.harness import results
from benchmarks.report import parts, rows, tables
from benchmarks.report.targets import targets_in
from benchmarks.static import triton_kernels
from benchmarks.static.figures import SHARED_LIMIT, Figures, exceeded, recorded_budgets

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "benchmarks" / "results"
MEASURED = "cpu_epyc_zen4_2_threads.json"  # what the README's table of targets shows
RESULTS = [path for path in sorted(FOLDER.glob("*.json")) if json.loads(path.read_text()).get("format")]
LOADED = {path: results.load(str(path)) for path in RESULTS}
WHOLE_RUNS = [path for path, result in LOADED.items() if result["overhead"] and result["header"]["device"] == "cpu"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_results_that_a_page_names_are_committed(page):
    for name in re.findall(r"benchmarks/results/([\w./-]+\.json)", page.read_text(encoding="utf-8")):
        assert (FOLDER / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_command_of_a_result_is_that_of_its_file(page):
    """Where a page says `FILE`, measured by `COMMAND`."""
    said = r"`benchmarks/results/([\w./-]+\.json)`, measured by `(python -m benchmarks [^`]+)`"
    for name, command in re.findall(said, page.read_text(encoding="utf-8")):
        recorded = json.loads((FOLDER / name).read_text(encoding="utf-8"))["header"]["command"]
        assert command == recorded.partition(" --output")[0], name


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_result_is_complete(path):
    result = LOADED[path]
    assert {"date", "commit"} <= set(result["header"])
    rows = result["rows"] + result["end_to_end"] + result["scaling"]
    assert rows and not result["left_out"]
    for row in rows:
        too_large = row in result["scaling"] and row["status"] == "unavailable" and "GiB" in row["reason"]
        assert row["status"] == "ok" or too_large, row


@pytest.mark.parametrize("kind", ("scaling", "end_to_end"))
def test_the_tables_of_the_page_are_those_of_the_results(kind):
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    result = results.load(str(FOLDER / MEASURED.replace(".json", f"_{kind}.json")))
    summary = {
        "scaling": lambda: parts.scaling_summary(result),
        "end_to_end": lambda: parts.end_to_end_summary(result["end_to_end"]),
    }[kind]()
    lines = [line for line in summary.splitlines() if line.startswith("|")]
    assert len(lines) > 3
    for line in lines:
        assert line in page, line


def test_the_tables_of_the_instruction_sets_on_a_xeon():
    """By page the files of the columns of times, and the contender in them."""
    columns = {
        "pixel_decoder": [("xeon_amx", "published"), ("xeon_avx512bf16", "cpu"), ("xeon_amx", "cpu")],
        "upsample_modulate": [(name, "cpu") for name in ("xeon_amx_pytorch_upsample", "xeon_amx", "xeon_avx512bf16")],
    }
    for name, found in columns.items():
        times = []
        for file, contender in found:
            rows = LOADED[FOLDER / f"{file}_2_threads.json"]["rows"]
            times.append({(row["op"], row["pass"]): row["ms"] for row in rows if row["contender"] == contender})
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split("On an Intel Xeon")[1]
        lines = re.findall(r"^\| (\w+) \| (forward|forward and backward) \| (.+) \|$", page, flags=re.MULTILINE)
        assert len(lines) >= 4
        for op, pass_, cells in lines:
            expected = [f"{column[op, pass_.replace(' and ', '_')]:.1f}" for column in times]
            assert cells.split(" | ") == expected, (op, pass_)


def test_time_per_pixel_of_the_decoder_is_flat():
    result = results.load(str(FOLDER / MEASURED.replace(".json", "_scaling.json")))
    found = {
        key: rows.flatness(group["cpu"], "cpu")
        for key, group in rows.curves(result).items()
        if key[0] == "pixel_decoder"
    }
    assert len(found) == 3 and max(found.values()) <= 1.15


@pytest.mark.parametrize("path", WHOLE_RUNS, ids=lambda path: path.stem)
def test_a_page_has_the_table_of_every_whole_run(path):
    result = LOADED[path]
    text = (ROOT / ("README.md" if path.name == MEASURED else "docs/benchmarks.md")).read_text(encoding="utf-8")
    assert f"benchmarks/results/{path.name}" in text
    rows = [line for line in tables.targets_table(result).splitlines() if line.startswith("|")]
    assert "\n".join(rows) in text
    missing = [target.text for target in targets_in(result) if target.reached is None]
    assert not missing or "held_to" in result["header"]  # a run that is held to AVX2 may lack dtypes
    assert "held_to" not in result["header"] or result["header"]["torch_instruction_set"] == "AVX2"


def test_kernels_fit_and_keep_their_budgets_under_triton_3_6():
    """And take at most a quarter more instructions than under the pinned Triton. Kernels that compute values several
    times, for different layouts of registers, can take several times as many."""
    text = (FOLDER / "static" / "triton_3.6.0_sm_90.json").read_text(encoding="utf-8")
    found = json.loads(text)
    budgets = recorded_budgets("triton")
    assert {name for name in budgets if "sm_90" in budgets[name]} <= set(found)
    sizes = {f"D{width}/{dtype}" for width in triton_kernels.WIDTHS for dtype in triton_kernels.DTYPES}
    assert {name.split("/", 1)[1] for name in found} == sizes
    for name, by_architecture in found.items():
        figures = Figures(**{k: v for k, v in by_architecture["sm_90"].items() if k in Figures._fields})
        assert figures.toolchain.startswith("triton 3.6.0,")
        assert figures.shared_bytes <= SHARED_LIMIT["sm_90"], name
        if name in budgets:
            budget = budgets[name]["sm_90"]
            assert not list(exceeded(figures, budget)), name
            assert (figures.issue_slots_per_16_px or 0) <= 1.25 * (budget["issue_slots_per_16_px"] or 0), name

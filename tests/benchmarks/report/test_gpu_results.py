"""The figures of the GPU in docs are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.harness import results
from benchmarks.models import reuse
from benchmarks.report import parts, tables

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "benchmarks" / "results"
GPU = results.load(str(FOLDER / "gpu_h200.json"))
LOSSES = results.load(str(FOLDER / "gpu_h200_losses.json"))


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("benchmarks", parts.ops_summary(GPU["rows"])),
        ("benchmarks", parts.ops_summary(LOSSES["rows"])),
        ("benchmarks", parts.end_to_end_summary(GPU["end_to_end"])),
        ("sampling", reuse.table(json.loads((FOLDER / "trunk" / "reuse_h200.json").read_text())["rows"])),
    ],
)
def test_tables_of_a_page_are_those_of_the_results(name, table):
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) > 3 and all(line in page(name) for line in lines)


def test_the_report_has_the_summary():
    """So that a result of another GPU can be read beside the page."""
    assert "## Milliseconds of the ops, bfloat16\n\n" + parts.ops_summary(GPU["rows"]) in tables.markdown(GPU)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_measured_kernels(name):
    measured = {re.sub(r"(/D32)?/bfloat16$", "", row["kernel"]): row for row in GPU["kernels"]}
    section = page(name).split("\n## Measured\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `(.+)` \| (.+) \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert len(found) == 8
    for kernel, modeled, bound, milliseconds in found:
        row = measured[kernel]
        shown = (f"{row['modeled_ms']:.3f}", row["bound"], f"{row['measured_ms']:.3f}")
        assert (modeled, bound, milliseconds) == shown, kernel


def test_times_by_chunk():
    rows = json.loads((FOLDER / "gpu_sweep.json").read_text())["rows"]
    found = page("cuda").split("by the pixels of a chunk")[1]
    for start, block_backward, missing in (
        ("H200, inputs", "15 warps, inputs copied ahead", 2),
        ("H200, not copied ahead", "15 warps", 0),
        ("H200, not copied ahead, block", "10 warps in two thread blocks, as before", 0),
    ):
        chosen = [
            row
            for row in rows
            if row.get("op") == "pixel_decoder"
            and row["device"] == "H200"
            and row.get("block_backward") == block_backward
            and row.get("embedding", "not ahead") == "not ahead"
        ]
        times = ["–"] * missing + [f"{row['ms']:.2f}" for row in sorted(chosen, key=lambda row: row["chunk_pixels"])]
        assert len(times) == 5 and f" | {' | '.join(times)} |" in re.search(rf"^\| {start}.*$", found, re.MULTILINE)[0]


def test_figures_in_sentences():
    """Of the README and of the pages, in the words in which they stand there."""
    times = {(row["op"], row["contender"], row["pass"]): row["ms"] for row in [*LOSSES["rows"], *GPU["rows"]]}
    both = times["pixel_decoder", "cuda", "forward_backward"]
    forward = times["pixel_decoder", "cuda", "forward"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{forward:.3f} ms forward and {both:.2f} ms with backward" in readme
    loss = [times["flow_matching_loss", "cuda", name] for name in ("forward", "forward_backward")]
    assert "take {:.4f} ms, with backward in one pass {:.4f} ms".format(*loss) in page("flow_matching_loss")
    one_pass, two_ops = (times["pixel_decoder_loss", name, "forward_backward"] for name in ("cuda", "cuda two ops"))
    assert f"{one_pass:.2f} ms on `cuda`" in page("pixel_decoder_loss")
    assert f"one after the other {two_ops:.2f} ms" in page("pixel_decoder_loss")
    stalled = json.loads((FOLDER / "gpu_check.json").read_text())["counters"]
    warps = stalled["cuda.pixel_decoder.forward_kernel/D32/bfloat16"]["warps_stalled_per_issue"]
    assert f"({warps['math_pipe_throttle']} and {warps['dispatch_stall']} warps per issued instruction" in page("cuda")

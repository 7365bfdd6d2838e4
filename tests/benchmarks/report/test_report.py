"""The report from a stored result. The figures of tests/benchmarks/result.json are made up, not measured."""

import json
import pathlib

import pytest

from benchmarks.harness import results
from benchmarks.harness.results import LISTS
from benchmarks.report import __main__ as report_program
from benchmarks.report import rows, tables
from benchmarks.report.targets import targets_in

STORED = pathlib.Path(__file__).parents[1] / "result.json"


@pytest.fixture
def text():
    return tables.markdown(results.load(STORED))


@pytest.mark.parametrize(
    "line",
    (
        "# Benchmarks on Example CPU",
        "- kept heap: True",
        "- ceilings, measured in this run: copy 40.0 GB/s",
        "- ceilings, measured in this run: multiply-add bfloat16 400, float32 200 GFLOP/s",
        "## pixel_decoder, float32, forward",
        "| published eager | 44 | 43.6 to 44.4 | 1.00 | 0.82 | 0.2 | 45 | 23 % of compute |",
        "| published, torch.compile (unstable) | 50 | 49.5 to 50.5 | 0.88 | 0.72 | 0.2 | 40 | 20 % of compute |",
        "| cpu | 12.5 | 12.4 to 12.6 | 3.52 | 2.88 | 0.8 | 160 | 80 % of compute |",
        "## pixel_decoder, float32, forward, ours with avx2",
        "- cpu: wrong: output 0: relative error 1.00e+00, allowed 4.00e-03",
        "| cpu, backward kernel only | 5 | 4.95 to 5.05 | 20.00 | 20.00 | 20.0 | 80 | 50 % of memory |",
        "| published eager, float32 | 2600.0 | 1.00 |",
        "| cpu, float32 | 80.0 | 32.50 |",
        "- reference, float32: unavailable: the process was killed",
        "## Peak memory growth of pixel_decoder_loss_from_tokens, forward and backward, 65,536 pixels",
        "| contender | MB, outputs included | × cpu two ops keeping cond |",
        "| cpu, float32 | 60.0 | 1.50 |",
        "| cpu, forward | 35.0 |",
        "| deco_kernels | 0.0123 |",
        "| pixel_decoder float32, forward | ≥ 3.6 x | 3.52 x | no | 2.88 x |",
        "- 18 more targets are not measured in this result",
        "| pixel_decoder float32, forward, AVX2 build | ≥ 2.2 x | 2 x | no | 2 x |",
        "| pixel_decoder float32, memory growth of eager over ours, 524,288 pixels | ≥ 25 x | 32.5 x | yes | – |",
        "| pixel_decoder, host time per call on one pixel, forward | ≤ 120 µs | 35 µs | yes | – |",
        "| import deco_kernels with its ops, beyond import torch | ≤ 0.15 s | 0.05 s | yes | – |",
        "## Time per pixel vs. size: pixel_decoder, float32, forward",
        "| published eager | 2e+03 | 656 | – | 512 | – |",
        "| cpu | 500 | 168 | 176 | 128 | 1.05 |",
        "- published eager, 4,194,304 px: unavailable: needs about 9.0 GiB, 4.0 GiB are available",
        "## deco-demo: training step, batch 8, 128 x 128, float32",
        "| cpu | 230 | 228 to 232 | 2.00 | 64 | 1 | 60 | 20 | 1 | 43 | 100 | 3 | 2 |",
        "| limit: without decoder and loss | 166 | 164 to 168 | 2.77 | – | 1 | 60 | 0 | – | 0 | 100 | 3 | 2 |",
        "- triton: unavailable: no GPU",
        "| pixel_decoder.forward_kernel/D32/bfloat16 | 0.200 | issue | 0.300 | 1.50 | 1 | 216 (214) | 0 (0) |",
        "- weights.pack_kernel/D32/bfloat16: not launched by any op here",
        "- scaling of flow_matching_loss",
    ),
)
def test_lines(text, line):
    assert line in text.splitlines()


def test_rows_stand_with_what_they_were_timed_with():
    assert [len(group) for group in rows.groups(results.load(STORED)["rows"])] == [4, 2, 2, 3]


def test_a_result_without_figures_of_targets_has_no_table_of_them():
    nothing = {"rows": [], "memory": [], "overhead": [], "import_time": None}
    assert tables.targets_table(results.load(STORED) | nothing) == ""


def test_every_target_is_looked_up():
    reached = {target.text: target for target in targets_in(results.load(STORED))}
    assert len(reached) == 26
    loss = [target for text, target in reached.items() if text.startswith("flow_matching_loss")]
    assert [(target.reached, target.met) for target in loss] == [(12.5, False), (20.0, False)]
    assert not reached["pixel_decoder, host time per call on one pixel, forward and backward"].met


def test_parts_that_were_not_run_are_left_out():
    result = results.load(STORED)
    result |= {name: [] for name in LISTS if name != "rows"} | {"import_time": None}
    text = tables.markdown(result)
    assert "Peak memory" not in text and "Host time" not in text and "## Import" not in text
    assert "Time per pixel" not in text and "training step" not in text and "Kernels" not in text


def test_the_title_says_what_the_run_was_held_to():
    result = results.load(STORED)
    result["header"]["held_to"] = "AVX2"
    assert tables.markdown(result).startswith("# Benchmarks on Example CPU, held to AVX2\n")


def test_only_results_are_read(tmp_path):
    other = tmp_path / "other.json"
    for content in ([], {"format": 0}):
        other.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="not a result"):
            results.load(other)


def test_written_to_a_file(tmp_path, text):
    target = tmp_path / "report.md"
    assert report_program.main([str(STORED), "--output", str(target)]) == 0
    assert target.read_text(encoding="utf-8") == text

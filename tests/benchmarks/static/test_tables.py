"""The compiler's figures in docs/triton.md and docs/cuda.md match benchmarks/budgets.json."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks.static import __main__ as static_program
from benchmarks.static import tables
from benchmarks.static.figures import BUDGETS, recorded_budgets

DOCS = Path(__file__).parents[3] / "docs"
each_backend = pytest.mark.parametrize("backend", static_program.BACKENDS)
LAST_BLOCK = {
    "triton": ("adaln_block.backward_kernel+last", "sm_90"),
    "cuda": ("cuda.block_backward.backward_kernel+mlp+tiled+last", "sm_90a"),
}


def page(backend):
    return (DOCS / f"{backend}.md").read_text()


@each_backend
def test_the_page_shows_the_record(backend):
    for table in tables.tables(json.loads(BUDGETS.read_text()), backend):
        assert table in page(backend), "`python -m benchmarks static --tables` prints the tables of the page"


@each_backend
@pytest.mark.parametrize(
    ("table", "case", "figures"),
    [
        (0, "D32/bfloat16", ("registers", "spill_bytes", "bytes_per_px", "issue", "tensor", "shared", "special")),
        (1, "D32/bfloat16", ("bytes_per_px",)),
        (2, "D64/bfloat16", ("registers", "spill_bytes", "issue_slots_per_16_px")),
    ],
)
def test_another_record_gives_another_table(backend, table, case, figures):
    budgets = json.loads(BUDGETS.read_text())
    kernel, architecture = LAST_BLOCK[backend]
    for figure in figures:
        changed = copy.deepcopy(budgets)
        record = changed[f"{kernel}/{case}"][architecture]
        (record if figure in record else record["cycles_per_16_px"])[figure] += 100
        assert tables.tables(changed, backend)[table] not in page(backend), figure


def test_the_command_prints_the_tables(capsys):
    assert static_program.main(["--tables"]) == 0
    output = capsys.readouterr().out
    budgets = json.loads(BUDGETS.read_text())
    assert all(table in output for backend in static_program.BACKENDS for table in tables.tables(budgets, backend))


def test_the_slots_of_the_cuda_backward_are_those_of_its_kernels():
    budgets = recorded_budgets("cuda")
    kernels = [f"block_backward.backward_kernel+mlp+tiled{step}" for step in ("+first", "", "+last")]
    kernels += ["decoder_recompute.recompute_kernel", "decoder_embedding.embedding_kernel"]
    slots = sum(budgets[f"cuda.{kernel}/D32/bfloat16"]["sm_90a"]["issue_slots_per_16_px"] for kernel in kernels)
    assert f"The decoder's backward at N 3 takes {slots:,.0f} slots in all" in page("cuda")
    general = [
        budgets[f"cuda.{kernel}+general/D32/bfloat16"]["sm_90a"]["issue_slots_per_16_px"]
        for kernel in ("pixel_decoder.forward_kernel", "decoder_recompute.recompute_kernel")
    ]
    assert "forward and recompute take {:,.0f} and {:,.0f} slots".format(*general) in page("cuda")

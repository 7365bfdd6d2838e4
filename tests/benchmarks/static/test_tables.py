"""The compiler's figures in docs/triton.md and docs/cuda.md match benchmarks/budgets.json."""

import copy
import json
import re
from pathlib import Path

import pytest

from benchmarks.static import __main__ as static_program
from benchmarks.static import tables
from benchmarks.static.figures import BUDGETS, bound_of, recorded_budgets

DOCS = Path(__file__).parents[3] / "docs"
STATIC = BUDGETS.parent / "results" / "static"
each_backend = pytest.mark.parametrize("backend", static_program.BACKENDS)
LAST_BLOCK = {
    "triton": ("adaln_block.backward_kernel+last", "sm_90"),
    "cuda": ("cuda.block_backward.backward_kernel+mlp+tiled+ahead+last", "sm_90a"),
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


def test_an_architecture_has_the_record_of_the_kernel_that_it_runs():
    records = {"kernel+tiled/D32/bfloat16": {"sm_80": 1}, "kernel+tiled+ahead/D32/bfloat16": {"sm_90a": 2}}
    assert tables.records_of(records, "kernel+tiled") == {"sm_80": 1, "sm_90a": 2}
    assert not tables.records_of(records, "kernel+tiled", 64)
    for name, entry in recorded_budgets("cuda").items():
        if "+ahead" in name:
            assert not entry.keys() & recorded_budgets("cuda").get(name.replace("+ahead", ""), {}).keys(), name


def test_the_slots_of_the_cuda_backward_are_those_of_its_kernels():
    budgets = recorded_budgets("cuda")
    kernels = [f"block_backward.backward_kernel+mlp+tiled+ahead{step}" for step in ("+first", "", "+last")]
    kernels += ["decoder_recompute.recompute_kernel", "decoder_embedding.embedding_kernel"]
    slots = sum(budgets[f"cuda.{kernel}/D32/bfloat16"]["sm_90a"]["issue_slots_per_16_px"] for kernel in kernels)
    assert f"The decoder's backward at N 3 takes {slots:,.0f} slots in all" in page("cuda")
    general = [
        budgets[f"cuda.{kernel}+general/D32/bfloat16"]["sm_90a"]["issue_slots_per_16_px"]
        for kernel in ("pixel_decoder.forward_kernel", "decoder_recompute.recompute_kernel")
    ]
    assert "forward and recompute take {:,.0f} and {:,.0f} slots".format(*general) in page("cuda")


@pytest.mark.parametrize(
    ("backend", "architecture", "names", "said"),
    [
        (
            "cuda",
            "sm_90a",
            {
                "decoder": "cuda.pixel_decoder.forward_kernel",
                "recompute": "cuda.decoder_recompute.recompute_kernel",
                "head": "cuda.decoder_head.head_kernel",
                "block": "cuda.block_backward.backward_kernel+mlp+tiled+ahead",
                "embedding": "cuda.decoder_embedding.embedding_kernel",
                "loss": "cuda.flow_matching_loss_backward.gradient_kernel+sums/bfloat16",
            },
            "with its gradients {:,.0f}; the two ops one after the other take {:,.0f}",
        ),
        (
            "triton",
            "sm_90",
            {
                "decoder": "pixel_decoder.forward_kernel",
                "recompute": "pixel_decoder.recompute_kernel",
                "head": "pixel_decoder_head.head_kernel",
                "block": "adaln_block.backward_kernel",
                "embedding": "pixel_decoder.embedding_kernel",
                "loss": "flow_matching_loss.gradient_kernel+sums",
            },
            "with its gradients takes {:,.0f} slots per 16 pixels, and the two ops one after the other {:,.0f}",
        ),
    ],
)
def test_the_slots_of_the_one_pass_op_are_those_of_its_kernels(backend, architecture, names, said):
    def slots(kernel, variant=""):
        name = names[kernel] + variant
        name += "/D32/bfloat16" * ("/" not in name)
        return recorded_budgets(backend)[name][architecture]["issue_slots_per_16_px"]

    both = sum(slots("block", step) for step in ("+first", "", "+last")) + slots("embedding") + slots("loss")
    one_pass = slots("decoder", "+keeps") + slots("head") + both
    two_ops = slots("decoder") + slots("recompute") + both
    assert said.format(one_pass, two_ops) in page(backend)


def test_the_page_shows_the_cuda_kernels_with_a_query_and_an_rms_head():
    budgets, kernels = recorded_budgets("cuda"), {
        "forward": "pixel_decoder.forward_kernel",
        "forward that keeps its activations": "pixel_decoder.forward_kernel+keeps",
        "recompute": "decoder_recompute.recompute_kernel",
        "head backward": "decoder_head.head_kernel",
        "embedding backward": "decoder_embedding.embedding_kernel",
    }  # fmt: skip
    records = {title: budgets[f"cuda.{name}+extended/D32/bfloat16"] for title, name in kernels.items()}
    for title, record in records.items():
        figures = record["sm_90a"]
        numbers = f"{figures['registers']}, {figures['issue_slots_per_16_px']:,.0f}, {figures['bytes_per_px']:.0f}"
        assert f" {title} {numbers}" in page("cuda")
    at_64 = budgets["cuda.decoder_recompute.recompute_kernel+extended/D64/bfloat16"]["sm_90a"]["spill_bytes"]
    on_120 = records["recompute"]["sm_120"]["spill_bytes"]
    assert f"then spills {at_64} bytes at D 64, and {on_120} bytes at D 32 on sm_120" in page("cuda")


def test_the_page_shows_the_block_backward_of_d64_with_smaller_tiles():
    kernel = "adaln_block.backward_kernel/D64/bfloat16"
    records = {"128, 8 (the launch table)": json.loads(BUDGETS.read_text())}
    for rows in (64, 32):
        path = STATIC / f"triton_block_backward_d64_tile{rows}.json"
        records[f"{rows}, 8"] = json.loads(path.read_text())
    for name, figures in records.items():
        record = figures[kernel]["sm_90"]
        bound, cycles = bound_of(record, "sm_90"), record["cycles_per_16_px"]
        line = f"{name} | {record['spill_bytes']} | {cycles['issue']:,.0f} | {cycles['shared']:,.0f} "
        assert f"| {line}| {bound.milliseconds:.2f} {bound.name} |" in page("triton")


def test_the_page_shows_the_kernels_with_halved_rows():
    section = page("triton").split("\n## Mean of LayerNorm\n")[1].split("\n## ")[0]
    names = {
        "decoder forward": "pixel_decoder.forward_kernel",
        "decoder recompute": "pixel_decoder.recompute_kernel",
        "adaln_block forward": "adaln_block.forward_kernel",
        "block backward, between": "adaln_block.backward_kernel",
        "upsample_modulate backward": "upsample_modulate.backward_kernel",
    }
    files = [STATIC / f"triton_3.6.0_{name}.json" for name in ("halved_rows", "sm_90")]
    records = [json.loads(file.read_text()) for file in files]
    lines = re.findall(r"^\| (.+), D (\d+) \| (.+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert len(lines) == len(records[0]) == 10
    for kernel, width, *cells in lines:
        for record, cell in zip(records, cells, strict=True):
            found = record[f"{names[kernel]}/D{width}/bfloat16"]["sm_90"]
            figures = [found["spill_bytes"], found["issue_slots_per_16_px"], found["cycles_per_16_px"]["shared"]]
            assert cell == ", ".join([str(found["registers"]), *(f"{figure:,.0f}" for figure in figures)])


def test_the_page_shows_the_gradient_of_the_loss_with_larger_tiles():
    kernel = "flow_matching_loss.gradient_kernel+sums/D32/bfloat16"
    path = STATIC / "triton_loss_gradient_tile64.json"
    for name, file in (("64, 8", path), ("32, 4 (the launch table)", BUDGETS)):
        cells = [name]
        for architecture in ("sm_80", "sm_89", "sm_120"):
            record = json.loads(file.read_text())[kernel][architecture]
            bound = bound_of(record, architecture)
            cells.append(f"{record['spill_bytes']}, {bound.milliseconds:.3f} {bound.name}")
        assert f"| {' | '.join(cells)} |" in page("triton")


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ("no_kernel=64,4,1,1", "expected a kernel of adaln_block, "),
        ("adaln_block=64,4,1", "expected four numbers after adaln_block=, got '64,4,1'"),
        ("adaln_block=64,4,1,x", "got '64,4,1,x'"),
    ],
)
def test_a_wrong_launch_is_named(launch, said, capsys):
    with pytest.raises(SystemExit):
        static_program.main(["--launch", launch])
    assert said in capsys.readouterr().err


def test_other_launch_parameters_are_not_recorded(capsys):
    with pytest.raises(SystemExit):
        static_program.main(["--launch", "adaln_block=64,4,1,1", "--record"])
    assert "leave out --record" in capsys.readouterr().err

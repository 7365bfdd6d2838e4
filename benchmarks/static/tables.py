"""Tables of docs/triton.md and docs/cuda.md, generated from benchmarks/budgets.json.

`python -m benchmarks static --tables` prints them.
"""

from typing import Any, NamedTuple

from benchmarks.static.figures import bound_of
from benchmarks.static.machines import BYTES, MACHINES

_TRITON_KERNELS = {
    "pixel_decoder.forward_kernel": "decoder forward",
    "pixel_decoder.forward_kernel+keeps": "decoder forward that keeps its activations",
    "pixel_decoder.recompute_kernel": "decoder recompute (forward, then head backward)",
    "pixel_decoder_head.head_kernel": "head backward",
    "adaln_block.backward_kernel+first": "block backward, launched first",
    "adaln_block.backward_kernel": "block backward, between",
    "adaln_block.backward_kernel+last": "block backward, launched last",
    "pixel_decoder.embedding_kernel": "embedding backward",
    "adaln_block.forward_kernel": "adaln_block forward",
    "adaln_block.backward_kernel+first+last": "adaln_block backward",
    "upsample_modulate.forward_kernel": "upsample_modulate forward",
    "upsample_modulate.backward_kernel": "upsample_modulate backward",
    "flow_matching_loss.sums_kernel": "loss sums",
    "flow_matching_loss.gradient_kernel": "loss gradient",
    "flow_matching_loss.gradient_kernel+sums": "loss gradient and sums",
}
_CUDA_KERNELS = {
    "cuda.pixel_decoder.forward_kernel": "decoder forward",
    "cuda.pixel_decoder.forward_kernel+keeps": "decoder forward that keeps its activations",
    "cuda.decoder_recompute.recompute_kernel": "decoder recompute (forward, then head backward)",
    "cuda.decoder_head.head_kernel": "head backward",
    "cuda.block_backward.backward_kernel+mlp+tiled+first": "block backward, launched first",
    "cuda.block_backward.backward_kernel+mlp+tiled": "block backward, between",
    "cuda.block_backward.backward_kernel+mlp+tiled+last": "block backward, launched last",
    "cuda.decoder_embedding.embedding_kernel": "embedding backward",
    "cuda.adaln_block.forward_kernel": "adaln_block forward",
    "cuda.block_backward.backward_kernel+mlp+first+last": "adaln_block backward",
    "cuda.upsample_modulate.modulate_kernel": "upsample_modulate forward",
    "cuda.block_backward.backward_kernel+first+last": "upsample_modulate backward",
    "cuda.flow_matching_loss.sums_kernel": "loss sums",
    "cuda.flow_matching_loss_backward.gradient_kernel": "loss gradient",
    "cuda.flow_matching_loss_backward.gradient_kernel+sums": "loss gradient and sums",
}


class _Page(NamedTuple):
    kernels: dict[str, str]  # name in the record -> its title
    architecture: str
    architectures: tuple[str, ...]  # of the tables of bounds
    other_cases: tuple[tuple[int, str], ...]  # (width, dtype) besides D 32 in bfloat16


_PAGES = {
    "triton": _Page(
        _TRITON_KERNELS,
        "sm_90",
        ("sm_80", "sm_90", "sm_100", "sm_120"),
        ((16, "bfloat16"), (64, "bfloat16"), (32, "float32")),
    ),
    "cuda": _Page(
        _CUDA_KERNELS,
        "sm_90a",
        ("sm_80", "sm_90a", "sm_100", "sm_120"),
        ((16, "bfloat16"), (64, "bfloat16"), (32, "float16")),
    ),
}


def tables(budgets: dict[str, Any], backend: str) -> tuple[str, ...]:
    """The tables of docs/BACKEND.md."""
    page = _PAGES[backend]
    return (
        _main_table(budgets, page),
        _largest_bounds_table(budgets, page),
        _other_cases_table(budgets, page),
        *(_all_bounds_table(budgets, page, architecture) for architecture in page.architectures),
    )


def records_of(budgets: dict[str, Any], kernel: str, width: int = 32, dtype: str = "bfloat16") -> dict[str, Any]:
    """Architecture -> record of the kernel, or of the one that runs there in its place and copies its inputs ahead."""
    names = (kernel, kernel.replace("+tiled", "+tiled+ahead"))
    cases = (f"D{width}/{dtype}", dtype)  # CUDA kernels of the loss have no width
    return {key: value for name in names for case in cases for key, value in budgets.get(f"{name}/{case}", {}).items()}


def _main_table(budgets: dict[str, Any], page: _Page) -> str:
    """Every kernel at D 32 in bfloat16 on the page's architecture."""
    lines = [
        "| kernel | registers | spilled | shared | issue | tensor | shared memory | special | bytes per pixel |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel, title in page.kernels.items():
        record = records_of(budgets, kernel)[page.architecture]
        cycles = [f"{record['cycles_per_16_px'][pipe]:,.0f}" for pipe in ("issue", "tensor", "shared", "special")]
        lines.append(
            f"| {title} | {record['registers']} | {record['spill_bytes']} | {record['shared_bytes'] / 1000:.0f} kB "
            f"| {' | '.join(cycles)} | {_bytes(record['bytes_per_px'])} |"
        )
    return "\n".join(lines)


def _bytes(per_px: float | None) -> str:
    return "–" if per_px is None else f"{per_px:,.0f}"


def _largest_bounds_table(budgets: dict[str, Any], page: _Page) -> str:
    """Modeled milliseconds of every kernel at D 32 in bfloat16, with the largest bound, by architecture."""
    heads = [f"{name} ({MACHINES[name].device})" for name in page.architectures]
    lines = [f"| kernel | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for kernel, title in page.kernels.items():
        records = records_of(budgets, kernel)
        bounds = [bound_of(records[name], name) for name in page.architectures]
        cells = [f"{_milliseconds(bound.milliseconds)} {bound.name}" for bound in bounds if bound is not None]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _milliseconds(time: float) -> str:
    return f"{time:.{3 if time < 0.02 else 2}f}"


def _all_bounds_table(budgets: dict[str, Any], page: _Page, architecture: str) -> str:
    """Modeled milliseconds of every bound of every kernel at D 32 in bfloat16 on one architecture, the largest bold."""
    bounds = ("issue", "tensor", "shared", "special", "fp32", "alu", BYTES)
    lines = [f"| {architecture} | {' | '.join(bounds)} |", "|---" * (1 + len(bounds)) + "|"]
    for kernel, title in page.kernels.items():
        record = records_of(budgets, kernel)[architecture]
        times = MACHINES[architecture].milliseconds(record["cycles_per_16_px"], record["bytes_per_px"])
        cells = [_milliseconds(times[bound]) for bound in bounds]
        largest = bounds.index(max(times, key=lambda bound: times[bound]))
        cells[largest] = f"**{cells[largest]}**"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _other_cases_table(budgets: dict[str, Any], page: _Page) -> str:
    """Registers, spilled bytes and issue slots per 16 pixels of the other recorded widths and dtypes."""
    heads = [f"D {width}, {dtype}" for width, dtype in page.other_cases]
    lines = [f"| kernel | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for kernel, title in page.kernels.items():
        if "flow_matching_loss" not in kernel:
            records = [records_of(budgets, kernel, *case)[page.architecture] for case in page.other_cases]
            cells = [f"{r['registers']}, {r['spill_bytes']}, {r['issue_slots_per_16_px']:,.0f}" for r in records]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)

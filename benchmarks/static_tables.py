"""The tables of docs/triton.md, made from benchmarks/budgets.json.

`python -m benchmarks static --tables` prints them.
"""

from typing import Any

# The model's machine: an H200 at 1.755 GHz, and its work: 32 images of 256x256.
SCHEDULERS, CLOCK, PIXELS = 132 * 4, 1.755e9, 32 * 256 * 256

_KERNELS = {
    "pixel_decoder.forward_kernel": "decoder forward",
    "pixel_decoder.replay_kernel": "decoder replay (forward again, head backwards)",
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
}
_OTHER_CASES = ((16, "bfloat16"), (64, "bfloat16"), (32, "float32"))
_ARCHITECTURE = "sm_90"


def milliseconds(cycles_per_16_px: float) -> float:
    """Time of a pipe that is busy for so many cycles per 16 pixels, on the model's machine and work."""
    return cycles_per_16_px * PIXELS / 16 / SCHEDULERS / CLOCK * 1e3


def main_table(budgets: dict[str, Any]) -> str:
    """Every kernel at D 32 in bfloat16 on sm_90; the time is that of issuing its instructions."""
    lines = ["| kernel | registers | spilled | shared | slots per 16 px | modelled ms |", "|---|---|---|---|---|---|"]
    for kernel, title in _KERNELS.items():
        record = budgets[f"{kernel}/D32/bfloat16"][_ARCHITECTURE]
        slots = record["issue_slots_per_16_px"]
        lines.append(
            f"| {title} | {record['registers']} | {record['spill_bytes']} | {record['shared_bytes'] / 1000:.0f} kB "
            f"| {slots:,.0f} | {milliseconds(slots):.{3 if slots < 100 else 2}f} |"
        )
    return "\n".join(lines)


def other_cases_table(budgets: dict[str, Any]) -> str:
    """Registers, spilled bytes and slots per 16 pixels of the other recorded widths and dtypes on sm_90."""
    heads = [f"D {width}, {dtype}" for width, dtype in _OTHER_CASES]
    lines = [f"| kernel | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for kernel, title in _KERNELS.items():
        if not kernel.startswith("flow_matching_loss"):
            records = [budgets[f"{kernel}/D{width}/{dtype}"][_ARCHITECTURE] for width, dtype in _OTHER_CASES]
            cells = [f"{r['registers']}, {r['spill_bytes']}, {r['issue_slots_per_16_px']:,.0f}" for r in records]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)

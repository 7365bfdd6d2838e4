"""Performance targets of the package, each looked up in a result.

Ratios are relative to the published formulation in eager PyTorch in the same run, on a CPU with AVX512-BF16 and two
threads; one of them is higher on a processor with AVX2 only.
"""

import dataclasses

from benchmarks.names import BACKWARD_ALONE, BEST_EAGER, FORWARD, PUBLISHED, TRAINING, TWO_OPS
from benchmarks.ops.sizes import STANDARD, size_of

BACKEND = "cpu"
_PASS_TEXT = {
    FORWARD: "forward",
    TRAINING: "forward and backward",
    BACKWARD_ALONE: "backward kernel only, vs. eager forward and backward",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """`value` is a lower limit if `at_least`, else an upper limit. Figures that the result lacks are None."""

    text: str
    value: float
    unit: str
    at_least: bool
    reached: float | None
    against_best: float | None = None  # for ratios of time: relative to the best eager formulation

    @property
    def met(self) -> bool:
        if self.reached is None:
            return False
        return self.reached >= self.value if self.at_least else self.reached <= self.value


def targets_in(result: dict) -> list[Target]:
    """Every target with the figure reached in the result."""
    found = []
    avx2_only = result["header"].get("instruction_set") == "avx2"
    for op, dtype, pass_, value in (
        ("pixel_decoder", "float32", FORWARD, 3.6),
        ("pixel_decoder", "bfloat16", FORWARD, 4.1),
        ("pixel_decoder", "float32", TRAINING, 2.5),
        ("pixel_decoder", "bfloat16", TRAINING, 2.5),
        ("pixel_decoder_from_tokens", "float32", FORWARD, 2.1),
        ("pixel_decoder_from_tokens", "bfloat16", FORWARD, 2.2),
        ("upsample_modulate", "float32", FORWARD, 1.4),
        ("upsample_modulate", "bfloat16", FORWARD, 1.4),
        ("upsample_modulate", "float32", TRAINING, 1.25),
        ("upsample_modulate", "bfloat16", TRAINING, 1.25),
        ("adaln_block", "float32", FORWARD, 1.9),
        ("adaln_block", "bfloat16", FORWARD, 2.5),
        ("flow_matching_loss", "float32", TRAINING, 18.0),
        ("flow_matching_loss", "float32", BACKWARD_ALONE, 25.0),
        ("pixel_decoder_loss", "float32", TRAINING, 3.6 if avx2_only else 3.4),
        ("pixel_decoder_loss", "bfloat16", TRAINING, 3.3),
    ):
        text = f"{op} {dtype}, {_PASS_TEXT[pass_]}"
        found.append(Target(text, value, "x", True, *_speedups(result, op, dtype, pass_)))
    for op, value in (("pixel_decoder_loss", 1.2), ("pixel_decoder_loss_from_tokens", 1.1)):
        for dtype in ("float32", "bfloat16"):
            times = _milliseconds(result, op, dtype)
            ours, two_ops = times.get((BACKEND, TRAINING)), times.get((BACKEND + TWO_OPS, TRAINING))
            reached = two_ops / ours if ours and two_ops else None
            found.append(Target(f"{op} {dtype}, {_PASS_TEXT[TRAINING]}, over its two ops", value, "x", True, reached))
    avx2 = _speedups(result, "pixel_decoder", "float32", FORWARD, instruction_set="avx2")
    found.append(Target("pixel_decoder float32, forward, AVX2 build", 2.2, "x", True, *avx2))
    for dtype in ("float32", "bfloat16"):
        text = f"pixel_decoder {dtype}, memory growth of eager over ours, 524,288 pixels"
        found.append(Target(text, 25.0, "x", True, _memory_ratio(result, dtype)))
    for pass_, value in ((FORWARD, 120.0), (TRAINING, 360.0)):
        text = f"pixel_decoder, host time per call on one pixel, {_PASS_TEXT[pass_]}"
        found.append(Target(text, value, "µs", False, _overhead(result, pass_)))
    import_s = (result.get("import_time") or {}).get("package_and_ops_s")
    found.append(Target("import deco_kernels with its ops, beyond import torch", 0.15, "s", False, import_s))
    return found


def _speedups(
    result: dict, op: str, dtype: str, pass_: str, instruction_set: str | None = None
) -> tuple[float | None, float | None]:
    """Speedups over the published and over the best eager formulation."""
    ms = _milliseconds(result, op, dtype, instruction_set)
    ours = ms.get((BACKEND, pass_))
    eager_pass = TRAINING if pass_ == BACKWARD_ALONE else pass_
    published = ms.get((PUBLISHED, eager_pass))
    best = ms.get((BEST_EAGER, eager_pass), published)
    return (published / ours if ours and published else None), (best / ours if ours and best else None)


def _milliseconds(
    result: dict, op: str, dtype: str, instruction_set: str | None = None
) -> dict[tuple[str, str], float]:
    """(contender, pass) → time in the standard size."""
    size = dataclasses.asdict(size_of(STANDARD, op))
    return {
        (row["contender"], row["pass"]): row["ms"]
        for row in result["rows"]
        if (row["op"], row["dtype"], row["size"], row["forced_instruction_set"]) == (op, dtype, size, instruction_set)
        and row["status"] == "ok"
    }


def _memory_ratio(result: dict, dtype: str) -> float | None:
    bytes_of = {
        row["contender"]: row["growth_bytes"]
        for row in result["memory"]
        if (row["op"], row["dtype"], row["status"]) == ("pixel_decoder", dtype, "ok")
    }
    ours, eager = bytes_of.get(BACKEND), bytes_of.get(PUBLISHED)
    return eager / ours if ours and eager else None


def _overhead(result: dict, pass_: str) -> float | None:
    for row in result["overhead"]:
        if (row["contender"], row["pass"], row["status"]) == (BACKEND, pass_, "ok"):
            return row["us"]
    return None

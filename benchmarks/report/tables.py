"""A result as Markdown."""

from benchmarks.harness import results
from benchmarks.names import BACKWARD_ALONE, PUBLISHED, TRAINING
from benchmarks.report import parts
from benchmarks.report.markdown import ratio, refusal_of, section, size_text, table, title_of
from benchmarks.report.rows import eager_medians, groups, memory_cases, share_of_ceiling
from benchmarks.report.targets import targets_in


def load(path: str) -> dict:
    """A result that a report can be made of. Raises OSError, or ValueError that names the file."""
    result = results.load(path)
    with results.fields_of(path, "python -m benchmarks --output"):
        markdown(result)
    return result


def markdown(result: dict) -> str:
    """The whole report."""
    found = [_header(result), *(_timings(rows, result["ceilings"]) for rows in groups(result["rows"]))]
    if result["header"]["device"] == "cuda":
        for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
            if summary := parts.ops_summary([row for row in result["rows"] if row["dtype"] == dtype]):
                found.append(section(f"## Milliseconds of the ops, {dtype}", summary, []))
    found += [_memory(rows) for rows in memory_cases(result["memory"])]
    found += [_overhead(result["overhead"]), _import_time(result["import_time"])]
    found += [
        parts.scaling(result),
        parts.end_to_end(result["end_to_end"]),
        parts.kernels(result["kernels"]),
    ]
    if result["left_out"]:
        found.append(section("## Skipped for lack of time", "", result["left_out"]))
    if result["header"]["device"] == "cpu" and result["rows"]:
        found.append(targets_table(result))
    return "\n\n".join(part for part in found if part) + "\n"


def _header(result: dict) -> str:
    header, ceilings = result["header"], result["ceilings"]
    held = f", held to {header['held_to']}" if "held_to" in header else ""
    lines = [f"# Benchmarks on {header.get('gpu') or header['processor']}{held}", ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in header.items() if value is not None]
    lines.append(f"- ceilings, measured in this run: copy {ceilings['bytes_per_s'] / 1e9:.1f} GB/s")
    for name, rates in (("matmul", ceilings["matmul_flops_per_s"]), ("multiply-add", ceilings["fma_flops_per_s"])):
        if rates:
            rates_text = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in sorted(rates.items()))
            lines.append(f"- ceilings, measured in this run: {name} {rates_text} GFLOP/s")
    return "\n".join(lines)


def _timings(rows: list[dict], ceilings: dict) -> str:
    first = rows[0]
    pass_ = TRAINING if first["pass"] == BACKWARD_ALONE else first["pass"]
    title = f"## {first['op']}, {first['dtype']}, {title_of(pass_)}"
    if first["forced_instruction_set"]:
        title += f", ours with {first['forced_instruction_set']}"
    on_gpu = any("host_us" in row for row in rows)
    lines, notes = [], []
    for row in rows:
        name = title_of(row["contender"])
        if row["pass"] == BACKWARD_ALONE:
            name += f", {title_of(BACKWARD_ALONE)}"
        if row["status"] != "ok":
            notes.append(f"{name}: {refusal_of(row)}")
            continue
        if row.get("throttled"):
            notes.append(f"{name}: the GPU lowered its clocks: {', '.join(row['throttled'])}")
        if row.get("graph_reason"):
            notes.append(f"{name}: not captured in a CUDA graph: {row['graph_reason']}")
        lines.append([name + (" (unstable)" if row["unstable"] else ""), *_figures(row, rows, ceilings, on_gpu)])
    if first["op"] == "modulated_rms_norm":
        notes.append("not an op of this package: the part of adaln_block that Liger-Kernel implements")
    heads = ["contender", "ms", "20 to 80 %", "× published", "× best eager", "GB/s", "GFLOP/s", "of ceiling"]
    heads += ["ms in a CUDA graph", "host µs per call"] if on_gpu else []
    return section(f"{title}\n\n{size_text(first['size'])}", table(heads, lines), notes)


def _figures(row: dict, rows: list[dict], ceilings: dict, on_gpu: bool) -> list[str]:
    """The cells of a row after its name."""
    published, best = eager_medians(rows)
    seconds = row["ms"] / 1e3
    share, limit = share_of_ceiling(row, ceilings)
    cells = [
        f"{row['ms']:.3g}",
        f"{row['ms_p20']:.3g} to {row['ms_p80']:.3g}",
        ratio(published, row["ms"]),
        ratio(best, row["ms"]),
        f"{row['bytes'] / seconds / 1e9:.1f}",
        f"{row['flops'] / seconds / 1e9:.0f}",
        f"{share:.0f} % of {limit}",
    ]
    if on_gpu:
        cells.append("–" if row.get("graph_ms") is None else f"{row['graph_ms']:.3g}")
        cells.append("–" if row.get("host_us") is None else f"{row['host_us']:.0f}")
    return cells


def _memory(rows: list[dict]) -> str:
    """One case's table, whose first contender of a dtype is the measure of the others."""
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(row["dtype"], row.get("growth_bytes"))
    lines, notes = [], []
    for row in rows:
        name = f"{title_of(row['contender'])}, {row['dtype']}"
        if row["status"] != "ok":
            notes.append(f"{name}: {row['status']}: {row['reason']}")
            continue
        grown = row["growth_bytes"]
        lines.append([name, f"{grown / 1e6:.1f}", ratio(first[row["dtype"]], grown)])
    head = f"## Peak memory growth of {rows[0]['op']}, forward and backward, {rows[0]['pixels']:,} pixels"
    measure = "published" if rows[0]["contender"] == PUBLISHED else rows[0]["contender"]
    return section(head, table(["contender", "MB, outputs included", f"× {measure}"], lines), notes)


def _overhead(rows: list[dict]) -> str:
    if not rows:
        return ""
    lines, notes = [], []
    for row in rows:
        name = f"{title_of(row['contender'])}, {title_of(row['pass'])}"
        if row["status"] == "ok":
            lines.append([name, f"{row['us']:.1f}"])
        else:
            notes.append(f"{name}: {row['status']}: {row['reason']}")
    head = f"## Host time per call of {rows[0]['op']} on one pixel"
    return section(head, table(["contender", "µs"], lines), notes)


def _import_time(found: dict | None) -> str:
    if not found:
        return ""
    lines = [["deco_kernels", f"{found['package_s']:.4f}"], ["deco_kernels.ops", f"{found['package_and_ops_s']:.4f}"]]
    return "## Import, beyond importing PyTorch\n\n" + table(["module", "s"], lines)


def targets_table(result: dict) -> str:
    """The targets whose figures the result has; empty if it has none."""
    lines, missing = [], 0
    for target in targets_in(result):
        if target.reached is None:
            missing += 1
            continue
        sign, reached = "≥" if target.at_least else "≤", f"{target.reached:.3g} {target.unit}"
        best = "–" if target.against_best is None else f"{target.against_best:.3g} x"
        verdict = "yes" if target.met else "no"
        lines.append([target.text, f"{sign} {target.value:g} {target.unit}", reached, verdict, best])
    if not lines:
        return ""
    heads = ["what", "target", "reached", "met", "vs. best eager"]
    notes = [f"{missing} more targets are not measured in this result"] if missing else []
    return section("## Targets", table(heads, lines), notes)

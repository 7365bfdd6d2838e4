"""Markdown of the parts beyond single ops: scaling, end to end, kernels."""

from benchmarks.names import BACKWARD_ALONE, COMPILED, DEVICE_BACKENDS, FORWARD, LIMIT, PUBLISHED, SAMPLING
from benchmarks.report.markdown import ratio, refusal_of, section, table, title_of
from benchmarks.report.rows import EAGER, FLAT_FROM, curves, end_to_end_groups, flatness, groups, pixels_of


def scaling_summary(result: dict) -> str:
    """One line per op, dtype, pass and fused backend: time per pixel at large sizes, and its flatness."""
    device, lines = result["header"]["device"], []
    for (op, dtype, pass_), group in curves(result).items():
        published = dict(group.get(PUBLISHED, ()))
        for name, points in group.items():
            spread = flatness(points, device)
            if name in EAGER or spread is None:
                continue
            large = [(pixels, time) for pixels, time in points if pixels >= FLAT_FROM[device]]
            (first, _), (last, time) = large[0], large[-1]
            beside = [f"{published[pixels]:.3g}" if pixels in published else "–" for pixels in (first, last)]
            cells = [f"{large[0][1]:.3g}", f"{time:.3g}", f"{spread:.2f}", *beside]
            lines.append([f"{op} {dtype}, {title_of(pass_)}: {name}, {first:,} to {last:,} px", *cells])
    heads = ["what", "ns per pixel, smallest", "largest image", "largest / smallest time", "eager, smallest", "largest"]
    return section("## Time per pixel, large images", table(heads, lines), []) if lines else ""


def scaling(result: dict) -> str:
    """The summary, then one table per op, dtype and pass."""
    device, parts = result["header"]["device"], [scaling_summary(result)]
    for (op, dtype, pass_), group in curves(result).items():
        sizes = sorted({pixels for points in group.values() for pixels, _ in points})
        lines = []
        for name, points in group.items():
            times = dict(points)
            spread = flatness(points, device)
            overhead = f"{points[0][0] * points[0][1] / 1e3:.0f}"
            cells = [f"{times[pixels]:.3g}" if pixels in times else "–" for pixels in sizes]
            lines.append([title_of(name), *cells, overhead, "–" if spread is None else f"{spread:.2f}"])
        heads = ["ns per pixel at", *(f"{pixels:,} px" for pixels in sizes)]
        heads += [f"µs per call at {sizes[0]:,} px", f"largest / smallest from {FLAT_FROM[device]:,} px"]
        notes = [
            f"{title_of(row['contender'])}, {pixels_of(row):,} px: {refusal_of(row)}"
            for row in result["scaling"]
            if row["status"] != "ok" and (row["op"], row["dtype"], row["pass"]) == (op, dtype, pass_)
        ]
        parts.append(
            section(f"## Time per pixel vs. size: {op}, {dtype}, {title_of(pass_)}", table(heads, lines), notes)
        )
    return "\n\n".join(part for part in parts if part)


def ops_summary(rows: list[dict]) -> str:
    """One line per op and pass, in milliseconds; the ratios are those of the fastest backend."""
    names = [name for name in DEVICE_BACKENDS["cuda"][1:] if any(row["contender"] == name for row in rows)]
    lines = []
    for group in groups(rows):
        medians = {
            row["contender"]: row["ms"] for row in group if row["status"] == "ok" and row["pass"] != BACKWARD_ALONE
        }
        if not medians:
            continue
        best = min((medians[name] for name in names if name in medians), default=None)
        cells = [f"{medians[name]:.3g}" if name in medians else "–" for name in (PUBLISHED, COMPILED, *names)]
        ratios = [ratio(medians.get(name), best) if best else "–" for name in (PUBLISHED, COMPILED)]
        what = FORWARD if group[0]["pass"] == FORWARD else "forward and backward"
        lines.append([f"{group[0]['op']}, {what}", *cells, *ratios])
    heads = ["what", "published eager", "published, torch.compile", *names, "× published", "× torch.compile"]
    return table(heads, lines)


def end_to_end_summary(rows: list[dict]) -> str:
    """One line per case and fused backend, in milliseconds."""
    lines = []
    for (preset, pass_, batch, image_size, dtype, steps), group in end_to_end_groups(rows).items():
        medians = {row["contender"]: row["ms"] for row in group if row["status"] == "ok"}
        what = f"{pass_} of {steps} steps" if pass_ == SAMPLING else pass_
        for name, milliseconds in medians.items():
            if name in EAGER or name == LIMIT:
                continue
            others = [f"{medians[other]:.3g}" if other in medians else "–" for other in (PUBLISHED, COMPILED, LIMIT)]
            text = f"{preset}, {what}, batch {batch}, {image_size} x {image_size}, {dtype}: {name}"
            lines.append([text, f"{milliseconds:.3g}", *others, ratio(medians.get(PUBLISHED), milliseconds)])
    heads = ["what", "ms", "published eager", "published, torch.compile", "limit", "× published"]
    return section("## End to end", table(heads, lines), []) if lines else ""


def end_to_end(rows: list[dict]) -> str:
    """The summary, then one table per case."""
    parts = [end_to_end_summary(rows)]
    parts += [_end_to_end_group(*key, group) for key, group in end_to_end_groups(rows).items()]
    return "\n\n".join(part for part in parts if part)


def _end_to_end_group(preset, pass_, batch, image_size, dtype, steps, rows: list[dict]) -> str:
    timed = [row for row in rows if row["status"] == "ok"]
    medians = {row["contender"]: row["ms"] for row in timed}
    published, limit = medians.get(PUBLISHED), medians.get(LIMIT)
    names = list(dict.fromkeys(name for row in timed for name in row["parts"]))
    lines = []
    for row in timed:
        beyond = f"{row['ms'] - limit:.3g}" if limit and row["contender"] != LIMIT else "–"
        cells = [f"{row['ms']:.3g}", f"{row['ms_p20']:.3g} to {row['ms_p80']:.3g}", ratio(published, row["ms"]), beyond]
        cells += [f"{row['parts'][name]:.3g}" if name in row["parts"] else "–" for name in names]
        lines.append([title_of(row["contender"]) + (" (unstable)" if row["unstable"] else ""), *cells])
    what = f"{pass_} of {steps} steps, guided" if pass_ == SAMPLING else pass_
    head = f"## {preset}: {what}, batch {batch}, {image_size} x {image_size}, {dtype}"
    heads = ["contender", "ms", "20 to 80 %", "× published", "ms beyond the limit", *(f"ms {name}" for name in names)]
    notes = [f"{title_of(row['contender'])}: {refusal_of(row)}" for row in rows if row["status"] != "ok"]
    return section(head, table(heads, lines), notes)


def kernels(rows: list[dict]) -> str:
    """Table of the budgeted kernels; benchmarks/static/timed_kernels.py describes the rows."""
    lines, notes = [], []
    for row in rows:
        modeled, measured = row["modeled_ms"], row["measured_ms"]
        if measured is None:
            notes.append(f"{row['kernel']}: {row['reason']}")
            continue
        both = "–" if modeled is None else f"{measured / modeled:.2f}"
        registers = f"{row['registers']} ({row['recorded_registers']})"
        spills = f"{row['spill_bytes']} ({row['recorded_spill_bytes']})"
        model = "–" if modeled is None else f"{modeled:.3f}"
        lines.append(
            [
                row["kernel"],
                model,
                row["bound"] or "–",
                f"{measured:.3f}",
                both,
                str(row["launches"]),
                registers,
                spills,
            ]
        )
    if not rows:
        return ""
    heads = ["kernel", "modeled ms", "bound", "measured ms", "measured / modeled", "launches"]
    heads += ["registers (recorded)", "spilled bytes (recorded)"]
    head = f"## Kernels on {rows[0]['architecture']}: modeled from the recorded instructions and bytes, and measured"
    return section(head, table(heads, lines), notes)

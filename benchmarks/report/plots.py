"""PNG plots from a result: speedups, roofline, time per pixel, memory, end to end."""

import os
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator  # noqa: E402

from benchmarks.names import (  # noqa: E402
    BACKWARD_ALONE,
    BEST_EAGER,
    COMPILE_MODES,
    LIGER,
    LIMIT,
    PUBLISHED,
    SAMPLING,
    TRAINING,
)
from benchmarks.report.markdown import title_of  # noqa: E402
from benchmarks.report.rows import EAGER, FLAT_FROM, curves, eager_medians, groups, memory_cases  # noqa: E402

_COLORS = {
    PUBLISHED: "tab:gray",
    BEST_EAGER: "silver",
    "reference": "tab:brown",
    "cpu": "tab:blue",
    "triton": "tab:purple",
    "cuda": "tab:green",
    LIGER: "tab:pink",
    LIMIT: "black",
    **dict(zip(COMPILE_MODES, ("tab:orange", "gold"), strict=True)),
}
_SHORT_PASS = {TRAINING: "forward + backward"}


def draw(result: dict, folder: str) -> list[str]:
    """Draws all plots for which the result has rows; returns the paths written."""
    drawings: dict[str, Callable] = {
        "speedups": speedups,
        "roofline": roofline,
        "scaling": scaling,
        "memory": memory,
        "end_to_end": end_to_end,
    }
    written = []
    for name, drawing in drawings.items():
        figure = drawing(result)
        if figure is None:
            continue
        header = result["header"]
        machine = header.get("gpu") or f"{header['processor']}, {header['threads']} threads"
        machine += f", held to {header['held_to']}" if "held_to" in header else ""
        figure.suptitle(f"{figure.get_suptitle()}\n{machine}, PyTorch {header['torch']}", fontsize=10)
        path = os.path.join(folder, f"{name}.png")
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written


def _color(name: str) -> str:
    return _COLORS.get(name, "tab:cyan")


def _timed(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["status"] == "ok" and row["pass"] != BACKWARD_ALONE]


def speedups(result: dict):
    """Bars from 1: time of the best eager formulation over that of each contender. One panel per pass."""
    panels: dict[str, list[tuple[list[dict], float]]] = {}
    for rows in groups(result["rows"]):
        _, best = eager_medians(rows)
        timed = [row for row in _timed(rows) if row["contender"] != BEST_EAGER]
        if best and timed:
            panels.setdefault(timed[0]["pass"], []).append((timed, best))
    if not panels:
        return None
    bars = max(sum(len(rows) + 1 for rows, _ in panel) for panel in panels.values())
    size = (2 + 5.5 * len(panels), 1.5 + 0.19 * bars)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for one, (pass_, panel) in zip(axes[0], panels.items(), strict=True):
        _speedup_bars(one, panel)
        one.set_title(title_of(pass_), fontsize=9)
        one.set(xscale="log", xlabel="speedup, 20th to 80th percentile")
        one.xaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]))
        one.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        one.xaxis.set_minor_locator(NullLocator())
    names = dict.fromkeys(row["contender"] for panel in panels.values() for rows, _ in panel for row in rows)
    handles = [plt.Rectangle((0, 0), 1, 1, color=_color(name), label=title_of(name)) for name in names]
    figure.legend(handles=handles, fontsize=7, loc="outside lower center", ncols=len(handles))
    figure.suptitle("Speedup over the best eager formulation")
    return figure


def _speedup_bars(axes, panel: list[tuple[list[dict], float]]) -> None:
    position, ticks = 0, []
    for rows, best in panel:
        ticks.append((position + (len(rows) - 1) / 2, _group_label(rows[0])))
        for row in rows:
            ratio, low, high = (best / row[name] for name in ("ms", "ms_p80", "ms_p20"))
            axes.barh(position, ratio - 1, 0.85, left=1, color=_color(row["contender"]))
            axes.plot([low, high], [position, position], "k-", linewidth=0.8)
            axes.text(max(1, high), position, f" {ratio:.2f}", va="center", fontsize=7)
            position += 1
        position += 1
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.set_ylim(position - 1.3, -0.7)
    axes.margins(x=0.1)


def _group_label(row: dict) -> str:
    size = row["size"]
    text = f"{row['op']}\n{row['dtype']}, {size['batch']}×{size['height']}×{size['width']}"
    return text + (f", {row['forced_instruction_set']}" if row["forced_instruction_set"] else "")


def roofline(result: dict):
    """FLOP/s vs. FLOPs per byte under the ceilings measured in the same run; one panel per compute dtype."""
    ceilings = result["ceilings"]
    rows = [row for row in _timed(result["rows"]) if row["flops"]]
    kinds = sorted({row["arithmetic"] for row in rows})
    if not kinds:
        return None
    figure, panels = plt.subplots(1, len(kinds), figsize=(6.5 * len(kinds), 5), squeeze=False, layout="constrained")
    markers = dict(zip(sorted({row["op"] for row in rows}), "osD^vP*X", strict=False))
    for axes, kind in zip(panels[0], kinds, strict=True):
        own = [row for row in rows if row["arithmetic"] == kind]
        intensities = [row["flops"] / row["bytes"] for row in own]
        peak, bandwidth = ceilings["flops"][kind], ceilings["bytes_per_s"]
        ridge = peak / bandwidth
        ends = [min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 3]
        axes.plot([ends[0], ridge, ends[1]], [bandwidth * ends[0] / 1e9, peak / 1e9, peak / 1e9], "k-", linewidth=1)
        axes.text(ends[0], bandwidth * ends[0] / 1e9, f"   copy {bandwidth / 1e9:.0f} GB/s", fontsize=7)
        axes.text(ends[1], peak / 1e9, f"{peak / 1e9:.0f} GFLOP/s ", fontsize=7, va="bottom", ha="right")
        for row, intensity in zip(own, intensities, strict=True):
            filled = row["pass"] == TRAINING
            color = _color(row["contender"])
            style = {"color": color, "markerfacecolor": color if filled else "white", "markersize": 6}
            rate = row["flops"] / row["ms"] / 1e6
            axes.plot(intensity, rate, marker=markers[row["op"]], linestyle="none", **style)
        axes.set(xscale="log", yscale="log", title=kind, xlabel="FLOPs per byte, both by formula", ylabel="GFLOP/s")
        axes.grid(True, which="major", linewidth=0.3)
    names = dict.fromkeys(row["contender"] for row in rows)
    handles = [plt.Line2D([], [], color=_color(n), marker="o", linestyle="none", label=title_of(n)) for n in names]
    handles += [plt.Line2D([], [], color="black", marker=m, linestyle="none", label=op) for op, m in markers.items()]
    figure.legend(handles=handles, fontsize=7, loc="outside right center")
    figure.suptitle("Roofline; hollow: forward, filled: forward and backward")
    return figure


def scaling(result: dict):
    """Time per pixel vs. pixels, on log axes; dotted: the time of the smallest call divided by the pixels."""
    panels = curves(result)
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(6 * columns, 3.6 * lines), squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    device = result["header"]["device"]
    for axes, ((op, dtype, pass_), group) in zip(grid.flat, panels.items(), strict=False):
        for name, points in group.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=_color(name), label=title_of(name))
        axes.set(xscale="log", yscale="log", xlabel="pixels", ylabel="ns per pixel")
        axes.set_ylim(bottom=min(time for points in group.values() for _, time in points) / 2)
        for name, points in group.items():
            if name not in EAGER:
                _mark_call(axes, points, _color(name), FLAT_FROM[device])
        axes.axvline(FLAT_FROM[device], color="black", linewidth=0.5)
        axes.set_title(f"{op}, {dtype}, {_SHORT_PASS.get(pass_, pass_)}", fontsize=9)
        axes.grid(True, which="major", linewidth=0.3)
        axes.legend(fontsize=7)
    figure.suptitle("Time per pixel vs. size; dotted: time of the smallest call divided by the pixels")
    return figure


def _mark_call(axes, points: list[tuple[int, float]], color: str, until: int) -> None:
    """Annotates the time of the smallest call, and draws it divided by more pixels."""
    call = points[0][0] * points[0][1]
    axes.plot([points[0][0], until], [points[0][1], call / until], ":", color=color, linewidth=1)
    axes.annotate(f"{call / 1e3:.0f} µs per call", points[0], (3, -12), textcoords="offset points", fontsize=7)


def memory(result: dict):
    """Bars of peak memory growth."""
    cases = memory_cases([row for row in result["memory"] if row["status"] == "ok"])
    if not cases:
        return None
    heights = [1.5 + 0.35 * len(rows) for rows in cases]
    figure, grid = plt.subplots(
        len(cases), 1, figsize=(8, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axes, rows in zip(grid[:, 0], cases, strict=True):
        for position, row in enumerate(rows):
            megabytes = row["growth_bytes"] / 1e6
            axes.barh(position, megabytes, color=_color(row["contender"]))
            axes.text(megabytes, position, f" {megabytes:,.0f}", va="center", fontsize=8)
        labels = [f"{title_of(row['contender'])}, {row['dtype']}" for row in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel="MB, outputs and gradients included", title=f"{rows[0]['op']}, {rows[0]['pixels']:,} pixels")
        axes.margins(x=0.12)
    figure.suptitle("Peak memory growth, forward and backward")
    return figure


def end_to_end(result: dict):
    """Stacked bars: the parts of training steps and of sampling."""
    rows = [row for row in result["end_to_end"] if row["status"] == "ok"]
    if not rows:
        return None
    cases = list(dict.fromkeys(_case_of(row) for row in rows))
    figure, grid = plt.subplots(len(cases), 1, figsize=(9, 0.8 + 1.9 * len(cases)), squeeze=False, layout="constrained")
    parts = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    colors = dict(zip(parts, plt.get_cmap("tab10").colors, strict=False))
    for axes, case in zip(grid.flat, cases, strict=True):
        own = [row for row in rows if _case_of(row) == case]
        for position, row in enumerate(own):
            left = 0.0
            for name, milliseconds in row["parts"].items():
                axes.barh(position, milliseconds, 0.8, left=left, color=colors[name])
                left += milliseconds
            axes.text(left, position, f" {row['ms']:.3g} ms", va="center", fontsize=7)
        axes.set_yticks(range(len(own)), [title_of(row["contender"]) for row in own], fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(", ".join(case), fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, fontsize=7, loc="outside right center")
    figure.suptitle("End to end, milliseconds by part")
    return figure


def _case_of(row: dict) -> tuple[str, ...]:
    pass_ = f"{row['pass']}, {row['steps']} steps" if row["pass"] == SAMPLING else row["pass"]
    return row["preset"], pass_, f"batch {row['batch']}", f"{row['image_size']}²", row["dtype"]

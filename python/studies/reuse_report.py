"""Report of `ablate.py reuse`: table.csv, table.md, study.png and samples.jpg."""

import csv
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from deco_kernels.model.checkpoint_file import complete_or_absent
from studies.reuse import CHOSEN, EVEN, FEWER, TIMED_ROUNDS, TIMED_SAMPLES, Settings, contenders

TITLE = "The trunk at some steps only"
KINDS = {EVEN: "even trunk steps", CHOSEN: "chosen trunk steps", FEWER: "fewer steps in all"}
COLUMNS = {  # key of a result → head of its column, and format
    "sample_error": ("relative error of the sample", "{:.3f}"),
    "velocity_error": ("of the velocities", "{:.3f}"),
    "psnr": ("PSNR, dB", "{:.1f}"),
}
SPECTRA = {0.5: "-", 0.2: ":"}  # share of the steps → line
SHOWS = (
    "How far samples with the trunk at K steps are from those with the trunk at every step, from the same noise, with "
    "even and with chosen steps; and how far the same number of trunk calls gets if the decoder is left out too."
)
CANNOT = (
    "The model is small, has been trained for minutes, and samples with one solver. Errors are distances from its own "
    "samples with the trunk at every step: another sample can be as good. There is no FID. The seconds are those of a "
    "model whose decoder takes most of the time, not of one whose trunk does."
)

Results = list[dict[str, Any]]
Seconds = dict[str, float]


def write_report(settings: Settings, results: Results, seconds: Seconds, out: Path) -> str:
    """Writes the report, each file atomically; returns the text of table.md."""
    text = summary(settings, results, seconds)
    writers = {
        "table.csv": lambda path: write_csv(results, seconds, path),
        "table.md": lambda path: path.write_text(text, encoding="utf-8"),
        "study.png": lambda path: plot(settings, results, seconds).savefig(path, dpi=110, format="png"),
        "samples.jpg": lambda path: pictures(settings, out).savefig(path, dpi=80, format="jpeg"),
    }
    for name, write in writers.items():
        with complete_or_absent(out / name, overwrite=True) as temporary:
            write(temporary)
    return text


def write_csv(results: Results, seconds: Seconds, path: Path) -> None:
    """One line per contender and seed. Empty: no velocity error between different steps, no PSNR of equal samples."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "count", "seed", *COLUMNS, "seconds", "trunk_steps"])
        for result in results:
            cells = [result[key] for key in ("kind", "count", "seed", *COLUMNS)]
            chosen = " ".join(map(str, result["trunk_steps"] or []))
            writer.writerow([*cells, seconds[_name(result)], chosen])


def summary(settings: Settings, results: Results, seconds: Seconds) -> str:
    """Means over seeds as Markdown, with the range if there are several seeds, and notes."""
    heads = ["sampling", "trunk", "decoder", *(head for head, _ in COLUMNS.values()), "seconds"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for contender in contenders(settings.steps):
        own = [result for result in results if _name(result) == contender.name]
        decoded = contender.count if contender.kind == FEWER else settings.steps
        cells = [KINDS[contender.kind], str(contender.count), str(decoded)]
        cells += [cell([result[key] for result in own], form) for key, (_, form) in COLUMNS.items()]
        lines.append([*cells, f"{seconds[contender.name]:.2f}"])
    seeds = len(results) // len(contenders(settings.steps))
    notes = [
        f"{settings.samples} samples of {settings.image_size}², {settings.steps} Euler steps, guidance "
        f"{settings.guidance:g}, {seeds} seed(s) of the noise. trunk, decoder: steps that run them. Errors are "
        "‖x - x_exact‖ / ‖x_exact‖ against the trunk at every step, of the velocities as mean over the steps; PSNR is "
        f"the mean over samples. Seconds: {TIMED_SAMPLES} samples, the least of {TIMED_ROUNDS} rounds in which all "
        "rows alternate.",
        f"Shows: {SHOWS}",
        f"Cannot show: {CANNOT}",
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([f"# {TITLE}", table, "\n".join(f"- {note}" for note in notes)]) + "\n"


def cell(values: list[float | None], form: str) -> str:
    """Mean and range; "–" where there is no value."""
    if any(value is None for value in values):
        return "–"
    mean, low, high = (form.format(value) for value in (statistics.fmean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def plot(settings: Settings, results: Results, seconds: Seconds) -> Figure:
    """Error, PSNR and time over the number of trunk steps, and the spectrum of the error."""
    figure = Figure(figsize=(18, 4.2), layout="constrained")
    error, psnr, spectrum, time = figure.subplots(1, 4)
    for number, (kind, title) in enumerate(KINDS.items()):
        own = [result for result in results if result["kind"] == kind and result["psnr"] is not None]
        for axis, key in ((error, "sample_error"), (psnr, "psnr")):
            counts = sorted({result["count"] for result in own})
            means = [statistics.fmean(each[key] for each in own if each["count"] == count) for count in counts]
            axis.plot(counts, means, color=f"C{number}", label=title)
            axis.plot([each["count"] for each in own], [each[key] for each in own], "o", color=f"C{number}", ms=3)
        points = sorted((each.count, seconds[each.name]) for each in contenders(settings.steps) if each.kind == kind)
        time.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=title)
    error.set(title="relative error of the sample", xlabel="trunk steps")
    psnr.set(title="PSNR of the sample, dB", xlabel="trunk steps")
    time.set(title=f"seconds for {TIMED_SAMPLES} samples", xlabel="trunk steps", ylim=(0, None))
    error.legend(fontsize=8)
    draw_spectra(spectrum, settings, results)
    figure.suptitle(TITLE)
    return figure


def draw_spectra(axis: Axes, settings: Settings, results: Results) -> None:
    """Energy of the error on each diagonal of the 8x8 DCT over that of the sample, at some shares of the steps."""
    counts = [each.count for each in contenders(settings.steps)]
    for share, style in SPECTRA.items():
        count = min(counts, key=lambda k: abs(k - settings.steps * share))
        for number, (kind, title) in enumerate(KINDS.items()):
            own = [each for each in results if each["kind"] == kind and each["count"] == count]
            if own:
                ratios = [np.divide(each["difference"], each["sample"]) for each in own]
                axis.plot(range(15), np.mean(ratios, 0), style, color=f"C{number}", label=f"{title}, {count}")
    axis.set(title="energy of the error over the sample's", xlabel="vertical + horizontal frequency", yscale="log")
    axis.margins(y=0.35)
    axis.legend(fontsize=6, loc="lower center", ncols=2)


def pictures(settings: Settings, out: Path) -> Figure:
    """The first samples of the first seed: a column per kind, a row per number of trunk steps."""
    counts = sorted({each.count for each in contenders(settings.steps)}, reverse=True)
    figure = Figure(figsize=(13, 1.1 * len(counts)), layout="constrained")
    grid = figure.subplots(len(counts), len(KINDS), squeeze=False)
    for row, count in zip(grid, counts, strict=True):
        for axis, (kind, title) in zip(row, KINDS.items(), strict=True):
            # Every step is the same in all columns.
            shown = EVEN if count == settings.steps else kind
            with Image.open(out / "runs" / f"{shown}-{count}-seed0" / "samples.png") as image:
                axis.imshow(np.asarray(image))
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_ylabel(str(count), rotation=0, labelpad=14, va="center")
            if count == counts[0]:
                axis.set_title(title)
    return figure


def _name(result: dict[str, Any]) -> str:
    return f"{result['kind']} {result['count']}"

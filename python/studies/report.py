"""Report of a finished study: table.csv, table.md, study.png, and weights.json if weights were learned."""

import csv
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure

from deco_kernels import ops
from deco_kernels.model.checkpoint_file import complete_or_absent
from studies.catalog import Costs, Results, Study, mean_weight
from studies.run import Recipe, write_json


def write_report(study: Study, recipe: Recipe, results: Results, costs: Costs, out: Path) -> str:
    """Writes the report of a study, each file atomically; returns the text of table.md."""
    text = summary(study, recipe, results, costs)
    writers = {
        "table.csv": lambda path: write_csv(results, costs, path),
        "table.md": lambda path: path.write_text(text, encoding="utf-8"),
        "study.png": lambda path: plot(study, results, costs).savefig(path, dpi=110, format="png"),
    }
    for name, write in writers.items():
        with complete_or_absent(out / name, overwrite=True) as temporary:
            write(temporary)
    write_weights(study, results, out / "weights.json")
    return text


def write_csv(results: Results, costs: Costs, path: Path) -> None:
    """One line per run: variant, seed, parameters, costs, and the error of every kind of image in every metric."""
    lines = []
    for result in results:
        line = {name: result[name] for name in ("variant", "seed", "steps", "parameters", "decoder_parameters")}
        line |= costs.get(result["variant"], {})
        for images, errors in result["errors"].items():
            line |= {f"{metric}, {images}": value for metric, value in errors.items()}
        lines.append(line)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def write_weights(study: Study, results: Results, path: Path) -> None:
    """Writes variant → frequency weights [3][8][8] for Y, Cb, Cr, averaged over seeds; no file if none were learned."""
    learned = {v.name: mean_weight(results, v.name).tolist() for v in study.variants if v.learned}
    if learned:
        write_json(learned, path)


def summary(study: Study, recipe: Recipe, results: Results, costs: Costs) -> str:
    """Means over seeds as Markdown, with the range if there are several seeds, and notes."""
    columns = [(images, metric) for images, errors in results[0]["errors"].items() for metric in errors]
    heads = ["variant", "decoder parameters", *next(iter(costs.values()), {})]
    heads += [f"{metric}, {images}" for images, metric in columns]
    lines = []
    for variant in study.variants:
        own = [result for result in results if result["variant"] == variant.name]
        line = [variant.name, f"{own[0]['decoder_parameters']:,}"]
        line += [f"{value:.3g}" for value in costs.get(variant.name, {}).values()]
        for images, metric in columns:
            errors = [result["errors"][images][metric] for result in own]
            spread = "" if len(own) == 1 else f" ({min(errors):.4f} to {max(errors):.4f})"
            line.append(f"{statistics.fmean(errors):.4f}{spread}")
        lines.append(line)
    seeds = len(results) // len(study.variants)
    spread = "; the spread over seeds is unknown" if seeds == 1 else f"; parentheses: range over {seeds} seeds"
    notes = [
        f"{recipe.steps} steps of {recipe.batch_size} images of about {recipe.image_size}², {recipe.preset}, {seeds} "
        f"seed(s). Columns are held-out squared errors of the velocity (pixel: all channels; jpeg85: weighted DCT of "
        f"YCbCr; low, high: luminance coefficients with row + column below 4, from 4 on){spread}. Part of each error "
        "is noise that no model can predict.",
        *weight_notes(study, results),
        f"Shows: {study.shows}",
        f"Cannot show: {study.cannot}",
    ]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)], *lines]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n\n".join([f"# {study.title}", table, "\n".join(f"- {note}" for note in notes)]) + "\n"


def weight_notes(study: Study, results: Results) -> list[str]:
    """Notes on the learned weights compared with the JPEG weights."""
    jpeg, notes = ops.jpeg_frequency_weight(85), []
    for variant in study.variants:
        if not variant.learned:
            continue
        weight = mean_weight(results, variant.name)
        for plane, name in enumerate(("Y", "Cb", "Cr")):
            pair = torch.stack((weight[plane].flatten().log(), jpeg[plane].flatten().log()))
            u, v = divmod(int(weight[plane].argmax()), 8)
            notes.append(
                f"{variant.name}, {name}: weights from {weight[plane].min():.3g} to {weight[plane].max():.3g} (mean "
                f"{weight[plane].mean():.3f}), the largest at row {u}, column {v}; DC {weight[plane][0, 0]:.3g} (JPEG "
                f"85: {jpeg[plane][0, 0]:.3g}); correlation of the logarithms with JPEG 85 "
                f"{torch.corrcoef(pair)[0, 1].item():+.2f}"
            )
    return notes


def plot(study: Study, results: Results, costs: Costs) -> Figure:
    """Training losses, held-out errors with one point per seed, and the study's own panels."""
    images = list(results[0]["errors"])
    columns = 1 + len(images) + study.panels
    figure = Figure(figsize=(4.4 * columns, 4.2), layout="constrained")
    curves, *points = figure.subplots(1, columns, squeeze=False)[0]
    for number, variant in enumerate(study.variants):
        own = [result for result in results if result["variant"] == variant.name]
        mean = torch.tensor([result["pixel_losses"] for result in own]).mean(0)
        window = max(1, len(mean) // 20)
        smooth = mean.unfold(0, window, 1).mean(1)
        curves.plot(torch.arange(window, len(mean) + 1), smooth, label=variant.name, color=f"C{number}")
        for axis, name in zip(points, images, strict=False):
            errors = [result["errors"][name]["pixel"] for result in own]
            axis.plot([number] * len(errors), errors, "o", color=f"C{number}")
    curves.set(title=f"pixel loss, mean of {window} steps", xlabel="step", yscale="log")
    curves.legend(fontsize=8)
    for axis, name in zip(points, images, strict=False):
        axis.set_title(f"velocity error, {name}")
        axis.set_xticks(range(len(study.variants)), [v.name for v in study.variants], rotation=30, ha="right")
        axis.set_xlim(-0.5, len(study.variants) - 0.5)
    if study.draw:
        study.draw(points[len(images) :], study, results, costs)
    figure.suptitle(study.title)
    return figure

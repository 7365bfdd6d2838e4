"""Report of the demo: a picture and a JSON file from one dictionary of results."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

from demonstration.contenders import to_unit  # noqa: E402


def write_json(results: dict, path: Path) -> None:
    path.write_text(json.dumps(results, indent=2) + "\n")


def write_picture(results: dict, photographs: torch.Tensor, samples: torch.Tensor, path: Path) -> None:
    """Top row: photographs and samples. Bottom row: losses, PSNR and energy spectra. The title shows the figures."""
    count = len(photographs)
    figure = plt.figure(figsize=(15, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    images = upper.subplots(1, 2 * count, squeeze=False)[0]
    for index, name in enumerate(results["photographs"]):
        _show(images[2 * index], photographs[index], name)
        _show(images[2 * index + 1], samples[index], f"sample, {results['psnr_per_photograph'][index]:.1f} dB")
    both, losses, quality, spectrum = lower.subplots(1, 4)
    _plot_both_losses(both, results)
    _plot_losses(losses, results)
    _plot_psnr(quality, results)
    _plot_spectra(spectrum, results)
    figure.suptitle(_headline(results), fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _show(axes, image: torch.Tensor, title: str) -> None:
    axes.imshow(to_unit(image).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def _headline(results: dict) -> str:
    return (
        f"DeCo on {results['machine']['threads']} CPU threads, float32, {results['steps']} steps: "
        f"{results['step_ms_eager']:.1f} ms per step eager, {results['step_ms_fused']:.1f} ms fused "
        f"({results['speedup']:.2f}x)\n"
        f"peak memory of a step {results['peak_mb_eager']:.0f} MB eager, {results['peak_mb_fused']:.0f} MB fused; "
        f"largest gradient error {results['max_gradient_error']:.1e} fused, "
        f"{results['max_gradient_error_eager']:.1e} eager"
    )


def _plot_both_losses(axes, results: dict) -> None:
    eager, fused = results["losses_eager"], results["losses_fused"]
    steps = range(1, len(eager) + 1)
    axes.plot(steps, eager, color="tab:orange", linewidth=3, label="eager")
    axes.plot(steps, fused[: len(eager)], color="tab:blue", linewidth=1, label="fused")
    axes.set(title=f"loss of both, first {len(eager)} steps", xlabel="step")
    axes.legend(fontsize=8)


def _plot_losses(axes, results: dict) -> None:
    losses = results["losses_fused"]
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", linewidth=0.3, alpha=0.4)
    axes.plot(steps, _running_mean(losses, window=max(1, len(losses) // 50)), color="tab:blue", label="running mean")
    axes.set(title="training loss, fused", xlabel="step", yscale="log")
    axes.legend(fontsize=8)


def _running_mean(values: list[float], window: int) -> list[float]:
    sums = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
    ends = torch.arange(1, len(values) + 1)
    starts = (ends - window).clamp_min(0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _plot_psnr(axes, results: dict) -> None:
    steps = [step for step, _ in results["psnr_curve"]]
    for index, name in enumerate(results["photographs"]):
        axes.plot(steps, [values[index] for _, values in results["psnr_curve"]], marker="o", markersize=3, label=name)
    axes.axhline(results["promises"]["psnr"]["bound"], color="gray", linestyle="--", linewidth=1, label="required")
    axes.set(title="PSNR of samples [dB]", xlabel="step")
    axes.legend(fontsize=8, loc="lower right")


def _plot_spectra(axes, results: dict) -> None:
    for name, style in (("photographs", "k-"), ("samples", "C0--"), ("noise", "C7:")):
        axes.plot(range(15), results["energy_spectra"][name], style, label=name)
    axes.set(title="energy in the 8x8 DCT (Y)", xlabel="diagonal u + v", yscale="log")
    axes.legend(fontsize=8)

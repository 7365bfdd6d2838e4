"""Compares the DCT spectra of DiT output and pixel velocity of one or two models during sampling.

    python python/spectrum.py deco.ckpt dit.ckpt --out out/spectrum

At every sampling step, the 8x8 DCT energies of the DiT's output (upsampled to full resolution) and of the conditional
pixel velocity are averaged over the images and written to FOLDER/spectrum.csv. FOLDER/spectrum.png shows the energy
share of each coefficient in zig-zag order, averaged over steps, and the share of the upper half over time.

Source: DeCo (arXiv 2511.19365), figure 4.

Exit status: 0; 2 with a line that begins with "error:"; 130 when interrupted.
"""

import argparse
import csv
import sys
from pathlib import Path

from command_line.failures import exit_status, importing

with importing("torch matplotlib numpy pillow tqdm"):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch
    from tqdm import tqdm

    from deco_kernels.model.checkpoint_file import complete_or_absent
    from images.spectra import high_share, shares, zigzag
    from sampling.inputs import (
        DTYPES,
        Conditioner,
        add_options,
        device_of,
        dtype_of,
        load_network,
        noise_of,
        read_conditions,
        solver_settings,
    )
    from sampling.spectrum_recorder import SIGNALS, SpectrumRecorder

TITLES = {"dit_output": "output of the DiT", "velocity": "pixel velocity"}
BATCH = 16  # images computed together


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options), options.debug, "interrupted; nothing was written")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python/spectrum.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="+", help="one or two files, see docs/checkpoints.md")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the results")
    parser.add_argument("--name", action="append", help="name of a model in the results (repeatable; default: path)")
    add_options(parser, batch=f"{BATCH}", count=16)
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    options = parser.parse_args(arguments)
    if len(options.checkpoint) > 2:
        parser.error(f"expected one or two checkpoints, got {len(options.checkpoint)}")
    options.name = options.name or [str(path) for path in options.checkpoint]
    if not len(set(options.name)) == len(options.name) == len(options.checkpoint):
        parser.error(f"--name: expected a unique name for each checkpoint, got {options.name}")
    return options


def run(options: argparse.Namespace) -> None:
    table, picture = options.out / "spectrum.csv", options.out / "spectrum.png"
    for path in (table, picture):
        if path.exists():
            raise ValueError(f"--out: {path} exists; choose another folder")
    device, host = device_of(options), torch.device("cpu")
    networks = {}
    for name, path in zip(options.name, options.checkpoint, strict=True):
        networks[name] = load_network(path, options, host)
        read_conditions(options, networks[name])  # report mistakes before hours of sampling
        solver_settings(options, networks[name])
    options.out.mkdir(parents=True, exist_ok=True)
    spectra = {name: measure(networks.pop(name).to(device), name, options, device) for name in options.name}
    with complete_or_absent(table, overwrite=False) as temporary:
        write_table(spectra, temporary)
    with complete_or_absent(picture, overwrite=False) as temporary:
        write_picture(spectra, temporary)
    for name, signals in spectra.items():
        upper = ", ".join(f"{TITLES[s]} {shares(signals[s])[32:].sum():.2%}" for s in SIGNALS)
        print(f"{name}: energy in the upper half of the coefficients: {upper}")
    print(f"wrote {table} and {picture}")


def measure(network: torch.nn.Module, name: str, options: argparse.Namespace, device: torch.device) -> dict:
    """Signal → time → energies [64], see `SpectrumRecorder.spectra`. Raises FloatingPointError if one is not finite."""
    conditions, settings = read_conditions(options, network), solver_settings(options, network)
    conditioner = Conditioner.of(network, device, options.text_encoder)
    conditioner.check(conditions)
    recorder = SpectrumRecorder(network, DTYPES[dtype_of(options, device)])
    batch = options.batch or min(BATCH, options.count)
    with tqdm(total=options.count, desc=name, unit="image") as bar:
        for first in range(0, options.count, batch):
            indices = range(first, min(first + batch, options.count))
            noise = torch.stack([noise_of(index, options.seed, options.size) for index in indices])
            cond, uncond = conditioner([conditions[index % len(conditions)] for index in indices])
            recorder.sample(noise.to(device), cond, uncond, **settings)
            bar.update(len(indices))
    spectra = recorder.spectra()
    if not all(energy.isfinite().all() for times in spectra.values() for energy in times.values()):
        raise FloatingPointError(
            f"{name}: expected finite energies, got infinity or NaN; try --dtype float32 or a smaller --guidance; "
            "otherwise the checkpoint is corrupted"
        )
    return spectra


def write_table(spectra: dict, path: Path) -> None:
    """One row per model, signal, time and coefficient: its mean square and its share of the energy at that time."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["model", "signal", "time", "zigzag", "vertical", "horizontal", "energy", "share"])
        for name, signals in spectra.items():
            for signal, times in signals.items():
                for time, energy in times.items():
                    values = torch.stack((energy, energy / energy.sum()), dim=1).tolist()
                    for order, (place, (value, share)) in enumerate(zip(zigzag(), values, strict=True)):
                        rows.writerow([name, signal, f"{time:.6g}", order, *place, f"{value:.6g}", f"{share:.6g}"])


def write_picture(spectra: dict, path: Path) -> None:
    """Top: shares in zig-zag order; bottom: share of the upper half over time. Left: DiT; right: velocity."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharey="row")
    for column, signal in enumerate(SIGNALS):
        above, below = axes[:, column]
        for name, signals in spectra.items():
            above.plot(shares(signals[signal]), label=name, marker=".", markersize=3, linewidth=1)
            times = sorted(signals[signal])
            below.plot(times, [high_share(signals[signal][time]) for time in times], label=name)
        above.set(title=TITLES[signal], yscale="log", xlabel="DCT coefficient in zig-zag order")
        below.set(yscale="log", xlabel="time, 0 noise to 1 image")
    axes[0, 0].set_ylabel("share of the energy")
    axes[1, 0].set_ylabel("share of coefficients 32 to 63")
    axes[0, 1].legend(fontsize=8)
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

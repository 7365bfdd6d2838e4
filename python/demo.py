"""Trains a small DeCo on photographs with fused ops and with eager PyTorch, and writes a report. Run by `make demo`.

1. Both contenders start from the same weights, see the same noise, and take their first steps alternately. Measures
   step times, losses, the gradient of every parameter against the published formulation in float64, and the peak
   memory of each contender in a separate process. Writes a first out/demo/report.png.
2. The fused contender continues training until it reproduces the photographs, sampled from its averaged weights.
3. out/demo/report.png shows photographs, samples, loss curves, PSNR and DCT energy spectra; report.json the figures.

Exit status: 0; 1 if a target is missed (PSNR, agreement of losses or gradients); 2 with a line that begins with
"error:", such as without an image to train on; 130 when interrupted.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from command_line.failures import exit_status
from deco_kernels import machine
from deco_kernels.command_line import positive
from deco_kernels.ops import registry
from demonstration.contenders import (
    FULL,
    SHORT,
    Contender,
    Recipe,
    compare_steps,
    gradient_errors,
    loss_difference,
    psnr,
    train,
)
from demonstration.peak_memory import measure
from demonstration.report import write_json, write_picture
from images.photographs import load_photographs, shipped_photographs
from images.spectra import diagonal_energies

ROOT = Path(__file__).resolve().parents[1]

# Bounds on float32 differences after the compared steps, due to different orders of summation.
LOSS_DIFFERENCE = 1e-4
GRADIENT_ERROR = 1e-5


def main(arguments: list[str] | None = None) -> int:
    options, promises = parse(arguments), {}
    status = exit_status(lambda: promises.update(demonstrate(options)))
    return status or int(not all(promise["kept"] for promise in promises.values()))


def demonstrate(options: argparse.Namespace) -> dict[str, dict]:
    """Trains, prints and writes the report; returns its promises. Raises ValueError if there is no image."""
    recipe = SHORT if options.short else FULL
    if options.steps is not None:
        recipe = recipe.shortened(options.steps)
    names, photographs = load_photographs(options.image or shipped_photographs(), recipe.image_size)
    if not names:
        raise ValueError("no readable image; name one with --image FILE, or install scikit-learn")
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "report.png"
    print(
        f"1. Fused ops and eager PyTorch take {recipe.compared_steps} steps in turn; a first {picture} shows both.\n"
        f"2. The fused ops train on, {recipe.steps} steps in all; {picture} and report.json show the result.",
        flush=True,
    )
    results = run(recipe, names, photographs, options.seed, picture)
    results["seconds"] = time.perf_counter() - started
    write_json(results, options.out / "report.json")
    print_summary(results)
    print(f"wrote {picture} and report.json after {results['seconds']:.0f} s")
    return results["promises"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python/demo.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--image", type=Path, action="append", help="train on this image (repeatable; default: two sample photographs)"
    )
    parser.add_argument(
        "--short", action="store_true", help="fewer steps and a lower required PSNR, for automated tests"
    )
    parser.add_argument(
        "--steps", type=positive, help="number of training steps, without a required PSNR (default: the recipe's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, noise and times (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "demo", help="folder of the report (default: out/demo)"
    )
    return parser.parse_args(arguments)


def run(recipe: Recipe, names: list[str], photographs: torch.Tensor, seed: int, picture: Path) -> dict:
    """Runs both stages and writes a picture after each. Returns the results as written to JSON."""
    print(f"photographs: {', '.join(names)}; {recipe.steps} steps of {recipe.batch_size} images, {serving_backends()}")
    fused = Contender(recipe, photographs, seed, eager=False)
    eager = Contender(recipe, photographs, seed, eager=True)
    measured = compare_steps(fused, eager)
    errors = gradient_errors(fused, seed)
    measured |= {f"peak_mb_{name}": measure(name, recipe, len(names)) for name in ("eager", "fused")}
    about = {
        "photographs": names,
        "seed": seed,
        "recipe": recipe.as_dict(),
        "backends": serving_backends(),
        "machine": machine.description("cpu", ROOT) | {"command": " ".join(["python", *sys.argv])},
    }

    def report(curve: list[tuple[int, list[float]]], samples: torch.Tensor) -> dict:
        results = measured | about | found(fused, eager, errors, seed, curve, samples)
        write_picture(results, photographs, samples, picture)
        return results

    samples = fused.sample(seed)
    report([(len(fused.losses), psnr(samples, photographs))], samples)
    print(f"wrote a first {picture}", flush=True)
    return report(*train(fused, seed))


def found(fused: Contender, eager: Contender, errors: dict, seed: int, curve: list, samples: torch.Tensor) -> dict:
    """Results of the steps so far, and whether the targets are met.

    Args:
        errors: result of `gradient_errors`.
        curve: [(step, PSNR of each photograph)]; the last entry is for `samples` [n, 3, S, S].
    """
    reached, required = curve[-1][1], fused.recipe.required_psnr
    worst_fused, worst_eager = (max(pair[index] for pair in errors.values()) for index in (0, 1))
    difference = loss_difference(fused, eager)
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(seed))
    return {
        "psnr": min(reached),
        "psnr_per_photograph": reached,
        "max_gradient_error": worst_fused,
        "max_gradient_error_eager": worst_eager,
        "max_loss_difference": difference,
        "promises": {
            "psnr": promise(min(reached), required, min(reached) >= required),
            "max_gradient_error": promise(worst_fused, GRADIENT_ERROR, worst_fused <= GRADIENT_ERROR),
            "max_loss_difference": promise(difference, LOSS_DIFFERENCE, difference <= LOSS_DIFFERENCE),
        },
        "steps": len(fused.losses),
        "psnr_curve": curve,
        "energy_spectra": {
            "photographs": diagonal_energies(fused.photographs),
            "samples": diagonal_energies(samples),
            "noise": diagonal_energies(noise),
        },
        "gradient_errors": {name: dict(zip(("fused", "eager"), pair, strict=True)) for name, pair in errors.items()},
        "losses_eager": eager.losses,
        "losses_fused": fused.losses,
    }


def promise(value: float, bound: float, kept: bool) -> dict:
    return {"value": value, "bound": bound, "kept": kept}


def serving_backends() -> str:
    """The backend of the fused op in training, with the reason if it is not the CPU backend."""
    op = "pixel_decoder_loss_from_tokens"
    request = registry.Request(op, "cpu", (torch.float32,) * 3, width=32, depth=3, patch_size=16)
    reason = registry.refusal("cpu", request, torch.device("cpu"))
    return f"{op} on backend {'cpu' if reason is None else f'reference (cpu: {reason})'}"


def print_summary(results: dict) -> None:
    rows = [
        ("", "eager", "fused", ""),
        ("step time", f"{results['step_ms_eager']:.1f} ms", f"{results['step_ms_fused']:.1f} ms",
         f"{results['speedup']:.2f}x faster"),
        ("peak memory of a step", f"{results['peak_mb_eager']:.0f} MB", f"{results['peak_mb_fused']:.0f} MB", ""),
        ("largest gradient error", f"{results['max_gradient_error_eager']:.1e}", f"{results['max_gradient_error']:.1e}",
         "relative L2, against float64"),
    ]  # fmt: skip
    for label, eager, fused, note in rows:
        print(f"{label:<24}{eager:>10}{fused:>10}  {note}".rstrip())
    for name, kept in results["promises"].items():
        relation = ("at least" if name == "psnr" else "at most") + f" {kept['bound']:g}"
        print(f"{name:<24}{kept['value']:>10.4g}  {relation}: {'kept' if kept['kept'] else 'BROKEN'}")


if __name__ == "__main__":
    machine.keep_heap(*sys.argv)
    sys.exit(main())

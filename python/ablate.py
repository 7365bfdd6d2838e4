"""Small studies of DeCo on the CPU: variants are trained identically and evaluated on held-out crops.

    python python/ablate.py interaction     AdaLN vs. addition in the pixel decoder
    python python/ablate.py capacity        width D and depth N of the decoder: error and cost
    python python/ablate.py frequency       JPEG quality of the frequency weights, and learned weights
    python python/ablate.py aspect          native aspect ratio vs. square crops

or a trained model samples with the trunk at some steps only, against sampling with it at every step.

    python python/ablate.py reuse --checkpoint runs/small/checkpoints/step_000002000.ckpt

Writes to out/ablate/STUDY: table.csv (one line per run), table.md (means over seeds, and what the study can and cannot
show), study.png, weights.json if frequency weights were learned, samples.jpg of reuse, and runs/ with the figures of
every run and its averaged weights or samples. The same command with --resume continues a study that was stopped or
killed.

Exit status: 0; 2 if photographs, options or the folder cannot be used (with one line on stderr); 130 if interrupted.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import os
import re
import sys
from pathlib import Path

from command_line.failures import exit_status, importing

PACKAGES = "'deco_kernels[train]' matplotlib scikit-learn"
with importing(PACKAGES):
    from deco_kernels.command_line import positive
    from deco_kernels.machine import keep_heap
    from images.photographs import readable, shipped_photographs

ROOT = Path(__file__).resolve().parents[1]
CROPS, HELD_OUT_CROPS = 300, 48  # of every photograph
REUSE = "reuse"
STUDY_NAMES = ("interaction", "capacity", "frequency", "aspect", REUSE)
ONLY_TRAINING, ONLY_REUSE = ("image", "batch_size", "preset"), ("checkpoint", "samples", "guidance")  # options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options), interrupted="interrupted; the same command with --resume continues")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python/ablate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDY_NAMES)
    parser.add_argument(
        "--steps", type=positive, help="training steps per run (default: 300 to 500, by study); of sampling (reuse: 50)"
    )
    parser.add_argument("--seeds", type=positive, help="runs per variant (default: 1 to 3, by study)")
    parser.add_argument(
        "--image-size", type=positive, default=64, help="side of the images, a multiple of 16 (default: 64)"
    )
    training = parser.add_argument_group("studies that train")
    training.add_argument(
        "--image", type=Path, action="append", help="photograph (repeatable; default: two sample photographs)"
    )
    training.add_argument("--batch-size", type=positive, help="images per step (default: 8)")
    training.add_argument("--preset", help="model that the variants modify (default: deco-demo)")
    reuse = parser.add_argument_group(REUSE)
    reuse.add_argument("--checkpoint", type=Path, help="class-to-image model, any file that model.load_model reads")
    reuse.add_argument("--samples", type=positive, help="samples per seed (default: 32)")
    reuse.add_argument("--guidance", type=float, help="guidance scale (default: 1.5)")
    parser.add_argument("--out", type=Path, help="folder of the study (default: out/ablate/STUDY)")
    parser.add_argument("--resume", action="store_true", help="continue the study in the folder")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Runs the study. Raises ValueError or OSError if options, photographs, checkpoint or folder cannot be used."""
    foreign = ONLY_TRAINING if options.study == REUSE else ONLY_REUSE
    for name in foreign:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: not an option of {options.study}; leave it out")
    out = options.out or ROOT / "out" / "ablate" / options.study
    pictures = ["study.png", "samples.jpg"] if options.study == REUSE else ["study.png"]
    with importing(PACKAGES):  # some only where they are needed
        print(run_reuse(options, out) if options.study == REUSE else run_training(options, out))
    print(f"wrote {', '.join(str(out / name) for name in ('table.csv', 'table.md', *pictures))}")


def run_training(options: argparse.Namespace, out: Path) -> str:
    """Runs a study that trains its variants; returns the text of its table.md."""
    from deco_kernels.model import PRESETS, DeCo
    from studies.catalog import STUDIES
    from studies.crops import native_shapes
    from studies.report import write_report
    from studies.run import Recipe

    study = STUDIES[options.study]
    given = {name: getattr(options, name) for name in ("batch_size", "preset") if getattr(options, name) is not None}
    recipe = Recipe(options.steps or study.steps, image_size=options.image_size, **given)
    if recipe.preset not in PRESETS or PRESETS[recipe.preset][0] is not DeCo:
        known = [name for name, (kind, _) in PRESETS.items() if kind is DeCo]
        raise ValueError(f"--preset: expected one of {known}, got {recipe.preset!r}")
    if recipe.image_size % 16:
        raise ValueError(f"--image-size: expected a multiple of the patch size 16, got {recipe.image_size}")
    paths = options.image or shipped_photographs()
    found = dict(readable(paths))
    photographs = list(found.values())
    if not photographs:
        named = f" among {', '.join(map(str, paths))}" if paths else ""
        raise ValueError(f"no readable photograph{named}; name one with --image FILE, or install scikit-learn")
    shapes = native_shapes(recipe.image_size, 16) if study.native else [(recipe.image_size,) * 2]
    held_out = held_out_images(study, recipe, photographs, shapes)
    settings = {"study": options.study, "images": [str(path) for path in found], **dataclasses.asdict(recipe)}
    with alone_in(out):
        claim(out, settings, options.resume)
        seeds = number_of_seeds(options.seeds, study.seeds, out)
        results = run_all(study, recipe, seeds, photographs, shapes, held_out, out)
        return write_report(study, recipe, results, measured_costs(study, recipe, out), out)


def run_reuse(options: argparse.Namespace, out: Path) -> str:
    """Runs the study of the trunk at some steps only; returns the text of its table.md."""
    from tqdm import tqdm

    from deco_kernels import flow
    from deco_kernels.model import DeCo, load_model
    from sampling.inputs import sha256
    from studies import reuse
    from studies.reuse_report import write_report

    if options.checkpoint is None:
        raise ValueError("--checkpoint: expected the file of a trained class-to-image model, got none")
    network = load_model(options.checkpoint).eval().requires_grad_(False)
    if not isinstance(network, DeCo):
        raise ValueError(f"--checkpoint: expected a class-to-image DeCo model, got {type(network).__name__}")
    if options.image_size % network.trunk.patch_size:
        raise ValueError(
            f"--image-size: expected a multiple of the patch size {network.trunk.patch_size}, got {options.image_size}"
        )
    given = {name: getattr(options, name) for name in ("steps", "guidance", "samples", "image_size")}
    recipe = reuse.Settings(**{name: value for name, value in given.items() if value is not None})
    flow.Sampler(network, steps=recipe.steps, guidance=recipe.guidance)  # validates them, before the folder has them
    settings = {"study": REUSE, "checkpoint_sha256": sha256(options.checkpoint), **dataclasses.asdict(recipe)}
    with alone_in(out):
        claim(out, settings, options.resume)
        seeds = number_of_seeds(options.seeds, reuse.SEEDS, out)
        measurement = reuse.Measurement(network, recipe, reuse.chosen_steps(network, recipe, out))
        with tqdm(total=seeds * len(reuse.contenders(recipe.steps)), unit="run") as bar:
            results = []
            for result in measurement.results(seeds, out, bar.set_description):
                results.append(result)
                bar.update(1)
        return write_report(recipe, results, reuse.seconds(measurement, out), out)


def run_all(study, recipe, seeds: int, photographs: list, shapes: list, held_out: dict, out: Path) -> list[dict]:
    """Results of all runs of the study; finished runs are read from their folders."""
    from tqdm import tqdm

    from studies.crops import at_own_shape, at_square, cut
    from studies.run import Run, read_json

    results = []
    with tqdm(total=seeds * len(study.variants) * recipe.steps, unit="step") as bar:
        for seed in range(seeds):
            for variant in study.variants:
                bar.set_description(f"{variant.name}, seed {seed}")
                folder = out / "runs" / f"{variant.name.replace(' ', '-')}-seed{seed}"
                if (folder / "result.json").exists():
                    bar.update(recipe.steps)
                    results.append(read_json(folder / "result.json", "remove it to repeat the run"))
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                crops = cut(photographs, shapes, CROPS, seed, held_out=False)
                training = at_own_shape(crops) if variant.native else at_square(crops, recipe.image_size)
                one = Run(variant, recipe, seed, training, len(photographs), folder)
                one.train(bar.update)
                results.append(one.finish(held_out))
    return results


def held_out_images(study, recipe, photographs: list, shapes: list[tuple[int, int]]) -> dict[str, dict]:
    """Evaluation images: squares, and for the aspect study also rectangles."""
    from studies.crops import at_own_shape, at_square, cut

    crops = cut(photographs, shapes, HELD_OUT_CROPS, 0, held_out=True)
    images = {"squares": at_square(crops, recipe.image_size)}
    if study.native:
        groups = at_own_shape(crops)
        images["rectangles"] = {shape: group for shape, group in groups.items() if shape[0] != shape[1]}
    return images


@contextlib.contextmanager
def alone_in(out: Path):
    """Locks the folder for this process; creates it if it does not exist.

    Raises ValueError if it is a file or if another process has locked it.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, {out} is a file; choose another name")
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out: another process works in {out}; wait for it, or choose another folder") from None
        yield
    finally:
        os.close(descriptor)


def claim(out: Path, settings: dict, resume: bool) -> None:
    """Claims the folder for a study with these settings, and removes partial files of a killed process.

    Raises ValueError if it contains other files or another study, or this study without `resume`.
    """
    from studies.run import read_json, write_json

    path = out / "settings.json"
    if any(not each.name.startswith(".") for each in out.iterdir()):
        if not resume:
            raise ValueError(f"--out: {out} is not empty; continue it with --resume or choose another folder")
        if not path.is_file():
            raise ValueError(f"--out: {out} holds no study; choose another folder")
        before = read_json(path, "choose another folder")
        changed = [f"{key} {before.get(key)} -> {new}" for key, new in settings.items() if before.get(key) != new]
        if changed:
            raise ValueError(f"--out: {out} holds another study ({', '.join(changed)}); choose another folder")
        for unfinished in out.rglob(".*.part"):
            unfinished.unlink()
        return
    write_json(settings, path)


def number_of_seeds(asked: int | None, default: int, out: Path) -> int:
    """Number of seeds requested, by default the given one, and at least the number in the folder.

    Raises ValueError if fewer are requested than the folder contains.
    """
    found = [re.fullmatch(r".*-seed(\d+)", path.parent.name) for path in out.glob("runs/*/result.json")]
    present = max((int(match[1]) + 1 for match in found if match), default=0)
    if asked is not None and asked < present:
        raise ValueError(f"--seeds: {out} holds runs of {present} seeds, expected at least as many, got {asked}")
    return asked or max(default, present)


def measured_costs(study, recipe, out: Path) -> dict[str, dict[str, float]]:
    """Cost of every variant, measured once per study; empty for studies without a cost."""
    from studies.run import read_json, write_json

    if study.cost is None:
        return {}
    path = out / "costs.json"
    if not path.exists():
        write_json({variant.name: study.cost(variant, recipe) for variant in study.variants}, path)
    return read_json(path, "remove it to measure the costs again")


if __name__ == "__main__":
    keep_heap(*sys.argv)
    sys.exit(main())

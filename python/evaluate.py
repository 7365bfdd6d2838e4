"""Compares samples with a reference: FID, sFID, Inception score, precision and recall, through torch-fidelity.

    python python/evaluate.py out/fid data/imagenet/val --out out/fid.json
    python python/evaluate.py out/fid/samples_50000x256x256x3.npz VIRTUAL_imagenet256_labeled.npz --out out/fid.json

Samples are a folder of images, such as one of sample.py, or an .npz with uint8 [n, H, W, 3] under arr_0. The reference
is one of these, or an .npz of the ADM evaluation suite with statistics (mu, sigma, mu_s, sigma_s).

Features are kept in --cache: a run that was stopped continues with the same command. The weights of the extractor are
downloaded at first use; without a network, give their file with --weights.

Exit status: 0; 2 with a line that begins with "error:"; 130 when interrupted.
"""

import argparse
import json
import sys
from pathlib import Path

from command_line.failures import exit_status, importing

with importing("'deco_kernels[evaluation]'"):
    from deco_kernels.command_line import positive, thread_count
    from deco_kernels.model.checkpoint_file import complete_or_absent
    from evaluation.extractor import INCEPTION, Extractor
    from evaluation.features import features_of
    from evaluation.images import open_images, open_reference, require_same_size
    from evaluation.metrics import LEAST_IMAGES, evaluate
    from sampling.inputs import device_of

COMPARABLE = 10_000  # images; FID and recall of fewer are biased


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options), options.debug, "interrupted; the same command continues")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python/evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path, help="folder of images or .npz with arr_0")
    parser.add_argument("reference", type=Path, help="folder of images or .npz with arr_0 or with statistics")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="file to write; replaced")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="features (default: features, beside --out)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights of the extractor (default: downloaded)")
    parser.add_argument(
        "--extractor", default=INCEPTION, metavar="NAME", help="of torch-fidelity (default: %(default)s)"
    )
    parser.add_argument("--batch", type=positive, default=32, help="images computed together (default: 32)")
    parser.add_argument("--device", help="PyTorch device (default: cuda if available, else cpu)")
    parser.add_argument("--threads", type=thread_count, help="CPU threads")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    samples, reference = open_images(options.samples), open_reference(options.reference)
    require_same_size(samples, reference)
    sets = {"samples": samples, **({} if reference.images is None else {"reference": reference.images})}
    for name, images in sets.items():
        if len(images) < LEAST_IMAGES:
            raise ValueError(
                f"{name}: expected at least {LEAST_IMAGES} images, got {len(images)} in {images.path}; give more images"
            )
        if len(images) < COMPARABLE:
            print(
                f"warning: {len(images)} {name}: FID and recall of fewer than {COMPARABLE:,} are biased",
                file=sys.stderr,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    extractor = Extractor(options.extractor, options.weights, device_of(options))
    cache = options.cache or options.out.parent / "features"
    features = {name: features_of(images, extractor, cache, options.batch, name) for name, images in sets.items()}
    metrics, missing = evaluate(features["samples"], features.get("reference"), reference.statistics)
    result = {
        "metrics": metrics,
        "missing": missing,
        "samples": described(options.samples, samples),
        "reference": described(options.reference, reference.images) | {"statistics": sorted(reference.statistics)},
        "extractor": extractor.description,
    }
    with complete_or_absent(options.out, overwrite=True) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, value in metrics.items():
        print(f"{name}: {value:.6g}")
    for name, reason in missing.items():
        print(f"{name}: not computed, {reason}")
    print(f"wrote {options.out}")


def described(path: Path, images) -> dict:
    """Path, number and size of the images of a set."""
    count, size = (None, None) if images is None else (len(images), list(images.size))
    return {"path": str(path), "images": count, "size": size}


if __name__ == "__main__":
    sys.exit(main())

"""Creates a small training data set: random crops of photographs, in one class folder per photograph.

    python python/photo_crops.py data/photographs

By default it uses the two photographs in scikit-learn's wheel. A photograph that cannot be read, or is smaller than a
crop, is reported and skipped. Exit status: 0; 2 with a line that begins with "error:".
"""

import argparse
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

from command_line.failures import exit_status, importing

with importing("torch numpy pillow scikit-learn"):
    from PIL import Image

    from deco_kernels.command_line import positive
    from images.photographs import readable, shipped_photographs

SIDES = (96, 256)  # smallest and largest side of a crop


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python/photo_crops.py", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to create or to extend")
    parser.add_argument("--image", type=Path, action="append", help="photograph to use instead (repeatable)")
    parser.add_argument("--count", type=positive, default=500, help="crops per photograph (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the crops (default: 0)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Writes one class folder per photograph. Raises ValueError if names collide, one exists, or none is written."""
    paths = options.image or shipped_photographs()
    shared = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if shared:
        raise ValueError(f"--image: expected a unique name for each class, got {shared[0]} more than once")
    for path in paths:
        if (options.out / path.stem).exists():
            raise ValueError(f"out: {options.out / path.stem} exists; remove it, or choose another folder")
    made = 0
    for path, photograph in readable(paths):
        if min(photograph.size) < SIDES[0]:
            size = f"{photograph.width}x{photograph.height}"
            print(f"warning: {path} is skipped: {size} pixels, expected sides of at least {SIDES[0]}", file=sys.stderr)
            continue
        cut(photograph, options.out / path.stem, options.count, SIDES, options.seed)
        made += 1
    if not made:
        raise ValueError("--image: no usable photograph; name one with --image FILE, or install scikit-learn")
    print(f"{made} classes of {options.count} crops in {options.out}")


def cut(photograph: Image.Image, folder: Path, count: int, sides: tuple[int, int], seed: int) -> None:
    """Writes `folder` atomically, with `count` square crops as JPEG files; `sides` gives the range of their sides."""
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    drawn = random.Random(seed)
    for number in range(count):
        side = min(drawn.randint(*sides), *photograph.size)
        left, top = drawn.randint(0, photograph.width - side), drawn.randint(0, photograph.height - side)
        crop = photograph.crop((left, top, left + side, top + side))
        crop.save(unfinished / f"{number:05d}.jpg", quality=95)
    unfinished.rename(folder)


if __name__ == "__main__":
    sys.exit(main())

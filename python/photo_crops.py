"""Cuts random crops from photographs into class folders, one per photograph: a small data set to train on.

    python python/photo_crops.py data/photographs

By default from the two photographs that ship inside scikit-learn's wheel. A photograph that cannot be read, or is
smaller than a crop, is named and left out. Exit status: 0; 2 with a line that begins with "error:".
"""

import argparse
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

from command_line.arguments import positive
from command_line.failures import exit_status
from images.photographs import readable, shipped_photographs

SIDES = (96, 256)  # of a crop, least and most


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python/photo_crops.py", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make, or to add to")
    parser.add_argument("--image", type=Path, action="append", help="cut from this one instead (repeatable)")
    parser.add_argument("--count", type=positive, default=500, help="crops per photograph (500)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """A class folder for each photograph. Raises ValueError where two would share one, one exists, or none is made."""
    paths = options.image or shipped_photographs()
    shared = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if shared:
        raise ValueError(f"--image: expected a name of its own for each class, got {shared[0]} more than once")
    for path in paths:
        if (options.out / path.stem).exists():
            raise ValueError(f"out: {options.out / path.stem} exists; remove it, or choose another folder")
    made = 0
    for path, photograph in readable(paths):
        if min(photograph.size) < SIDES[0]:
            size = f"{photograph.width}x{photograph.height}"
            print(f"warning: {path} is left out: {size} pixels, expected sides of {SIDES[0]} at least", file=sys.stderr)
            continue
        cut(photograph, options.out / path.stem, options.count, SIDES, options.seed)
        made += 1
    if not made:
        raise ValueError("--image: no photograph to cut from; name one with --image FILE, or install scikit-learn")
    print(f"{made} classes of {options.count} crops in {options.out}")


def cut(photograph: Image.Image, folder: Path, count: int, sides: tuple[int, int], seed: int) -> None:
    """Make `folder`, whole or not at all, with `count` square crops as JPEG files, their sides between those given."""
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

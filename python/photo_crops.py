"""Cuts random crops from photographs into class folders, one per photograph: a small data set to train on.

    python python/photo_crops.py data/photographs

By default from the two photographs that ship inside scikit-learn's wheel.
"""

import argparse
import random
import sys
from pathlib import Path

from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))

from _photos import shipped_photographs  # noqa: E402


def cut(photograph: Path, folder: Path, count: int, sides: tuple[int, int], seed: int) -> None:
    """Write `count` square crops of `photograph`, their sides between those given, as JPEG files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(seed)
    with Image.open(photograph) as opened:
        image = opened.convert("RGB")
    for number in range(count):
        side = min(drawn.randint(*sides), *image.size)
        left, top = drawn.randint(0, image.width - side), drawn.randint(0, image.height - side)
        image.crop((left, top, left + side, top + side)).save(folder / f"{number:05d}.jpg", quality=95)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python/photo_crops.py", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--image", type=Path, action="append", help="cut from this one instead (repeatable)")
    parser.add_argument("--count", type=int, default=500, help="crops per photograph (500)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    photographs = options.image or shipped_photographs()
    if not photographs:
        parser.error("no photograph; name one with --image FILE, or install scikit-learn")
    for photograph in photographs:
        cut(photograph, options.out / photograph.stem, options.count, (96, 256), options.seed)


if __name__ == "__main__":
    main()

"""Named regions of the CUDA sources: the lines between a line `// region: NAME` and the next line `// end region`.

Static analysis and the tests of planted faults address code by these names. Names are unique in csrc/cuda, and regions
do not nest.
"""

import re
from pathlib import Path
from typing import NamedTuple

CUDA_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
_MARKER = re.compile(r"// (?:region: (\w+)|end region)$")


class Region(NamedTuple):
    path: Path
    lines: range  # line numbers, from 1


def all_regions() -> dict[str, Region]:
    """Every region of csrc/cuda by name. Raises ValueError for an unpaired marker or a duplicate name."""
    regions: dict[str, Region] = {}
    for path in sorted(CUDA_SOURCES.iterdir()):
        start: tuple[str, int] | None = None  # name of the open region, number of its first line
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if (marker := _MARKER.search(line)) is None:
                continue
            name = marker[1]
            if start is None and name is not None and name not in regions:
                start = name, number + 1
            elif start is not None and name is None:
                regions[start[0]] = Region(path, range(start[1], number))
                start = None
            else:
                raise ValueError(f"{path}:{number}: unpaired marker or a second region of this name: {line.strip()}")
        if start is not None:
            raise ValueError(f"{path}: region {start[0]} has no end")
    return regions

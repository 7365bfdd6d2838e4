"""Assignment of images to training steps: a pure function of (seed, step) for any number of processes.

Images are grouped by crop size. Each group is an infinite stream of its images, reshuffled for each pass. Steps come in
rounds of about one pass over all images. In each round a group has as many steps as it has batches, in an order that is
reshuffled for each round. The step number therefore determines the position in the data.
"""

from __future__ import annotations

import math

import numpy as np

ORDER_OF_IMAGES, ORDER_OF_STEPS, SUBSTITUTES = range(3)  # keys of the random streams of one seed


class BatchPlan:
    """The images of each step.

    Args:
        groups: crop (height, width) in pixels → indices of its images, at least one.
        batch_size: images per step.
        seed: seed of all orders.
    """

    def __init__(self, groups: dict[tuple[int, int], np.ndarray], batch_size: int, seed: int):
        self.shapes, self.members = list(groups), list(groups.values())
        self.batch_size, self.seed = batch_size, seed
        counts = [max(1, round(len(members) / batch_size)) for members in self.members]
        self._round = np.repeat(np.arange(len(counts)), counts)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def step(self, step: int) -> tuple[int, np.ndarray]:
        """(group, image indices int64 [batch_size]) of a step, counted from 0."""
        number, position = divmod(step, len(self._round))
        order = self._rng(ORDER_OF_STEPS, number).permutation(self._round)
        group = int(order[position])
        earlier = number * int((self._round == group).sum()) + int((order[:position] == group).sum())
        first = earlier * self.batch_size
        return group, np.array([self._image(group, first + i) for i in range(self.batch_size)])

    def substitute(self, group: int, sample: int, attempt: int) -> int:
        """Index of the image that replaces a sample's image after it and `attempt` substitutes were unusable."""
        members = self.members[group]
        return int(members[self._rng(SUBSTITUTES, sample, attempt).integers(len(members))])

    def _image(self, group: int, position: int) -> int:
        """Index of the image at a position of a group's stream."""
        members = self.members[group]
        number, offset = divmod(position, len(members))
        if self._orders.get(group, (None,))[0] != number:
            self._orders[group] = number, self._rng(ORDER_OF_IMAGES, group, number).permutation(members)
        return int(self._orders[group][1][offset])

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


def crop_shapes(size: int, multiple: int, max_aspect: float) -> list[tuple[int, int]]:
    """Rectangles (height, width) with sides divisible by `multiple` and about size² pixels, from tall to wide."""
    shapes: dict[tuple[int, int], None] = {}
    for height in range(multiple, math.ceil(size * math.sqrt(max_aspect)) + multiple, multiple):
        width = max(multiple, round(size * size / height / multiple) * multiple)
        if max(height, width) <= max_aspect * min(height, width):
            shapes[height, width] = None
    return sorted({*shapes, *((width, height) for height, width in shapes)}, key=lambda shape: shape[1] / shape[0])


def group_by_shape(
    sizes: np.ndarray, shapes: list[tuple[int, int]], smallest_group: int
) -> dict[tuple[int, int], np.ndarray]:
    """Assign every image, sizes [n, (height, width)], to the shape of nearest aspect ratio.

    Shapes with fewer than `smallest_group` images are dropped, rarest first, until one is left. Images of size (0, 0)
    are in no group. Returns shape → image indices.
    """
    readable = np.flatnonzero(sizes.min(axis=1) > 0)
    aspect = np.log(sizes[readable, 1] / sizes[readable, 0])
    shapes = sorted(shapes, key=lambda shape: shape[1] / shape[0])
    while True:
        centers = np.log([width / height for height, width in shapes])
        nearest = np.searchsorted((centers[1:] + centers[:-1]) / 2, aspect)
        counts = np.bincount(nearest, minlength=len(shapes))
        rarest = int(counts.argmin())
        if counts[rarest] >= smallest_group or len(shapes) == 1:
            return {shape: readable[nearest == i] for i, shape in enumerate(shapes) if counts[i]}
        del shapes[rarest]

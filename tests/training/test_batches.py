"""Order of images: complete, reproducible from any step, independent of the number of processes; buckets."""

from collections import Counter

import numpy as np
import pytest
import torch

from deco_kernels.training.batches import BatchPlan, crop_shapes, group_by_shape
from deco_kernels.training.loading import Batch, Parts


def plan(batch_size=4, seed=0, **groups):
    given = groups or {"square": 10}
    members, first = {}, 0
    for number, count in enumerate(given.values()):
        members[16, 16 * (number + 1)] = np.arange(first, first + count)
        first += count
    return BatchPlan(members, batch_size, seed)


def test_each_pass_shows_every_image_once():
    given = plan()
    stream = np.concatenate([given.step(step)[1] for step in range(25)])
    passes = stream.reshape(10, 10)
    assert (np.sort(passes) == np.arange(10)).all()
    assert len({tuple(each) for each in passes}) == 10


def test_a_step_depends_on_seed_and_number_alone():
    one, other = plan(), plan()
    ahead = [one.step(step) for step in (17, 3, 17)]
    assert (ahead[0][1] == ahead[2][1]).all() and (ahead[1][1] == other.step(3)[1]).all()
    assert not (plan(seed=1).step(3)[1] == ahead[1][1]).all()


def test_fewer_images_than_a_batch():
    given = plan(batch_size=7, square=3)
    counts = Counter(np.concatenate([given.step(step)[1] for step in range(3)]).tolist())
    assert counts == {0: 7, 1: 7, 2: 7}


def test_groups_are_not_mixed_and_come_in_proportion():
    given = plan(batch_size=4, small=8, large=40)
    steps = [given.step(step) for step in range(48)]
    assert Counter(group for group, _ in steps) == {0: 8, 1: 40}
    for group, numbers in steps:
        assert ((numbers < 8) == (group == 0)).all()
    counts = Counter(np.concatenate([numbers for _, numbers in steps]).tolist())
    assert set(counts.values()) == {4} and len(counts) == 48
    assert [group for group, _ in steps] != sorted(group for group, _ in steps)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_parts_of_all_processes_make_the_batch(world_size, accumulate):
    given = plan(batch_size=8, square=20)
    whole = [index for batch in Parts(given, 3, 6, 1, 0, 1) for index in batch]
    ranks = [list(Parts(given, 3, 6, accumulate, rank, world_size)) for rank in range(world_size)]
    together = [index for batches in zip(*ranks, strict=True) for batch in batches for index in batch]
    assert together == whole
    assert [sample for _, sample, _ in whole] == list(range(24, 48))


def test_substitutes_are_reproducible_and_of_the_same_group():
    given = plan(small=8, large=40)
    found = [given.substitute(0, 5, attempt) for attempt in range(50)]
    assert found == [plan(small=8, large=40).substitute(0, 5, attempt) for attempt in range(50)]
    assert set(found) == set(range(8))


def test_crop_shapes_have_about_the_area():
    shapes = crop_shapes(256, 16, 2.0)
    assert (256, 256) in shapes and len(shapes) > 8
    for height, width in shapes:
        assert height % 16 == width % 16 == 0 and (width, height) in shapes
        assert 0.9 < height * width / 256**2 < 1.1 and max(height, width) <= 2 * min(height, width)


def test_images_go_to_the_nearest_aspect():
    shapes = [(32, 16), (24, 24), (16, 32)]
    sizes = np.array([[100, 100], [0, 0], [200, 100], [90, 110], [100, 300], [100, 200]])
    found = group_by_shape(sizes, shapes, 1)
    assert {shape: members.tolist() for shape, members in found.items()} == {
        (32, 16): [2],
        (24, 24): [0, 3],
        (16, 32): [4, 5],
    }
    merged = group_by_shape(sizes, shapes, 2)
    assert {shape: members.tolist() for shape, members in merged.items()} == {(24, 24): [0, 2, 3], (16, 32): [4, 5]}
    assert list(group_by_shape(sizes, shapes, 100)) != [] and len(group_by_shape(sizes, shapes, 100)) == 1


def test_images_and_labels_move_without_waiting(monkeypatch):
    """Both are pinned, and copied from pinned memory in the order of the stream."""
    pinned, moved = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *target, **options: moved.append((target, options)) or self)
    images, labels, device = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([1, 2]), torch.device("cuda")
    batch = Batch(images, labels, samples=torch.tensor([0, 1]), skipped={})
    assert batch.pin_memory() is batch and {id(tensor) for tensor in pinned} == {id(images), id(labels)}
    assert batch.to(device).targets is labels
    assert moved == [((device,), {"non_blocking": True})] * 2
    captions = Batch(images, ["a", "b"], samples=torch.tensor([0, 1]), skipped={})
    assert captions.pin_memory().to(device).targets == ["a", "b"]

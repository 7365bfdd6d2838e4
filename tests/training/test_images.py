"""Decoding: orientation, modes, crops."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from deco_kernels.training import images


def pixels(height=24, width=40):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image, **options):
    file = io.BytesIO()
    image.save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    stored = encode(Image.fromarray(pixels()), exif=exif)
    turned = [pixels(), pixels()[:, ::-1], pixels()[::-1, ::-1], pixels()[::-1], pixels().swapaxes(0, 1)]
    turned += [np.rot90(pixels(), -1), pixels()[::-1, ::-1].swapaxes(0, 1), np.rot90(pixels())]
    with images.open_image(stored) as image:
        assert images.upright_size(image) == ((40, 24) if orientation >= 5 else (24, 40))
        found = np.asarray(images.upright_rgb(image))
    assert np.array_equal(found, turned[orientation - 1])


@pytest.mark.parametrize(
    ("mode", "format"), [("L", "PNG"), ("CMYK", "TIFF"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG")]
)
def test_every_mode_becomes_rgb(mode, format):
    stored = encode(Image.fromarray(pixels()).convert(mode), format=format)
    with images.open_image(stored) as image:
        assert image.mode == mode
        found = images.upright_rgb(image)
    assert found.mode == "RGB" and np.asarray(found).std() > 20
    if mode in ("CMYK", "RGBA"):
        assert np.abs(np.asarray(found).astype(int) - pixels()).max() <= 1


def test_sixteen_bit_gray_keeps_its_range():
    gray = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    with images.open_image(encode(Image.fromarray(gray))) as image:
        found = np.asarray(images.upright_rgb(image))
    assert np.array_equal(found[..., 0], (gray >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("height", "width", "to"), [(64, 64, (32, 32)), (300, 77, (32, 32)), (65, 400, (48, 24)), (20, 30, (32, 64))]
)
def test_crops_have_the_size_asked_for(height, width, to):
    image = Image.fromarray(pixels(height, width))
    assert images.to_uint8(images.center_crop(image, *to)).shape == (3, *to)


def test_crop_halves_by_box_then_bicubic():
    image = Image.fromarray(pixels(150, 200))
    expected = image.resize((100, 75), Image.Resampling.BOX).resize((85, 64), Image.Resampling.BICUBIC)
    found = images.center_crop(image, 64, 64)
    assert np.array_equal(np.asarray(found), np.asarray(expected)[:, 10:74])


def test_signed_range():
    assert torch.equal(images.to_signed(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([-1.0, 1.0]))


def test_no_image():
    with pytest.raises(ValueError, match="no image"):
        images.open_image(None)

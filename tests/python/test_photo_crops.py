"""photo_crops.py: photographs of every kind, skipped files, and folders that are not modified."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import photo_crops


@pytest.fixture
def red_over_blue():
    """Red above, blue below, 128x128: every crop of at least 96 pixels contains both."""
    pixels = np.zeros((128, 128, 3), dtype=np.uint8)
    pixels[:64, :, 0] = pixels[64:, :, 2] = 255
    return Image.fromarray(pixels)


def crop(out: Path, *photographs: Path) -> int:
    named = [part for path in photographs for part in ("--image", str(path))]
    return photo_crops.main([str(out), "--count", "2", *named])


def test_crops_are_upright_rgb_whatever_the_file_holds(red_over_blue, tmp_path):
    """EXIF rotation, alpha, CMYK, palette, a symlink, and a name in another script."""
    turned = red_over_blue.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # orientation: rotate by 90 degrees clockwise
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    alpha = red_over_blue.convert("RGBA")
    alpha.save(tmp_path / "alpha.png")
    red_over_blue.convert("CMYK").save(tmp_path / "print.tif")
    red_over_blue.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.gif")
    (tmp_path / "link.png").symlink_to(tmp_path / "alpha.png")
    red_over_blue.save(tmp_path / "湖 ö.webp", lossless=True)
    names = ["turned.jpg", "alpha.png", "print.tif", "palette.gif", "link.png", "湖 ö.webp"]
    assert crop(tmp_path / "out", *(tmp_path / name for name in names)) == 0
    for name in names:
        crops = sorted((tmp_path / "out" / Path(name).stem).iterdir())
        assert len(crops) == 2
        for path in crops:
            with Image.open(path) as image:
                pixels = np.asarray(image).astype(int)
            assert pixels.shape[0] == pixels.shape[1] and 96 <= len(pixels) <= 128 and pixels.shape[2] == 3
            assert (np.abs(pixels[:8] - [255, 0, 0]) < 40).all() and (np.abs(pixels[-8:] - [0, 0, 255]) < 40).all()


def test_grey_of_16_bits_keeps_its_range(tmp_path):
    ramp = np.linspace(0, 65535, 128).astype(np.uint16)
    Image.fromarray(np.broadcast_to(ramp, (128, 128)).copy()).save(tmp_path / "ramp.png")
    assert crop(tmp_path / "out", tmp_path / "ramp.png") == 0
    with Image.open(tmp_path / "out" / "ramp" / "00000.jpg") as image:
        pixels = np.asarray(image)
    assert pixels.std() > 30 and np.mean(pixels == 255) < 0.1


def test_what_cannot_be_cut_is_named_and_left_out(red_over_blue, tmp_path, capsys, make_fifo):
    red_over_blue.save(tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    place = content.index(b"IDAT")
    (tmp_path / "broken.png").write_bytes(content[: place - 4] + struct.pack(">I", 5) + content[place:])
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("RGB", (95, 500)).save(tmp_path / "narrow.png")
    make_fifo(tmp_path / "pipe.png")
    names = ["broken.png", "text.jpg", "narrow.png", "missing.png", "pipe.png"]
    assert crop(tmp_path / "out", *(tmp_path / name for name in [*names, "good.png"])) == 0
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.split(" is skipped: ")[0] for line in said) == sorted(
        f"warning: {tmp_path / name}" for name in names
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good"]
    assert crop(tmp_path / "none", *(tmp_path / name for name in names)) == 2
    assert "error: --image: no usable photograph" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_nothing_is_mixed_or_replaced(red_over_blue, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    for name in ("lake.png", "other/lake.jpg"):
        red_over_blue.save(tmp_path / name)
    assert crop(tmp_path / "out", tmp_path / "lake.png", tmp_path / "other" / "lake.jpg") == 2
    assert "expected a unique name for each class, got lake more than once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert crop(tmp_path / "out", tmp_path / "lake.png") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert crop(tmp_path / "out", tmp_path / "lake.png") == 2
    assert "exists; remove it, or choose another folder" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_an_interrupted_class_is_not_there(red_over_blue, tmp_path, monkeypatch):
    red_over_blue.save(tmp_path / "lake.png")
    save, saved = Image.Image.save, []

    def save_or_stop(image, path, **options):
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(image, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save_or_stop)
        assert crop(tmp_path / "out", tmp_path / "lake.png") == 130
    assert not (tmp_path / "out" / "lake").exists()
    assert crop(tmp_path / "out", tmp_path / "lake.png") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lake"]


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_bad_counts(count, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        photo_crops.main([str(tmp_path / "out"), "--count", count])
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
